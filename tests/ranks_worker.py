"""What test_ranks.py has two processes do: torchrun --standalone --nproc-per-node 2 tests/ranks_worker.py WORLD FOLDER, with the
project and tests/ in PYTHONPATH.

All in one start, as starting is what takes long. Every scene is a call of train.main, in both processes; FOLDER/<scene>-<rank>.pt
says how it ended, and for rank 0 holds what `recorded` saw.
"""

import contextlib
import io
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from runs import settings, to_flags

import ppo
import train
from training import checkpoint, launch, models, ranks, shard

RANK = int(os.environ.get("RANK", 0))
ONE_STEP = {"steps": 1, "evaluation": None}


@contextlib.contextmanager
def changed(owner: Any, **names: Any) -> Iterator[None]:
    """Inside, the owner has other attributes."""
    before = {name: getattr(owner, name) for name in names}
    for name, value in names.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def recorded() -> Iterator[dict]:
    """Inside, the first rollout and the raw gradients of the first optimiser step are kept."""
    kept: dict = {}
    collect, clip = ppo.collect, torch.nn.utils.clip_grad_norm_

    def collect_and_keep(*args, **rest):
        rollout = collect(*args, **rest)
        kept.setdefault("rollout", {f.name: getattr(rollout, f.name).clone() for f in fields(rollout)})
        return rollout

    def clip_and_keep(trained, *rest):
        kept.setdefault("gradient", torch.cat([p.grad.flatten() for p in trained]).clone())
        return clip(trained, *rest)

    with changed(ppo, collect=collect_and_keep), changed(torch.nn.utils, clip_grad_norm_=clip_and_keep):
        yield kept


def play(folder: Path, scene: str, flags: list[str]) -> None:
    """train.main with those flags, as this process sees it."""
    out, err = io.StringIO(), io.StringIO()
    store = dist.PrefixStore(scene, launch.common)  # else what one scene told would silence the next one
    with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), changed(sys, argv=["train.py", *flags]),
          changed(launch, common=store), recorded() as kept):
        try:
            code = train.main()
        except SystemExit as left:
            code = left.code
    said = "".join(line + "\n" for line in err.getvalue().splitlines() if "train.py: " in line or "Error" in line)
    torch.save({"code": code, "out": out.getvalue(), "err": said} | kept, folder / f"{scene}-{RANK}.pt")


# --- what may go wrong, in one of the two ------------------------------------------------------------------------------


@contextlib.contextmanager
def meddling(meddle: Callable[[models.Models, int], None]) -> Iterator[None]:
    """Inside, meddle(models, PPO steps taken) is called after building and after every step."""
    build, update = train.build_models, ppo.update
    steps = SimpleNamespace(taken=0, models=None)

    def build_and_meddle(*args):
        steps.models = build(*args)
        meddle(steps.models, 0)
        return steps.models

    def update_and_meddle(*args, **rest):
        result = update(*args, **rest)
        steps.taken += 1
        meddle(steps.models, steps.taken)
        return result

    with changed(train, build_models=build_and_meddle), changed(ppo, update=update_and_meddle):
        yield


def nan_scores(which: models.Models, steps: int) -> None:
    if RANK == 1 and steps == 1:
        which.reward = lambda ids, mask, n: torch.full((len(ids),), torch.nan)


def nan_gradient(which: models.Models, steps: int) -> None:
    if RANK == 1 and steps == 1:
        which.value.head.weight.register_hook(lambda gradient: gradient * torch.nan)


def fault(which: models.Models, steps: int) -> None:
    def broken(*args):
        raise KeyError("a fault of ours")

    if RANK == 1 and steps == 1:
        which.reference_logits = broken


def terminated(which: models.Models, steps: int) -> None:
    if RANK == 1 and steps == 1:
        os.kill(os.getpid(), signal.SIGTERM)


# --- mutants: what the comparison with one process must notice ---------------------------------------------------------


def mean_for_sum(self, stats, trained, total=ranks.Ranks.total):
    found = total(self, stats, trained)
    for p in trained:
        p.grad /= self.size
    return found


def swapped_rows(self, n, rows=ranks.Ranks.rows):
    other = SimpleNamespace(rank=self.size - 1 - self.rank, size=self.size)
    return rows(other, n)


@contextlib.contextmanager
def unseeded_dropout() -> Iterator[None]:
    """Each process goes on with its own generator."""
    update = ppo.update

    def update_unseeded(*args, **rest):
        torch.manual_seed(RANK)
        with changed(torch, manual_seed=lambda seed: None):
            return update(*args, **rest)

    with changed(ppo, update=update_unseeded):
        yield


@contextlib.contextmanager
def first_columns() -> Iterator[None]:
    """Each process draws for as many responses as it has, not for all of which it has some."""
    generate = models.sample

    def generate_with_first(*args, generator, **rest):
        first = torch.rand(generator.shape, generator=torch.Generator().manual_seed(0))
        return generate(*args, generator=first, **rest)

    with changed(models, sample=generate_with_first):
        yield


def others_rows(self, dtype, device, rows=shard.Shards.rows):
    """Each process takes the other's rows for its own."""
    part = rows(self, dtype, device)
    return lambda tensor: part(tensor.roll(len(tensor) // 2, 0))


MUTANTS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "mean_for_sum": lambda: changed(ranks.Ranks, total=mean_for_sum),
    "swapped_rows": lambda: changed(ranks.Ranks, rows=swapped_rows),
    "unseeded_dropout": unseeded_dropout,
    "first_columns": first_columns,
}
def full_disk(which: models.Models, steps: int) -> None:
    def no_room(*args, **rest):
        raise OSError(28, "No space left on device")

    if RANK == 0 and steps == 1:
        checkpoint.save_lora = no_room


TROUBLE = {"nan_scores": nan_scores, "nan_gradient": nan_gradient, "fault": fault, "terminated": terminated,
           "full_disk": full_disk}


def main() -> None:
    world, folder = map(Path, sys.argv[1:])
    begun = folder / "begun-by-one"

    def flags(name: str, **changes) -> list[str]:
        return to_flags(settings(world, folder / name, **changes))

    with launch.joined(), changed(dist, destroy_process_group=lambda: None):  # there are more scenes to come
        play(folder, "run", flags("run"))
        play(folder, "resumed", ["--resume", "--out", str(begun)])
        play(folder, "again", flags("run"))
        play(folder, "flag", flags("flag", beta="lots"))
        play(folder, "uneven", flags("uneven", micro_batch_size=4))
        play(folder, "unlike", flags("unlike", seed=RANK))
        play(folder, "rule", flags("rule", evaluation=None, reward=f"{folder / 'rules.py'}:rule"))
        for name, meddle in TROUBLE.items():
            with meddling(meddle), changed(checkpoint, save_lora=checkpoint.save_lora):
                play(folder, name, flags(name, evaluation=None, save_every=1 if name != "terminated" else 99))
        with changed(os, environ=os.environ | {"TORCHELASTIC_RESTART_COUNT": "1"}):
            if RANK == 0:
                shutil.copytree(begun.with_name("begun-to-restart"), folder / "restarted")
            play(folder, "restarted", flags("restarted"))
            play(folder, "restarted_other", flags("restarted", gamma=0.5))
        for name, mutant in MUTANTS.items():
            with mutant(), changed(train, finish=lambda *_: None):
                play(folder, name, flags(name, **ONE_STEP))
        ending = {"policy": str(folder / "ending")}
        play(folder, "whole", flags("whole", shard="whole", **ending))
        with changed(shard.Shards, rows=others_rows), changed(train, finish=lambda *_: None):
            play(folder, "others_rows", flags("others_rows", shard="whole", **ending, **ONE_STEP))
        play(folder, "in_step", [*flags("in_step", shard="in-step", **ending), "--gradient-checkpointing"])
        play(folder, "sharded_resumed", ["--resume", "--out", str(begun.with_name("begun-to-shard")), "--shard", "in-step"])
        play(folder, "two_devices", flags("two_devices", shard="auto", reference_device="cpu:0"))
        play(folder, "sharded_rule", flags("sharded_rule", evaluation=None, reward=f"{folder / 'rules.py'}:rule", shard="whole"))
        with meddling(terminated):
            play(folder, "sharded_term", flags("sharded_term", evaluation=None, save_every=99, shard="in-step"))
        with meddling(fault):  # the last of all: the first process loses the second
            play(folder, "sharded_fault", flags("sharded_fault", evaluation=None, shard="whole"))


if __name__ == "__main__":
    main()
