# SPDX-License-Identifier: MIT
"""The lines that a run leaves in its folder, and the same numbers where they are seen while it goes: --log-to tensorboard.

    record = Record(run, state.step)
    record("metrics", {"step": 1, "score_mean": 0.03, ...})      # a line in metrics.jsonl, curves under train/

The paper's runs were watched so. Both are extras: without --log-to neither is imported.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from training.config import RunConfig
from training.folder import append_line

Show = Callable[[dict[str, float], int], object]  # numbers by name, at a step


class Record:
    """Appends lines; in the process that does so first it also opens the log."""

    def __init__(self, run: RunConfig, step: int):
        self.run, self.step, self.show = run, step, None

    def __call__(self, name: str, line: dict) -> None:
        append_line(Path(self.run.out) / f"{name}.jsonl", line)
        if self.run.log_to and self.show is None:
            self.show = LOGS[self.run.log_to][1](self.run, self.step)
        if self.show:
            group = "train" if name == "metrics" else "evaluation"
            numbers = {f"{group}/{key}": x for key, x in line.items() if isinstance(x, (int, float)) and key != "step"}
            self.show(numbers, line["step"])


def tensorboard(run: RunConfig, step: int) -> Show:
    """Event files in the run folder; what a resumed run goes over again is taken back."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(Path(run.out) / "tensorboard"), purge_step=step + 1 if step else None)

    def show(numbers: dict[str, float], at: int) -> None:
        for name, x in numbers.items():
            writer.add_scalar(name, x, at)
        writer.flush()

    return show


def wandb(run: RunConfig, step: int) -> Show:
    """A run of Weights & Biases by the folder's name, which a resumed one goes on with."""
    import wandb as its

    out = Path(run.out)
    its.init(project="lora-ppo", name=out.name, id=out.name, dir=str(out), config=run.to_dict(), resume="allow")
    return lambda numbers, at: its.log(numbers, step=at)


LOGS: dict[str, tuple[str, Callable[[RunConfig, int], Show]]] = {"tensorboard": ("tensorboard", tensorboard),
                                                                 "wandb": ("wandb", wandb)}


def require_log(run: RunConfig) -> None:
    """Raises ValueError where --log-to asks for a package that is not there."""
    if run.log_to and importlib.util.find_spec(LOGS[run.log_to][0]) is None:
        raise ValueError(f"--log-to {run.log_to}: the package is missing: pip install {LOGS[run.log_to][0]}")
