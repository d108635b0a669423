# SPDX-License-Identifier: MIT
"""Signs of trouble in a run of PPO, each said once, with the figure that gave it away and what to do about it.

    watch = Watch()
    for metrics in steps:                 # train.py's, one dictionary a step
        for line in watch(metrics):
            print(line)

A sign is a reason to look, not a proof: the run goes on. What can't go on (NaN) is an error in ppo.py.
"""

import math
from collections.abc import Callable, Iterable
from statistics import median
from typing import NamedTuple

OVER_OPTIMISED = 0.4  # √KL beyond which reward and quality part (section 4, Figure 3 right)
CLIPPED = 0.5         # share of tokens
LONGER = 3.0          # times the first step's length, or a third of it
VALUE_LOSS = 10.0     # times the least so far of the median of three steps: one odd batch moves no median
ERRORS = 4.0          # standard errors by which KL may lie below zero

Metrics = dict[str, float]


class Past(NamedTuple):
    """What the signs need of the steps before this one; nothing that grows."""

    steps: int
    first_length: float
    value_losses: tuple[float, ...]  # the last two
    least_value_loss: float
    highest_score: float

    def after(self, m: Metrics) -> "Past":
        three = (*self.value_losses, m["value_loss"])
        least = min(self.least_value_loss, median(three)) if len(three) == 3 else self.least_value_loss
        return Past(self.steps + 1, self.first_length, three[-2:], least, max(self.highest_score, m["score_mean"]))


def negative_kl(m: Metrics, past: Past) -> str | None:
    if m["kl_k1"] >= -ERRORS * m["kl_k1_se"] or m["kl_k1_se"] == 0:
        return None
    return (f"k1 is {m['kl_k1']:.4f} ± {m['kl_k1_se']:.4f} nats per token, below zero by more than chance: the tokens were not "
            "drawn from the distribution whose log-probabilities are compared (temperature, top-p, masks or dropout differ)")


def over_optimised(m: Metrics, past: Past) -> str | None:
    root = math.sqrt(max(0.0, m["true_kl"]))
    if root <= OVER_OPTIMISED or past.steps < 3 or m["score_mean"] <= past.highest_score:
        return None
    return (f"√KL is {root:.2f} and the reward still rises ({m['score_mean']:.2f}): beyond {OVER_OPTIMISED} the paper sees "
            "reward and quality part; read samples.jsonl, take an earlier checkpoint, a larger beta or a smaller learning rate")


def length_changed(m: Metrics, past: Past) -> str | None:
    first, now = past.first_length, m["length"]
    if first / LONGER <= now <= first * LONGER:
        return None
    grown = now > first
    return (f"responses have {'grown' if grown else 'shrunk'} from {first:.0f} to {now:.0f} tokens: the reward model seems to "
            f"pay for {'length' if grown else 'brevity'} itself; read samples.jsonl")


def never_ending(m: Metrics, past: Past) -> str | None:
    if m["finished"] >= 0.05:
        return None
    return (f"{100 * (1 - m['finished']):.0f} % of the responses never end: raise --response-length, set --missing-eos-penalty, "
            "or check that the tokenizer's EOS is the one that the policy was trained with")


def much_clipped(m: Metrics, past: Past) -> str | None:
    if m["clip_fraction"] <= CLIPPED:
        return None
    return (f"{100 * m['clip_fraction']:.0f} % of the tokens were clipped: most of the update is thrown away; lower "
            "--learning-rate or --ppo-epochs")


def value_diverges(m: Metrics, past: Past) -> str | None:
    least, now = past.least_value_loss, m["value_loss"]
    if now <= VALUE_LOSS * max(least, 1e-3):
        return None
    return (f"the value loss is {now:.3g}, {now / max(least, 1e-9):.0f} times its least: advantages are noise by now; lower "
            "--learning-rate, or look at the reward's scale")


def constant_reward(m: Metrics, past: Past) -> str | None:
    if m["score_std"] > 1e-6:
        return None
    return (f"every response got the reward {m['score_mean']:.4g}: there is nothing to learn; look at the reward model, its "
            "tokenizer and the prompt template")


def empty_responses(m: Metrics, past: Past) -> str | None:
    if m["empty"] <= 0.2:
        return None
    return f"{100 * m['empty']:.0f} % of the responses are empty (EOS comes first); look at the prompt template"


SIGNS: list[Callable[[Metrics, Past], str | None]] = [negative_kl, over_optimised, length_changed, never_ending, much_clipped,
                                                      value_diverges, constant_reward, empty_responses]


class Watch:
    """Remembers what it must of the steps so far, and which signs have been said."""

    def __init__(self, earlier: Iterable[Metrics] = ()):
        self.past: Past | None = None
        self.shown: set[str] = set()
        for metrics in earlier:  # of a run that is resumed: what they showed was said then
            self(metrics)

    def __call__(self, metrics: Metrics) -> list[str]:
        """The signs that this step shows for the first time."""
        past = self.past or Past(0, metrics["length"], (), math.inf, metrics["score_mean"])
        lines = []
        for sign in SIGNS:
            if sign.__name__ not in self.shown and (line := sign(metrics, past)):
                self.shown.add(sign.__name__)
                lines.append(f"warning, step {metrics['step']}: {line}")
        self.past = past.after(metrics)
        return lines
