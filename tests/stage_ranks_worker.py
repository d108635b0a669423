"""What test_stage_ranks.py has two processes do: torchrun --standalone --nproc-per-node 2 tests/stage_ranks_worker.py WORLD
FOLDER, with the project and tests/ in PYTHONPATH.

Every scene is a call of the main of sft.py, reward.py or evaluate.py in both processes; FOLDER/<scene>-<rank>.pt says how it
ended and holds what `recorded` saw.
"""

import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks_worker import changed, mean_for_sum

import evaluate
import reward
import sft
from training import launch, ranks, stages

RANK = int(os.environ.get("RANK", 0))
PROGRAMS = {"sft.py": sft, "reward.py": reward, "evaluate.py": evaluate}
STEPS = 8  # two epochs of 16 sequences in batches of 5: the last of an epoch is one sequence, and one of two processes has none


def flags(program: str, world: Path, folder: Path, out: str, *more: object) -> list[str]:
    """Of a training of a second on FOLDER/sft.json or reward.json, with dropout."""
    base, share = {"sft.py": ("--model", "--validation"), "reward.py": ("--base", "--held-out")}[program]
    given = [base, world / "sft", "--data", folder / program.replace(".py", ".json"), "--out", folder / out, "--prompt-template",
             "tiny", share, 0.2, "--save-every", 2, "--epochs", 2, "--batch-size", 5, "--micro-batch-size", 2,
             "--learning-rate", 0.003, "--lora-dropout", 0.3, "--device", "cpu"]
    return [str(word) for word in (*given, *more)]


@contextlib.contextmanager
def recorded() -> Iterator[dict]:
    """Inside, the raw gradient of every step is kept, with which parameters have one."""
    kept: dict = {"gradients": [], "reached": []}
    clip = torch.nn.utils.clip_grad_norm_

    def clip_and_keep(parameters, *rest):
        kept["gradients"].append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).clone())
        kept["reached"].append([p.grad is not None for p in parameters])
        return clip(parameters, *rest)

    with changed(torch.nn.utils, clip_grad_norm_=clip_and_keep):
        yield kept


def play(folder: Path, scene: str, program: str, argv: list[str]) -> None:
    """The program's main with those flags, as this process sees it."""
    out, err = io.StringIO(), io.StringIO()
    with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), changed(sys, argv=[program, *argv]),
          recorded() as kept):
        try:
            code = PROGRAMS[program].main()
        except SystemExit as left:
            code = left.code
    said = "".join(line + "\n" for line in err.getvalue().splitlines() if ".py: " in line or "Error" in line)
    torch.save({"code": code, "out": out.getvalue(), "err": said} | kept, folder / f"{scene}-{RANK}.pt")


# --- what may go wrong, in one of the two ------------------------------------------------------------------------------


def after(step: int, do: Callable[[Any], object], rank: int = 1) -> contextlib.AbstractContextManager:
    """Inside, do(loop) is called in that process after that step, before anything is saved."""
    honest = reward.Loop.update

    def update(self, loss):
        honest(self, loss)
        if self.step == step and RANK == rank:
            do(self)

    return changed(reward.Loop, update=update)


def nan_gradient(loop: Any) -> None:
    loop.parameters[-1].register_hook(lambda gradient: gradient * torch.nan)


def terminated(loop: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def no_room(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def missing(path: str, **_: Any) -> None:
    raise FileNotFoundError(f"{path}: no such data file")


def broken(*_: Any, **more: Any) -> None:
    raise KeyError("a fault of ours")


TROUBLE: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "nan": lambda: after(2, nan_gradient),
    "terminated": lambda: after(3, terminated),
    "full_disk": lambda: changed(stages, write_tensors=no_room) if RANK == 0 else contextlib.nullcontext(),
    "missing": lambda: changed(sft, load_instructions=missing) if RANK == 1 else contextlib.nullcontext(),
    "fault": lambda: changed(sft, load_base=broken) if RANK == 1 else contextlib.nullcontext(),
}


# --- mutants: what the comparison with one process must notice ---------------------------------------------------------


@contextlib.contextmanager
def unseeded_dropout() -> Iterator[None]:
    torch.manual_seed(RANK)
    with changed(torch, manual_seed=lambda seed: None):
        yield


MUTANTS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "mean_for_sum": lambda: changed(ranks.Ranks, total=mean_for_sum),
    "everything_twice": lambda: changed(ranks.Ranks, share=lambda self, items: items),
    "unseeded_dropout": unseeded_dropout,
}


def slow_judge(folder: Path) -> None:
    """What the first does at leisure lasts longer than the others' patience in all else."""
    ranks.here().gather(lambda: None)  # all are here
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    done = ranks.first_at_leisure(lambda: time.sleep(1.5) or "judged")
    dist.distributed_c10d._set_pg_timeout(launch.TIMEOUT)
    torch.save({"code": 0, "out": done if RANK == 0 else "", "err": ""}, folder / f"slow_judge-{RANK}.pt")


def main() -> None:
    world, folder = map(Path, sys.argv[1:])

    def train(scene: str, program: str = "sft.py", *more: object) -> None:
        play(folder, scene, program, flags(program, world, folder, scene, *more))

    with launch.joined(), changed(dist, destroy_process_group=lambda: None):  # there are more scenes to come
        train("sft")
        train("reward", "reward.py")
        train("full", "reward.py", "--tuning", "full", "--weight-decay", 0.1, "--epochs", 1, "--learning-rate", 0.001)
        train("again", "sft.py")  # FOLDER/again holds files
        train("flag", "sft.py", "--epochs", 0)
        train("unlike", "sft.py", "--seed", RANK)
        play(folder, "resumed", "sft.py", ["--resume", "--out", str(folder / "begun-by-one")])
        for name, trouble in TROUBLE.items():
            with trouble():
                train(name)
        with changed(os, environ=os.environ | {"TORCHELASTIC_RESTART_COUNT": "1"}):
            train("restarted")
            train("restarted_other", "sft.py", "--out", folder / "restarted", "--lora-rank", 4)
        for name, mutant in MUTANTS.items():
            with mutant():
                train(name, "sft.py", "--epochs", 1)
        for name, more in {"evaluated": ["--kl-tokens", "300"], "judged": ["--kl-tokens", "1", "--judge", "reward"],
                           "wrong": ["--limit", "-1"]}.items():
            play(folder, name, "evaluate.py", [str(folder / "run"), *more])
        for rule in ("rule", "rule_of_one"):
            named = ["--kl-tokens", "1", "--judge", "reward", "--reward", f"{folder / 'rules.py'}:{rule}"]
            play(folder, rule, "evaluate.py", [str(folder / rule), *named])
        play(folder, "winrate", "evaluate.py", ["winrate", "--annotations", str(folder / "annotations.json")])
        play(folder, "chat", "evaluate.py", ["chat", str(folder / "run")])
        slow_judge(folder)


if __name__ == "__main__":
    main()
