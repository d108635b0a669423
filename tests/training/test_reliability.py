"""What a run promises when things go wrong: signals, kills, a full disk, NaN. bench/kill_resume.py is the long version."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from runs import assert_same_run, records, settings, start, to_flags, weights

import evaluate
import ppo
import train
from data import load_instructions, tokenize_prompts
from formats.tokenizer import load_tokenizer
from training import checkpoint
from training.folder import append_line, checkpoints, damage, locked, newest_whole

STEPS = 4


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    """A run that nobody disturbed. Tests read it and never write to it."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    start(settings(world, out, steps=STEPS))
    return out


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def launch(*argv, **how) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **how)


def program(monkeypatch, capsys, *argv) -> tuple[int, str, str]:
    """train.py in this process: (exit code, output, complaint)."""
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    code = train.main()
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, said.out, "".join(line + "\n" for line in said.err.splitlines() if "train.py: " in line)  # no progress bars


# --- going on ----------------------------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_is_passed_over_and_the_run_comes_out_the_same(copy, finished):
    weights_file = copy / f"step-{STEPS:04d}" / "policy" / "adapter_model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-3])
    printed = start({"out": str(copy)}, resume=True)
    assert f"step-{STEPS:04d} is damaged and is passed over: policy/adapter_model.safetensors" in printed
    assert_same_run(copy, finished, f"step-{STEPS:04d}")


def test_a_run_killed_before_its_first_checkpoint_begins_again(copy, finished):
    for folder in checkpoints(copy):
        shutil.rmtree(folder)
    (copy / ".step-0001.part").mkdir()
    with open(copy / "metrics.jsonl", "a") as lines:
        lines.write('{"step": 5, "scor')
    assert "holds no checkpoint yet" in start({"out": str(copy)}, resume=True)
    assert_same_run(copy, finished, f"step-{STEPS:04d}")
    assert not list(copy.glob(".*"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "evaluations.jsonl"])
def test_a_line_cut_off_by_a_kill_is_written_again(copy, finished, name):
    shutil.rmtree(copy / f"step-{STEPS:04d}")
    os.truncate(copy / name, (copy / name).stat().st_size - 7)
    start({"out": str(copy)}, resume=True)
    assert_same_run(copy, finished, f"step-{STEPS:04d}")


def test_when_no_checkpoint_is_whole_nothing_is_thrown_away(copy, monkeypatch, capsys):
    for folder in checkpoints(copy):
        (folder / "manifest.json").unlink()
    before = (copy / "metrics.jsonl").read_bytes()
    code, _, err = program(monkeypatch, capsys, "--resume", "--out", str(copy))
    assert code == 2 and "no checkpoint" in err and (copy / "metrics.jsonl").read_bytes() == before


def test_only_the_newest_checkpoints_are_kept_where_asked(world, finished, tmp_path):
    start(settings(world, tmp_path / "run", steps=STEPS, keep=2))
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-0003", "step-0004"]
    assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path / "run" / "step-0004").values(),
                                                 weights(finished / "step-0004").values(), strict=True))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_run_after_its_step_and_says_how_to_go_on(world, finished, tmp_path, name):
    out, number = tmp_path / "run", getattr(signal, name)
    run = launch(*to_flags(settings(world, out, steps=200, save_every=200)))
    while run.poll() is None and len(records(out / "metrics.jsonl") if (out / "metrics.jsonl").exists() else []) < 2:
        time.sleep(0.01)
    run.send_signal(number)
    printed, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + number, errors
    step = len(records(out / "metrics.jsonl"))
    assert f"stopped by {name} after step {step} of 200; go on with: python train.py --resume --out {out}" in printed
    assert newest_whole(out).name == f"step-{step:04d}" and "Traceback" not in errors


# --- two processes, one folder -----------------------------------------------------------------------------------------


def test_a_run_that_lives_is_nobody_elses_to_resume_and_a_killed_one_is_free(world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    given = to_flags({k: v for k, v in settings(world, out, steps=200, save_every=1, keep=2).items() if k != "evaluation"})
    run = launch(*given)
    try:
        while run.poll() is None and not checkpoints(out):
            time.sleep(0.01)
        for flags in (["--resume", "--out", str(out)], given):
            code, _, err = program(monkeypatch, capsys, *flags)
            assert code == 2 and err.count("\n") == 1 and f"--out {out} is in use by another process (pid {run.pid})" in err
        assert run.poll() is None
    finally:
        run.kill()
        run.wait()
    step = int(newest_whole(out).name[-4:])
    config = json.loads((out / "config.json").read_text()) | {"steps": step + 1}
    (out / "config.json").write_text(json.dumps(config))
    code, _, err = program(monkeypatch, capsys, "--resume", "--out", str(out))
    assert code == 0, err
    assert [m["step"] for m in records(out / "metrics.jsonl")] == list(range(1, step + 2))


def test_a_run_may_be_evaluated_while_it_trains_but_not_twice_at_once(copy, monkeypatch, capsys):
    def evaluation() -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", str(copy), "--kl-tokens", "50"])
        return evaluate.main(), "".join(line for line in capsys.readouterr().err.splitlines() if "evaluate.py: " in line)

    with locked(copy):
        assert evaluation() == (0, "")
    before = (copy / "evaluation.json").read_bytes()
    with locked(copy, ".evaluating.lock"):
        code, err = evaluation()
    assert code == 2 and f"evaluate.py: folder {copy} is in use by another process (pid {os.getpid()})" in err
    assert (copy / "evaluation.json").read_bytes() == before and not list(copy.glob(".*"))


def test_a_folder_that_cannot_be_made_is_said_before_anything_is_loaded(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "load_tokenizer", lambda *_: pytest.fail("loaded first"))
    (tmp_path / "file").write_text("mine")
    code, _, err = program(monkeypatch, capsys, *to_flags(settings(world, tmp_path / "file" / "x")))
    assert code == 2 and err.count("\n") == 1
    assert err.startswith(f"train.py: --out {tmp_path / 'file' / 'x'}: no such folder can be made or written (Not a directory)")


# --- a disk that is full -----------------------------------------------------------------------------------------------


def test_a_full_disk_ends_the_run_with_one_line_and_leaves_the_last_checkpoint(copy, finished):
    """RLIMIT_FSIZE: no file may grow beyond 20,000 bytes, so that the next checkpoint can't be written."""
    for step in (2, 3, 4):
        shutil.rmtree(copy / f"step-{step:04d}")

    def small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    run = launch("--resume", "--out", str(copy), preexec_fn=small_disk)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 1 and "Traceback" not in errors and "train.py: " in errors.splitlines()[-1]
    assert [p.name for p in checkpoints(copy)] == ["step-0001"] and damage(copy / "step-0001") is None
    start({"out": str(copy)}, resume=True)
    assert_same_run(copy, finished, f"step-{STEPS:04d}")


def test_a_line_that_finds_no_room_is_named(world, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="metrics.jsonl: cannot be written .No space left on device"):
        append_line(tmp_path / "metrics.jsonl", {"step": 1})


@pytest.mark.parametrize("writer", ["save_lora", "save_file", "write_state"])
def test_a_writer_that_fails_ends_the_run_and_leaves_nothing_half_done(copy, finished, monkeypatch, capsys, writer):
    shutil.rmtree(copy / "step-0004")
    before = {p: p.read_bytes() for p in copy.glob("step-*/**/*") if p.is_file()}

    def full(*args, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, writer, full)
    code, _, err = program(monkeypatch, capsys, "--resume", "--out", str(copy))
    assert code == 1 and "No space left on device" in err and err.count("\n") == 1
    assert {p: p.read_bytes() for p in copy.glob("step-*/**/*") if p.is_file()} == before and not list(copy.glob(".*"))


# --- numbers that are none ---------------------------------------------------------------------------------------------


def poison(monkeypatch, name: str) -> None:
    """Makes one quantity NaN from the second PPO step on."""
    build, update = train.build_models, ppo.update

    def poisoned(*args):
        models = build(*args)
        owner = (models.value, "forward") if name == "value" else (models, name)
        honest, steps = getattr(*owner), []

        def call(ids, *rest):
            out = honest(ids, *rest)
            if len(steps) < 1:
                return out
            return torch.full_like(out, torch.nan) if out.dim() == 1 else torch.cat([out[:1] * torch.nan, out[1:]])

        setattr(*owner, call)
        monkeypatch.setattr(ppo, "update", lambda *a, **k: [update(*a, **k), steps.append(1)][0])
        return models

    monkeypatch.setattr(train, "build_models", poisoned)


@pytest.mark.parametrize(("name", "quantity"), [("reward", "scores"), ("value", "values"), ("reference_logits", "ref_logprobs")])
def test_nan_stops_the_step_names_itself_and_leaves_a_bundle(world, tmp_path, monkeypatch, capsys, name, quantity):
    poison(monkeypatch, name)
    out = tmp_path / "run"
    code, _, err = program(monkeypatch, capsys, *to_flags({k: v for k, v in settings(world, out).items() if k != "evaluation"}))
    assert code == 1 and err.count("\n") == 1
    assert f"step 2: {quantity} of" in err and "are NaN or infinite" in err
    assert f"the last checkpoint is {out / 'step-0001'}" in err
    bundle = torch.load(out / "debug-step-0002.pt", weights_only=True)
    assert bundle["step"] == 2 and bundle[quantity].isnan().any() and bundle["responses"].shape[0] == 8
    assert newest_whole(out) == out / "step-0001"


def test_a_gradient_that_is_nan_never_reaches_a_weight(world, tmp_path, monkeypatch, capsys):
    out, honest = tmp_path / "run", ppo.value_loss
    monkeypatch.setattr(ppo, "value_loss", lambda *a, **k: [honest(*a, **k)[0] * torch.nan, honest(*a, **k)[1]])
    taken = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *a, **k: [taken.append(1), step(self, *a, **k)])
    code, _, err = program(monkeypatch, capsys, *to_flags({k: v for k, v in settings(world, out).items() if k != "evaluation"}))
    assert code == 1 and "step 1: grad_norm is nan; stopped before the optimiser step" in err
    assert not taken and "there is no checkpoint yet" in err and (out / "debug-step-0001.pt").is_file()


def test_logits_that_are_nan_cannot_be_sampled(world, tmp_path, monkeypatch, capsys):
    build = train.build_models

    def broken(*args):
        models = build(*args)
        torch.nn.init.constant_(models.policy.model.norm.weight, torch.nan)
        return models

    monkeypatch.setattr(train, "build_models", broken)
    given = {k: v for k, v in settings(world, tmp_path / "run").items() if k != "evaluation"}
    code, _, err = program(monkeypatch, capsys, *to_flags(given))
    assert code == 1 and "step 1: the policy's logits at response token 0 are NaN or infinite" in err


@pytest.mark.parametrize(("rule", "sign"), [
    ("return [0.5] * len(responses)", "every response got the reward 0.5"),
    ("return [float(len(r)) for r in responses]", "")])
def test_a_constant_reward_is_handled_and_said(world, tmp_path, rule, sign):
    (tmp_path / "rules.py").write_text(f"def rule(prompts, responses):\n    {rule}\n")
    printed = start(settings(world, tmp_path / "run", reward=f"{tmp_path / 'rules.py'}:rule", evaluation=None))
    assert (sign in printed) if sign else "every response got the reward" not in printed
    assert all(m["score_std"] >= 0 and m["policy_loss"] == m["policy_loss"] for m in records(tmp_path / "run" / "metrics.jsonl"))


def test_prompts_beyond_the_limit_are_left_out_and_counted(world, tmp_path):
    instructions = load_instructions(world / "data" / "ppo.json")
    lengths = sorted(map(len, tokenize_prompts(instructions, load_tokenizer(world / "sft"), "tiny", 9999).ids))
    kept = sum(n <= lengths[30] for n in lengths)
    printed = start(settings(world, tmp_path / "run", steps=1, query_length=lengths[30], evaluation=None))
    assert f"of {kept} instructions" in printed and f"{60 - kept} dropped as longer than {lengths[30]} tokens" in printed


def test_every_dtype_takes_log_probabilities_and_losses_in_float32():
    logits = (torch.randn(2, 3, 9) * 30).bfloat16()
    tokens = torch.randint(9, (2, 3))
    found = ppo.token_logprobs(logits, tokens, 0.7)
    assert found.dtype == torch.float32
    expected = (logits.double() / 0.7).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert torch.allclose(found.double(), expected, atol=1e-4)


def test_a_self_check_that_fails_is_one_line(world, tmp_path, monkeypatch, capsys):
    found = {"ratio_error": 0.0, "ratio_error_mean": 0.0, "reference_gap": float("nan"), "reference_gap_mean": float("nan")}
    monkeypatch.setattr(ppo, "self_check", lambda *a: found)
    given = {k: v for k, v in settings(world, tmp_path / "run").items() if k != "evaluation"}
    code, _, err = program(monkeypatch, capsys, *to_flags(given))
    assert code == 1 and "must be 0 within" in err and err.count("\n") == 1


def test_out_of_memory_says_where_to_look(monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")

    monkeypatch.setattr(train, "train", full)
    code, _, err = program(monkeypatch, capsys)
    assert code == 1 and err.count("\n") == 1 and "--plan with the same flags says what to turn" in err


def test_the_config_of_a_run_is_checked_field_by_field(copy, monkeypatch, capsys):
    config = json.loads((copy / "config.json").read_text())
    for change, words in (({"steps": "many"}, "steps is 'many': must be int"), ({"beta": None}, "beta is None"),
                          ({"seed": True}, "seed is True"), ({"estimator": 3}, "estimator is 3")):
        (copy / "config.json").write_text(json.dumps(config | change))
        code, _, err = program(monkeypatch, capsys, "--resume", "--out", str(copy))
        assert code == 2 and words in err and err.count("\n") == 1
