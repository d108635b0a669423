# SPDX-License-Identifier: MIT
"""PPO for language models, in the order in which it runs: rollout → shaped rewards → advantages → update.

Sun, Gupta and Iyyer (2023), section 3; Schulman et al. (2017) for the losses. One PPO step is two lines,

    rollout = collect(actors, penalty, prompts, prompt_mask, config)     # steps 1 to 4
    stats = update(actors, rollout, optimizer, config)                   # steps 5 to 7

    1  sample a response to every prompt                                 generate, sample_and_score
    2  let policy, value, reference and reward model read it             sample_and_score
    3  shape rewards: the score at the end, less a penalty at each token shape_rewards (Eq. 3), whiten
    4  estimate how much better each token was than expected             gae
    5  shuffle the rollout into optimiser steps, a few times over        update
    6  clipped losses of policy (Eq. 2) and value, token by token        policy_loss, value_loss
    7  one gradient over all micro-batches, clipped once, one step       gradient_step

Dropout is the caller's: put the models in eval mode for `collect` and in train mode for `update`. So is the learning rate:
set it once per PPO step (`learning_rate` below), not per optimiser step, which is how the released code counts too.

Departures from the released code, each explained where it happens: padding counts nowhere; gradients accumulate over
distinct micro-batches; whitened rewards are scaled, not shifted; the logged KL is unclamped.

Shapes: B batch, P prompt length (left-padded), T response length (right-padded), S = P + T sequence, V vocabulary.
`mask` is (B, T) and true through the first EOS. Log-probabilities, values, rewards and losses are float32.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Stats = dict[str, Tensor]
EosIds = int | Sequence[int]  # one id, or several that each end a response (Llama 3)
Progress = Callable[[str, int], None]  # called with ("generate" | "score" | "update", number of responses just done)


def setting(default: Any, unit: str, help: str, **bounds: float):
    """A configuration field; the training program makes its command-line flag and --help line from the metadata.

    bounds: low or above, high or below, which check_bounds holds the value to.
    """
    return field(default=default, metadata={"unit": unit, "help": help, "bounds": bounds})


@dataclass
class PPOConfig:
    """Every number of PPO, with the paper's value (section 2.2) or, where it is silent, the released code's."""

    rollout_batch_size: int = setting(256, "responses", "sampled per PPO step", low=1)
    step_batch_size: int = setting(128, "responses", "per optimiser step; the released code in effect uses 16", low=1)
    micro_batch_size: int = setting(8, "responses", "per forward pass, with backward or without; changes memory only", low=1)
    rollout_micro_batch_size: int = setting(32, "responses", "generated at once; changes memory only; 0: as many as fit", low=0)
    ppo_epochs: int = setting(2, "epochs", "passes over each rollout", low=1)
    response_length: int = setting(300, "tokens", "longest response that is sampled", low=1)
    temperature: float = setting(1.0, "", "divides the logits in sampling and in every log-probability alike", above=0)
    missing_eos_penalty: float | None = setting(None, "reward", "score of a response without EOS; None: its own")
    beta: float = setting(0.02, "reward/nat", "coefficient of the penalty (Eq. 3)", low=0)
    kl_target: float | None = setting(None, "nats/token", "KL towards which beta adapts; None: beta stays fixed", above=0)
    kl_horizon: float = setting(10_000, "responses", "the larger, the slower an adaptive beta moves")
    gamma: float = setting(1.0, "", "discount per token", low=0, high=1)
    lam: float = setting(0.95, "", "GAE's lambda: 0 trusts the value model, 1 the observed rewards", low=0, high=1)
    whiten_rewards: bool = setting(True, "", "scale shaped rewards to unit deviation over the rollout")
    cliprange: float = setting(0.2, "", "how far the probability ratio may leave 1 (epsilon of Eq. 2)", above=0)
    cliprange_value: float = setting(0.2, "reward", "how far a value may leave the rollout's", above=0)
    vf_coef: float = setting(0.1, "", "weight of the value loss", low=0)
    max_grad_norm: float = setting(1.0, "", "gradients longer than this are scaled down to it", above=0)
    learning_rate: float = setting(1e-5, "", "peak; rises over warmup_steps, then falls linearly over lr_steps", above=0)
    lr_steps: int = setting(781, "PPO steps", "until the learning rate is 0: ten epochs of the paper's data", low=1)
    warmup_steps: int = setting(5, "PPO steps", "until the peak learning rate", low=0)
    adam_eps: float = setting(1e-5, "", "Adam's epsilon", above=0)

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.kl_horizon < self.rollout_batch_size:  # beta would jump, and could turn negative
            raise ValueError(f"kl_horizon {self.kl_horizon} is below rollout_batch_size {self.rollout_batch_size}")
        require_divisible("rollout_batch_size", self.rollout_batch_size, "step_batch_size", self.step_batch_size)
        require_divisible("step_batch_size", self.step_batch_size, "micro_batch_size", self.micro_batch_size)


@dataclass
class Actors:
    """The four models of RLHF, and the policy's sampler, each as a callable of tensors on its own device.

    attention_mask is 1 at real tokens, which stand on the right: positions must be counted from it, as model.py does (a
    Hugging Face model takes them as position_ids; README.md has the lines).
    """

    policy: Callable     # (input_ids, attention_mask, keep) -> logits (B, keep, V) of the last `keep` positions
    value: Callable      # (input_ids, attention_mask) -> (B, S)
    reference: Callable  # as policy
    reward: Callable     # (input_ids, attention_mask, n) -> (B,); the last n positions are the response's
    # (prompts, prompt_mask) -> responses (B, up to T), sampled from the policy at config.temperature; or (responses, logprobs),
    # where the sampler's are as exact as the update's: it saves one forward pass in four. A bf16 KV cache, or adapters rounded
    # for sampling, would start the ratio off 1.
    generate: Callable
    eos_token_id: EosIds
    pad_token_id: int
    policy_device: Any = "cpu"     # policy and value
    reference_device: Any = "cpu"  # reference and reward
    team: Any = field(default_factory=lambda: Alone())  # who shares the work: nobody; see the end of this file


@dataclass
class Rollout:
    """One batch of experience, on the policy's device. Everything behind a response's EOS is 0 (ids: the pad id)."""

    prompts: Tensor         # (B, P) token ids, left-padded
    prompt_mask: Tensor     # (B, P) 1 at real tokens
    responses: Tensor       # (B, T) token ids, right-padded
    mask: Tensor            # (B, T) bool, true through the first EOS
    finished: Tensor        # (B,)   bool, the response holds an EOS
    logprobs: Tensor        # (B, T) log π_old of the sampled tokens
    ref_logprobs: Tensor    # (B, T) log π_ref of the sampled tokens
    values: Tensor          # (B, T) predicted at the position before each token
    scores: Tensor          # (B,)   what the reward model said, raw
    penalties: Tensor       # (B, T) the divergence estimator's values, without β
    rewards: Tensor         # (B, T) Eq. 3, scaled if whiten_rewards
    advantages: Tensor      # (B, T) whitened over the whole rollout
    returns: Tensor         # (B, T) what the value model should have predicted

    def __len__(self) -> int:
        return len(self.responses)

    def micro_batch(self, rows: Tensor) -> "Rollout":
        """The given rows, without the padding that they all share: their cost follows their real tokens."""
        start, stop = first_column(self.prompt_mask[rows]), longest(self.mask[rows])
        cut = {}
        for f in fields(self):
            x = getattr(self, f.name)[rows]
            cut[f.name] = x if x.ndim == 1 else x[:, start:] if f.name.startswith("prompt") else x[:, :stop]
        return Rollout(**cut)

    def packed(self) -> "Packed":
        """Prompts and responses as the models read them in the update."""
        width = longest_row(self.prompt_mask, self.mask)
        return pack(self.prompts, self.prompt_mask, self.responses, self.mask, width)


# ------------------------------------------------------------------------------ steps 1 to 4: the rollout (section 3.1)


@torch.no_grad()
def collect(actors: Actors, penalty: Callable, prompts: Tensor, prompt_mask: Tensor, config: PPOConfig,
            beta: float | None = None, progress: Progress = lambda phase, n: None) -> Rollout:
    """Samples one response to each prompt (B, P) and works out what it was worth.

    penalty(logprobs, ref_logprobs) → (B, T) is the divergence estimator; beta, its coefficient, is config.beta unless
    given (an adaptive one changes from step to step). Raises NotFinite for NaN or infinity.
    """
    prompts, prompt_mask = prompts.to(actors.policy_device), prompt_mask.to(actors.policy_device)
    # 1, 2: sample, and let all four models read what was sampled
    mine = actors.team.rows(len(prompts))
    scored = stack(actors.team.gather(lambda: sample_and_score(actors, prompts[mine], prompt_mask[mine], config, progress)))
    responses, mask, scores = (scored.pop(name) for name in ("responses", "mask", "scores"))
    responses = responses.masked_fill(~mask, actors.pad_token_id)
    scored = {name: real(x, mask) for name, x in scored.items()}  # logprobs, ref_logprobs, values
    # 3: rewards
    finished = (mask & is_eos(responses, actors.eos_token_id)).any(1)  # token ids: decoded text may hide or imitate an EOS
    judged = judged_scores(scores, finished, config.missing_eos_penalty)
    penalties = real(penalty(scored["logprobs"], scored["ref_logprobs"]), mask)
    rewards = shape_rewards(judged, penalties, mask, config.beta if beta is None else beta)
    if config.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    # 4: advantages
    advantages, returns = gae(rewards, scored["values"], mask, config.gamma, config.lam)
    advantages = whiten(advantages, mask)

    rollout = Rollout(prompts, prompt_mask, responses, mask, finished, scores=scores, penalties=penalties, rewards=rewards,
                      advantages=advantages, returns=returns, **scored)
    check_finite(rollout)
    return rollout


def judged_scores(scores: Tensor, finished: Tensor, missing_eos_penalty: float | None) -> Tensor:
    """What is trained on, (B,): the scores, with missing_eos_penalty in the place of those of responses without EOS."""
    return scores if missing_eos_penalty is None else scores.masked_fill(~finished, missing_eos_penalty)


def shape_rewards(scores: Tensor, penalties: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Eq. 3: [0 0 ... score] − β · penalty; (B,), (B, T), (B, T) → (B, T). The score lands on the last real token."""
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores must be {tuple(mask.shape[:1])} (B,), got {tuple(scores.shape)}")
    mask = mask.bool()
    is_last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    return real(scores.unsqueeze(1).expand(mask.shape), is_last) - beta * real(penalties, mask)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Unit deviation over real tokens, and zero mean if shift_mean; padding becomes 0. (B, T), (B, T) → (B, T)

    Without shift_mean this is a pure scale: 0 stays 0. The released code computes (x − mean) / std + mean, which moves
    every token's reward by mean · (1 − 1/std) and so pays or charges the policy for length. Nor is anything scaled that
    deviates by less than a hundredth of its size: of answers of one token that all earn 1, the 1e-8 would make 10,000.
    """
    variance = masked_variance(x, mask)
    scale = torch.rsqrt(variance + 1e-8)
    if shift_mean:
        return real(x - masked_mean(x, mask), mask) * scale
    deviates = variance > 1e-4 * masked_mean(x.square(), mask)
    return real(x, mask) * torch.where(deviates, scale, 1.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = PPOConfig.gamma,
        lam: float = PPOConfig.lam) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, Eq. 16): (B, T) each → advantages, returns (B, T).

    δ_t = r_t + γ V_{t+1} − V_t and A_t = δ_t + γλ A_{t+1}. Nothing follows EOS, so the value there is 0.
    """
    rewards, values = real(rewards, mask), real(values, mask)
    next_values = F.pad(values[:, 1:], (0, 1))
    deltas = rewards + gamma * next_values - values
    advantage = torch.zeros_like(deltas[:, 0])
    backwards = []
    for delta in deltas.unbind(1)[::-1]:
        advantage = delta + gamma * lam * advantage
        backwards.append(advantage)
    advantages = torch.stack(backwards[::-1], 1)
    return advantages, advantages + values


@torch.no_grad()
def sample_and_score(actors: Actors, prompts: Tensor, prompt_mask: Tensor, config: PPOConfig,
                     progress: Progress) -> dict[str, Tensor]:
    """responses, mask, logprobs, ref_logprobs, values (B, T) and scores (B,), all on policy_device.

    On two devices the second reads each chunk as soon as it is sampled, while the first samples the next one: a GPU
    works through what is queued for it and the program goes on. The old log-probabilities are the sampler's where it
    returns them, else those of the forward pass that the update uses; self_check holds either against the update's.
    """
    two_devices = torch.device(actors.policy_device) != torch.device(actors.reference_device)

    def read_frozen(text: "Packed", sequence: Tensor, attention: Tensor) -> dict[str, Tensor]:
        return score_frozen(actors, text, sequence, attention, config.temperature)

    sampled, chunks, frozen = [], [], []
    for rows in torch.arange(len(prompts), device=prompts.device).split(config.rollout_micro_batch_size or len(prompts)):
        start = first_column(prompt_mask[rows])
        sampled.append(sample(actors, prompts[rows, start:], prompt_mask[rows, start:]))
        chunks.append((prompts[rows], prompt_mask[rows], sampled[-1]["responses"], sampled[-1]["mask"]))
        if two_devices:
            frozen.append(in_batches(read_frozen, config.micro_batch_size, *chunks[-1]))
        progress("generate", len(rows))
    rollout = stack(sampled)
    logprobs_known = "logprobs" in rollout

    def read(text: "Packed", sequence: Tensor, attention: Tensor) -> dict[str, Tensor]:
        scored = score_trained(actors, text, config.temperature, logprobs_known)
        scored |= {} if two_devices else read_frozen(text, sequence, attention)
        progress("score", len(sequence))
        return scored

    # Both devices read the very same batches, so that equal weights give equal numbers: in a batch of other rows or other
    # padding bf16 rounds otherwise, and two equal models would pay a penalty on the difference. One device reads a batch once.
    if not two_devices:
        chunks = [(prompts, prompt_mask, rollout["responses"], rollout["mask"])]
    T = rollout["mask"].shape[1]
    rollout |= stack([in_batches(read, config.micro_batch_size, *chunk) for chunk in chunks], T)
    if two_devices:
        rollout |= {name: x.to(actors.policy_device) for name, x in stack(frozen, T).items()}
    return rollout


# ------------------------------------------------------------------------------- steps 5 to 7: the update (section 3.1)


def update(actors: Actors, rollout: Rollout, optimizer: torch.optim.Optimizer, config: PPOConfig,
           generator: torch.Generator | None = None, progress: Progress = lambda phase, n: None) -> dict[str, float]:
    """ppo_epochs passes over the rollout in optimiser steps of step_batch_size responses, reshuffled each epoch.

    The optimiser holds every trained parameter of policy and value; their joint gradient norm is clipped once per step.
    generator (CPU) alone decides the order and the dropout, for which torch is seeded anew before each micro-batch, so that
    a resumed run repeats them. Returns each statistic's mean over all steps (ratio_max: the largest). Raises ValueError when
    step_batch_size does not divide the rollout, NotFinite when a loss or gradient is not.
    """
    require_divisible("rollout of", len(rollout), "step_batch_size", config.step_batch_size)
    history = []
    for _ in range(config.ppo_epochs):  # 5: each epoch in another order
        order = torch.randperm(len(rollout), generator=generator).to(rollout.mask.device)
        for rows in order.split(config.step_batch_size):
            history.append(gradient_step(actors, rollout, rows, optimizer, config, generator))
            progress("update", len(rows))
    means = average(history, [1 / len(history)] * len(history))
    return {name: x.item() for name, x in means.items()}


def gradient_step(actors: Actors, rollout: Rollout, rows: Tensor, optimizer: torch.optim.Optimizer, config: PPOConfig,
                  generator: torch.Generator | None = None) -> Stats:
    """One optimiser step on the given rows of the rollout, accumulated over micro-batches.

    Each micro-batch counts by its share of the tokens, so any split gives the gradient of the undivided batch; a mean
    of means would weight tokens by the length of the responses beside them. (The released code goes over the same
    micro-batch again and again, and clips in between.) Raises NotFinite before a NaN could reach a weight.
    """
    lengths = rollout.prompt_mask[rows].sum(1) + rollout.mask[rows].sum(1)
    rows = rows[lengths.argsort(stable=True)]  # any split will do: like lengths together waste least
    n_tokens = rollout.mask[rows].sum()
    optimizer.zero_grad(set_to_none=True)
    seed = int(torch.randint(2**62, (), generator=generator))
    history, weights = [], []
    for i, micro_rows in actors.team.share(list(enumerate(rows.split(config.micro_batch_size)))):
        torch.manual_seed(seed + i)
        batch = rollout.micro_batch(micro_rows)
        weight = batch.mask.sum() / n_tokens
        # 6: loss = actor + vf_coef · critic. Two backward passes add up to its gradient and hold one model's activations.
        actor, actor_stats = actor_loss(actors.policy, batch, config)
        (weight * actor).backward()
        del actor
        critic, critic_stats = critic_loss(actors.value, batch, config)
        (weight * config.vf_coef * critic).backward()
        del critic
        history.append(actor_stats | critic_stats)
        weights.append(weight)
    # 7: one gradient, clipped once, one step
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    stats = actors.team.total(average(history, weights), trained)
    stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)  # the norm before clipping
    for name in ("policy_loss", "value_loss", "grad_norm"):
        if not stats[name].isfinite():
            raise NotFinite(f"{name} is {stats[name].item()}; stopped before the optimiser step", rollout)
    optimizer.step()
    return stats


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
                cliprange: float = PPOConfig.cliprange) -> tuple[Tensor, Stats]:
    """Eq. 2, negated to be minimised: −min(r A, clip(r, 1 − ε, 1 + ε) A), mean over real tokens. (B, T) each → scalar.

    approx_kl is the Bregman (k3) estimate of KL(π_old‖π), nats per token: how far the update has moved the policy.
    """
    logprobs, old_logprobs, advantages = real(logprobs, mask), real(old_logprobs, mask), real(advantages, mask)
    log_r = logprobs - old_logprobs
    r = log_r.exp()
    unclipped = -advantages * r
    clipped = -advantages * r.clamp(1 - cliprange, 1 + cliprange)
    loss = masked_mean(torch.maximum(unclipped, clipped), mask)
    with torch.no_grad():
        stats = {
            "clip_fraction": masked_mean(clipped > unclipped, mask),
            "approx_kl": masked_mean(log_r.expm1() - log_r, mask),
            "ratio_mean": masked_mean(r, mask),
            "ratio_max": real(r, mask).max(),
        }
    return loss, {"policy_loss": loss.detach(), **stats}


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor,
               cliprange: float = PPOConfig.cliprange_value) -> tuple[Tensor, Stats]:
    """½ max((V − R)², (V_near − R)²), mean over real tokens; V_near is V kept within cliprange of the rollout's value.

    The maximum is pessimistic like Eq. 2's minimum: moving further than cliprange earns nothing. (B, T) each → scalar.
    """
    values, old_values, returns = real(values, mask), real(old_values, mask), real(returns, mask)
    near = torch.clamp(values, old_values - cliprange, old_values + cliprange)
    unclipped = (values - returns).square()
    clipped = (near - returns).square()
    loss = 0.5 * masked_mean(torch.maximum(unclipped, clipped), mask)
    return loss, {"value_loss": loss.detach(), "value_clip_fraction": masked_mean(clipped > unclipped, mask)}


def actor_loss(policy: Callable, batch: Rollout, config: PPOConfig) -> tuple[Tensor, Stats]:
    """The policy's loss on one micro-batch, a mean over its real tokens."""
    logprobs, entropy = response_logprobs(policy, batch.packed(), config.temperature)
    loss, stats = policy_loss(logprobs, batch.logprobs, batch.advantages, batch.mask, config.cliprange)
    return loss, stats | {"entropy": masked_mean(entropy, batch.mask)}


def critic_loss(value: Callable, batch: Rollout, config: PPOConfig) -> tuple[Tensor, Stats]:
    """The value model's loss on one micro-batch, a mean over its real tokens."""
    values = response_values(value, batch.packed())
    return value_loss(values, batch.values, batch.returns, batch.mask, config.cliprange_value)


def average(history: list[Stats], weights: list) -> Stats:
    """Weighted mean of each statistic; of those named ..._max the largest."""
    return {name: torch.stack([s[name] for s in history]).max() if name.endswith("_max")
            else sum(w * s[name] for w, s in zip(weights, history, strict=True)) for name in history[0]}


# ---------------------------------------------------------------------------------------------------- between PPO steps


def adapt_beta(beta: float, kl: float, target: float, horizon: float, n: int) -> float:
    """The coefficient for the next step: Ziegler et al. (2019), section 2.2, a proportional controller.

    kl and target share a unit (kl_target's is nats per token); n responses were sampled in this step. The relative
    error is limited to ±20%, so that one odd batch moves beta by at most 0.2 · n / horizon of itself.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * n / horizon)


def learning_rate(step: int, config: PPOConfig) -> float:
    """The rate for PPO step 1, 2, ...: linear warm-up to the peak, then linear decay, at 0 after lr_steps.

    It does not depend on how many steps are taken, so that a run can be extended: the released code decays over
    20,000 · 10 // 256 = 781 steps, of which the paper takes 100 to 180. Counting from 1 spends no step at rate 0.
    """
    warmup_steps = max(1, config.warmup_steps)
    decay = (config.lr_steps - step + 1) / max(1, config.lr_steps - warmup_steps + 1)
    return config.learning_rate * max(0.0, min(step / warmup_steps, decay, 1.0))


# ------------------------------------------------------------------------------------------------- what a rollout shows


def rollout_stats(rollout: Rollout) -> dict[str, float]:
    """What the rollout shows before any update; means over real tokens, except score, length (tokens) and finished.

    kl_k1 and kl_k3 are nats per token as measured, unclamped, whatever penalty is trained with. kl_k1 may be negative:
    an unlucky sample of a positive quantity, no error. kl_k3 estimates the same and can't.
    """
    mask = rollout.mask
    gap = rollout.logprobs - rollout.ref_logprobs
    stats = {
        "score_mean": rollout.scores.mean(),
        "score_std": rollout.scores.std(correction=0),
        "penalty": masked_mean(rollout.penalties, mask),
        "kl_k1": masked_mean(gap, mask),
        "kl_k1_se": token_mean_error(gap, mask),
        "kl_k3": masked_mean(torch.expm1(-gap) + gap, mask),
        "length": mask.sum(1).float().mean(),
        "finished": rollout.finished.float().mean(),
        "empty": (rollout.finished & (mask.sum(1) == 1)).float().mean(),
        "explained_variance": explained_variance(rollout.returns, rollout.values, mask),
    }
    return {name: x.item() for name, x in stats.items()}


def explained_variance(returns: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Share of the returns' variance that the values foresaw; 0 where there is none to foresee."""
    there, left = masked_variance(returns, mask), masked_variance(returns - values, mask)
    return torch.where(there > 1e-8, 1 - left / there.clamp(min=1e-8), 0.0)


def token_mean_error(x: Tensor, mask: Tensor) -> Tensor:
    """Standard error of masked_mean(x, mask) when responses are independent and their tokens are not."""
    lengths, n = mask.sum(1), len(mask)
    residuals = (real(x, mask).float().sum(1) - masked_mean(x, mask) * lengths).square().sum()
    return (residuals * n / max(1, n - 1)).sqrt() / lengths.sum()


@torch.no_grad()
def self_check(policy: Callable, rollout: Rollout, config: PPOConfig) -> dict[str, float]:
    """Before the first update and in eval mode all are 0 within float error, or masks, positions or dropout are wrong.

    ratio_error: largest |ratio − 1| (ratio_error_mean: its mean over tokens) when the update's forward pass reads one
    micro-batch, spread over the rollout (so that its padding is not what it was in collect). reference_gap: largest
    |log π − log π_ref| of the whole rollout (reference_gap_mean: its mean over tokens).
    """
    spread = max(1, len(rollout) // config.micro_batch_size)
    rows = torch.arange(0, len(rollout), spread)[:config.micro_batch_size]
    batch = rollout.micro_batch(rows.to(rollout.mask.device))
    logprobs, _ = response_logprobs(policy, batch.packed(), config.temperature)
    error = (logprobs - batch.logprobs).expm1().abs()
    gap = (rollout.logprobs - rollout.ref_logprobs).abs()
    return {"ratio_error": real(error, batch.mask).max().item(),
            "ratio_error_mean": masked_mean(error, batch.mask).item(),
            "reference_gap": gap.max().item(),
            "reference_gap_mean": masked_mean(gap, rollout.mask).item()}


class NotFinite(FloatingPointError):
    """A quantity is NaN or infinite. Raised before an optimiser could take it; `rollout` holds what led to it."""

    def __init__(self, message: str, rollout: Rollout):
        super().__init__(message)
        self.rollout = rollout


def check_finite(rollout: Rollout) -> None:
    """Raises NotFinite for the first quantity, in the order in which they are computed, that holds NaN or infinity."""
    for name in ("logprobs", "ref_logprobs", "values", "scores", "penalties", "rewards", "advantages", "returns"):
        bad = ~getattr(rollout, name).isfinite()
        if bool(bad.any()):
            rows = bad.flatten(1).any(1).nonzero()[:, 0].tolist() if bad.dim() > 1 else bad.nonzero()[:, 0].tolist()
            raise NotFinite(f"{name} of {len(rows)} of {len(rollout)} responses (the first is number {rows[0] + 1}) are NaN or "
                            "infinite", rollout)


# ----------------------------------------------------------------------- bookkeeping: masks, and means over real tokens


def is_eos(responses: Tensor, eos_token_id: EosIds) -> Tensor:
    """Where a token ends a response: bool, of the same shape."""
    ends = (eos_token_id,) if isinstance(eos_token_id, int) else eos_token_id
    found = torch.zeros_like(responses, dtype=torch.bool)
    for end in ends:
        found = found | (responses == end)
    return found


def response_mask(responses: Tensor, eos_token_id: EosIds) -> Tensor:
    """(B, T) token ids → (B, T) bool, true through and including the first EOS, which may be one id or any of several.

    It never looks at pad ids: where pad = EOS, as in many tokenizers, a mask from pad ids would drop the EOS itself,
    and with it the token that carries the score.
    """
    ends = is_eos(responses, eos_token_id).long()
    return ends.cumsum(1) - ends == 0  # no EOS strictly before this token


def real(x: Tensor, mask: Tensor) -> Tensor:
    """x in float32, 0 in the padding. Filling, not multiplying, keeps even a NaN there out of sums and gradients.

    Raises ValueError unless x has the mask's shape: broadcasting would train on the wrong tokens without a word.
    """
    if x.shape != mask.shape:
        raise ValueError(f"expected the mask's shape {tuple(mask.shape)} (B, T), got {tuple(x.shape)}")
    return x.float().masked_fill(~mask.bool(), 0.0)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over real tokens: each token counts alike, whichever response it is in."""
    return real(x, mask).sum() / mask.sum()


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """Population variance over real tokens."""
    return masked_mean((x - masked_mean(x, mask)).square(), mask)


# --------------------------------------------------------- bookkeeping: log-probabilities and values of response tokens


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probability of each token under softmax(logits / temperature): (B, T, V), (B, T) → (B, T), float32.

    The temperature is that of sampling, in rollout and update alike: otherwise the ratio of Eq. 2 would compare two
    distributions from neither of which anything was sampled. (Hence no top-p or top-k either: this could not follow.)
    """
    # (logits.float() / temperature).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1), a few rows at a time
    return TokenLogprobs.apply(logits, tokens, temperature)[0]


class TokenLogprobs(torch.autograd.Function):
    """(logits (B, T, V), tokens (B, T), temperature) → (logprobs, entropy), both (B, T), float32, entropy in nats.

    In plain torch: log_pi = (logits.float() / temperature).log_softmax(-1), of which gather(-1, tokens) and
    −(exp(log_pi) · log_pi).sum(-1) are the results. That makes half a dozen float32 tensors of the largest size there is
    and keeps some for the backward pass; here it goes a few rows at a time, through the processor's cache, and keeps one
    number a row. Entropy is watched and not trained: no gradient comes from it.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        rows, tokens = logits.flatten(0, 1), tokens.flatten().unsqueeze(1)
        chunk = max(1, (2**19 if logits.device.type == "cpu" else 2**24) // rows.shape[1])
        parts = []
        for x, token in zip(rows.split(chunk), tokens.split(chunk), strict=True):
            x = x.float() / temperature
            log_sum = x.logsumexp(-1, keepdim=True)
            log_pi = x - log_sum
            entropy = -log_pi.exp().mul_(log_pi).sum(-1)
            parts.append((log_pi.gather(-1, token).squeeze(1), entropy, log_sum))
        logprobs, entropy, log_sums = map(torch.cat, zip(*parts, strict=True))
        logprobs, entropy = logprobs.view(logits.shape[:2]), entropy.view(logits.shape[:2])
        ctx.save_for_backward(logits, tokens, log_sums)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor, None, None]:
        """d logprob / d logits = (one-hot of the token − π) / temperature."""
        logits, tokens, log_sums = ctx.saved_tensors
        result = torch.empty_like(logits)
        parts = (x.split(ctx.chunk) for x in (logits.flatten(0, 1), tokens, log_sums, (grad / ctx.temperature).reshape(-1, 1),
                                              result.flatten(0, 1)))
        for x, token, log_sum, g, out in zip(*parts, strict=True):
            pi = (x.float() / ctx.temperature).sub_(log_sum).exp_()
            out.copy_(pi.mul_(-g).scatter_add_(-1, token, g))
        return result, None, None


def response_logits(model: Callable, text: "Packed") -> Tensor:
    """The logits (B, T, V) from which the last T columns were drawn: those one position before each.

    The last token decides none of them and is left away, so that the model makes no logits that nobody looks at.
    """
    return model(text.sequence[:, :-1], text.attention[:, :-1], text.back.shape[1])


def response_logprobs(model: Callable, text: "Packed", temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probability of each response token, entropy of its distribution), both (B, T)."""
    drawn = text.sequence[:, -text.back.shape[1]:]
    logprobs, entropy = TokenLogprobs.apply(response_logits(model, text), drawn, temperature)
    return logprobs.gather(1, text.back), entropy.gather(1, text.back)


def response_values(value: Callable, text: "Packed") -> Tensor:
    """Values (B, T), float32, one position before each response token: what to expect as the token is chosen."""
    values = value(text.sequence[:, :-1], text.attention[:, :-1])
    return values[:, -text.back.shape[1]:].float().gather(1, text.back)


def score_trained(actors: Actors, text: "Packed", temperature: float, logprobs_known: bool = False) -> dict[str, Tensor]:
    """values and (unless they are known) logprobs, (B, T), on policy_device."""
    text = text.to(actors.policy_device)
    scored = {"values": response_values(actors.value, text)}
    if not logprobs_known:
        scored["logprobs"], _ = response_logprobs(actors.policy, text, temperature)
    return scored


def score_frozen(actors: Actors, text: "Packed", sequence: Tensor, attention: Tensor, temperature: float) -> dict[str, Tensor]:
    """ref_logprobs (B, T) and scores (B,), on reference_device. The reward model reads `join`'s rows, whose responses all
    begin at the same column."""
    device = actors.reference_device
    ref_logprobs, _ = response_logprobs(actors.reference, text.to(device), temperature)
    scores = actors.reward(sequence.to(device), attention.to(device), text.back.shape[1])
    return {"ref_logprobs": ref_logprobs, "scores": scores.float()}


# -------------------------------------------------------------------- bookkeeping: batches as wide as their longest row


@dataclass
class Packed:
    """Prompts and responses with all their padding on the left, so that a batch is as wide as its longest row.

    Padded on both sides it would be as wide as the longest prompt and the longest response together, about a quarter
    more at the paper's lengths. The last token of every response stands in the last column.
    """

    sequence: Tensor   # (B, S) token ids
    attention: Tensor  # (B, S) 1 at real tokens
    back: Tensor       # (B, T) which of the last T columns holds response token t; arbitrary where there is none

    def to(self, device) -> "Packed":
        return Packed(self.sequence.to(device), self.attention.to(device), self.back.to(device))


def pack(prompts: Tensor, prompt_mask: Tensor, responses: Tensor, mask: Tensor, width: int | None = None) -> Packed:
    """Left-padded prompts and right-padded responses as one row each; width: of the longest, else P + T."""
    sequence, attention = join(prompts, prompt_mask, responses, mask)
    order = attention.int().argsort(dim=1, stable=True)  # padding first, then the real tokens as they stood
    sequence, attention = sequence.gather(1, order), attention.gather(1, order)
    if width is not None:
        sequence, attention = sequence[:, -width:], attention[:, -width:]
    T = mask.shape[1]
    return Packed(sequence, attention, (torch.arange(T, device=mask.device) - mask.sum(1, keepdim=True)) % T)


def join(prompts: Tensor, prompt_mask: Tensor, responses: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask (B, P + T); tokens behind EOS are masked out, whatever their id."""
    return torch.cat([prompts, responses], 1), torch.cat([prompt_mask, mask.to(prompt_mask.dtype)], 1)


def first_column(prompt_mask: Tensor) -> int:
    """Where the longest of the left-padded prompts begins: what stands before is padding in every row."""
    return int(prompt_mask.bool().any(0).int().argmax())


def longest(mask: Tensor) -> int:
    """Length of the longest response: what stands behind is padding in every row."""
    return int(mask.sum(1).max())


def longest_row(prompt_mask: Tensor, mask: Tensor) -> int:
    """Real tokens of the longest prompt and response together."""
    return int((prompt_mask.sum(1) + mask.sum(1)).max())


def in_batches(read: Callable, size: int, prompts: Tensor, prompt_mask: Tensor, responses: Tensor,
               mask: Tensor) -> dict[str, Tensor]:
    """read(packed, sequence, attention) → {name: (b, t) or (b,)} on `size` rows at a time, put together as (B, T) or (B,).

    Rows of like length go together, without the padding that they share: the cost follows the real tokens.
    """
    order = (prompt_mask.sum(1) + mask.sum(1)).argsort(stable=True)
    batches = []
    for rows in order.split(size):
        start, stop = first_column(prompt_mask[rows]), longest(mask[rows])
        batch = prompts[rows, start:], prompt_mask[rows, start:], responses[rows, :stop], mask[rows, :stop]
        batches.append(read(pack(*batch, width=longest_row(batch[1], batch[3])), *join(*batch)))
    unsort = order.argsort()
    return {name: x[unsort.to(x.device)] for name, x in stack(batches, mask.shape[1]).items()}


def sample(actors: Actors, prompts: Tensor, prompt_mask: Tensor) -> dict[str, Tensor]:
    """One chunk of the rollout: responses and mask, and logprobs where generate returns (responses, logprobs)."""
    sampled = actors.generate(prompts, prompt_mask)
    responses, *logprobs = sampled if isinstance(sampled, tuple) else (sampled,)
    mask = response_mask(responses, actors.eos_token_id)
    responses = responses.masked_fill(~mask, actors.pad_token_id)  # what was sampled behind EOS is gone
    return {"responses": responses, "mask": mask} | ({"logprobs": logprobs[0].float()} if logprobs else {})


def stack(chunks: list[dict[str, Tensor]], width: int = 0) -> dict[str, Tensor]:
    """The chunks as one, padded on the right with zeros to the widest or to width: a chunk ends early, as its rows do."""
    width = max([width, *(x.shape[1] for chunk in chunks for x in chunk.values() if x.ndim == 2)])
    return {name: torch.cat([F.pad(chunk[name], (0, width - chunk[name].shape[1])) if chunk[name].ndim == 2 else chunk[name]
                             for chunk in chunks]) for name in chunks[0]}


# ------------------------------------------------------------------------------------------- bookkeeping: who does what


class Alone:
    """One process does all the work. Where torchrun starts several, training/ranks.py has the twin that shares it.

    Each of them holds all prompts and, once it is gathered, the whole rollout: only sampling, scoring and the micro-batches
    of an optimiser step are shared. So every mean, deviation and check above is of the whole, whoever computes it.
    """

    rank, size, in_step = 0, 1, False

    def rows(self, n: int) -> slice:
        """Which of n rows this process samples and scores: so many of them, side by side."""
        return slice(0, n)

    def gather(self, work: Callable[[], Any]) -> list:
        """What work() gives in every process, in their order. What it raises in one is raised in all."""
        return [work()]

    def share(self, items: list) -> list:
        """Which of the items, micro-batches or the like, this process works on."""
        return items

    def total(self, stats: Stats, trained: list[Tensor]) -> Stats:
        """The sum of each statistic over the processes (..._max: the largest), and in place that of the gradients: each
        micro-batch counts by its share of all tokens already."""
        return stats


# --------------------------------------------------------------------------------------- bookkeeping: the configuration


def check_bounds(config: Any) -> None:
    """Raises ValueError for the first field whose number isn't finite or lies outside the bounds of its `setting`."""
    for f in fields(config):
        value, bounds = getattr(config, f.name), f.metadata.get("bounds", {})
        if not isinstance(value, (int, float)):
            continue
        if not abs(value) < 2**63:  # nor NaN; torch counts in 64 bits
            raise ValueError(f"{f.name} is {value}: must be a finite number")
        inside = (bounds.get("low", value) <= value <= bounds.get("high", value)
                  and bounds.get("above", -math.inf) < value < bounds.get("below", math.inf))
        if not inside:
            raise ValueError(f"{f.name} is {value}: must be {bounds_in_words(**bounds)}")


def bounds_in_words(low: float | None = None, above: float | None = None, high: float | None = None,
                    below: float | None = None) -> str:
    """Of the pairs that are in use."""
    if high is not None:
        return f"from {low} to {high}"
    if below is not None:
        return f"from {low} up to but not {below}"
    return f"above {above}" if above is not None else f"at least {low}"


def require_divisible(whole: str, size: int, part: str, part_size: int) -> None:
    """Raises ValueError with both names and values: a remainder would be dropped or weighted unlike the rest."""
    if size % part_size:
        raise ValueError(f"{whole} {size} is not a multiple of {part} {part_size}")
