"""Several processes are one run: the same numbers, the same files, one voice. bench/distributed.py is the long version.

tests/ranks_worker.py plays every scene in two processes over gloo, in one start; here it is compared with one process.
"""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from ranks_worker import MUTANTS, TROUBLE, recorded
from runs import STEPS, configured, one_line, played_by_two, records, scene, settings, start, timeless, weights
from torch.distributed.run import get_args_parser

from ppo import PPOConfig, Rollout
from training import launch, ranks
from training.config import FIELDS, build_parser
from training.folder import checkpoints, damage
from training.plan import require_sharable

LAST = f"step-{STEPS:04d}"
RULE = """import os
calls = []

def rule(prompts, responses):
    calls.append(len(prompts))
    if os.environ.get("RANK") == "1" and sum(calls) > 4:
        raise LookupError("no such word")
    return [float(len(r)) for r in responses]
"""


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory) -> dict:
    """The run of one process, with what `recorded` saw of it; its folder is `out`."""
    out = tmp_path_factory.mktemp("alone") / "run"
    with recorded() as kept:
        start(settings(world, out))
    return kept | {"out": out}


@pytest.fixture(scope="module")
def ending(world, tmp_path_factory) -> dict:
    """The same of a policy, `ending` beside the run, of which every fifth token ends a response."""
    folder = tmp_path_factory.mktemp("ending")
    shutil.copytree(world / "sft", folder / "ending")
    (folder / "ending" / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(2, 2560, 5))}))
    with recorded() as kept:
        start(settings(world, folder / "run", policy=str(folder / "ending")))
    return kept | {"out": folder / "run"}


@pytest.fixture(scope="module")
def two(world, alone, ending, tmp_path_factory) -> Path:
    """The folder in which two processes have played all scenes."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(ending["out"].with_name("ending"), folder / "ending")
    (folder / "rules.py").write_text(RULE)
    for name in ("begun-by-one", "begun-to-restart", "begun-to-shard"):
        shutil.copytree(alone["out"], folder / name)
        for step in checkpoints(folder / name)[1:]:
            shutil.rmtree(step)
    for name, out in (("begun-by-one",) * 2, ("begun-to-restart", "restarted"), ("begun-to-shard",) * 2):
        config = folder / name / "config.json"
        config.write_text(config.read_text().replace(str(alone["out"]), str(folder / out)))
    return played_by_two("ranks_worker.py", world, folder)


def differences(alone: dict, other: dict) -> list[str]:
    """Where a first PPO step isn't one process's: texts must be equal, numbers within 1e-4, and the raw gradient within 1e-4 of
    its norm. None of the latter: the step was stopped before."""
    found = []
    for name, expected in alone["rollout"].items():
        got = other["rollout"][name]
        same = got.shape == expected.shape and (torch.allclose(got, expected, atol=1e-4) if got.is_floating_point()
                                                else torch.equal(got, expected))
        found += [] if same else [name]
    expected = alone["gradient"]
    gap = (other.get("gradient", torch.zeros_like(expected)) - expected).norm() / expected.norm()
    return found if gap <= 1e-4 else [*found, "gradient"]


def assert_like(a: Path, b: Path) -> None:
    """Two runs to be one but for rounding: lines, texts, and the weights at the end."""
    assert sorted(p.relative_to(a).as_posix() for p in a.rglob("*")) == sorted(p.relative_to(b).as_posix() for p in b.rglob("*"))
    first, second = timeless(a), timeless(b)
    for name in ("metrics", "evaluations", "samples"):
        assert len(first[name]) == len(second[name]) > 0
        for x, y in zip(first[name], second[name], strict=True):
            assert x.keys() == y.keys()
            for key in x:
                assert y[key] == (pytest.approx(x[key], rel=1e-3, abs=1e-6) if is_numbers(x[key]) else x[key]), (name, key)
    first, second = weights(a / LAST), weights(b / LAST)
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in first)


def is_numbers(x: object) -> bool:
    return isinstance(x, float) or isinstance(x, list) and all(isinstance(each, (int, float)) for each in x)


# --- the same run ------------------------------------------------------------------------------------------------------


def test_one_step_of_two_processes_is_that_of_one(alone, two):
    assert {f.name for f in fields(Rollout)} == alone["rollout"].keys()
    assert differences(alone, scene(two, "run")) == []


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(alone, two, name):
    assert differences(alone, scene(two, name)) != []


def test_a_run_of_two_processes_leaves_what_one_leaves(alone, two):
    ended = scene(two, "run")
    assert ended["code"] == 0 and ended["out"].count("step    1  reward") == 1 and "win rate after" in ended["out"]
    assert_like(alone["out"], two / "run")
    assert not list((two / "run").glob(".*"))


def test_a_run_begun_by_one_is_ended_by_two(alone, two):
    assert "resumed from" in scene(two, "resumed")["out"]
    assert_like(alone["out"], two / "begun-by-one")


def test_a_run_begun_by_two_is_ended_by_one(alone, two, tmp_path):
    out = Path(shutil.copytree(two / "run", tmp_path / "run"))
    for step in checkpoints(out)[1:]:
        shutil.rmtree(step)
    assert f"resumed from {out / 'step-0001'}" in start({"out": str(out)}, resume=True)
    assert_like(alone["out"], out)


def test_samples_do_not_depend_on_how_many_are_sampled_at_once(world, alone, tmp_path):
    with recorded() as kept:
        start(settings(world, tmp_path / "run", rollout_micro_batch_size=3, steps=1, evaluation=None))
    assert differences(alone, kept) == []


# --- frozen weights shared (--shard) -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["whole", "in_step"])
def test_a_sharded_run_is_that_of_one_process(ending, two, name):
    """In step with gradient checkpointing, which changes no number."""
    lengths = ending["rollout"]["mask"].sum(1)
    assert lengths[:4].max() != lengths[4:].max()  # one process's rows end before the other's
    assert differences(ending, scene(two, name)) == []
    assert_like(ending["out"], two / name)


def test_rows_in_the_wrong_place_are_noticed(ending, two):
    assert differences(ending, scene(two, "others_rows")) != []


def test_a_sharded_run_is_resumed_by_one_process_and_the_reverse(alone, ending, two, tmp_path):
    assert "resumed from" in scene(two, "sharded_resumed")["out"]
    assert_like(alone["out"], two / "begun-to-shard")
    out = Path(shutil.copytree(two / "in_step", tmp_path / "run"))
    for step in checkpoints(out)[1:]:
        shutil.rmtree(step)
    printed = start({"out": str(out)}, resume=True)
    assert "frozen weights over" not in printed and "--shard: a process alone on its machine holds all of" in printed
    assert_like(ending["out"], out)


def test_what_cannot_be_sharded_is_refused_in_one_line(two, world, tmp_path):
    assert "all four models of a process stand on one device, not on cpu and cpu:0" in one_line(two, "two_devices", 2)
    with pytest.raises(ValueError, match="--shard: there is one process, which holds it all"):
        require_sharable(configured(world, tmp_path / "one", shard="auto"), resume=False)
    with pytest.raises(ValueError, match="--shard auto: only frozen weights are sharded, and under --tuning"):
        configured(world, tmp_path / "full", shard="auto", tuning="full")
    with pytest.raises(ValueError, match="compile with shard auto: layers whose weights come and go are not compiled"):
        configured(world, tmp_path / "compiled", shard="auto", compile=True)
    assert not any(tmp_path.iterdir())


def test_a_rule_that_fails_in_one_of_sharded_processes_ends_all_with_one_line(two):
    assert "step 2: the rule rules.py:rule raised LookupError: no such word" in one_line(two, "sharded_rule", 1)
    assert (two / "sharded_rule" / "debug-step-0002.pt").is_file()


def test_a_signal_to_one_of_sharded_processes_ends_all_after_the_same_step(two):
    assert f"stopped by SIGTERM after step 1 of {STEPS}" in scene(two, "sharded_term")["out"]
    assert [p.name for p in checkpoints(two / "sharded_term")] == ["step-0001"]


def test_a_fault_in_one_of_sharded_processes_is_told_by_that_one_alone(two):
    """The other waits in a forward pass, for weights that don't come, and loses the connection."""
    first, second = (torch.load(two / f"sharded_fault-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert second["code"] == 1 and "KeyError: 'a fault of ours'" in second["err"]
    assert first["code"] == 1 and first["err"] == ""
    assert [p.name for p in checkpoints(two / "sharded_fault")] == ["step-0001"]


# --- one voice ---------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line_of_one_process(two):
    assert "argument --beta: invalid float value: 'lots'" in one_line(two, "flag", 2)
    assert f"--out {two / 'run'} already holds files" in one_line(two, "again", 2)
    line = one_line(two, "uneven", 2)
    assert "2 processes can't share an optimiser step of 4 responses, which is 1 micro-batch of 4" in line
    assert "--micro-batch-size 2 gives each 1" in line and not (two / "uneven").exists()
    assert "flag seed is 1 in rank 1 and 0 in rank 0" in one_line(two, "unlike", 2)


def test_a_rule_that_fails_in_one_process_ends_all_with_one_line_and_one_bundle(two):
    line = one_line(two, "rule", 1)
    assert "step 2: the rule rules.py:rule raised LookupError: no such word (rules.py, line 7" in line
    assert f"the batch is in {two / 'rule' / 'debug-step-0002.pt'}; the last checkpoint is {two / 'rule' / 'step-0001'}" in line
    bundle = torch.load(two / "rule" / "debug-step-0002.pt", weights_only=True)
    assert sum(map(len, bundle["responses"])) == 8  # of both


@pytest.mark.parametrize(("name", "words"), [("nan_scores", "step 2: scores of 4 of 8 responses (the first is number 5) are NaN"),
                                             ("nan_gradient", "step 2: grad_norm is nan; stopped before the optimiser step")])
def test_nan_in_one_process_stops_all_with_one_line_and_one_bundle(two, name, words):
    line = one_line(two, name, 1)
    assert words in line and f"the last checkpoint is {two / name / 'step-0001'}" in line
    assert torch.load(two / name / "debug-step-0002.pt", weights_only=True)["responses"].shape[0] == 8


def test_a_fault_in_one_process_is_seen_whole_and_once(two):
    ended = scene(two, "fault")
    assert ended["code"] == 1 and "KeyError: 'a fault of ours'" in ended["err"]


def test_a_file_that_the_first_cannot_write_ends_all_with_one_line(two):
    assert "No space left on device" in one_line(two, "full_disk", 1)
    assert not checkpoints(two / "full_disk") and len(records(two / "full_disk" / "metrics.jsonl")) == 1


def test_a_signal_to_one_process_ends_all_after_the_same_step(two):
    ended, out = scene(two, "terminated"), two / "terminated"
    assert ended["code"] == 143 and f"stopped by SIGTERM after step 1 of {STEPS}; go on with" in ended["out"]
    assert [p.name for p in checkpoints(out)] == ["step-0001"] and damage(out / "step-0001") is None
    assert len(records(out / "metrics.jsonl")) == 1


def test_a_restart_goes_on_with_this_run_and_no_other(alone, two):
    assert "resumed from" in scene(two, "restarted")["out"]
    assert_like(alone["out"], two / "restarted")
    assert "already holds files" in one_line(two, "restarted_other", 2)


def test_every_scene_of_trouble_is_looked_at():
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{name}"' in text for name in TROUBLE)


# --- shares ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "size"), [(8, 2), (7, 3), (2, 4), (0, 2)])
def test_every_row_is_one_processs(n, size):
    team = []
    for rank in range(size):
        one = object.__new__(ranks.Ranks)
        one.rank, one.size = rank, size
        team.append(one)
    assert [i for one in team for i in range(n)[one.rows(n)]] == list(range(n))
    assert sorted(i for one in team for i in one.share(list(range(n)))) == list(range(n))


def test_each_process_sees_its_own_gpus_alone(monkeypatch):
    eight = [str(i) for i in range(8)]
    assert launch.own_gpus(eight, 3, 8) == ["3"] and launch.own_gpus(eight, 3, 4) == ["6", "7"]  # the paper's pairs
    assert launch.own_gpus([], 1, 2) == [] and launch.own_gpus(["GPU-a", "GPU-b"], 1, 2) == ["GPU-b"]
    with pytest.raises(ValueError, match="3 processes on 2 GPUs: at most one a GPU, --nproc-per-node 2"):
        launch.own_gpus(["0", "1"], 2, 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6")
    assert launch.visible_gpus() == ["4", "6"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert launch.visible_gpus() == ["0", "1"]


def test_a_share_that_is_not_even_is_refused_with_numbers(monkeypatch):
    def refusal(size: int, config: PPOConfig) -> str:
        monkeypatch.setattr(ranks, "here", lambda: type("Team", (), {"size": size}))
        with pytest.raises(ValueError) as found:
            ranks.require_even(config)
        return str(found.value)

    config = PPOConfig(rollout_batch_size=128, step_batch_size=64, micro_batch_size=32)
    assert "--micro-batch-size 16 gives each 1" in refusal(4, config)
    assert "--step-batch-size must be a multiple of 3" in refusal(3, config)
    monkeypatch.setattr(ranks, "here", lambda: type("Team", (), {"size": 4}))
    assert ranks.require_even(replace(config, micro_batch_size=8)) is None


def test_an_error_that_cannot_travel_is_told_by_one_that_can():
    class Odd(Exception):
        def __init__(self, first, second):
            super().__init__(first)

    told = ranks.portable(Odd("what happened", 1))
    assert type(told) is RuntimeError and str(told) == "Odd: what happened"


def test_torchrun_passes_every_flag_of_ours_on(world, tmp_path):
    """It refuses what could be short for several of its own."""
    words = [part for f in FIELDS for part in ([f"--{f.name.replace('_', '-')}"] if f.type is bool else
                                               [f"--{f.name.replace('_', '-')}", "1"])] + ["--resume", "--plan"]
    given = get_args_parser().parse_args(["--standalone", "--nproc-per-node", "2", "train.py", *words])
    assert given.training_script == "train.py" and given.training_script_args == words


def test_the_commands_of_scale_md_are_torchruns_and_ours():
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line.startswith("    torchrun") and " train.py " in line]
    assert len(lines) == 3
    for line in lines:
        given = get_args_parser().parse_args(line[1:])
        assert given.training_script == "train.py" and vars(build_parser("").parse_args(given.training_script_args))


def test_a_restart_does_not_meet_the_dead_of_the_start_before():
    """torchrun's store stays, and what they left in it."""
    store = dist.HashStore()

    def join(attempt: int, rank: int) -> list[str]:
        time.sleep(0.05 * (rank == attempt))  # each comes last once
        mine = launch.fresh(store, rank, 3)
        mine.set(f"address {rank}", f"{rank} of {attempt}")
        return [mine.get(f"address {other}").decode() for other in range(3)]

    for attempt in range(3):
        with ThreadPoolExecutor(3) as threads:
            found = threads.map(join, [attempt] * 3, range(3), timeout=20)
        assert list(found) == [[f"{other} of {attempt}" for other in range(3)]] * 3


def test_a_lost_connection_is_known_by_its_words_and_other_errors_stay_what_they_are():
    def fails(error: Exception) -> None:
        raise error

    closed = RuntimeError("[/src/third_party/gloo/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer. This is GLHF!")
    with pytest.raises(launch.Lost, match=r"does not answer \(Read error \[127.0.0.1\]:1: Connection reset by peer\)"):
        launch.watched(fails, closed)
    for other in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), torch.OutOfMemoryError("CUDA out of memory")):
        with pytest.raises(type(other)) as found:
            launch.watched(fails, other)
        assert found.value is other


def test_one_process_under_torchrun_is_alone(monkeypatch, world, tmp_path):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with launch.joined():
        assert type(ranks.here()).__name__ == "Alone" and ranks.speaks()
    ranks.require_even(configured(world, tmp_path / "run").ppo)
