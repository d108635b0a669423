# SPDX-License-Identifier: MIT
"""What a run shows while it trains: its sizes in words, a bar inside each step, a line a step, and some of its samples."""

import shutil
import sys
import time
from pathlib import Path

from tqdm import tqdm

from ppo import PPOConfig, Rollout
from training.checkpoint import State
from training.config import TINY_PRESET, RunConfig
from training.folder import append_line
from training.models import Models
from training.ranks import here


def describe_run(run: RunConfig, models: Models, state: State) -> str:
    """Sizes that follow from the configuration, in words."""
    config, prompts = run.ppo, state.prompts
    updates = config.ppo_epochs * config.rollout_batch_size // config.step_batch_size
    seen = run.steps * config.rollout_batch_size
    trained = sum(p.numel() for p in models.trained())
    total = sum(p.numel() for p in models.policy.parameters())
    lines = []
    if run.policy == TINY_PRESET["policy"]:
        numbers = [f"{name} {value}" for name, value in TINY_PRESET.items() if not isinstance(value, str)]
        lines.append(f"miniature world, preset: {', '.join(numbers)} (flags override it)")
    lines.append(f"{run.tuning}: {trained:,} trained parameters (policy, value and its head) beside {total:,} in the policy; "
                 f"penalty {run.estimator}, beta {config.beta}")
    lines.append(
        f"{run.steps} steps × {config.rollout_batch_size} responses = {seen:,} of {len(prompts.ids):,} instructions "
        f"({seen / len(prompts.ids):.2f} epochs; {prompts.dropped} dropped as longer than {run.query_length} tokens); "
        f"a step has {updates} optimiser steps of {config.step_batch_size}, in micro-batches of {config.micro_batch_size}")
    return "\n".join(lines)


class StepProgress:
    """One bar inside a step over all that is done with responses, named by the phase; also adds up each phase's seconds.

    Where several processes share the rollout, the others are taken to be as far with theirs.
    """

    def __init__(self, config: PPOConfig):
        total = config.rollout_batch_size * (2 + config.ppo_epochs)  # sampled, scored, and trained on in every epoch
        self.bar = tqdm(total=total, unit="response", leave=False, position=1, delay=1)
        self.seconds = {"generate": 0.0, "score": 0.0, "update": 0.0}
        self.mark = time.perf_counter()

    def resume(self) -> None:
        """What has passed since the last response belongs to no phase."""
        self.mark = time.perf_counter()

    def __call__(self, phase: str, n: int) -> None:
        """n more responses are through this phase."""
        now = time.perf_counter()
        self.seconds[phase] += now - self.mark
        self.mark = now
        self.bar.set_description(f"  {phase}", refresh=False)
        self.bar.update(n if phase == "update" else n * here().size)
        if self.bar.n == self.bar.total:
            self.bar.close()


LEGEND = """reward: the reward model's score; shaped: less beta · penalty (Eq. 3); k1, k3, KL: nats per token to the reference,
two estimates and the true one on 8 to 32 responses; clip: share of tokens clipped; grad: norm before clipping; lr: learning
rate; s: seconds to generate + score + update"""


def step_line(m: dict, columns: int = 1000) -> str:
    """The line a step prints. Where it is wider than the terminal, what matters least for a glance is left to metrics.jsonl."""
    parts = {
        "reward": f"reward {m['score_mean']:6.3f}", "shaped": f"shaped {m['shaped_reward']:6.3f}",
        "k1": f"k1 {m['kl_k1']:7.4f}", "k3": f"k3 {m['kl_k3']:6.4f}", "KL": f"KL {m['true_kl']:6.4f}",
        "tokens": f"tokens {m['length']:5.1f}", "clip": f"clip {m['clip_fraction']:5.3f}",
        "v-loss": f"v-loss {m['value_loss']:6.4f}", "grad": f"grad {m['grad_norm']:6.3f}", "lr": f"lr {m['learning_rate']:.1e}",
        "s": f"s {m['seconds_generate']:.1f}+{m['seconds_score']:.1f}+{m['seconds_update']:.1f}"}

    def line() -> str:
        return "  ".join([f"step {m['step']:4d}", *parts.values()])

    for name in ("k1", "lr", "v-loss", "k3", "grad", "clip", "shaped", "s", "tokens"):
        if len(line()) >= columns:
            del parts[name]
    return line()


def terminal_columns() -> int:
    """Of the terminal that lines go to; a file has room for all."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 1000


def save_samples(file: Path, state: State, rollout: Rollout, rows: list[int], tokenizer) -> None:
    """The first responses of a rollout in readable form; rows: which instructions they answer."""
    for row, index in enumerate(rows):
        example = state.prompts.examples[index]
        text = tokenizer.decode(rollout.responses[row][rollout.mask[row]])
        append_line(file, {"step": state.step, "instruction": example["instruction"], "input": example.get("input", ""),
                           "response": text, "score": round(rollout.scores[row].item(), 4)})
