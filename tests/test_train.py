"""What train.py promises: a run folder that says all, checkpoints that PEFT reads, and resuming as if never stopped."""

import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_tasks, write_tokenizer
from safetensors.torch import load_file, save_file
from runs import STEPS, assert_same_run, configured, records, settings, start, state_of, timeless, to_flags, weights

import evaluate
import ppo
import train
import training.models
from divergences import ESTIMATORS
from formats.tokenizer import load_tokenizer
from lora import add_lora, load_lora, lora_layers, save_lora
from model import Llama
from training.checkpoint import load_weights
from training.config import FIELDS, stored_config
from training.folder import append_line, checkpoints, cut_after
from training.devices import compile_layers, resolve_devices
from training.models import build_models


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    """A run from start to end. Tests read it and never write to it."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    printed = start(settings(world, out))
    (out.parent / "printed").write_text(printed, encoding="utf-8")
    return out


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


# --- the run folder ------------------------------------------------------------------------------------------------


def test_a_run_folder_holds_all_of_the_run(finished):
    names = {p.name for p in finished.iterdir()} - {"curves.png"}  # needs matplotlib
    assert names == {"config.json", "about.json", "metrics.jsonl", "samples.jsonl", "evaluations.jsonl"} | {
        f"step-{n:04d}" for n in range(1, STEPS + 1)}
    assert {p.name for p in (finished / "step-0002").iterdir()} == {"policy", "value", "trainer", "manifest.json"}


def test_config_json_names_every_field_and_gives_the_run_back(finished, world):
    stored = json.loads((finished / "config.json").read_text())
    assert set(stored) == {f.name for f in FIELDS}
    run = configured(world, finished)
    train.place(run)
    assert stored_config({"out": str(finished)}) == run
    assert run.dtype == "float32"  # not "auto", which means another one on another machine


def test_metrics_have_one_line_a_step_with_finite_numbers(finished):
    metrics = records(finished / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    documented = {"step", "learning_rate", "beta", "score_mean", "score_std", "shaped_reward", "penalty", "kl_k1", "kl_k1_se",
                  "kl_k3", "true_kl", "true_kl_se", "length", "finished", "empty", "explained_variance", "policy_loss",
                  "value_loss", "clip_fraction", "value_clip_fraction", "approx_kl", "ratio_mean", "ratio_max", "entropy",
                  "grad_norm", "seconds_generate", "seconds_score", "seconds_update"}
    for m in metrics:
        assert set(m) == documented and all(math.isfinite(x) for x in m.values())
        assert 1 <= m["length"] <= 8 and m["grad_norm"] > 0 and m["beta"] == 0.02
    assert metrics[0]["true_kl"] == 0  # the policy starts as its reference
    assert metrics[0]["kl_k1"] == pytest.approx(0, abs=1e-6)  # the sampler's KV cache rounds otherwise than a whole pass
    assert metrics[-1]["true_kl"] > 0 and metrics[-1]["kl_k3"] > 0


def test_the_learning_rate_is_set_once_a_step(finished, world):
    config = configured(world, finished).ppo
    expected = [ppo.learning_rate(step, config) for step in range(1, STEPS + 1)]
    assert [m["learning_rate"] for m in records(finished / "metrics.jsonl")] == expected
    assert state_of(finished / "step-0003")["optimizer"]["param_groups"][0]["lr"] == expected[-1]


def test_samples_are_readable_and_of_instructions_in_the_data(finished, world):
    samples = records(finished / "samples.jsonl")
    assert [s["step"] for s in samples] == [step for step in range(1, STEPS + 1) for _ in range(4)]
    asked = {(r["instruction"], r["input"]) for r in json.loads((world / "data" / "ppo.json").read_text())}
    assert {(s["instruction"], s["input"]) for s in samples} <= asked
    assert len({s["instruction"] for s in samples}) > 4 and any(s["response"] for s in samples)


def test_a_samples_score_is_the_reward_models_of_that_very_prompt_and_response(world, tmp_path, monkeypatch):
    """Rows, prompts and responses stay together: each is scored again from its own text's token ids."""
    kept = []
    collect = ppo.collect
    monkeypatch.setattr(ppo, "collect", lambda *a, **k: kept.append(collect(*a, **k)) or kept[-1])
    start(settings(world, tmp_path / "run", steps=1, evaluation=None))
    tokenizer, [rollout] = load_tokenizer(world / "sft"), kept
    from data import format_prompt
    from reward import RewardModel

    model = RewardModel.from_pretrained(world / "reward")
    for row, sample in enumerate(records(tmp_path / "run" / "samples.jsonl")):
        prompt = tokenizer.encode(format_prompt(sample, "tiny"), bos=True)
        response = rollout.responses[row][rollout.mask[row]].tolist()
        assert rollout.prompts[row][rollout.prompt_mask[row].bool()].tolist() == prompt
        assert tokenizer.decode(response) == sample["response"]
        ids = torch.tensor([prompt + response])
        assert model(ids, torch.ones_like(ids)).item() == pytest.approx(sample["score"], abs=1e-3)


def test_evaluations_stand_before_and_after(finished):
    before, after = records(finished / "evaluations.jsonl")
    assert (before["step"], after["step"]) == (0, STEPS)
    for evaluation in (before, after):
        assert evaluation["n"] == len(evaluation["responses"]) == len(evaluation["preferences"]) == 12
        assert {"win_rate", "win_rate_se", "reward", "true_kl", "tokens", "facts"} <= set(evaluation)
    assert before["true_kl"] == 0 < after["true_kl"]


def test_the_run_says_where_things_are_what_it_checked_and_what_came_of_it(finished):
    printed = (finished.parent / "printed").read_text()
    assert "policy, value → cpu; reference, reward → cpu" in printed and "two models instead of four" in printed
    assert "reward: reads the policy's token ids as they are (one tokenizer, one template), and is read at the EOS" in printed
    assert "self-check over" in printed and "ratio 1 ±" in printed
    assert "3 steps × 8 responses = 24 of 60 instructions" in printed and "4 optimiser steps of 4" in printed
    assert all(f"step {n:4d}  reward" in printed for n in range(1, STEPS + 1))
    assert "win rate after − before" in printed and f"written to {finished}" in printed


def test_evaluations_during_training_are_made_where_asked_and_change_nothing(world, finished, tmp_path):
    start(settings(world, tmp_path / "run", eval_every=2))
    assert [e["step"] for e in records(tmp_path / "run" / "evaluations.jsonl")] == [0, 2, 3]
    assert timeless(tmp_path / "run")["metrics"] == timeless(finished)["metrics"]


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}, {"adapter": True}])
def test_with_lora_the_start_is_measured_after_the_first_step_and_is_the_same(world, tmp_path, monkeypatch, changes):
    """So that a line of a step comes first; the start is the policy without its adapter, or with the one it started from."""
    if "adapter" in changes:
        start(settings(world, tmp_path / "first", steps=1, evaluation=None))
        changes = {"adapter": str(tmp_path / "first" / "step-0001" / "policy")}
    seen, measured = [], train.evaluate_now
    monkeypatch.setattr(train, "evaluate_now", lambda models, run, benchmark, label: seen.append(label) or measured(
        models, run, benchmark, label))
    monkeypatch.setattr(train, "step_line", lambda m, columns: seen.append("step") or "")
    start(settings(world, tmp_path / "later", steps=1, **changes))
    assert seen == ["step", "before", "step 1"]
    step = train.step_or_save

    def measured_at_once(out, models, state, run):  # as it was done before there was a step
        models.shared = False
        at_once.append(measured(models, run, benchmark_of(run, models), "at once"))
        models.shared = True
        return step(out, models, state, run)

    at_once = []
    monkeypatch.setattr(train, "step_or_save", measured_at_once)
    start(settings(world, tmp_path / "again", steps=1, **changes))
    later = records(tmp_path / "later" / "evaluations.jsonl")[0]
    assert later["step"] == 0 and later["responses"] == at_once[0]["responses"]
    assert later["rewards"] == pytest.approx(at_once[0]["rewards"], abs=1e-5) and later["true_kl"] == 0


def benchmark_of(run, models):
    from evaluation.measure import load_benchmark

    return load_benchmark(run.evaluation, models.tokenizer, run.prompt_template, run.query_length)


def test_the_start_of_a_seed_is_measured_once_for_all_its_runs(world, finished, tmp_path):
    """--baseline: full fine-tuning starts from the same policy, another seed or temperature from another."""
    start(settings(world, tmp_path / "full", tuning="full", estimator="none", baseline=str(finished)))
    assert records(tmp_path / "full" / "evaluations.jsonl")[0] == records(finished / "evaluations.jsonl")[0]
    start(settings(world, tmp_path / "measured", tuning="full", estimator="none"))
    assert records(tmp_path / "measured" / "evaluations.jsonl") == records(tmp_path / "full" / "evaluations.jsonl")
    for what, change in (("seed is 0, this run's 1", {"seed": 1}), ("temperature is 1.0, this run's 0.5", {"temperature": 0.5})):
        with pytest.raises(ValueError, match=f"--baseline {finished}: its {what}"):
            start(settings(world, tmp_path / "other", baseline=str(finished), **change))
        shutil.rmtree(tmp_path / "other")
    with pytest.raises(ValueError, match="holds no evaluation from before a first step"):
        start(settings(world, tmp_path / "other", baseline=str(tmp_path / "full" / "step-0001")))


def test_without_evaluation_data_the_run_is_the_same_and_evaluates_nothing(world, finished, tmp_path):
    start(settings(world, tmp_path / "run", evaluation=None))
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()
    assert timeless(tmp_path / "run")["metrics"] == timeless(finished)["metrics"]


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_a_policy_checkpoint_loads_in_peft_with_equal_logits(finished, world):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.LlamaForCausalLM.from_pretrained(world / "sft")
    theirs = peft.PeftModel.from_pretrained(base, finished / "step-0003" / "policy").eval()
    run = stored_config({"out": str(finished)})
    models = build_models(run, load_tokenizer(world / "sft"))
    load_weights(run, models, finished / "step-0003")
    ids = torch.randint(3, 600, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = theirs(ids).logits
        torch.testing.assert_close(models.policy(ids), logits, atol=1e-4, rtol=1e-4)
        assert (logits - models.reference_logits(ids, torch.ones_like(ids), 12)).abs().max() > 0.01  # it did learn


def test_a_checkpoint_is_named_by_the_steps_it_has_seen(finished):
    assert [state_of(step)["step"] for step in checkpoints(finished)] == [1, 2, 3]


def test_the_last_step_is_saved_though_save_every_does_not_meet_it(world, tmp_path):
    start(settings(world, tmp_path / "run", save_every=2, evaluation=None))
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-0002", "step-0003"]


def test_a_run_cut_off_after_a_step_resumes_bit_for_bit(copy, finished):
    """As if killed before the checkpoint of step 2 was whole: what it had written of later steps is written anew."""
    shutil.rmtree(copy / "step-0002")
    (copy / "step-0003").rename(copy / ".step-0002.part")
    assert f"resumed from {copy / 'step-0001'}" in start({"out": str(copy)}, resume=True)
    assert_same_run(copy, finished)


def test_a_run_that_could_not_save_keeps_the_last_checkpoint_and_resumes(world, finished, tmp_path, monkeypatch):
    save = torch.save

    def fail_at_2(content, file):
        if content["step"] == 2:
            Path(file).write_bytes(b"half")
            raise OSError("disk full")
        save(content, file)

    monkeypatch.setattr(torch, "save", fail_at_2)
    with pytest.raises(OSError, match="disk full"):
        start(settings(world, tmp_path / "run"))
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-0001"]
    monkeypatch.undo()
    start({"out": str(tmp_path / "run")}, resume=True)
    assert_same_run(tmp_path / "run", finished)


def test_resuming_a_finished_run_changes_nothing(copy, finished):
    start({"out": str(copy)}, resume=True)
    assert_same_run(copy, finished)


def test_resuming_reads_lines_whatever_a_response_holds(copy):
    """U+2028 ends a line for str.splitlines, and stands unescaped in the file."""
    append_line(copy / "samples.jsonl", {"step": STEPS, "response": "a\u2028b\x85c"})
    cut_after(copy / "samples.jsonl", STEPS)
    assert records(copy / "samples.jsonl")[-1]["response"] == "a\u2028b\x85c"


def test_a_run_can_be_extended_and_is_then_the_longer_run(world, finished, tmp_path):
    """A step's learning rate does not depend on how many are to come."""
    start(settings(world, tmp_path / "run", steps=2))
    printed = start({"out": str(tmp_path / "run"), "steps": STEPS}, resume=True)
    assert f"resumed from {tmp_path / 'run' / 'step-0002'}" in printed
    assert timeless(tmp_path / "run")["metrics"] == timeless(finished)["metrics"]
    longer, whole = (weights(folder / f"step-{STEPS:04d}") for folder in (tmp_path / "run", finished))
    assert all(torch.equal(longer[name], whole[name]) for name in whole)
    assert stored_config({"out": str(tmp_path / "run")}).steps == STEPS
    assert [e["step"] for e in records(tmp_path / "run" / "evaluations.jsonl")] == [0, 2, STEPS]


def test_a_run_from_before_lr_steps_falls_to_0_at_its_last_step_as_it_did(copy):
    stored = json.loads((copy / "config.json").read_text())
    del stored["lr_steps"]
    (copy / "config.json").write_text(json.dumps(stored))
    assert stored_config({"out": str(copy)}).ppo.lr_steps == STEPS


def test_equal_seeds_give_equal_runs_and_another_seed_another(world, finished, tmp_path):
    torch.manual_seed(123)  # what ran before in this process has no part in it
    start(settings(world, tmp_path / "again"))
    assert_same_run(tmp_path / "again", finished)
    start(settings(world, tmp_path / "other", seed=1, evaluation=None))
    assert timeless(tmp_path / "other")["metrics"] != timeless(finished)["metrics"]


def test_evaluate_py_measures_a_run_folder_as_the_run_itself_did(copy, monkeypatch, capsys):
    """SFT and the last checkpoint, built anew from disk, give the figures and responses that training wrote down; beside
    them stands what evaluate.py alone measures."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(copy), "--kl-tokens", "1"])
    assert evaluate.main() == 0
    out = capsys.readouterr().out
    assert "step-0003" in out and "what each penalty says" in out
    results = json.loads((copy / "evaluation.json").read_text(encoding="utf-8"))
    before, after = records(copy / "evaluations.jsonl")
    for result, during in zip(results.values(), (before, after), strict=True):
        assert result["judge"] == "annotators" and result["step"] == during["step"]
        during.pop("start", None)  # what --baseline goes by
        assert {k: result[k] for k in during if "kl" not in k} == {k: v for k, v in during.items() if "kl" not in k}
    assert set(results["step-0003"]["estimators"]) == set(ESTIMATORS) - {"none"}
    assert {p.name for p in (copy / "outputs" / "step-0003").iterdir()} == {"annotations.json", "model_outputs.json"}


def test_evaluate_py_names_the_checkpoints_there_are(copy, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(copy), "--step", "7"])
    assert evaluate.main() == 2
    error = capsys.readouterr().err
    assert "--step [7]" in error and "[1, 2, 3]" in error and error.count("\n") == 1


# --- variants ------------------------------------------------------------------------------------------------------


def test_shared_frozen_weights_give_exactly_the_results_of_four_models(world, tmp_path, monkeypatch):
    """Two names for one CPU make train.py build all four, as on two GPUs. They score each chunk as it is sampled: with one
    chunk, both read the same batches."""
    start(settings(world, tmp_path / "shared", rollout_micro_batch_size=8))
    built = []
    monkeypatch.setattr(train, "build_models", lambda *a: built.append(build_models(*a)) or built[-1])
    start(settings(world, tmp_path / "four", rollout_micro_batch_size=8, reference_device="cpu:0"))
    [models] = built
    assert not models.shared and models.value.backbone is not models.rewards.model.backbone
    assert_same_run(tmp_path / "four", tmp_path / "shared")


TWO_NAMES = [  # dtype, tuning, starts from an adapter, reward is a rule
    ("bfloat16", "lora", False, False), ("bfloat16", "lora", True, True), ("float32", "lora", True, False),
    ("float32", "full", False, False), ("float32", "full", False, True)]


@pytest.mark.parametrize("dtype, tuning, started, by_rule", TWO_NAMES)
def test_two_devices_read_the_same_batches_so_that_equal_models_give_equal_numbers(
        world, adapter, rule, tmp_path, dtype, tuning, started, by_rule):
    """In bf16 a row in other company rounds otherwise: the self-check would stop the paper's own placement, and the penalty
    would be paid on rounding noise. A rollout of several chunks, each read in several batches; and it resumes."""
    changes = {"dtype": dtype, "tuning": tuning, "reference_device": "cpu:0", "evaluation": None, "rollout_batch_size": 16,
               "rollout_micro_batch_size": 6, "micro_batch_size": 4, "steps": 2}
    changes |= ({"adapter": str(adapter)} if started else {}) | ({"reward": rule} if by_rule else {})
    printed = start(settings(world, tmp_path / "whole", **changes))
    first, _ = records(tmp_path / "whole" / "metrics.jsonl")
    if dtype == "bfloat16":
        assert "|log π − log π_ref| ≤ 0.0e+00" in printed
        assert first["kl_k1"] == first["kl_k3"] == first["penalty"] == 0
    else:
        assert abs(first["kl_k1"]) < 1e-5  # the sampler's log-probabilities, of a KV cache
    cut = Path(shutil.copytree(tmp_path / "whole", tmp_path / "cut"))
    shutil.rmtree(cut / "step-0002")
    start({"out": str(cut)}, resume=True)
    assert_same_run(cut, tmp_path / "whole", "step-0002")


@pytest.mark.parametrize("dtype, its", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_reference_and_reward_have_a_dtype_of_their_own(world, tmp_path, dtype, its):
    """Float32 beside bf16, as the released code has them; on one device nothing can then be shared."""
    printed = start(settings(world, tmp_path / "run", dtype=dtype, reference_dtype=its, steps=1, evaluation=None))
    assert f"{dtype}, reference and reward {its}" in printed and "two models instead of four" not in printed
    models = build_models(stored_config({"out": str(tmp_path / "run")}), load_tokenizer(world / "sft"))
    assert {p.dtype for name, p in models.policy.named_parameters() if "lora" not in name} == {getattr(torch, dtype)}
    frozen = [*models.reference.parameters(), *models.rewards.model.backbone.parameters()]
    assert {p.dtype for p in frozen} == {getattr(torch, its)}


def test_evaluations_may_be_longer_than_rollouts(world, tmp_path):
    start(settings(world, tmp_path / "run", steps=1, response_length=2, evaluation_length=6))
    [m], (before, _) = (records(tmp_path / "run" / f"{name}.jsonl") for name in ("metrics", "evaluations"))
    assert m["length"] <= 2 < before["tokens"]


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_checkpoint_of_another_kind_of_device_is_refused_in_one_line(copy, monkeypatch, capsys, kind):
    state = copy / "step-0003" / "trainer" / "state.pt"
    stored = torch.load(state, weights_only=True)
    stored["random"][kind] = torch.zeros(16, dtype=torch.uint8)
    torch.save(stored, state)
    monkeypatch.setattr("training.folder.damage", lambda checkpoint: None)
    code, error = call(monkeypatch, capsys, ["--resume", "--out", str(copy)])
    assert code == 2 and error.count("\n") == 1
    assert f"was written on {kind} and its random states mean nothing on cpu" in error and "--adapter" in error


def test_recomputing_activations_changes_nothing(world, finished, tmp_path):
    start(settings(world, tmp_path / "run", gradient_checkpointing=True))
    assert_same_run(tmp_path / "run", finished)


def test_on_one_device_only_adapters_and_value_head_are_trained_and_frozen_weights_stand_once(world, tmp_path):
    models = build_models(configured(world, tmp_path), load_tokenizer(world / "sft"))
    assert models.shared and models.value.backbone is models.rewards.model.backbone
    layers, targets, hidden = 2, 4, 16
    trained = {name for m in (models.policy, models.value) for name, p in m.named_parameters() if p.requires_grad}
    assert all(name.endswith(("lora_A", "lora_B")) or name.startswith("head.") for name in trained)
    assert len(models.trained()) == 2 * layers * targets * 2 + 2
    assert models.value.head.weight.numel() == hidden and not models.value.head.weight.any()


def test_the_reward_model_and_the_reference_never_move(world, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(train, "build_models", lambda *a: built.append(build_models(*a)) or built[-1])
    start(settings(world, tmp_path / "run", steps=2, evaluation=None))
    [models] = built
    fresh = build_models(configured(world, tmp_path / "run"), load_tokenizer(world / "sft"))
    ids = torch.randint(3, 600, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        assert torch.equal(models.reference_logits(ids, mask, 9), fresh.reference_logits(ids, mask, 9))
        assert torch.equal(models.reward(ids, mask, 4), fresh.reward(ids, mask, 4))
        assert not torch.equal(models.policy_logits(ids, mask, 9), fresh.policy_logits(ids, mask, 9))
        assert not torch.equal(models.value(ids, mask), fresh.value(ids, mask))


def test_full_fine_tuning_saves_whole_models_and_resumes_bit_for_bit(world, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    start(settings(world, whole, tuning="full", steps=2, learning_rate=1e-3))
    tuned, base = Llama.from_pretrained(whole / "step-0002" / "policy"), Llama.from_pretrained(world / "sft")
    ids = torch.tensor([[1, 5, 9, 300]])
    assert not torch.allclose(tuned(ids), base(ids), atol=1e-3)
    moved = {name for name, p in tuned.named_parameters() if not torch.equal(p, base.get_parameter(name))}
    assert moved == {name for name, _ in tuned.named_parameters()}
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "step-0002")
    start({"out": str(cut)}, resume=True)
    assert_same_run(cut, whole, "step-0002")


def test_without_a_penalty_dropout_alone_regularises(world, tmp_path):
    """Table 1's "dropout only"."""
    start(settings(world, tmp_path / "run", estimator="none", lora_dropout=0.5, evaluation=None))
    metrics = records(tmp_path / "run" / "metrics.jsonl")
    assert all(m["penalty"] == 0 and m["shaped_reward"] == pytest.approx(m["score_mean"], abs=1e-5) for m in metrics)
    assert metrics[-1]["kl_k3"] > 0  # measured all the same


def test_the_logged_shaped_reward_is_the_one_trained_on(world, tmp_path):
    """A response without EOS was paid missing_eos_penalty, whatever the reward model said of it."""
    start(settings(world, tmp_path / "run", steps=1, missing_eos_penalty=-3.0, response_length=2, evaluation=None))
    [m] = records(tmp_path / "run" / "metrics.jsonl")
    assert m["finished"] < 1 and m["score_mean"] > -3
    if m["finished"] == 0:
        assert m["shaped_reward"] == pytest.approx(-3, abs=1e-5)
    assert m["shaped_reward"] < m["score_mean"]


@pytest.mark.parametrize("name", ["clamped_kl", "kl", "squared_error", "jensen_shannon", "negative_kl", "k3"])
def test_every_estimator_of_table_1_runs_by_name(world, tmp_path, name):
    start(settings(world, tmp_path / "run", estimator=name, steps=2, evaluation=None))
    first, second = records(tmp_path / "run" / "metrics.jsonl")
    assert first["penalty"] == pytest.approx(0, abs=1e-6) and abs(second["penalty"]) > 1e-6


def test_an_adaptive_beta_follows_the_measured_kl_and_is_restored(world, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    start(settings(world, whole, kl_target=0.001, kl_horizon=40.0, evaluation=None))
    metrics = records(whole / "metrics.jsonl")
    assert metrics[0]["beta"] == 0.02
    for now, then in zip(metrics, metrics[1:]):
        assert then["beta"] == ppo.adapt_beta(now["beta"], now["kl_k1"], 0.001, 40.0, 8) != now["beta"]
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "step-0003")
    start({"out": str(cut)}, resume=True)
    assert_same_run(cut, whole)


def test_micro_batches_change_memory_not_the_result(world, finished, tmp_path):
    start(settings(world, tmp_path / "run", steps=1, micro_batch_size=4, lora_dropout=0.0, evaluation=None))
    start(settings(world, tmp_path / "other", steps=1, micro_batch_size=1, lora_dropout=0.0, evaluation=None))
    first, second = weights(tmp_path / "run" / "step-0001"), weights(tmp_path / "other" / "step-0001")
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=1e-3)


def test_as_many_are_sampled_at_once_as_fit_and_the_run_stays_the_same(world, finished, tmp_path):
    start(settings(world, tmp_path / "run", rollout_micro_batch_size=0))
    stored = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert stored["rollout_micro_batch_size"] == 256
    mine, its = (records(folder / "samples.jsonl") for folder in (tmp_path / "run", finished))
    assert [line["response"] for line in mine] == [line["response"] for line in its]


def test_the_self_check_stops_a_run_whose_reference_is_not_its_policy(world, tmp_path, monkeypatch):
    def crooked(*a):
        models = build_models(*a)
        logits = models.reference_logits
        models.reference_logits = lambda *inputs: logits(*inputs) * 1.1
        return models

    monkeypatch.setattr(train, "build_models", crooked)
    with pytest.raises(RuntimeError, match="self-check.*must be 0 within"):
        start(settings(world, tmp_path / "run", evaluation=None))
    assert not checkpoints(tmp_path / "run")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_self_check_stops_a_run_whose_compiled_layers_are_not_the_plain_ones(world, tmp_path, monkeypatch, dtype):
    """Policy and reference are wrong alike, by a compiler that hands on a layer's coordinates in reverse."""
    def wrong(graph, _):
        return lambda *inputs: tuple(output.flip(-1) for output in graph(*inputs))

    monkeypatch.setattr(training.models, "compile_layers", partial(compile_layers, backend=wrong))
    with pytest.raises(RuntimeError, match="self-check.*must be 0 within"):
        start(settings(world, tmp_path / "run", evaluation=None, dtype=dtype, compile=True))
    assert not checkpoints(tmp_path / "run")


# --- what a run starts from ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(world, tmp_path_factory) -> Path:
    """An adapter as supervised fine-tuning leaves it: rank 4, alpha 12, on attention and MLP, B not zero."""
    torch.manual_seed(3)
    model = add_lora(Llama.from_pretrained(world / "sft"), rank=4, alpha=12, dropout=0.3, targets=("q_proj", "down_proj"))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    folder = tmp_path_factory.mktemp("adapter") / "sft"
    save_lora(model, folder)
    return folder


def test_a_policy_that_starts_from_an_adapter_keeps_it_in_its_reference(world, adapter, tmp_path, monkeypatch):
    """The classic silent error: with the bare base as reference, the KL would hold all that fine-tuning had learned."""
    built = []
    monkeypatch.setattr(train, "build_models", lambda *a: built.append(build_models(*a)) or built[-1])
    printed = start(settings(world, tmp_path / "run", adapter=str(adapter), evaluation=None))
    assert f"policy: starts from the adapter {adapter} (rank 4, alpha 12, 4 layers); its reference keeps that adapter" in printed
    started = load_start(world, adapter)
    ids = torch.randint(3, 600, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        reference, policy = (f(ids, mask, 9) for f in (built[0].reference_logits, built[0].policy_logits))
        torch.testing.assert_close(reference, started(ids), atol=1e-5, rtol=0)
        assert (policy - reference).abs().max() > 1e-3
        assert (Llama.from_pretrained(world / "sft")(ids) - reference).abs().max() > 0.1
    assert abs(records(tmp_path / "run" / "metrics.jsonl")[0]["kl_k1"]) < 1e-5


def load_start(world, adapter) -> Llama:
    model = Llama.from_pretrained(world / "sft")
    load_lora(model, adapter)
    return model.eval()


def test_a_started_policys_checkpoint_is_the_whole_way_from_the_base(world, adapter, tmp_path):
    """PEFT puts it on the base model that the adapter names: it must not lack what the policy started from."""
    start(settings(world, tmp_path / "run", adapter=str(adapter), evaluation=None))
    run = configured(world, tmp_path / "run", adapter=str(adapter), evaluation=None)
    stored = json.loads((tmp_path / "run" / "step-0003" / "policy" / "adapter_config.json").read_text())
    assert (stored["r"], stored["lora_alpha"], stored["lora_dropout"]) == (4, 12, 0.1)
    models = build_models(run, load_tokenizer(world / "sft"))
    load_weights(run, models, tmp_path / "run" / "step-0003")
    ids = torch.tensor([[1, 5, 9, 300]])
    peft = pytest.importorskip("peft")
    import transformers

    base = transformers.LlamaForCausalLM.from_pretrained(world / "sft")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "step-0003" / "policy").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, models.policy_logits(ids, torch.ones_like(ids), 4), atol=1e-4, rtol=0)


def test_a_started_run_is_the_same_after_a_resume_and_with_four_models(world, adapter, tmp_path):
    start(settings(world, tmp_path / "two", adapter=str(adapter), evaluation=None, rollout_micro_batch_size=8))
    cut = Path(shutil.copytree(tmp_path / "two", tmp_path / "cut"))
    shutil.rmtree(cut / "step-0002"), shutil.rmtree(cut / "step-0003")
    start({"out": str(cut)}, resume=True)
    assert_same_run(cut, tmp_path / "two")
    start(settings(world, tmp_path / "four", adapter=str(adapter), evaluation=None, rollout_micro_batch_size=8,
                   reference_device="cpu:0"))
    assert_same_run(tmp_path / "four", tmp_path / "two")


def test_adapters_sit_where_lora_targets_says(world, tmp_path):
    start(settings(world, tmp_path / "run", steps=1, evaluation=None, lora_targets="q_proj, up_proj,down_proj"))
    stored = json.loads((tmp_path / "run" / "step-0001" / "policy" / "adapter_config.json").read_text())
    assert sorted(stored["target_modules"]) == ["down_proj", "q_proj", "up_proj"]


@pytest.fixture
def rule(tmp_path) -> str:
    """A reward for many words."""
    (tmp_path / "rules.py").write_text("def words(prompts, responses):\n"
                                       "    assert all('### Response:' in p for p in prompts)\n"
                                       "    return [len(r.split()) / 10 for r in responses]\n")
    return f"{tmp_path / 'rules.py'}:words"


def test_a_plain_python_function_is_a_reward(world, rule, tmp_path):
    printed = start(settings(world, tmp_path / "run", reward=rule))
    assert f"reward: the rule {rule}, on texts" in printed and "value: starts from the policy's weights" in printed
    samples = records(tmp_path / "run" / "samples.jsonl")
    assert all(s["score"] == pytest.approx(len(s["response"].split()) / 10, abs=1e-4) for s in samples)
    evaluation = records(tmp_path / "run" / "evaluations.jsonl")[0]
    words = [len(text.split()) / 10 for text in evaluation["responses"]]
    assert evaluation["reward"] == pytest.approx(sum(words) / len(words), abs=1e-4)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_without_a_reward_model_the_value_model_starts_from_the_policys_weights(world, rule, tmp_path, tuning):
    models = build_models(configured(world, tmp_path, reward=rule, tuning=tuning), load_tokenizer(world / "sft"))
    ours, theirs = (m.model.layers[0].mlp.up_proj.weight for m in (models.value.backbone, models.policy))
    assert torch.equal(ours, theirs) and (ours.data_ptr() == theirs.data_ptr()) == (tuning == "lora")
    if tuning == "lora":
        pairs = zip(lora_layers(models.value.backbone).values(), lora_layers(models.policy).values(), strict=True)
        assert all(a.lora_B is not b.lora_B and a.weight is b.weight for a, b in pairs)


def test_a_reward_model_with_another_tokenizer_judges_the_text_and_lends_the_value_model_nothing(world, tmp_path):
    """Its backbone would read the policy's ids as other words."""
    other = Path(shutil.copytree(world / "reward", tmp_path / "other"))
    (other / "tokenizer.model").unlink()
    write_tokenizer(make_tasks(300, seed=5), tmp_path / "new" / "tokenizer.model")
    shutil.copy(tmp_path / "new" / "tokenizer.model", other)
    printed = start(settings(world, tmp_path / "run", reward=str(other), evaluation=None))
    assert "reward: reads instruction and answer as texts, with a tokenizer of its own (template tiny)" in printed
    assert "value: starts from the policy's weights" in printed


@pytest.mark.parametrize("what", ["data", "evaluation", "policy", "reward"])
def test_a_run_is_not_resumed_over_other_data_or_models(world, tmp_path, monkeypatch, capsys, what):
    shutil.copytree(world, tmp_path / "world")
    start(settings(tmp_path / "world", tmp_path / "run", steps=1))
    path = Path({"data": "data/ppo.json", "evaluation": "data/evaluation.json"}.get(what, "sft" if what == "policy" else what))
    file = tmp_path / "world" / path / ("" if path.suffix else "model.safetensors")
    if path.suffix:
        tasks = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(tasks, indent=3), encoding="utf-8")  # spelt otherwise, it is the same data
        assert call(monkeypatch, capsys, ["--resume", "--out", str(tmp_path / "run"), "--steps", "2"])[0] == 0
        tasks[0]["instruction"] += " Now."
        file.write_text(json.dumps(tasks), encoding="utf-8")
    else:
        tensors = load_file(file)
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
        save_file(tensors, file, {"format": "pt"})
    before = contents(tmp_path / "run")
    code, error = call(monkeypatch, capsys, ["--resume", "--out", str(tmp_path / "run"), "--steps", "3"])
    assert code == 2 and error.count("\n") == 1
    assert error.startswith(f"train.py: --{what} {tmp_path / 'world' / path} is not what ")
    assert contents(tmp_path / "run") == before


def test_what_is_longer_than_the_models_window_is_said_by_run_and_plan(world, tmp_path, monkeypatch, capsys):
    flags = to_flags(settings(world, tmp_path / "run", steps=1, query_length=508, evaluation=None))
    warning = f"warning: --policy {world / 'sft'}, --query-length + --response-length: 516 tokens are more than its 512 positions"
    for more in (["--plan"], []):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags, *more])
        assert train.main() == 0
        assert warning in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_that_lacks_a_character_ends_nothing(world, tmp_path, encoding):
    flags = to_flags(settings(world, tmp_path / "run", steps=1, evaluation=None))
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], capture_output=True,
                          env=os.environ | {"PYTHONUTF8": "0", "PYTHONIOENCODING": encoding})
    assert done.returncode == 0 and b"placement: policy, value ? cpu" in done.stdout


# --- placement -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, asked, expected, note", [
    (2, ("cuda:0", "cuda:1"), ("cuda:0", "cuda:1"), ""),
    (1, ("cuda:0", "cuda:1"), ("cuda:0", "cuda:0"), "(cuda:1 not there)"),
    (1, ("cuda:0", "cpu"), ("cuda:0", "cpu"), ""),
    (0, ("cuda:0", "cuda:1"), ("cpu", "cpu"), "(cuda:0 and cuda:1 not there)"),
])
def test_the_default_placement_falls_to_what_there_is_and_says_so(monkeypatch, count, asked, expected, note):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    policy, reference, line = resolve_devices(*asked)
    assert (policy, reference) == expected
    assert line == f"placement: policy, value → {policy}; reference, reward → {reference} {note}".rstrip()


# --- command line --------------------------------------------------------------------------------------------------


def call(monkeypatch, capsys, flags: list[str]) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    code = train.main()
    return code, capsys.readouterr().err


def test_the_program_runs_from_the_command_line(world, tmp_path):
    flags = to_flags(settings(world, tmp_path / "run", steps=1, estimator="jensen_shannon"))
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags, "--no-whiten-rewards"], capture_output=True,
                          encoding="utf-8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step    1  reward" in done.stdout and "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["whiten_rewards"] is False
    assert (tmp_path / "run" / "step-0001" / "policy" / "adapter_config.json").is_file()


def test_help_names_every_field_with_its_default_and_unit():
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--help"], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"COLUMNS": "400"})  # so wide that no line is broken inside a word
    text = " ".join(done.stdout.split())
    assert done.returncode == 0 and "--resume" in text
    for f in FIELDS:
        assert f"--{f.name.replace('_', '-')}" in text, f.name
        assert " ".join(f.metadata["help"].split()) in text, f.name
        assert f"(default {f.default}" in text or f.default is None, f.name  # what None means, the help says


@pytest.mark.parametrize("changes, says", [
    ({"estimator": "chi_squared"}, "estimator 'chi_squared' does not exist; choose clamped_kl, kl, bregman"),
    ({"data": "nowhere.json"}, "nowhere.json: no such data file"),
    ({"data": "empty.json"}, "empty.json: the file is empty"),
    ({"data": "none.json"}, "none.json: the list holds no records"),
    ({"data": "mute.json"}, "mute.json: record 1: field 'instruction' is missing"),
    ({"evaluation": "nowhere.json"}, "nowhere.json: no such data file"),
    ({"step_batch_size": 3}, "--rollout-batch-size 8 is not a multiple of --step-batch-size 3"),
    ({"micro_batch_size": 3}, "--step-batch-size 4 is not a multiple of --micro-batch-size 3"),
    ({"policy_device": "cuda:7"}, "device cuda:7 is not there"),
    ({"reference_device": "tpu"}, "device tpu is not there"),
    ({"reward": None}, "--reward is missing"),
    ({"data": None}, "--data is missing"),
    ({"policy": "nowhere"}, "nowhere: no such tokenizer"),
    ({"reward": "nowhere"}, "nowhere"),
    ({"prompt_template": "other"}, "template 'other'"),
    ({"query_length": 3}, "--query-length 3: all 60 prompts are longer"),
    ({"steps": 0}, "--steps is 0"),
    ({"lora_rank": 0}, "--lora-rank is 0"),
    ({"lora_dropout": 1.0}, "--lora-dropout is 1.0"),
    ({"temperature": 0.0}, "--temperature is 0.0"),
    ({"adapter": "nowhere"}, "nowhere: no adapter_config.json"),
    ({"adapter": "x", "tuning": "full"}, "python lora.py merge"),
    ({"lora_targets": "q_proj,gate"}, "'gate'"),
    ({"reward": "nowhere.py:f"}, "nowhere.py: no such file"),
    ({"reward": "rules.py"}, "--reward rules.py: a rule is named file.py:function; it has score"),
    ({"reward": "broken.py:score"}, "broken.py can't be run: ModuleNotFoundError: No module named 'nope'"),
    ({"reward_eos": "no"}, "reward says that it was trained with EOS: leave the flag away"),
    ({"data": "half.json"}, "half.json: record 0: field 'instruction' holds half a character, '\\ud83d' at position 5"),
])
def test_bad_input_is_exit_code_2_and_one_line_and_no_file(world, tmp_path, monkeypatch, capsys, changes, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "mute.json").write_text(json.dumps([{"instruction": "Say x."}, {"input": "y"}]))
    (tmp_path / "half.json").write_text(json.dumps([{"instruction": "Face \ud83d"}]))  # half an emoji
    (tmp_path / "rules.py").write_text("def score(prompts, responses):\n    return [0.0] * len(responses)\n")
    (tmp_path / "broken.py").write_text("import nope\n")
    before = sorted(tmp_path.rglob("*"))
    code, error = call(monkeypatch, capsys, to_flags(settings(world, tmp_path / "run", **changes)))
    assert code == 2
    assert error.startswith("train.py: ") and says in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_that_holds_a_run_is_never_overwritten(world, copy, monkeypatch, capsys):
    before = contents(copy)
    code, error = call(monkeypatch, capsys, to_flags(settings(world, copy)))
    assert code == 2 and f"--out {copy} already holds files" in error and error.count("\n") == 1
    assert contents(copy) == before


@pytest.mark.parametrize("flags, says", [
    (["--seed", "5"], "--resume: --seed 5 differs from the run's 0"),
    (["--steps", "2"], "--resume: --steps 2 differs from the run's 3"),
    (["--steps", "999"], "--steps is 999: must be at most --lr-steps 781"),
    (["--estimator", "kl"], "--resume: --estimator kl differs from the run's bregman"),
])
def test_a_run_is_not_resumed_as_another(copy, monkeypatch, capsys, flags, says):
    before = contents(copy)
    code, error = call(monkeypatch, capsys, ["--resume", "--out", str(copy), *flags])
    assert code == 2 and says in error and error.count("\n") == 1
    assert contents(copy) == before


def test_resuming_where_there_is_no_run_is_named(world, copy, tmp_path, monkeypatch, capsys):
    code, error = call(monkeypatch, capsys, ["--resume", "--out", str(tmp_path / "nothing")])
    assert code == 2 and "there is no run in" in error and error.count("\n") == 1
    assert not (tmp_path / "nothing").exists()


def test_resuming_with_the_same_flags_is_allowed(world, copy, finished, monkeypatch, capsys):
    code, _ = call(monkeypatch, capsys, ["--resume", *to_flags(settings(world, copy))])
    assert code == 0
    assert_same_run(copy, finished)
