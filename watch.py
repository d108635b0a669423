"""Signs of trouble in a run of PPO, each said once, with the figure that gave it away and what to do about it.

    watch = Watch()
    for metrics in steps:                 # train.py's, one dictionary a step
        for line in watch(metrics):
            print(line)

A sign is a reason to look, not a proof: the run goes on. What can't go on (NaN) is an error in ppo.py.
"""

import math
from collections.abc import Callable

OVER_OPTIMISED = 0.4  # √KL beyond which reward and quality part (section 4, Figure 3 right)
CLIPPED = 0.5         # share of tokens
LONGER = 3.0          # times the first step's length, or a third of it
VALUE_LOSS = 10.0     # times the least so far
ERRORS = 4.0          # standard errors by which KL may lie below zero

Steps = list[dict[str, float]]


def negative_kl(steps: Steps) -> str | None:
    m = steps[-1]
    if m["kl_k1"] >= -ERRORS * m["kl_k1_se"] or m["kl_k1_se"] == 0:
        return None
    return (f"k1 is {m['kl_k1']:.4f} ± {m['kl_k1_se']:.4f} nats per token, below zero by more than chance: the tokens were not "
            "drawn from the distribution whose log-probabilities are compared (temperature, top-p, masks or dropout differ)")


def over_optimised(steps: Steps) -> str | None:
    m = steps[-1]
    root = math.sqrt(max(0.0, m["true_kl"]))
    if root <= OVER_OPTIMISED or len(steps) < 4 or m["score_mean"] <= max(s["score_mean"] for s in steps[:-1]):
        return None
    return (f"√KL is {root:.2f} and the reward still rises ({m['score_mean']:.2f}): beyond {OVER_OPTIMISED} the paper sees "
            "reward and quality part; read samples.jsonl, take an earlier checkpoint, a larger beta or a smaller learning rate")


def length_changed(steps: Steps) -> str | None:
    first, now = steps[0]["length"], steps[-1]["length"]
    if first / LONGER <= now <= first * LONGER:
        return None
    what = "grown" if now > first else "shrunk"
    return (f"responses have {what} from {first:.0f} to {now:.0f} tokens: the reward model seems to pay for "
            f"{'length' if now > first else 'brevity'} itself; read samples.jsonl")


def never_ending(steps: Steps) -> str | None:
    if steps[-1]["finished"] >= 0.05:
        return None
    return (f"{100 * (1 - steps[-1]['finished']):.0f} % of the responses never end: raise --response-length, set "
            "--missing-eos-penalty, or check that the tokenizer's EOS is the one that the policy was trained with")


def much_clipped(steps: Steps) -> str | None:
    if steps[-1]["clip_fraction"] <= CLIPPED:
        return None
    return (f"{100 * steps[-1]['clip_fraction']:.0f} % of the tokens were clipped: most of the update is thrown away; lower "
            "--learning-rate or --ppo-epochs")


def value_diverges(steps: Steps) -> str | None:
    least, now = min(s["value_loss"] for s in steps), steps[-1]["value_loss"]
    if now <= VALUE_LOSS * max(least, 1e-3):
        return None
    return (f"the value loss is {now:.3g}, {now / max(least, 1e-9):.0f} times its least: advantages are noise by now; lower "
            "--learning-rate, or look at the reward's scale")


def constant_reward(steps: Steps) -> str | None:
    if steps[-1]["score_std"] > 1e-6:
        return None
    return (f"every response got the reward {steps[-1]['score_mean']:.4g}: there is nothing to learn; look at the reward model, "
            "its tokenizer and the prompt template")


def empty_responses(steps: Steps) -> str | None:
    if steps[-1]["empty"] <= 0.2:
        return None
    return f"{100 * steps[-1]['empty']:.0f} % of the responses are empty (EOS comes first); look at the prompt template"


SIGNS: list[Callable[[Steps], str | None]] = [negative_kl, over_optimised, length_changed, never_ending, much_clipped,
                                              value_diverges, constant_reward, empty_responses]


class Watch:
    """Remembers the steps so far and which signs have been said."""

    def __init__(self, earlier: Steps = ()):
        self.steps: Steps = []
        self.said: set[str] = set()
        for metrics in earlier:  # of a run that is resumed: what they showed was said then
            self(metrics)

    def __call__(self, metrics: dict[str, float]) -> list[str]:
        """The signs that this step shows for the first time."""
        self.steps.append(metrics)
        lines = []
        for sign in SIGNS:
            if sign.__name__ not in self.said and (line := sign(self.steps)):
                self.said.add(sign.__name__)
                lines.append(f"warning, step {metrics['step']}: {line}")
        return lines
