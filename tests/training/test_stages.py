"""What stages 1 and 2 promise when things go wrong: a killed training resumes bit for bit, NaN is stored nowhere, --out holds a
whole model or none. bench/kill_resume.py is the long version."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from runs import write_stage_data
from safetensors.torch import load_file, save_file

import evaluate
import reward
import sft
from formats.tokenizer import load_tokenizer
from model import Llama
from reward import RewardModel
from training import folder, stages
from training.folder import checkpoints, damage, locked, newest_whole

EPOCHS, BATCHES = 2, 4  # 16 records in batches of 4
PROGRAMS = {"sft.py": sft, "reward.py": reward}


@pytest.fixture(scope="module")
def data(world, tmp_path_factory) -> Path:
    """Data of both stages, and what a training comes to that nobody disturbs. Tests read it and never write to it."""
    here = tmp_path_factory.mktemp("stages")
    write_stage_data(world, here)
    for program in PROGRAMS:
        assert run(program, *flags(program, world, here, here / f"whole {program}")) == 0
    return here


def flags(program: str, world: Path, data: Path, out: Path, *more: object) -> list[str]:
    stem = program.removesuffix(".py")
    base, share = {"sft": ("--model", "--validation"), "reward": ("--base", "--held-out")}[stem]
    given = [base, world / "sft", "--data", data / f"{stem}.json", "--out", out, "--prompt-template", "tiny", share, 0.2,
             "--save-every", 1, "--epochs", EPOCHS, "--batch-size", 4, "--micro-batch-size", 2, "--learning-rate", 0.01,
             "--device", "cpu"]
    return [str(word) for word in (*given, *more)]


def run(program: str, *argv: object) -> int:
    return PROGRAMS[program].main([str(word) for word in argv])


def complaint(capsys) -> str:
    """What was said on stderr, without progress bars."""
    lines = re.split(r"[\r\n]", capsys.readouterr().err)
    return "".join(line + "\n" for line in lines if line.strip() and "%|" not in line)


def contents(out: Path) -> dict:
    """Every byte of the folder; of training.json all but the speed and how often it was saved."""
    found = {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    record = json.loads(found.pop("training.json"))
    for row in record["history"]:
        row.pop("tokens_per_second", None)
    return found | {"training.json": record | {"flags": {k: v for k, v in record["flags"].items() if k != "save_every"}}}


class Killed(BaseException):
    """Stands for SIGKILL where a process of its own would take too long."""


def killed_behind(monkeypatch, step: int) -> None:
    honest = stages.Stage.__call__

    def call(self, loop):
        honest(self, loop)
        if loop.step == step and not self.args.resume:
            raise Killed

    monkeypatch.setattr(stages.Stage, "__call__", call)


# --- going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("step", "save_every", "saved"), [(1, 1, 1), (3, 2, 2), (4, 1, 4), (5, 4, 4), (8, 3, 8)],
                         ids=["first step", "middle", "end of an epoch", "next epoch", "last step"])
def test_a_killed_training_resumes_to_the_same_bytes(world, data, tmp_path, monkeypatch, capsys, program, step, save_every,
                                                     saved):
    out = tmp_path / "out"
    killed_behind(monkeypatch, step)
    with pytest.raises(Killed):
        run(program, *flags(program, world, data, out, "--save-every", save_every))
    assert newest_whole(out).name == f"step-{saved:04d}" and not (out / "config.json").exists()
    torch.manual_seed(99)  # another process has drawn other numbers by now
    assert run(program, "--resume", "--out", out) == 0
    said = capsys.readouterr()
    assert f"resumed from {out / f'step-{saved:04d}'}" in said.out and "Traceback" not in said.err
    assert contents(out) == contents(data / f"whole {program}")


def test_full_tuning_resumes_to_the_same_bytes_too(world, data, tmp_path, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    assert run("sft.py", *flags("sft.py", world, data, one, "--tuning", "full")) == 0
    killed_behind(monkeypatch, 6)
    with pytest.raises(Killed):
        run("sft.py", *flags("sft.py", world, data, other, "--tuning", "full", "--save-every", 4))
    assert run("sft.py", "--resume", "--out", other) == 0
    assert contents(one) == contents(other)


def test_a_process_killed_by_the_system_leaves_what_resume_needs_and_no_lock(world, data, tmp_path):
    out = tmp_path / "out"
    code = ("import os, signal, sys, sft; from training import stages\nhonest = stages.Stage.__call__\n"
            "def call(self, loop):\n    honest(self, loop)\n    loop.step == 6 and os.kill(os.getpid(), signal.SIGKILL)\n"
            "stages.Stage.__call__ = call\nsft.main(sys.argv[1:])")
    done = subprocess.run([sys.executable, "-c", code, *flags("sft.py", world, data, out)], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL and (out / ".lock").exists()
    assert run("sft.py", "--resume", "--out", out) == 0
    assert contents(out) == contents(data / "whole sft.py")


def test_a_training_killed_before_its_first_checkpoint_begins_again(world, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(stages.Stage, "forget", lambda self: None)  # a killed process does nothing more
    killed_behind(monkeypatch, 2)
    with pytest.raises(Killed):
        run("sft.py", *flags("sft.py", world, data, out, "--save-every", 50))
    (out / ".step-0003.part").mkdir()
    assert run("sft.py", "--resume", "--out", out) == 0
    assert "holds no checkpoint yet" in capsys.readouterr().out and contents(out) == contents(data / "whole sft.py")


def test_a_damaged_newest_checkpoint_is_passed_over_and_only_two_are_kept(world, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    killed_behind(monkeypatch, 5)
    with pytest.raises(Killed):
        run("sft.py", *flags("sft.py", world, data, out))
    assert [path.name for path in checkpoints(out)] == ["step-0004", "step-0005"]
    os.truncate(out / "step-0005" / "state.pt", 100)
    assert run("sft.py", "--resume", "--out", out) == 0
    assert "step-0005 is damaged and is passed over: state.pt" in capsys.readouterr().out
    assert contents(out) == contents(data / "whole sft.py")


@pytest.mark.parametrize(("program", "name"), [("sft.py", "SIGINT"), ("reward.py", "SIGTERM")])
def test_a_signal_ends_the_training_after_its_step_and_says_how_to_go_on(world, data, tmp_path, program, name):
    out, number = tmp_path / "out", getattr(signal, name)
    argv = flags(program, world, data, out, "--epochs", 500, "--save-every", 3)
    child = subprocess.Popen([sys.executable, str(ROOT / program), *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True)
    while child.poll() is None and not checkpoints(out):
        time.sleep(0.01)
    child.send_signal(number)
    printed, errors = child.communicate(timeout=60)
    assert child.returncode == 128 + number and "Traceback" not in errors, errors
    step = int(newest_whole(out).name.removeprefix("step-"))
    assert f"stopped by {name} after step {step} of 2000; go on with: python {program} --resume --out {out}" in printed


def test_a_checkpoint_from_before_dropout_was_seeded_by_the_step_goes_on_and_says_so(halted, capsys):
    program, out = halted
    file, manifest = (checkpoints(out)[-1] / name for name in ("state.pt", folder.MANIFEST))
    torch.save(torch.load(file, weights_only=True) | {"random": {"cpu": torch.get_rng_state()}}, file)
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"state.pt": folder.describe(file)}))
    assert run(program, "--resume", "--out", out) == 0
    assert f"resumed from {file.parent}; it is from before dropout was seeded by the step" in capsys.readouterr().out


def test_resuming_a_finished_training_tidies_up_and_changes_nothing(data, tmp_path):
    out = Path(shutil.copytree(data / "whole sft.py", tmp_path / "out"))
    (out / "step-0008").mkdir()
    (out / ".model.part").mkdir()
    assert run("sft.py", "--resume", "--out", out) == 0
    assert contents(out) == contents(data / "whole sft.py") and not list(out.glob("step-*")) and not list(out.glob(".*"))


# --- the same training, or none ------------------------------------------------------------------------------------------


@pytest.fixture(params=PROGRAMS)
def halted(request, world, data, tmp_path, monkeypatch) -> tuple[str, Path]:
    """(program, folder) of a training that was killed behind its third step; its base and data may be changed."""
    shutil.copytree(world / "sft", tmp_path / "sft")
    for file in data.glob("*.json"):
        shutil.copy(file, tmp_path)
    killed_behind(monkeypatch, 3)
    with pytest.raises(Killed):
        run(request.param, *flags(request.param, tmp_path, tmp_path, tmp_path / "out"))
    return request.param, tmp_path / "out"


def refused(program: str, out: Path, capsys, *more: object) -> str:
    """The one line that --resume says, with exit code 2; nothing changes."""
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run(program, "--resume", "--out", out, *more) == 2
    said = complaint(capsys)
    assert said.startswith(f"{program}: ") and said.count("\n") == 1, said
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    return said


def test_other_data_is_refused(halted, capsys):
    program, out = halted
    file = out.parent / program.replace(".py", ".json")
    records = json.loads(file.read_text())
    records[3]["instruction"] = "Say something else."
    file.write_text(json.dumps(records))
    assert f"--resume: {file}: gives other tokens than when the training began" in refused(program, out, capsys)


def test_another_base_is_refused(halted, capsys):
    program, out = halted
    file = out.parent / "sft" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] *= 1.001
    save_file(tensors, file)
    said = refused(program, out, capsys)
    assert f"--resume: {out.parent / 'sft'}: its weights are not those that the training began with" in said


def test_other_flags_are_refused_and_the_same_ones_are_welcome(halted, capsys):
    program, out = halted
    assert "--resume: --lora-alpha 3.0 differs from the training's 64.0" in refused(program, out, capsys, "--lora-alpha", 3)
    assert "--resume: --epochs 9 differs" in refused(program, out, capsys, "--epochs", 9)
    assert run(program, "--resume", "--out", out, "--epochs", EPOCHS, "--lora-alpha", "64.0", "--save-every", 7) == 0


def test_the_other_program_s_training_is_refused(halted, capsys):
    program, out = halted
    [other] = PROGRAMS.keys() - {program}
    assert f"training.json: is no record of a training (its program is '{program}'" in refused(other, out, capsys)


@pytest.mark.parametrize(("content", "words"), [
    ("", "is no record of a training"), ("[]", "holds no flags"), ("[" * 100_000, "is no record of a training"),
    ('{"flags": []}', "holds no flags"), ({"epochs": "many"}, "argument --epochs: invalid int value: 'many'"),
    ({"epochs": 0}, "argument --epochs: 0: must be at least 1"), ({"learning_rate": None}, "lacks learning_rate"),
    ({"data": None}, "lacks data"), ({"data": "none.json"}, "none.json"), ({"help": True}, "training.json"),
    ({"colour": "red"}, "unrecognized arguments: --colour=red"), ({"device": "cuda:9"}, "--device cuda:9 is not there")])
def test_a_damaged_record_is_named(halted, capsys, content, words):
    program, out = halted
    if isinstance(content, dict):
        record = json.loads((out / "training.json").read_text())
        content = json.dumps(record | {"flags": record["flags"] | content})
    (out / "training.json").write_text(content)
    assert words in refused(program, out, capsys)


def test_where_nothing_was_begun_nothing_is_resumed(tmp_path, capsys):
    for program in PROGRAMS:
        assert run(program, "--resume", "--out", tmp_path / "none") == 2
        assert f"{program}: --resume: {tmp_path / 'none' / 'training.json'} not found: there is no training" in complaint(capsys)
    assert not list(tmp_path.iterdir())


def test_a_training_that_lives_is_nobody_elses(halted, world, data, capsys):
    program, out = halted
    with locked(out):
        assert f"--out {out} is in use by another process (pid {os.getpid()})" in refused(program, out, capsys)


def test_a_folder_that_holds_files_or_cannot_be_made_is_said_first(world, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sft, "load_tokenizer", lambda *_: pytest.fail("loaded first"))
    (tmp_path / "file").write_text("mine")
    for program in PROGRAMS:
        for out, words in ((tmp_path, f"--out {tmp_path} already holds files"),
                           (tmp_path / "file" / "x", f"--out {tmp_path / 'file' / 'x'}: no such folder can be made")):
            assert run(program, *flags(program, world, data, out)) == 2
            assert complaint(capsys).startswith(f"{program}: {words}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


BAD_FLAGS = [(["--epochs", "0"], "argument --epochs: 0: must be at least 1"), (["--epochs", "many"], "invalid int value: 'many'"),
             (["--batch-size", "-4"], "-4: must be at least 1"), (["--learning-rate", "nan"], "nan: must be a finite number"),
             (["--learning-rate", "0"], "0: must be above 0"), (["--warmup", "3"], "3: must be from 0 to 1"),
             (["--lora-dropout", "1"], "1: must be from 0 up to but not 1"), (["--lora-rank", "0"], "0: must be from 1 to 65536"),
             (["--seed", "-1"], "must be from 0 to"), (["--save-every", "0"], "must be at least 1"),
             (["--max-tokens", "0"], "at least 1"), (["--device", "cuda:7"], "--device cuda:7 is not there: choose from"),
             (["--device", "phone"], "--device phone is not there"),
             (["--stepz", "3"], "unrecognized arguments: --stepz 3"), (["--data", "none.json"], "none.json"),
             (["--data", "no\r\nne"], "no ne"), (["--epochs", "9" * 400], "must be a finite number"),
             (["--lora-rank", "1" * 12], "must be from 1 to 65536"),
             (["--max-grad-norm", "inf"], "inf: must be a finite number"), (["--tuning", "half"], "invalid choice: 'half'")]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("more", "words"), BAD_FLAGS, ids=[" ".join(more)[:30] for more, _ in BAD_FLAGS])
def test_bad_flags_are_one_line_and_leave_nothing(world, data, tmp_path, capsys, program, more, words):
    assert run(program, *flags(program, world, data, tmp_path / "out", *more)) == 2
    said = complaint(capsys)
    assert said.startswith(f"{program}: ") and said.count("\n") == 1 and words in said and not list(tmp_path.iterdir()), said


def test_without_resume_model_and_data_are_required(tmp_path, capsys):
    assert run("sft.py", "--out", tmp_path / "out", "--data", "x") == 2 and "are required: --model" in complaint(capsys)
    assert run("reward.py", "--out", tmp_path / "out") == 2 and "are required: --base, --data" in complaint(capsys)


# --- numbers that are none -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_base_that_gives_nan_is_said_at_the_first_step_and_leaves_nothing(world, data, tmp_path, capsys, program):
    base = Path(shutil.copytree(world, tmp_path / "world")) / "sft" / "model.safetensors"
    tensors = load_file(base)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.inf
    save_file(tensors, base)
    assert run(program, *flags(program, tmp_path / "world", data, tmp_path / "out")) == 1
    said = complaint(capsys).splitlines()[-1]
    assert said == f"{program}: step 1: loss is nan; stopped before the optimiser step; there is no checkpoint yet"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("quantity", ["loss", "grad_norm"])
def test_the_first_nan_is_named_and_no_weight_moves(world, data, tmp_path, monkeypatch, capsys, quantity):
    out, honest, seen = tmp_path / "out", sft._accumulate, []

    def poisoned(model, *rest):
        loss = honest(model, *rest)
        seen.append([p.detach().clone() for p in model.parameters()])
        if len(seen) < 3:
            return loss
        next(p for p in model.parameters() if p.grad is not None).grad[0] = torch.nan
        poisoned.model = model
        return torch.nan if quantity == "loss" else loss

    monkeypatch.setattr(sft, "_accumulate", poisoned)
    assert run("sft.py", *flags("sft.py", world, data, out)) == 1
    words = f"step 3: {quantity} is nan; stopped before the optimiser step; the last checkpoint is {out / 'step-0002'}"
    assert complaint(capsys).splitlines()[-1] == f"sft.py: {words}"
    assert all(torch.equal(a, b) for a, b in zip(seen[2], poisoned.model.parameters(), strict=True))
    assert not (out / "config.json").exists() and damage(out / "step-0002") is None


@pytest.mark.parametrize("program", PROGRAMS)
def test_weights_that_the_last_step_spoilt_are_not_stored(world, data, tmp_path, monkeypatch, capsys, program):
    """No loss reads them any more: held-out data does, and each checkpoint looks at its tensors."""
    honest = reward.Loop.update

    def spoil(self, loss):
        honest(self, loss)
        with torch.no_grad():
            self.parameters[0].fill_(torch.inf if self.step == self.total else self.parameters[0][0, 0])

    monkeypatch.setattr(reward.Loop, "update", spoil)
    out = tmp_path / "out"
    assert run(program, *flags(program, world, data, out)) == 1
    said = complaint(capsys).splitlines()[-1]
    assert re.search(r"step 8: .* holds NaN or infinity and is not saved; the last checkpoint is .*step-0007", said), said
    monkeypatch.setattr(stages.Stage, "save", lambda *_: None)
    assert run(program, *flags(program, world, data, tmp_path / "other")) == 1
    assert "step 8: " in (said := complaint(capsys).splitlines()[-1]) and "nan" in said.lower()
    assert not (tmp_path / "other").exists()


def test_a_reward_model_that_cannot_be_standardised_keeps_its_training(world, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    honest = reward.standardise
    monkeypatch.setattr(reward, "standardise", lambda model, sequences, *rest, **more: honest(
        model, sequences[:1] * 2, *rest, **more))
    assert run("reward.py", *flags("reward.py", world, data, out, "--save-every", 50)) == 2
    said = complaint(capsys).splitlines()[-1]
    assert "cannot standardise: 2 sequences have scores of standard deviation 0" in said
    assert said.endswith(f"the trained weights are in {out / 'step-0008'}")
    monkeypatch.setattr(reward, "standardise", honest)
    assert run("reward.py", "--resume", "--out", out) == 0
    assert contents(out) == contents(data / "whole reward.py")


# --- a whole model, or none ----------------------------------------------------------------------------------------------


def test_a_process_killed_at_any_call_of_the_file_system_leaves_a_whole_model_or_none(tmp_path):
    """Dies at the 1st, 2nd, ... write or rename inside move_in; each next process begins where that one stopped."""
    files = {"config.json": "{}", "model.safetensors": "weights", "tokenizer.model": "pieces", "adapter/adapter.json": "small"}
    out = tmp_path / "out"
    out.mkdir()
    for moment in range(60):
        child = os.fork()
        if not child:
            left = moment

            def counted(function):
                def call(*args, **more):
                    nonlocal left
                    left -= 1
                    if left < 0:
                        os._exit(9)
                    return function(*args, **more)

                return call

            folder.os.replace, folder.flush, folder.shutil.rmtree = map(counted, (os.replace, folder.flush, shutil.rmtree))

            def write(part: Path) -> None:
                for name, content in files.items():
                    (part / name).parent.mkdir(exist_ok=True)
                    counted((part / name).write_text)(content)

            try:
                folder.move_in(out, write, last="config.json")
            finally:
                os._exit(0 if sys.exc_info()[0] is None else 1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9)
        if (out / "config.json").exists():
            shutil.rmtree(out / ".model.part", ignore_errors=True)
            assert {str(p.relative_to(out)): p.read_text() for p in out.rglob("*") if p.is_file()} == files
            break
    assert moment > 12


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_full_disk_at_the_end_loses_nothing(world, data, tmp_path, monkeypatch, capsys, program):
    out, name = tmp_path / "out", {"sft.py": "save_model", "reward.py": "save_reward_model"}[program]

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PROGRAMS[program], name, full)
        assert run(program, *flags(program, world, data, out)) == 1
    assert "No space left on device" in complaint(capsys)
    assert sorted(path.name for path in out.iterdir()) == ["step-0007", "step-0008", "training.json"]
    assert run(program, "--resume", "--out", out) == 0
    assert contents(out) == contents(data / f"whole {program}")


def test_a_loader_says_that_a_training_is_not_finished(halted, monkeypatch, capsys):
    _, out = halted
    for load in (Llama.from_pretrained, RewardModel.from_pretrained, load_tokenizer):
        with pytest.raises(ValueError, match=f"{out}: holds a training that isn't finished; .*--resume --out {out}"):
            load(out)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(out)])
    assert evaluate.main() == 2


def test_the_record_says_how_the_model_was_made(data):
    record = json.loads((data / "whole reward.py" / "training.json").read_text())
    assert record["program"] == "reward.py" and record["flags"]["learning_rate"] == 0.01 and record["flags"]["dtype"] == "float32"
    assert [row["epoch"] for row in record["history"]] == [1, 2] and record["history"][1]["held_out"]["n"] == 4
    stored = json.loads((data / "whole reward.py" / "reward_config.json").read_text())
    assert (stored["mean"], stored["std"]) == pytest.approx((record["mean"], record["std"]))


# --- what the next program must know -----------------------------------------------------------------------------------


def test_a_reward_model_keeps_how_its_texts_were_written(world, data, tmp_path):
    """Its template by name, or what the template's file held: train.py reads answers to it in no other."""
    assert RewardModel.from_pretrained(data / "whole reward.py").prompt_template == "tiny"
    texts = {"prompt_inputs": "Q {instruction} {input} A:", "prompt_noinputs": "Q {instruction} A:", "before_response": " "}
    (tmp_path / "t.json").write_text(json.dumps(texts), encoding="utf-8-sig")
    given = flags("reward.py", world, data, tmp_path / "out", "--prompt-template", tmp_path / "t.json", "--epochs", 1)
    assert run("reward.py", *given) == 0
    read = RewardModel.from_pretrained(tmp_path / "out")
    assert read.prompt_template == texts and read.ends_with_eos is True


@pytest.mark.parametrize("program", PROGRAMS)
def test_sequences_beyond_the_models_window_are_said(program, world, data, tmp_path, capsys):
    assert run(program, *flags(program, world, data, tmp_path / "out", "--max-tokens", 600, "--epochs", 1)) == 0
    base = "--model" if program == "sft.py" else "--base"
    assert f"warning: {base} {world / 'sft'}, --max-tokens: 600 tokens are more than its 512 positions" in capsys.readouterr().out
