"""sft.py, reward.py and evaluate.py by several processes are what one process does: the same numbers and files, one voice.

tests/stage_ranks_worker.py plays every scene in two processes over gloo, in one start; here it is compared with one process.
"""

import contextlib
import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from runs import one_line, played_by_two, scene, settings, start, write_stage_data
from safetensors.torch import load_file
from stage_ranks_worker import MUTANTS, PROGRAMS, STEPS, TROUBLE, changed, flags, recorded
from torch.distributed.run import get_args_parser

import evaluate
import reward
import sft
from training import launch, ranks, stages
from training.folder import checkpoints, damage


RULES = """import os

def rule(prompts, responses):
    return [float(len(r)) for r in responses]

def rule_of_one(prompts, responses):
    if os.environ.get("RANK") == "0":  # the other scores nothing, as all of it is one batch
        raise LookupError("no such word")
    return rule(prompts, responses)
"""


class Killed(BaseException):
    """Stands for SIGKILL."""


def main(program: str, *argv: object) -> str:
    """One process's run, which must end well; returns what it printed."""
    with (contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as err,
          changed(sys, argv=[program, *map(str, argv)])):
        assert PROGRAMS[program].main() == 0, err.getvalue()
    return said.getvalue()


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory) -> dict:
    """What one process makes of the data in `folder`: the gradients of its steps by scene, and folders of those names."""
    folder = tmp_path_factory.mktemp("alone")
    write_stage_data(world, folder)
    kept = {"folder": folder}
    for name, program, more in (("sft", "sft.py", []), ("reward", "reward.py", []), ("full", "reward.py", [
            "--tuning", "full", "--weight-decay", 0.1, "--epochs", 1, "--learning-rate", 0.001])):
        with recorded() as kept[name]:
            main(program, *flags(program, world, folder, name, *more))
    return kept


@pytest.fixture(scope="module")
def two(world, alone, tmp_path_factory) -> Path:
    """The folder in which two processes have played all scenes."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("sft.json", "reward.json"):
        shutil.copy(alone["folder"] / name, folder)
    honest = stages.Stage.__call__

    def call(self, loop):
        honest(self, loop)
        if loop.step == 3:
            raise Killed

    for name in ("begun-by-one", "restarted"):
        with changed(stages.Stage, __call__=call), pytest.raises(Killed):
            main("sft.py", *flags("sft.py", world, folder, name))
    (folder / "again").mkdir()
    (folder / "again" / "file").write_text("mine")
    start(settings(world, folder / "run", steps=1, evaluation=None))
    config = json.loads((folder / "run" / "config.json").read_text()) | {"evaluation": str(world / "data" / "evaluation.json")}
    (folder / "run" / "config.json").write_text(json.dumps(config))
    shutil.copytree(folder / "run", alone["folder"] / "run")
    (folder / "rules.py").write_text(RULES)
    for rule in ("rule", "rule_of_one"):
        shutil.copytree(folder / "run", folder / rule)
        (folder / rule / "config.json").write_text(json.dumps(config | {"reward": f"{folder / 'rules.py'}:{rule}"}))
    (folder / "annotations.json").write_text('[{"preference": 1}, {"preference": 2}]')
    return played_by_two("stage_ranks_worker.py", world, folder)


def differing_steps(alone: dict, other: dict) -> list[int]:
    """Steps whose raw gradient isn't one process's within 1e-4 of its norm, or reaches other parameters."""
    pairs = zip(alone["gradients"], other["gradients"], alone["reached"], other["reached"], strict=False)
    return [step for step, (a, b, there, here) in enumerate(pairs, 1)
            if there != here or not (b - a).norm() <= 1e-4 * a.norm()]


def assert_like(a: Path, b: Path) -> None:
    """Two folders of a finished training to be one but for rounding: files, history, weights."""
    names = {file.relative_to(a).as_posix() for file in a.rglob("*")}
    assert names == {file.relative_to(b).as_posix() for file in b.rglob("*")} and "config.json" in names
    first, second = (json.loads((out / "training.json").read_text()) for out in (a, b))
    assert len(first["history"]) == len(second["history"]) > 0
    for x, y in zip([*first["history"], {k: first.get(k, 0) for k in ("mean", "std")}],
                    [*second["history"], {k: second.get(k, 0) for k in ("mean", "std")}], strict=True):
        x, y = ({name: value for name, value in row.items() if name != "tokens_per_second"} for row in (x, y))
        assert x.pop("held_out", None) == y.pop("held_out", None)  # of pairs in the right order, and how many
        assert y == pytest.approx(x, rel=1e-3)
    for file in a.rglob("*.safetensors"):
        mine, theirs = load_file(file), load_file(b / file.relative_to(a))
        assert mine.keys() == theirs.keys() and all(torch.allclose(mine[name], theirs[name], atol=1e-4) for name in mine)


# --- the same training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "reward", "full"])
def test_a_training_of_two_processes_is_that_of_one(alone, two, name):
    ended = scene(two, name)
    assert ended["code"] == 0 and ended["out"].count("saved ") == 1
    assert len(ended["gradients"]) == len(alone[name]["gradients"]) == (STEPS if name != "full" else STEPS // 2)
    assert differing_steps(alone[name], ended) == []
    assert_like(alone["folder"] / name, two / name)
    assert not list((two / name).glob(".*"))


def test_what_no_loss_depends_on_has_no_gradient_in_several_processes_either(alone, two):
    """A reward model's language head: with one of zeros AdamW would make it decay."""
    assert all(reached.count(False) == 1 for reached in scene(two, "full")["reached"])


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(alone, two, name):
    assert 1 in differing_steps(alone["sft"], scene(two, name))


def test_a_training_begun_by_one_is_ended_by_two(alone, two):
    assert f"resumed from {two / 'begun-by-one' / 'step-0002'}" in scene(two, "resumed")["out"]
    assert_like(alone["folder"] / "sft", two / "begun-by-one")


def test_a_signal_to_one_process_ends_all_after_the_same_step_and_one_goes_on(alone, two, tmp_path):
    ended, out = scene(two, "terminated"), Path(shutil.copytree(two / "terminated", tmp_path / "out"))
    assert ended["code"] == 143 and ended["out"].count(f"stopped by SIGTERM after step 3 of {STEPS}; go on with") == 1
    assert [path.name for path in checkpoints(out)] == ["step-0002", "step-0003"] and damage(out / "step-0003") is None
    assert f"resumed from {out / 'step-0003'}" in main("sft.py", "--resume", "--out", out)
    assert_like(alone["folder"] / "sft", out)


def test_a_restart_goes_on_with_this_training_and_no_other(alone, two):
    assert f"resumed from {two / 'restarted' / 'step-0002'}" in scene(two, "restarted")["out"]
    assert_like(alone["folder"] / "sft", two / "restarted")
    assert f"--out {two / 'restarted'} already holds files" in one_line(two, "restarted_other", 2)


def test_dropout_follows_from_seed_step_and_micro_batch_alone():
    def drawn(seed: int, step: int) -> list[float]:
        loop = reward.Loop([torch.nn.Parameter(torch.zeros(1))], [1] * 4, reward.TrainingConfig(9, 4, 1e-3, 2, seed=seed))
        loop.step = step
        torch.rand(seed + step)  # whatever was drawn before
        return [torch.rand(()).item() for _ in loop.micro_batches([0, 1, 2, 3])]

    assert drawn(0, 0) == drawn(0, 0) and len({*drawn(0, 0), *drawn(0, 1), *drawn(1, 0)}) == 6


# --- one voice ---------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line_of_one_process(two):
    assert "argument --epochs: 0: must be at least 1" in one_line(two, "flag", 2)
    assert f"--out {two / 'again'} already holds files" in one_line(two, "again", 2)
    assert "flag seed is 1 in rank 1 and 0 in rank 0" in one_line(two, "unlike", 2)
    assert f"{two / 'sft.json'}: no such data file" in one_line(two, "missing", 2)
    assert not any((two / name).exists() for name in ("flag", "unlike", "missing", "fault"))


def test_nan_in_one_process_stops_all_with_one_line(two):
    words = f"stopped before the optimiser step; the last checkpoint is {two / 'nan' / 'step-0002'}"
    assert f"step 3: grad_norm is nan; {words}" in one_line(two, "nan", 1)
    assert not (two / "nan" / "config.json").exists()


def test_a_file_that_the_first_cannot_write_ends_all_with_one_line(two):
    assert "No space left on device" in one_line(two, "full_disk", 1) and not (two / "full_disk").exists()


def test_a_fault_in_one_process_is_seen_whole_and_once(two):
    ended = scene(two, "fault")
    assert ended["code"] == 1 and "KeyError: 'a fault of ours'" in ended["err"]


def test_of_errors_that_each_met_by_itself_the_first_is_said(monkeypatch):
    """The others lost that process, or were interrupted as it was."""
    monkeypatch.setattr(launch, "common", dist.HashStore())
    assert [ranks.tells(error) for error in (KeyboardInterrupt(), launch.Lost(), KeyboardInterrupt())] == [True, False, False]


def test_every_scene_of_trouble_is_looked_at():
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{name}"' in text for name in TROUBLE)


def test_the_commands_of_scale_md_are_torchruns_and_the_programs():
    parsers = {"reward.py": reward.parse_args, "evaluate.py": lambda argv: evaluate.build_parser().parse_args(["run", *argv])}
    lines = [line.split() for line in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8").splitlines()
             if line.startswith("    torchrun --standalone") and " train.py " not in line]
    assert {get_args_parser().parse_args(line[1:]).training_script for line in lines} == parsers.keys()
    for line in lines:
        given = get_args_parser().parse_args(line[1:])
        assert vars(parsers[given.training_script](given.training_script_args)) and len(" ".join(line)) <= 106


@pytest.mark.parametrize(("program", "build"), [("sft.py", sft.parse_args), ("reward.py", reward.parse_args), (
    "evaluate.py", lambda argv: evaluate.build_parser().parse_args(["run", *argv]))])
def test_torchrun_passes_every_flag_of_a_program_on(program, build, capsys):
    """It refuses what could be short for several of its own."""
    with pytest.raises(SystemExit):
        build(["--help"])
    words = sorted(set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"})
    given = get_args_parser().parse_args(["--standalone", "--nproc-per-node", "2", program, *words])
    assert len(words) > 15 and (given.training_script, given.training_script_args) == (program, words)


# --- evaluation --------------------------------------------------------------------------------------------------------


def test_an_evaluation_by_two_processes_is_that_of_one(alone, two):
    """Answers and judgements equal, figures but for rounding, and what is printed too."""
    run = alone["folder"] / "run"
    said = [main("evaluate.py", run, "--kl-tokens", 300), main("evaluate.py", run, "--kl-tokens", 1, "--judge", "reward")]
    for name, expected in zip(("evaluated", "judged"), said, strict=True):
        ended = scene(two, name)
        assert ended["code"] == 0 and ended["err"] == ""
        assert len(ended["out"].splitlines()) == len(expected.splitlines()) and ended["out"].count("written to") == 1
    mine, theirs = (json.loads((folder / "evaluation.json").read_text()) for folder in (run, two / "run"))
    assert list(mine) == list(theirs) and len(mine) == 4
    for name, expected in mine.items():
        got = theirs[name]
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            if key == "estimators":
                assert all(got[key][which] == pytest.approx(each, rel=1e-3, abs=1e-6) for which, each in value.items())
            elif isinstance(value, float) or key == "rewards":
                assert got[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key
            else:
                assert got[key] == value, key
    files = {file.relative_to(run).as_posix() for file in run.rglob("*")}
    assert files == {file.relative_to(two / "run").as_posix() for file in (two / "run").rglob("*")}


def test_a_rule_judges_by_two_processes_and_one_that_fails_in_one_ends_both_with_one_line(two):
    assert scene(two, "rule")["code"] == 0
    for result in json.loads((two / "rule" / "evaluation.json").read_text()).values():
        references = json.loads((two / "rule" / "outputs" / "reference_outputs.json").read_text())
        longer = [(len(text) > len(other["output"])) - (len(text) < len(other["output"])) for text, other in zip(
            result["responses"], references, strict=True)]
        assert result["preferences"] == [1.5 + sign / 2 for sign in longer]
    line = one_line(two, "rule_of_one", 1)
    assert "the rule rules.py:rule_of_one raised LookupError: no such word" in line
    assert not (two / "rule_of_one" / "evaluation.json").exists()


def test_what_evaluates_nothing_is_the_first_processs(two):
    assert scene(two, "winrate")["out"].count("50.00 ± ") == 1
    assert "--limit -1: must be at least 0" in one_line(two, "wrong", 2)
    assert "chat is with one process: start it with python" in one_line(two, "chat", 2)


def test_the_others_wait_for_a_judge_longer_than_for_one_another(two):
    assert scene(two, "slow_judge")["out"] == "judged"
