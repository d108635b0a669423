"""The PPO details that must be right (one test or more each), on models small enough to check by hand."""

import inspect
import math
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

import ppo
from ppo import PPOConfig, Rollout

V, EOS, PAD = 7, 2, 0
nan, inf = float("nan"), float("inf")


class TinyLM(nn.Module):
    """A causal "language model": the logits at a position depend on the mean embedding of the real tokens up to it."""

    def __init__(self, seed: int = 0, outputs: int = V, device: str = "cpu"):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(V, 5, generator=generator).to(device))
        self.head = nn.Parameter(torch.randn(5, outputs, generator=generator).to(device))

    def forward(self, ids, mask, keep=0):
        real = mask.unsqueeze(-1).float()
        hidden = (self.embedding[ids] * real).cumsum(1) / real.cumsum(1).clamp(min=1)
        return (hidden @ self.head)[:, -keep:]


def sampler(model, length, temperature=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def generate(prompts, prompt_mask):
        ids, mask = prompts, prompt_mask
        for _ in range(length):
            probabilities = (model(ids, mask, 1)[:, -1] / temperature).softmax(-1)
            ids = torch.cat([ids, probabilities.multinomial(1, generator=generator)], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        return ids[:, prompts.shape[1]:]  # tokens behind EOS are left in: collect has to wipe them

    return generate


def left_padded_prompts(n, width=4, seed=0):
    lengths = torch.randint(1, width + 1, (n,), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(width) >= width - lengths.unsqueeze(1)).long()
    return torch.randint(3, V, (n, width), generator=torch.Generator().manual_seed(seed)) * mask, mask


def small_config(**changes):
    sizes = {"rollout_batch_size": 8, "step_batch_size": 8, "micro_batch_size": 2, "ppo_epochs": 1}
    return PPOConfig(**{**sizes, **changes})


def tiny_models():
    critic = TinyLM(seed=1, outputs=1)
    return TinyLM(seed=0), critic, lambda ids, mask: critic(ids, mask).squeeze(-1)


def count_threes(ids, mask, n):
    """A reward model: how many threes stand in the sequence."""
    return ((ids == 3) * mask).sum(1).float()


def actors(policy, value, reference=None, reward=count_threes, generate=None, **changes):
    ends = {"eos_token_id": EOS, "pad_token_id": PAD}
    return ppo.Actors(policy, value, reference or TinyLM(seed=5), reward, generate, **ends | changes)


def collect(policy, value, config, n=8, *, penalty=lambda a, b: a - b, batch=None, beta=None, generate=None, **changes):
    generate = generate or sampler(policy, 6, config.temperature)
    return ppo.collect(actors(policy, value, generate=generate, **changes), penalty, *batch or left_padded_prompts(n), config,
                       beta)


def update(policy, value, rollout, optimizer, config, **changes):
    return ppo.update(actors(policy, value), rollout, optimizer, config, **changes)


# --- masks -------------------------------------------------------------------------------------------------------


def test_mask_runs_through_the_first_eos_and_comes_from_eos_alone():
    responses = torch.tensor([[5, 2, 0, 0],    # the usual case
                              [5, 0, 4, 2],    # a pad id inside a response is an ordinary token; EOS in the last slot
                              [5, 4, 3, 3],    # never stops
                              [2, 2, 2, 2],    # one token; with pad = EOS this is all that is seen of it
                              [4, 2, 5, 2]])   # whatever follows EOS is not there
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    assert torch.equal(ppo.response_mask(responses, eos_token_id=2), expected)


def test_a_response_ends_at_the_first_of_several_eos_ids():
    responses = torch.tensor([[5, 6, 2, 5], [4, 2, 6, 6], [3, 4, 5, 3]])
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    for ends in ((2, 6), [6, 2]):
        assert torch.equal(ppo.response_mask(responses, ends), expected)
    assert torch.equal(ppo.response_mask(responses, [2]), ppo.response_mask(responses, 2))
    assert ppo.response_mask(responses, []).all()
    rollout = collect(TinyLM(), tiny_models()[2], small_config(), generate=lambda p, m: responses, eos_token_id=[2, 6],
                      batch=(torch.full((3, 1), 4), torch.ones(3, 1, dtype=torch.long)))
    assert rollout.finished.tolist() == [True, True, False] and torch.equal(rollout.mask, expected)


def test_pad_equal_to_eos_gives_the_same_rollout():
    policy, _, value = tiny_models()
    config = small_config()
    with_pad, with_eos = (collect(policy, value, config, pad_token_id=pad) for pad in (PAD, EOS))
    assert with_pad.finished.any() and not torch.equal(with_pad.responses, with_eos.responses)
    for name in {f.name for f in fields(Rollout)} - {"responses"}:
        assert torch.equal(getattr(with_pad, name), getattr(with_eos, name)), name


def test_padding_never_changes_a_loss_a_gradient_an_advantage_or_a_statistic():
    mask = torch.tensor([[True, True, False, False], [True, True, True, True], [True, False, False, False]])
    generator = torch.Generator().manual_seed(0)
    clean = {name: torch.randn(3, 4, generator=generator) * mask for name in ("new", "old", "adv", "pen", "val", "ret")}
    scores = torch.tensor([1.0, -2.0, 0.5])

    def everything(x):
        new, val = x["new"].clone().requires_grad_(), x["val"].clone().requires_grad_()
        policy, policy_stats = ppo.policy_loss(new, x["old"], x["adv"], mask)
        value, value_stats = ppo.value_loss(val, x["old"], x["ret"], mask)
        (policy + value).backward()
        return [policy, value, *policy_stats.values(), *value_stats.values(), new.grad, val.grad,
                ppo.whiten(x["adv"], mask), ppo.whiten(x["adv"], mask, shift_mean=False),
                ppo.shape_rewards(scores, x["pen"], mask, 0.1), *ppo.gae(x["pen"], x["val"], mask)]

    for garbage in (1e6, nan, inf):
        dirty = {name: x.masked_fill(~mask, garbage) for name, x in clean.items()}
        for a, b in zip(everything(clean), everything(dirty), strict=True):
            assert torch.equal(a, b)


def test_wrongly_shaped_tensors_are_refused_not_broadcast():
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 1\)"):
        ppo.policy_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1), mask)
    with pytest.raises(ValueError, match=r"scores must be \(2,\).*\(2, 1\)"):
        ppo.shape_rewards(torch.zeros(2, 1), torch.zeros(2, 3), mask, 0.02)


# --- rewards and advantages --------------------------------------------------------------------------------------


def test_equation_3_puts_the_score_on_the_last_real_token():
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    penalties = torch.tensor([[1.0, 2.0, 9.0], [0.0, -1.0, 4.0], [3.0, 9.0, 9.0]])
    rewards = ppo.shape_rewards(torch.tensor([10.0, 20.0, 30.0]), penalties, mask, beta=0.5)
    torch.testing.assert_close(rewards, torch.tensor([[-0.5, 9.0, 0.0], [0.0, 0.5, 18.0], [28.5, 0.0, 0.0]]))


def test_whitened_advantages_have_zero_mean_and_unit_deviation_over_real_tokens():
    x, mask = torch.tensor([[1.0, 3.0], [5.0, 100.0]]), torch.tensor([[True, True], [True, False]])
    deviation = math.sqrt(8 / 3)  # of 1, 3, 5
    torch.testing.assert_close(ppo.whiten(x, mask), torch.tensor([[-2.0, 0.0], [2.0, 0.0]]) / deviation)


@pytest.mark.parametrize("spread", [0.0, 2e-5])
def test_rewards_that_do_not_deviate_keep_their_scale(spread):
    """Answers of one token that all earn 1 (less a penalty that hardly differs): scaled by 1 / std they would be 10,000."""
    x = torch.tensor([[1.0 + spread], [1.0], [1.0 - spread]])
    torch.testing.assert_close(ppo.whiten(x, torch.ones(3, 1, dtype=torch.bool), shift_mean=False), x)
    one = torch.tensor([[0.0, 1.0]])  # but where the score stands on one of several tokens, it deviates: std 0.5
    torch.testing.assert_close(ppo.whiten(one, torch.ones(1, 2, dtype=torch.bool), shift_mean=False), 2 * one)


def test_whitened_rewards_are_scaled_never_shifted():
    x, mask = torch.tensor([[0.0, 0.0, 3.0]]), torch.tensor([[True, True, True]])
    scaled = ppo.whiten(x, mask, shift_mean=False)
    torch.testing.assert_close(scaled, x / math.sqrt(2))  # a shift would pay or charge the two empty tokens
    assert scaled[0, 0] == 0


def test_gae_worked_by_hand():
    """γ = 0.5, λ = 0.5; two real tokens. δ_1 = 4 − 2 = 2; δ_0 = 1 + 0.5 · 2 − 1 = 1; A_0 = 1 + 0.25 · 2."""
    rewards, values = torch.tensor([[1.0, 4.0, 0.0]]), torch.tensor([[1.0, 2.0, 7.0]])  # 7 stands behind EOS
    advantages, returns = ppo.gae(rewards, values, torch.tensor([[True, True, False]]), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[1.5, 2.0, 0.0]]
    assert returns.tolist() == [[2.5, 4.0, 0.0]]


def test_gae_equals_its_definition_as_a_discounted_sum():
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 1, 3]
    mask = torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
    rewards, values = torch.randn(3, 5, generator=generator), torch.randn(3, 5, generator=generator)
    advantages, returns = ppo.gae(rewards, values, mask, gamma=0.9, lam=0.8)
    for b, length in enumerate(lengths):
        v = values[b, :length].tolist() + [0.0]
        delta = [rewards[b, t].item() + 0.9 * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            naive = sum((0.9 * 0.8) ** (k - t) * delta[k] for k in range(t, length))
            assert advantages[b, t].item() == pytest.approx(naive, abs=1e-5)
            assert returns[b, t].item() == pytest.approx(naive + v[t], abs=1e-5)


def test_with_lambda_1_the_return_is_the_sum_of_rewards_to_come():
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[9.0, -3.0, 5.0]])
    _, returns = ppo.gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, torch.tensor([[7.0, 6.0, 4.0]]))


# --- log-probabilities -------------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_tempered_softmax_in_float32():
    logits = torch.randn(2, 3, V, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = torch.tensor([[0, 1, 2], [3, 4, 5]])
    result = ppo.token_logprobs(logits, tokens, temperature=0.5)
    assert result.dtype == torch.float32
    for b in range(2):
        for t in range(3):
            weights = [math.exp(2 * x) for x in logits[b, t].tolist()]
            assert result[b, t].item() == pytest.approx(math.log(weights[tokens[b, t]] / sum(weights)), abs=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_recorded_log_probabilities_are_those_of_the_sampler(temperature):
    """Sampling at one temperature and training at another is the bug; the frequency of each first token tells."""
    policy, _, value = tiny_models()
    n = 4000
    batch = torch.full((n, 1), 4), torch.ones(n, 1, dtype=torch.long)
    config = small_config(temperature=temperature, rollout_micro_batch_size=n)
    rollout = collect(policy, value, config, generate=sampler(policy, 1, temperature), batch=batch)
    for token in range(V):
        drawn = rollout.responses[:, 0] == token
        if drawn.any():
            assert drawn.float().mean().item() == pytest.approx(rollout.logprobs[drawn][0, 0].exp().item(), abs=0.03)


def test_before_the_first_update_the_ratio_is_1_and_the_penalty_0():
    policy, _, value = tiny_models()
    config = small_config(temperature=0.7)
    rollout = collect(policy, value, config, reference=policy)
    check = ppo.self_check(policy, rollout, config)
    assert check["ratio_error"] < 1e-5 and check["reference_gap"] == 0
    assert rollout.penalties.abs().max() == 0


def test_self_check_notices_another_temperature_and_another_model():
    policy, _, value = tiny_models()
    rollout = collect(policy, value, small_config(temperature=0.7))
    assert ppo.self_check(policy, rollout, small_config(temperature=1.0))["ratio_error"] > 1e-2
    assert ppo.self_check(policy, rollout, small_config(temperature=0.7))["reference_gap"] > 1e-2


def plain_logprobs(logits, tokens, temperature):
    """The slow twin of TokenLogprobs, in float64: a float32 sum over a large vocabulary is off by more than the code is,
    and by how much depends on the processor's vectors."""
    log_pi = (logits.double() / temperature).log_softmax(-1)
    return log_pi.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), -(log_pi.exp() * log_pi).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [11, 2**18])  # the second is so large that two rows fill a chunk
def test_chunked_log_probabilities_and_their_gradients_are_the_plain_ones(size, dtype):
    """Log-probabilities are differences of numbers near 20, whose last float32 bit is 2e-6; a few of those are allowed, and
    to the gradient one rounding of its own dtype."""
    draw = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(1, 5, size, generator=draw)).to(dtype).requires_grad_()
    tokens, weights = torch.randint(size, (1, 5), generator=draw), torch.randn(1, 5, generator=draw)
    logprobs, entropy = ppo.TokenLogprobs.apply(logits, tokens, 0.7)
    expected, its_entropy = plain_logprobs(logits, tokens, 0.7)
    torch.testing.assert_close(logprobs.double(), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), its_entropy, atol=0, rtol=1e-4)
    [gradient] = torch.autograd.grad((logprobs * weights).sum(), logits)
    wide = logits.detach().double().requires_grad_()
    [exact] = torch.autograd.grad((plain_logprobs(wide, tokens, 0.7)[0] * weights).sum(), wide)
    rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 5e-5
    torch.testing.assert_close(gradient.double(), exact, atol=1e-12, rtol=rounding)


def test_entropy_is_that_of_the_full_distribution_and_carries_no_gradient():
    logits = torch.tensor([[[0.5, 0.25, 0.25]]]).log().requires_grad_()
    _, entropy = ppo.TokenLogprobs.apply(logits, torch.tensor([[0]]), 1.0)
    assert entropy.item() == pytest.approx(1.5 * math.log(2)) and not entropy.requires_grad


# --- collect -----------------------------------------------------------------------------------------------------


def test_values_are_read_at_the_position_before_each_token_and_are_0_after_eos():
    def position(ids, mask):
        return mask.cumsum(1) - 1.0  # among the real tokens of its row

    responses = torch.tensor([[5, 2, 6, 6], [5, 5, 5, 5]])
    rollout = collect(TinyLM(), position, small_config(), generate=lambda p, m: responses,
                      batch=(torch.full((2, 3), 4), torch.ones(2, 3, dtype=torch.long)))
    assert rollout.values.tolist() == [[2.0, 3.0, 0.0, 0.0], [2.0, 3.0, 4.0, 5.0]]


def test_what_the_sampler_leaves_behind_eos_is_wiped():
    policy, _, value = tiny_models()
    batch = (torch.full((2, 3), 4), torch.ones(2, 3, dtype=torch.long))
    clean, dirty = (collect(policy, value, small_config(), generate=lambda p, m, r=r: torch.tensor(r), batch=batch)
                    for r in ([[5, 2, 0, 0], [3, 3, 3, 3]], [[5, 2, 3, 2], [3, 3, 3, 3]]))
    assert all(torch.equal(getattr(clean, f.name), getattr(dirty, f.name)) for f in fields(Rollout))


def test_no_model_is_shown_what_stands_behind_eos():
    policy, _, value = tiny_models()
    rollout = collect(policy, value, small_config(), reward=lambda ids, mask, n: mask.sum(1))
    assert torch.equal(rollout.scores, (rollout.prompt_mask.sum(1) + rollout.mask.sum(1)).float())


def test_tokens_without_reward_stay_without_when_the_rollout_is_whitened():
    policy, _, value = tiny_models()
    rollout = collect(policy, value, small_config(), beta=0.0)
    assert (rollout.rewards != 0).sum(1).max() == 1  # the last token's alone
    assert rollout.rewards[rollout.mask].std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_the_missing_eos_penalty_looks_at_token_ids_and_replaces_the_score():
    responses = torch.tensor([[3, 2], [3, 3], [2, 0]])  # EOS in the last slot is a finished response
    config = small_config(missing_eos_penalty=-1.0, whiten_rewards=False)
    rollout = collect(TinyLM(), tiny_models()[2], config, beta=0.0, generate=lambda p, m: responses,
                      batch=(torch.full((3, 1), 4), torch.ones(3, 1, dtype=torch.long)))
    assert rollout.finished.tolist() == [True, False, True]
    assert rollout.scores.tolist() == [1.0, 2.0, 0.0]  # raw, for the log
    assert rollout.rewards.tolist() == [[0.0, 1.0], [0.0, -1.0], [0.0, 0.0]]


def test_rows_stay_with_their_prompts_however_they_are_chunked():
    policy, _, value = tiny_models()
    prompts, prompt_mask = left_padded_prompts(8)
    all_responses = sampler(policy, 6)(prompts, prompt_mask)

    def replay(ids, mask):  # finds the rows by their content, trimmed or not; a chunk may stop when all of it has
        rows = [next(i for i in range(8) if prompts[i][prompt_mask[i].bool()].tolist() == p[m.bool()].tolist())
                for p, m in zip(ids, mask, strict=True)]
        responses = all_responses[rows]
        return responses[:, :ppo.longest(ppo.response_mask(responses, EOS))]

    whole = collect(policy, value, small_config(rollout_micro_batch_size=8), generate=replay)
    for size in (1, 3):
        chunked = collect(policy, value, small_config(rollout_micro_batch_size=size), generate=replay)
        for f in fields(Rollout):
            torch.testing.assert_close(getattr(chunked, f.name), getattr(whole, f.name), atol=1e-5, rtol=1e-5)


def test_log_probabilities_that_the_sampler_returns_spare_the_policys_forward_pass():
    policy, _, value = tiny_models()
    passes = []

    def watched(ids, mask, keep):
        passes.append(len(ids))
        return policy(ids, mask, keep)

    for chunk in (8, 3):
        config, draw = small_config(rollout_micro_batch_size=chunk), sampler(policy, 6)

        def generate(prompts, prompt_mask, draw=draw, config=config):
            responses = draw(prompts, prompt_mask)
            ids, mask = ppo.join(prompts, prompt_mask, responses, ppo.response_mask(responses, EOS))
            logits = policy(ids[:, :-1], mask[:, :-1], responses.shape[1])
            return responses, ppo.token_logprobs(logits, responses, config.temperature)

        passes.clear()
        rollout = collect(watched, value, config, generate=generate)
        assert not passes
        again = collect(policy, value, config, generate=sampler(policy, 6))
        for f in fields(Rollout):
            torch.testing.assert_close(getattr(rollout, f.name), getattr(again, f.name), atol=1e-5, rtol=1e-5)
        assert ppo.self_check(policy, rollout, config)["ratio_error"] < 1e-5


def test_scoring_chunk_by_chunk_beside_the_sampling_gives_the_same_rollout():
    policy, _, value = tiny_models()
    for size in (8, 3):
        config = small_config(rollout_micro_batch_size=size, micro_batch_size=8)
        one = collect(policy, value, config, generate=sampler(policy, 6))
        seen = []

        def reference(ids, mask, keep, seen=seen):
            seen.append("reference")
            return TinyLM(seed=5)(ids, mask, keep)

        draw = sampler(policy, 6)

        def generate(prompts, prompt_mask, seen=seen, draw=draw):
            seen.append("generate")
            return draw(prompts, prompt_mask)

        two = collect(policy, value, config, generate=generate, reference=reference, reference_device="cpu:0")
        for f in fields(Rollout):
            torch.testing.assert_close(getattr(one, f.name), getattr(two, f.name), atol=1e-5, rtol=1e-5)
        chunks = -(-8 // size)
        assert seen == ["generate", "reference"] * chunks  # in turn: on two devices, at the same time


def test_a_rollout_of_one_token_responses_trains():
    policy, critic, value = tiny_models()
    config = small_config()
    rollout = collect(policy, value, config, generate=lambda p, m: torch.full((len(p), 1), EOS))
    assert rollout.mask.all() and rollout.mask.shape == (8, 1)
    stats = update(policy, value, rollout, torch.optim.SGD([*policy.parameters(), *critic.parameters()]), config)
    assert all(math.isfinite(x) for x in stats.values())


def test_advantages_are_whitened_over_the_whole_rollout_and_returns_are_not():
    policy, _, value = tiny_models()
    rollout = collect(policy, value, small_config())
    advantages, returns = ppo.gae(rollout.rewards, rollout.values, rollout.mask)
    real = rollout.advantages[rollout.mask]
    assert real.mean().item() == pytest.approx(0, abs=1e-5)
    assert real.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(rollout.returns, returns) and not torch.allclose(advantages, rollout.advantages)


def test_logged_kl_is_the_measured_one_whatever_penalty_is_trained_with():
    policy, _, value = tiny_models()
    rollouts = [collect(policy, value, small_config(), penalty=penalty)
                for penalty in (lambda a, b: a - b, lambda a, b: torch.zeros_like(a))]
    logs = [ppo.rollout_stats(rollout) for rollout in rollouts]
    gaps = (rollouts[0].logprobs - rollouts[0].ref_logprobs)[rollouts[0].mask].tolist()
    for log in logs:
        assert log["kl_k1"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-5)
        assert log["kl_k3"] == pytest.approx(sum(math.exp(-g) - 1 + g for g in gaps) / len(gaps), rel=1e-4)
    assert logs[0]["penalty"] != 0 and logs[1]["penalty"] == 0


def test_a_negative_kl_estimate_is_logged_as_it_is():
    policy, _, value = tiny_models()
    rollout = collect(policy, value, small_config())
    lower = replace(rollout, ref_logprobs=(rollout.logprobs + 0.5) * rollout.mask)
    assert ppo.rollout_stats(lower)["kl_k1"] == pytest.approx(-0.5, abs=1e-5)


def test_the_error_of_the_logged_kl_counts_responses_not_tokens():
    """Two responses with gaps (1, 1, 1) and (0): mean 3/4, residuals 3 − 3 · 3/4 and 0 − 3/4."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found = ppo.token_mean_error(torch.tensor([[1.0, 1.0, 1.0], [0.0, 9.0, 9.0]]), mask)
    assert found.item() == pytest.approx(math.sqrt((0.75**2 + 0.75**2) * 2 / 1) / 4)


def test_empty_and_endless_responses_are_counted():
    policy, _, value = tiny_models()
    said = torch.tensor([[EOS, PAD], [3, EOS], [3, 4], [EOS, PAD]] * 2)
    stats = ppo.rollout_stats(collect(policy, value, small_config(), generate=lambda p, m: said[:len(p)]))
    assert (stats["empty"], stats["finished"], stats["length"]) == (0.5, 0.75, 1.5)


def test_a_rollout_that_is_not_finite_names_the_first_quantity_and_holds_the_batch():
    policy, _, value = tiny_models()
    with pytest.raises(ppo.NotFinite, match="scores of 8 of 8 responses .the first is number 1. are NaN") as caught:
        collect(policy, value, small_config(), reward=lambda ids, mask, n: torch.full((len(ids),), nan))
    assert len(caught.value.rollout) == 8 and caught.value.rollout.scores.isnan().all()


# --- losses ------------------------------------------------------------------------------------------------------


def test_policy_loss_worked_by_hand():
    """Ratios 1.5 and 0.5 meet advantages of both signs: Eq. 2 clips only where clipping lowers the objective."""
    logprobs, mask = torch.tensor([[1.5, 1.5, 0.5, 0.5]]).log().requires_grad_(), torch.ones(1, 4, dtype=torch.bool)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    loss, stats = ppo.policy_loss(logprobs, torch.zeros(1, 4), advantages, mask, cliprange=0.2)
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4)
    assert stats["clip_fraction"].item() == 0.5
    assert stats["ratio_mean"].item() == pytest.approx(1.0) and stats["ratio_max"].item() == pytest.approx(1.5)
    assert stats["approx_kl"].item() == pytest.approx((0.5 - math.log(1.5) - 0.5 - math.log(0.5)) / 2, rel=1e-5)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, 1.5, -0.5, 0.0]]) / 4)  # clipped tokens push no more


def test_value_loss_worked_by_hand():
    """From 0 towards the return 1, a value may move 0.2 a rollout; away from it, it is never excused."""
    values, mask = torch.tensor([[0.1, 0.5, -0.5]], requires_grad=True), torch.ones(1, 3, dtype=torch.bool)
    loss, stats = ppo.value_loss(values, torch.zeros(1, 3), torch.ones(1, 3), mask, cliprange=0.2)
    assert loss.item() == pytest.approx(0.5 * (0.9**2 + 0.8**2 + 1.5**2) / 3)
    assert stats["value_clip_fraction"].item() == pytest.approx(1 / 3)
    loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([[-0.9, 0.0, -1.5]]) / 3)


def test_every_token_weighs_alike_whatever_the_length_of_its_response():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    loss, _ = ppo.policy_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([[1.0] * 3, [5.0] * 3]), mask)
    assert loss.item() == -(3 * 1 + 5) / 4  # and not the mean of means, -(1 + 5) / 2


# --- update ------------------------------------------------------------------------------------------------------


def step_gradient(policy, critic, value, rollout, config):
    """The gradient that reached SGD with rate 1, read off the weights' movement; and what update logged."""
    parameters = [*policy.parameters(), *critic.parameters()]
    before = [p.detach().clone() for p in parameters]
    stats = update(policy, value, rollout, torch.optim.SGD(parameters, lr=1.0), config)
    return torch.cat([(a - b.detach()).flatten() for a, b in zip(before, parameters, strict=True)]), stats


def test_k_micro_batches_give_the_gradient_of_one_full_untrimmed_batch():
    """The comparison is the plain loss over the padded rollout: no micro-batches, weights, trimming or sorting."""
    policy, critic, value = tiny_models()
    collected = collect(policy, value, small_config(max_grad_norm=1e9))
    assert len(set(collected.mask.sum(1).tolist())) > 2, "lengths must differ, or the weights are not tested"
    moved, critic = TinyLM(seed=9), TinyLM(seed=8, outputs=1)  # not those of the rollout: both losses clip
    ids = torch.cat([collected.prompts, collected.responses], 1)
    attention = torch.cat([collected.prompt_mask, collected.mask.long()], 1)
    n, mask = collected.mask.shape[1], collected.mask
    logits, values = moved(ids, attention)[:, -n - 1:-1], critic(ids, attention)[:, -n - 1:-1, 0]
    ratio = (logits.log_softmax(-1).gather(-1, collected.responses[..., None])[..., 0] - collected.logprobs).exp()
    surrogate = torch.min(ratio * collected.advantages, ratio.clamp(0.8, 1.2) * collected.advantages)
    near = collected.values + (values - collected.values).clamp(-0.2, 0.2)
    critic_loss = 0.5 * torch.max((values - collected.returns) ** 2, (near - collected.returns) ** 2)
    (-surrogate[mask].mean() + 0.1 * critic_loss[mask].mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in [*moved.parameters(), *critic.parameters()]])

    for micro_batch_size in (1, 2, 4, 8):
        policy, critic = TinyLM(seed=9), TinyLM(seed=8, outputs=1)
        config = small_config(micro_batch_size=micro_batch_size, max_grad_norm=1e9)
        gradient, stats = step_gradient(policy, critic, lambda i, m, c=critic: c(i, m)[..., 0], collected, config)
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)
        assert stats["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-4)
        assert stats["clip_fraction"] > 0 and stats["value_clip_fraction"] > 0
        assert stats["policy_loss"] == pytest.approx(-surrogate[mask].mean().item(), abs=1e-5)
        assert stats["ratio_max"] == pytest.approx(ratio[mask].max().item(), rel=1e-4)


def test_the_gradient_is_clipped_once_per_step_and_logged_as_it_was_before():
    policy, critic, value = tiny_models()
    rollout = collect(policy, value, small_config())
    gradient, stats = step_gradient(policy, critic, value, rollout, small_config(max_grad_norm=0.01))
    assert gradient.norm().item() == pytest.approx(0.01, rel=1e-3)  # clipping each of 4 micro-batches could exceed it
    assert stats["grad_norm"] > 0.01


def test_packed_rows_hold_every_token_once_with_all_padding_on_the_left():
    prompts, prompt_mask = torch.tensor([[0, 0, 7], [4, 5, 6]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
    responses, mask = torch.tensor([[3, 4, 5, EOS], [6, EOS, PAD, PAD]]), torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    text = ppo.pack(prompts, prompt_mask, responses, mask, ppo.longest_row(prompt_mask, mask))
    assert text.sequence.tolist() == [[7, 3, 4, 5, EOS], [4, 5, 6, 6, EOS]]  # 5 wide; padded on both sides it would be 7
    assert text.attention.tolist() == [[1] * 5, [1] * 5]
    unpacked = text.sequence[:, -4:].gather(1, text.back)
    assert torch.equal(unpacked[mask], responses[mask])
    assert ppo.pack(prompts, prompt_mask, responses, mask).sequence.tolist() == [[0, 0, 7, 3, 4, 5, EOS], [0, 0, 4, 5, 6, 6, EOS]]


def test_packed_rows_are_scored_as_rows_by_themselves():
    policy, critic, value = tiny_models()
    prompts, prompt_mask = left_padded_prompts(8)
    responses = sampler(policy, 6)(prompts, prompt_mask)
    mask = ppo.response_mask(responses, EOS)
    text = ppo.pack(prompts, prompt_mask, responses, mask, ppo.longest_row(prompt_mask, mask))
    logprobs, entropy = ppo.response_logprobs(policy, text, 0.7)
    values = ppo.response_values(value, text)
    for row in range(8):
        ids = torch.cat([prompts[row][prompt_mask[row].bool()], responses[row][mask[row]]])[None]
        n, ones = int(mask[row].sum()), torch.ones_like(ids)
        expected, its_entropy = plain_logprobs(policy(ids, ones, len(ids[0]))[:, -n - 1:-1], ids[:, -n:], 0.7)
        torch.testing.assert_close(logprobs[row][mask[row]].double(), expected[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(entropy[row][mask[row]].double(), its_entropy[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(values[row][mask[row]], value(ids, ones)[0, -n - 1:-1])


def test_micro_batches_cost_no_more_columns_than_their_longest_row():
    policy, critic, value = tiny_models()
    prompt_mask = torch.tensor([[0] * 5 + [1] * 2] * 8)
    responses = torch.full((8, 6), 3)
    responses[torch.arange(8), torch.arange(8) // 2] = EOS  # lengths 1 1 2 2 3 3 4 4
    config = small_config()
    rollout = collect(policy, value, config, generate=lambda p, m: responses, batch=(4 * prompt_mask, prompt_mask))
    widths = []

    def watched(ids, mask, keep):
        widths.append(ids.shape[1])
        return policy(ids, mask, keep)

    update(watched, value, rollout, torch.optim.SGD(critic.parameters()), config)
    assert widths == [2, 3, 4, 5]  # 2 real prompt tokens and 1, 2, 3, 4 of response but the last; padded, each would be 12


def test_every_response_is_used_once_an_epoch_in_the_generators_order():
    policy, critic, value = tiny_models()
    config = small_config(step_batch_size=2, micro_batch_size=2, ppo_epochs=3)
    batch = torch.tensor([[3 + i % 4, 3 + i // 4] for i in range(8)]), torch.ones(8, 2, dtype=torch.long)
    rollout = collect(policy, value, config, batch=batch)

    def order(seed):
        seen = []

        def watched(ids, mask, keep):
            seen.extend(tuple(row[real.bool()][:2].tolist()) for row, real in zip(ids, mask, strict=True))
            return policy(ids, mask, keep)

        done = []
        update(watched, value, rollout, torch.optim.SGD(critic.parameters(), lr=0.0), config,
                   generator=torch.Generator().manual_seed(seed), progress=lambda phase, n: done.append((phase, n)))
        assert done == [("update", 2)] * 12
        return seen

    first = order(0)
    epochs = [first[:8], first[8:16], first[16:]]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 8 for epoch in epochs)
    assert epochs[0] != epochs[1] and first == order(0) and first != order(1)


@pytest.mark.parametrize("broken", ["policy_loss", "value_loss", "grad_norm"])
def test_a_non_finite_quantity_is_named_and_never_reaches_a_weight(broken):
    policy, critic, value = tiny_models()
    config = small_config()
    rollout = collect(policy, value, config)
    if broken == "policy_loss":
        rollout = replace(rollout, advantages=rollout.advantages * nan)
    if broken == "value_loss":
        rollout = replace(rollout, returns=rollout.returns * inf)
    root = nn.Parameter(torch.zeros(()))  # d sqrt(x) / dx is infinite at 0, while the loss is not
    faulty = (lambda ids, mask: value(ids, mask) + root.sqrt()) if broken == "grad_norm" else value
    parameters = [*policy.parameters(), *critic.parameters(), root]
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(FloatingPointError, match=broken):
        update(policy, faulty, rollout, torch.optim.Adam(parameters), config)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def test_ppo_learns_to_say_what_is_rewarded():
    torch.manual_seed(0)
    policy, critic, value = tiny_models()
    config = small_config(rollout_batch_size=32, step_batch_size=16, micro_batch_size=16, ppo_epochs=2)
    optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=0.03)
    scores = []
    for step in range(25):
        rollout = collect(policy, value, config, n=32, generate=sampler(policy, 6, seed=step), reference=TinyLM(seed=0),
                          reward=lambda ids, mask, n: ((ids[:, -n:] == 3) * mask[:, -n:]).sum(1).float())
        update(policy, value, rollout, optimizer, config)
        scores.append(rollout.scores.mean().item())
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 2, scores


# --- configuration -----------------------------------------------------------------------------------------------


def test_the_defaults_are_the_papers_and_every_field_explains_itself():
    config = PPOConfig()
    assert (config.rollout_batch_size, config.step_batch_size, config.ppo_epochs, config.beta) == (256, 128, 2, 0.02)
    assert all(f.metadata["help"] and "unit" in f.metadata for f in fields(PPOConfig))
    for function, names in ((ppo.gae, {"gamma": "gamma", "lam": "lam"}), (ppo.policy_loss, {"cliprange": "cliprange"}),
                            (ppo.value_loss, {"cliprange": "cliprange_value"})):
        for parameter, name in names.items():
            assert inspect.signature(function).parameters[parameter].default == getattr(config, name)


@pytest.mark.parametrize("changes, message", [
    ({"rollout_batch_size": 100}, "rollout_batch_size 100 is not a multiple of step_batch_size 128"),
    ({"micro_batch_size": 48}, "step_batch_size 128 is not a multiple of micro_batch_size 48"),
    ({"ppo_epochs": 0}, "ppo_epochs is 0"),
    ({"temperature": 0.0}, "temperature is 0.0"),
    ({"gamma": 1.5}, "gamma is 1.5"),
    ({"kl_target": -1.0}, "kl_target is -1.0"),
    ({"kl_horizon": 10.0}, "kl_horizon 10.0"),
])
def test_a_setting_that_cannot_work_is_named_with_its_value(changes, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**changes)


def test_a_rollout_that_does_not_divide_is_refused_not_truncated():
    policy, critic, value = tiny_models()
    rollout = collect(policy, value, small_config(), n=6)
    with pytest.raises(ValueError, match="rollout of 6 is not a multiple of step_batch_size 8"):
        update(policy, value, rollout, torch.optim.SGD(critic.parameters()), small_config())


def test_beta_rises_when_the_kl_is_above_target_and_moves_by_a_fifth_at_most():
    assert ppo.adapt_beta(0.1, kl=0.11, target=0.1, horizon=1000, n=100) == pytest.approx(0.1 * 1.01)
    assert ppo.adapt_beta(0.1, kl=5.0, target=0.1, horizon=1000, n=100) == pytest.approx(0.1 * 1.02)
    assert ppo.adapt_beta(0.1, kl=-5.0, target=0.1, horizon=1000, n=100) == pytest.approx(0.1 * 0.98)


def test_the_learning_rate_warms_up_and_decays_once_per_ppo_step():
    config = PPOConfig(learning_rate=1.0, warmup_steps=2, lr_steps=5)
    rates = [ppo.learning_rate(step, config) for step in range(1, 8)]
    assert rates == pytest.approx([0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])
    assert ppo.learning_rate(1, replace(config, warmup_steps=0)) == 1.0


def test_the_papers_learning_rate_is_still_seven_eighths_of_its_peak_at_step_100():
    """The released code decays over 781 steps: at step 100 (781 − 100 + 1) / (781 − 5 + 1) of the peak is left."""
    assert PPOConfig().lr_steps == 20_000 * 10 // 256 == 781
    assert ppo.learning_rate(100, PPOConfig()) == pytest.approx(1e-5 * 682 / 777)
