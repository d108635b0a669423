"""Runs of a second, for the tests of everything that trains, resumes or reads a run folder."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from conftest import ROOT
from safetensors.torch import load_file

import train
from training.config import RunConfig, build_config, stored_config

STEPS = 3


def settings(world: Path, out: Path, **changes) -> dict:
    """Flags of a run of a second: 8 responses of up to 8 tokens a step, two optimiser steps of 4 in each epoch."""
    data = {"data": str(world / "data" / "ppo.json"), "evaluation": str(world / "data" / "evaluation.json")}
    sizes = dict(steps=STEPS, save_every=1, rollout_batch_size=8, step_batch_size=4, micro_batch_size=2,
                 rollout_micro_batch_size=4, response_length=8, learning_rate=0.01, warmup_steps=1)
    places = dict(policy=str(world / "sft"), reward=str(world / "reward"), out=str(out), prompt_template="tiny",
                  policy_device="cpu", reference_device="cpu")
    return data | sizes | places | changes


def start(given: dict, resume: bool = False) -> str:
    """Runs train.py's loop in this process; returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()):
        train.train(stored_config(given) if resume else build_config(given), resume)
    return printed.getvalue()


def configured(world: Path, out: Path, **changes) -> RunConfig:
    """The configuration of such a run."""
    return build_config(settings(world, out, **changes))


def records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def timeless(out: Path) -> dict:
    """Everything a run computed, without the seconds it took."""
    metrics = [{k: v for k, v in m.items() if not k.startswith("seconds_")} for m in records(out / "metrics.jsonl")]
    return {"metrics": metrics} | {name: records(out / f"{name}.jsonl") for name in ("samples", "evaluations")
                                   if (out / f"{name}.jsonl").exists()}


def weights(step: Path) -> dict[str, torch.Tensor]:
    return {f"{file.parent.name}/{file.name}/{name}": tensor for file in sorted(step.glob("*/*.safetensors"))
            for name, tensor in load_file(file).items()}


def assert_same_run(a: Path, b: Path, step: str = f"step-{STEPS:04d}") -> None:
    """Bit for bit: metrics, samples, evaluations, weights, optimiser, random states."""
    assert timeless(a) == timeless(b)
    first, second = weights(a / step), weights(b / step)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert state_of(a / step) == state_of(b / step)


def state_of(step: Path):
    """trainer/state.pt with lists for tensors, so that == compares all of it."""
    def plain(x):
        if isinstance(x, torch.Tensor):
            return x.tolist()
        return {k: plain(v) for k, v in x.items()} if isinstance(x, dict) else x

    return plain(torch.load(step / "trainer" / "state.pt", weights_only=True))


def to_flags(given: dict) -> list[str]:
    return [part for name, value in given.items() if value is not None
            for part in (f"--{name.replace('_', '-')}", str(value))]


# --- stages 1 and 2 ------------------------------------------------------------------------------------------------


def write_stage_data(world: Path, folder: Path) -> None:
    """sft.json and reward.json: twenty records of each."""
    tasks = json.loads((world / "data" / "ppo.json").read_text())[:20]
    (folder / "sft.json").write_text(json.dumps(tasks))
    pairs = [{"instruction": task["instruction"], "input": task["input"], "output_1": task["output"], "output_2": "No.",
              "preference": 1 + i % 2} for i, task in enumerate(tasks)]
    (folder / "reward.json").write_text(json.dumps(pairs))


# --- scenes that two processes play --------------------------------------------------------------------------------


def played_by_two(worker: str, world: Path, folder: Path) -> Path:
    """The folder in which two processes over gloo have played all of a worker's scenes."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           str(ROOT / "tests" / worker), str(world), str(folder)], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def scene(two: Path, name: str) -> dict:
    """How it ended for the first process, after a look at the second, which ends alike and says nothing."""
    first, second = (torch.load(two / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["code"] == second["code"] and (second["out"], second["err"]) == ("", "")
    return first


def one_line(two: Path, name: str, code: int) -> str:
    """What it said as it ended so."""
    ended = scene(two, name)
    assert ended["code"] == code and ended["err"].count("\n") == 1, ended["err"]
    return ended["err"]
