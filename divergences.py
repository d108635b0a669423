# SPDX-License-Identifier: MIT
"""How far has the policy moved from the reference? The per-token penalties of Table 1, and the exact KL they stand for.

Sun, Gupta and Iyyer (2023), section 3.2: PPO subtracts β times one of these from the reward of every sampled token
(Eq. 3). Each takes the log-probabilities that the policy π and the reference π_ref give to the *sampled* token, any
shape, and returns the penalty in the same shape, in nats, without β. Only `true_kl` looks at the whole vocabulary.

    python divergences.py        # Schulman's check: bias and deviation of every estimator, about a second

Departures from the paper: `negative_kl` is not in Table 1 (it is section 4's probe that maximises KL). From its code:
everything stays in log space and at least float32, so that no probability underflows into NaN; `bregman` is capped (see there).

Shapes: ... any leading dimensions (usually B batch, T response length), V vocabulary.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

# bregman holds π_ref/π, which grows without bound where π samples what it finds unlikely and π_ref does not; e^89
# overflows float32. Beyond e^40 (2e17) no reward means anything, and up to there the squares in a variance stay finite.
MAX_LOG_RATIO = 40.0


def log_ratio(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log π(y) − log π_ref(y), in float32 or, of doubles, in float64; all that the estimators below look at.

    Raises ValueError when the shapes differ: broadcasting would silently compare tokens with other tokens.
    """
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(f"logprobs {tuple(logprobs.shape)}, ref_logprobs {tuple(ref_logprobs.shape)}: shapes differ")
    return _wide(logprobs) - _wide(ref_logprobs)


def _wide(x: Tensor) -> Tensor:
    """At least float32: in half precision differences near the reference would round to 0."""
    return x if x.dtype == torch.float64 else x.float()


def kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log π − log π_ref. Unbiased, of either sign, high variance. Schulman's k1; Table 1, "KL"."""
    return log_ratio(logprobs, ref_logprobs)


def clamped_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """max(0, log π − log π_ref). Less variance, biased upwards. AlpacaFarm's default; Table 1, "Clamped KL"."""
    return log_ratio(logprobs, ref_logprobs).clamp(min=0.0)


def bregman(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """π_ref/π − 1 − log(π_ref/π). Unbiased and never negative. Schulman's k3; Table 1, "Bregman"; footnote 15.

    Exact up to π_ref/π = e^MAX_LOG_RATIO, where the ratio stops: one absurd token costs 2e17, not infinity.
    """
    inverse = -log_ratio(logprobs, ref_logprobs)  # log(π_ref/π)
    return torch.expm1(inverse.clamp(max=MAX_LOG_RATIO)) - inverse


def squared_error(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """½ (log π − log π_ref)². Slightly biased, never negative. Schulman's k2; Table 1, "Squared error"; footnote 14."""
    return 0.5 * log_ratio(logprobs, ref_logprobs).square()


def jensen_shannon(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """½ max(0, log π − log m) + ½ max(0, log π_ref − log m), with m = ½(π + π_ref). Table 1, "Jensen-Shannon".

    A surrogate on the one sampled token, bounded by ½ log 2, and no unbiased estimator of anything: y is sampled from π
    alone, while the second half of the true divergence is an expectation under π_ref, and both halves are clamped.
    """
    gap = log_ratio(logprobs, ref_logprobs)
    return 0.5 * _excess_over_mixture(gap) + 0.5 * _excess_over_mixture(-gap)


def _excess_over_mixture(gap: Tensor) -> Tensor:
    """max(0, log p − log ½(p + q)) from gap = log p − log q.

    log p − log ½(p + q) = −log(½ + ½ e^−gap) is positive exactly when gap is, so clamping the gap first gives the same
    maximum and keeps exp from overflowing. log1p(expm1(·)) is exactly 0 at gap 0, where logaddexp − log 2 need not be.
    """
    return -torch.log1p(0.5 * torch.expm1(-gap.clamp(min=0.0)))


def none(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """0: no regularisation (section 3.2, last item)."""
    return torch.zeros_like(log_ratio(logprobs, ref_logprobs))


def negative_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """−(log π − log π_ref): pays for leaving the reference. Section 4's probe of over-optimisation (Figure 3)."""
    return -log_ratio(logprobs, ref_logprobs)


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "clamped_kl": clamped_kl,
    "kl": kl,
    "bregman": bregman,
    "squared_error": squared_error,
    "jensen_shannon": jensen_shannon,
    "none": none,
    "negative_kl": negative_kl,
}
ALIASES = {"k1": "kl", "k2": "squared_error", "k3": "bregman"}  # Schulman (2020), "Approximating KL divergence"


def get_estimator(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The estimator of that name, or of Schulman's (k1, k2, k3). Raises ValueError with the list of what exists."""
    try:
        return ESTIMATORS[ALIASES.get(name, name)]
    except KeyError:
        aliases = ", ".join(f"{short} = {long}" for short, long in ALIASES.items())
        raise ValueError(f"estimator {name!r} does not exist; choose {', '.join(ESTIMATORS)} (or {aliases})") from None


def true_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Exact KL(π‖π_ref) at each position, summed over the vocabulary in at least float32: (..., V), (..., V) → (...).

    In nats; the "true KL" of section 4 and Figures 2 and 3. Tokens that π rules out (logit −inf) contribute nothing.
    Raises ValueError when the shapes differ.
    """
    logprobs, ref_logprobs = _wide(logits).log_softmax(-1), _wide(ref_logits).log_softmax(-1)
    gap = log_ratio(logprobs, ref_logprobs).masked_fill(logprobs.isneginf(), 0.0)  # 0 · (−inf − x) would be NaN
    return (logprobs.exp() * gap).sum(-1)


def schulman_check(ref_mean: float, n: int = 1_000_000) -> dict[str, tuple[float, float]]:
    """bias/KL and deviation/KL of every estimator for π = N(0, 1), π_ref = N(ref_mean, 1), whose KL is ref_mean²/2.

    Uses n equally likely quantiles of π instead of random draws: the same table everywhere, without Monte Carlo noise.
    """
    x = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    logprobs, ref_logprobs = -0.5 * x.square(), -0.5 * (x - ref_mean).square()  # the constant cancels
    true = 0.5 * ref_mean**2
    table = {}
    for name, estimator in ESTIMATORS.items():
        estimates = estimator(logprobs, ref_logprobs).double()
        bias = (estimates.mean().item() - true) / true
        table[name] = (round(bias, 3) + 0.0, estimates.std().item() / true)  # + 0.0: an unbiased row reads 0, not -0
    return table


def main() -> None:
    sys.stdout.reconfigure(errors="replace")  # a console that has no π shows ? and goes on
    near, far = schulman_check(ref_mean=0.1), schulman_check(ref_mean=1.0)
    print("Samples from π = N(0, 1); how well does each estimator guess KL(π‖π_ref) from one sample?\n")
    print(f"{'':22}{'π_ref = N(0.1, 1)':^22}{'π_ref = N(1, 1)':^22}")
    print(f"{'':22}{'true KL 0.005':^22}{'true KL 0.5':^22}")
    print(f"{'estimator':22}{'bias/KL':>9}{'std/KL':>10}   {'bias/KL':>9}{'std/KL':>10}")
    short = {long: alias for alias, long in ALIASES.items()}
    for name in ESTIMATORS:
        label = f"{name} ({short[name]})" if name in short else name
        print(f"{label:22}{near[name][0]:9.3f}{near[name][1]:10.2f}   {far[name][0]:9.3f}{far[name][1]:10.2f}")
    print("""
bias/KL  0 is unbiased; -1 is an estimator that always says 0; -2 is the right size with the wrong sign.
std/KL   the noise of one sample: at 20, it takes 400 samples to bring the noise down to the KL itself.

kl is unbiased, but near the reference its noise drowns it. squared_error and bregman are 14 times quieter there, and
bregman stays unbiased. clamped_kl throws the negative half away, so close by it reports mostly noise as KL.
jensen_shannon is bounded by 0.35 and clamped: a surrogate, no estimate of KL (nor of the true JS divergence).""")


if __name__ == "__main__":
    main()
