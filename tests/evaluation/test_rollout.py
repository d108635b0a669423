"""What rollout promises: the run's own next step, token by token, and every number beside the others that it came from."""

import json
import sys

import pytest
import torch
from runs import configured, records, settings, start

import evaluate
import ppo
import train
from divergences import ESTIMATORS, true_kl
from evaluation import rollout
from evaluation.rollout_page import fit, is_clipped, page, plain, table, width
from training.checkpoint import load_checkpoint
from training.config import stored_config
from training.folder import checkpoints

ROW = 1


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("rollout") / "run"
    start(settings(world, out, evaluation=None, estimator="bregman", beta=0.3))
    return out


@pytest.fixture(scope="module")
def moment(run):
    """Of the last checkpoint but one: the step that follows it was taken, too."""
    return taken(run, 2)


def taken(run, *asked: int, row: int = ROW, prompt: str | None = None) -> dict:
    """What is taken of the last of these checkpoints."""
    config = stored_config({"out": str(run)})
    steps = rollout.chosen(run, [str(step) for step in asked], config)
    models, state = rollout.open_run(config)
    position = rollout.go_to(state, models, steps[max(steps)])
    batch = rollout.next_batch(state, config, row, prompt, models.tokenizer)
    for step, folder in steps.items():
        rollout.load(config, models, state, folder, position, step)
        found = rollout.take(models, state, config, batch)
    return found


@pytest.fixture(scope="module")
def its_step(run):
    """(rollout, models after it) of the step as train.py takes it from that checkpoint."""
    config = stored_config({"out": str(run)})
    models, state = rollout.open_run(config)
    load_checkpoint(config, models, state, checkpoints(run)[1])
    _, collected, _ = train.ppo_step(models, state, config)
    return collected, models, config


def test_it_is_the_step_that_the_run_took_next(run, moment):
    sample = [s for s in records(run / "samples.jsonl") if s["step"] == 3][ROW]
    assert moment["step"] == 2 and round(moment["score"], 4) == sample["score"]
    text = "".join(token["text"] for token in moment["tokens"]).removesuffix("</s>")
    assert text.strip() == sample["response"].strip()


def test_its_numbers_are_ppo_pys_tensors(moment, its_step):
    collected, _, config = its_step
    mask, own = collected.mask[ROW], moment["by"]["bregman"]
    for name, found in {"logprobs": [t["logprob"] for t in moment["tokens"]], "ref_logprobs": [t["ref_logprob"] for t in
                        moment["tokens"]], "values": [t["value"] for t in moment["tokens"]], "penalties": own["penalty"],
                        "rewards": own["reward"], "advantages": own["advantage"], "returns": own["returns"]}.items():
        assert found == getattr(collected, name)[ROW][mask].tolist(), name
    assert moment["finished"] == bool(collected.finished[ROW]) and moment["beta"] == config.ppo.beta


def test_the_ratio_is_that_of_the_policy_after_the_whole_update(moment, its_step):
    collected, models, config = its_step
    one = collected.micro_batch(torch.tensor([ROW]))
    new = ppo.response_logprobs(models.policy_logits, one.packed(), config.ppo.temperature)[0]
    assert [t["ratio"] for t in moment["tokens"]] == (new - one.logprobs).exp()[0].tolist()
    assert any(abs(t["ratio"] - 1) > 1e-3 for t in moment["tokens"])


def test_true_kl_and_the_likeliest_others_are_of_the_whole_distribution(run, moment):
    config = stored_config({"out": str(run)})
    models, state = rollout.open_run(config)
    load_checkpoint(config, models, state, checkpoints(run)[1])
    batch = rollout.next_batch(state, config, ROW, None, models.tokenizer)
    ids = torch.tensor([batch.ids[ROW]])
    policy, reference = (f(ids, torch.ones_like(ids), 1)[0, 0] for f in (models.policy_logits, models.reference_logits))
    token = moment["tokens"][0]
    assert token["true_kl"] == pytest.approx(true_kl(policy, reference).item(), abs=1e-5)
    likely = policy.softmax(-1).topk(6).values.tolist()
    found = sorted([p for _, p, _ in token["others"]] + [torch.tensor(token["logprob"]).exp().item()], reverse=True)
    assert len(token["others"]) == 5 and found[:5] == pytest.approx(likely[:5], rel=1e-4)


def test_an_estimator_of_the_readers_own_is_shown_too(run, monkeypatch):
    monkeypatch.setitem(ESTIMATORS, "reverse_bregman", lambda p, q: (p - q).expm1() - (p - q))
    found = taken(run, 2)
    facts = {"run": "r", "row": 0, "estimator": "reverse_bregman", "instruction": "i", "input": "", "lam": 1, "cliprange": 0.2}
    assert "reverse_" in table(facts, found) and "reverse_bregman" in page(facts, [found])


def test_every_estimator_is_credited_as_if_the_run_had_it(world, run, moment, tmp_path):
    """The first step of two runs that differ in their penalty alone samples the same."""
    here = taken(run, 0)
    start(settings(world, tmp_path / "kl", evaluation=None, estimator="kl", beta=0.3, steps=1))
    there = taken(tmp_path / "kl", 0)
    assert here["by"].keys() == ESTIMATORS.keys() and here["by"] == there["by"]
    different = moment["by"]
    assert different["kl"]["advantage"] != different["bregman"]["advantage"]


def test_each_number_follows_from_its_neighbours(moment):
    """Eq. 3, the scale, δ, GAE's recursion, whitening, the return: as the page writes them out."""
    values, score = [t["value"] for t in moment["tokens"]], moment["judged"]
    for name, by in moment["by"].items():
        behind = 0.0
        for t in reversed(range(len(values))):
            last = t == len(values) - 1
            shaped = (score if last else 0.0) - moment["beta"] * by["penalty"][t]
            delta = by["reward"][t] + (0.0 if last else values[t + 1]) - values[t]
            behind = delta + 0.95 * behind
            got = [by[key][t] for key in ("shaped", "reward", "delta", "gae", "advantage", "returns")]
            expected = [shaped, shaped * by["scale"], delta, behind, (behind - by["mean"]) / by["deviation"], behind + values[t]]
            assert got == pytest.approx(expected, abs=2e-5), (name, t)


def test_earlier_checkpoints_get_the_same_prompt_and_draws(run):
    """Only the weights differ: with the last one's prompts and draws, the start answers otherwise than by its own."""
    config = stored_config({"out": str(run)})
    steps = rollout.chosen(run, ["all"], config)
    assert list(steps) == [0, 1, 2, 3] and steps[0] is None
    models, state = rollout.open_run(config)
    position = rollout.go_to(state, models, steps[max(steps)])
    rollout.load(config, models, state, steps[0], position, 0)
    at_start = state.sampling.get_state()
    rollout.load(config, models, state, steps[2], position, 2)
    assert torch.equal(state.sampling.get_state(), at_start) and state.step == 2


def test_a_prompt_of_the_users_takes_a_place_in_the_batch(run, moment):
    asked = taken(run, 2, prompt="Tell me about copper.")
    assert [t["text"] for t in asked["tokens"]] != [t["text"] for t in moment["tokens"]]
    assert taken(run, 2, row=0, prompt="Tell me about copper.")["score"] != asked["score"]  # another row, other draws


# ------------------------------------------------------------------------------------------------------------- program


def told(monkeypatch, capsys, *argv) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "rollout", *map(str, argv)])
    return evaluate.main(), *capsys.readouterr()


def test_the_table_is_aligned_in_80_columns(run, monkeypatch, capsys):
    code, out, _ = told(monkeypatch, capsys, run, "--row", ROW)
    table = out[out.index("step 3 of"):].splitlines()
    assert code == 0 and max(map(width, table[:-2])) <= 80
    first = next(i for i, line in enumerate(table) if "true KL" in line)
    ends = {width(line) for line in table[first:first + 3]}
    assert len(ends) == 1  # the last column ends alike in every row
    for estimator in ("clamped", "KL", "Bregman", "squared", "Jensen-S"):
        assert estimator in out


def test_the_page_holds_the_numbers_and_no_markup_of_the_texts(run, monkeypatch, capsys, tmp_path):
    file = tmp_path / "page.html"
    code, out, _ = told(monkeypatch, capsys, run, "--prompt", "</script><b>x", "--out", file)
    assert code == 0 and f"written: {file}" in out
    text = file.read_text(encoding="utf-8")
    assert "</script><b>" not in text and "http" not in text.replace("http-equiv", "")
    content = json.loads(text.split('id="content">')[1].split("</script>")[0])
    assert [m["step"] for m in content["moments"]] == [0, 1, 2, 3] and content["facts"]["instruction"] == "</script><b>x"


@pytest.mark.parametrize(("flags", "message"), [
    (["--step", "7"], "--step 7: must be all or some of 0, 1, 2, 3"),
    (["--row", "8"], "--row 8: a batch of this run has rows 0 to 7"), (["--row", "-1"], "--row -1"),
    (["--prompt", " "], "--prompt is empty"), (["--prompt", "a " * 400], "--prompt has"),
    (["--out", "no/such/page.html"], "--out no/such/page.html: there is no folder"), (["--out", "."], "is a folder")])
def test_wrong_flags_are_one_line(run, monkeypatch, capsys, flags, message):
    code, _, err = told(monkeypatch, capsys, run, *flags)
    assert code == 2 and message in err and err.strip().count("\n") == 0


def test_a_rule_runs_only_where_it_is_named(world, tmp_path, monkeypatch, capsys):
    (tmp_path / "rules.py").write_text("def brief(prompts, responses):\n    return [-float(len(r)) for r in responses]\n")
    rule = f"{tmp_path / 'rules.py'}:brief"
    start(settings(world, tmp_path / "run", evaluation=None, reward=rule, steps=1))
    code, _, err = told(monkeypatch, capsys, tmp_path / "run")
    assert code == 2 and "--reward is missing" in err
    code, out, _ = told(monkeypatch, capsys, tmp_path / "run", "--reward", rule)
    assert code == 0 and "Penalty and reward" in out


def test_full_fine_tuning_is_looked_at_alike(world, tmp_path):
    start(settings(world, tmp_path / "run", evaluation=None, tuning="full", steps=2))
    assert configured(world, tmp_path / "run").ppo.rollout_batch_size == 8
    found = taken(tmp_path / "run", 1)
    sample = [s for s in records(tmp_path / "run" / "samples.jsonl") if s["step"] == 2][ROW]
    assert round(found["score"], 4) == sample["score"]


# ---------------------------------------------------------------------------------------------------------------- texts


def test_clipped_is_where_the_minimum_takes_the_clipped_product():
    assert is_clipped(1.3, 1.0, 0.2) and is_clipped(0.7, -1.0, 0.2)
    assert not is_clipped(1.3, -1.0, 0.2) and not is_clipped(0.7, 1.0, 0.2) and not is_clipped(1.1, 1.0, 0.2)


def test_texts_stay_in_their_columns():
    assert plain(" a\nb\t\x1b[31m") == "·a⏎b⇥\N{REPLACEMENT CHARACTER}[31m" and width("日本") == 4 and width("e\u0301") == 1
    assert [fit(x) for x in (-0.12345, -1e-5, 2e17)] == ["-0.123", "0.000", "2e+17"]
