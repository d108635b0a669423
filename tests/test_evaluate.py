"""What evaluate.py promises: win rates as AlpacaEval counts them, honest errors, KL over the whole vocabulary."""

import json
import math
from itertools import product

import pytest
import torch
from conftest import SIZES

import evaluate
from divergences import ESTIMATORS
from evaluate import (
    bootstrap,
    estimator_quality,
    mean_and_error,
    measure_reward,
    measure_true_kl,
    paired_difference,
    ratio_and_error,
    sample_responses,
    token_divergences,
    win_rate,
)
from model import Llama, LlamaConfig

V, EOS, PAD = 12, 2, 0


def tiny_llama(seed: int) -> Llama:
    torch.manual_seed(seed)
    return Llama(LlamaConfig(vocab_size=V, **(SIZES | {"initializer_range": 0.5}))).eval()


# --- statistics ----------------------------------------------------------------------------------------------------


def test_win_rate_by_hand():
    """1 is the reference's, 2 the candidate's, 0 and 1.5 are ties worth half, None is left out: 0 100 50 50 → 50."""
    mean, error = win_rate([1, 2, 0, 1.5, None])
    assert mean == 50
    assert error == pytest.approx(math.sqrt((50**2 + 50**2) / 3 / 4))


def test_a_weighted_judges_preference_counts_by_its_weight():
    mean, error = win_rate([1.25, 1.75, 2])
    assert mean == pytest.approx((25 + 75 + 100) / 3)
    assert error == pytest.approx(math.sqrt(((25 - mean) ** 2 + (75 - mean) ** 2 + (100 - mean) ** 2) / 2 / 3))


def test_unparsable_judgements_change_neither_the_rate_nor_its_error():
    assert win_rate([1, None, 2, 2, None]) == win_rate([1, 2, 2])
    assert win_rate([2, None]) == (100, 0)  # one judgement has no spread to estimate an error from


@pytest.mark.parametrize("bad", [3.0, 0.5, -1.0, 2.01, math.nan])
def test_a_value_that_is_no_preference_is_named(bad):
    with pytest.raises(ValueError, match=f"win_rate: preference {bad} must be 0 .tie. or from 1 .* to 2"):
        win_rate([1, 2, bad])


@pytest.mark.parametrize("nothing", [[], [None, None]])
def test_a_win_rate_of_nothing_is_refused(nothing):
    with pytest.raises(ValueError, match="win_rate: no preference is left"):
        win_rate(nothing)


def test_paired_difference_by_hand():
    """Reference → candidate +100, tie → candidate +50, tie → tie 0 (0 and 1.5 are both ties), unpaired left out."""
    difference, error = paired_difference([1, 0, 1.5, None, 2], [2, 2, 0, 2, None])
    assert difference == 50
    assert error == pytest.approx(math.sqrt((50**2 + 0 + 50**2) / 2 / 3))


def test_the_paired_error_is_smaller_than_two_win_rates_would_have():
    before, after = [1, 2] * 50, [1, 2] * 49 + [2, 2]
    assert paired_difference(before, after)[1] < 0.2 * math.hypot(win_rate(before)[1], win_rate(after)[1])


def test_pairs_of_unequal_number_are_refused():
    with pytest.raises(ValueError):
        paired_difference([1, 2], [1])


def test_the_bootstrap_error_is_that_of_every_possible_draw():
    """Of three runs there are 27 equally likely draws: their means' deviation is the exact bootstrap error."""
    runs = [40.0, 44.0, 48.5]
    means = [sum(draw) / 3 for draw in product(runs, repeat=3)]
    centre = sum(means) / 27
    exact = math.sqrt(sum((m - centre) ** 2 for m in means) / 27)
    mean, error = bootstrap(runs, n=20_000)
    assert mean == pytest.approx(sum(runs) / 3)
    assert error == pytest.approx(exact, rel=0.02)


def test_the_bootstrap_is_reproducible_and_depends_on_its_seed():
    runs = [40.0, 44.0, 48.5, 41.0]
    assert bootstrap(runs, seed=3) == bootstrap(runs, seed=3) != bootstrap(runs, seed=4)


def test_runs_given_as_lists_count_by_their_mean():
    assert bootstrap([[30, 50], [44], [50, 47]]) == bootstrap([40, 44, 48.5])
    assert bootstrap([[30, 50]]) == (40, 0)


def test_a_bootstrap_of_nothing_is_refused():
    with pytest.raises(ValueError, match="bootstrap: values_per_run is empty"):
        bootstrap([])


def test_a_ratio_weighs_tokens_alike_and_its_error_counts_responses():
    totals, counts = [1.0, 6.0, 2.0], [10, 20, 5]
    ratio, error = ratio_and_error(totals, counts)
    assert ratio == pytest.approx(9 / 35)  # not the mean of 0.1, 0.3 and 0.4
    spread = sum((t - ratio * c) ** 2 for t, c in zip(totals, counts)) / 2  # deviations of whole responses, n − 1
    assert error == pytest.approx(math.sqrt(spread / 3) / (35 / 3))
    assert ratio_and_error([1.0, 2.0], [2, 4]) == (0.5, 0)  # equal ratios have no spread


def test_with_one_token_each_a_ratio_is_a_mean():
    values = [1.0, 4.0, 2.5, 0.0]
    assert ratio_and_error(values, [1] * 4) == pytest.approx(mean_and_error(values))


def test_a_ratio_over_no_facts_at_all_is_not_a_number():
    assert all(math.isnan(x) for x in ratio_and_error([0, 0], [0, 0]))


# --- measuring -----------------------------------------------------------------------------------------------------


PROMPTS = [[1, 5, 6, 7], [1, 9], [1, 4, 4, 8, 11, 3], [1, 10, 3], [1, 7, 7]]
RESPONSES = [[5, EOS], [8, 9, 3, 4], [EOS], [11, 11, 6], [4, 5, EOS]]


def naive_kl(policy, reference, prompt, response, temperature) -> float:
    """Σ over the response's positions and over the vocabulary of π (log π − log π_ref), one sequence at a time."""
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        p, q = (torch.log_softmax(model(ids)[0].double() / temperature, -1) for model in (policy, reference))
    positions = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return sum(math.exp(p[t, v]) * (p[t, v] - q[t, v]).item() for t in positions for v in range(V))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_true_kl_is_the_sum_over_the_whole_vocabulary(temperature, batch_size):
    policy, reference = tiny_llama(0), tiny_llama(1)
    totals = [naive_kl(policy, reference, p, r, temperature) for p, r in zip(PROMPTS, RESPONSES)]
    expected = ratio_and_error(totals, [len(r) for r in RESPONSES])
    found = measure_true_kl(lambda i, m, keep: policy(i, m, keep), lambda i, m, keep: reference(i, m, keep), PROMPTS,
                            RESPONSES, pad_token_id=PAD, temperature=temperature, policy_device="cpu",
                            reference_device="cpu", batch_size=batch_size)
    assert expected[0] > 0.1
    assert found == pytest.approx(expected, rel=1e-4)


def test_true_kl_stops_after_max_tokens():
    seen = []

    def logits(ids, mask, keep):
        seen.append(len(ids))
        return torch.zeros(len(ids), keep, V)

    kl, _ = measure_true_kl(logits, logits, PROMPTS, RESPONSES, pad_token_id=PAD, temperature=1.0, policy_device="cpu",
                            reference_device="cpu", batch_size=1, max_tokens=6)
    assert kl == 0 and len(seen) == 2 * 2  # 2 + 4 tokens, by policy and reference


def test_estimates_stand_beside_the_true_kl_at_every_token():
    """Each estimator sees the sampled token's two log-probabilities, computed here one sequence at a time."""
    policy, reference = tiny_llama(0), tiny_llama(1)
    lengths, values = token_divergences(
        lambda i, m, keep: policy(i, m, keep), lambda i, m, keep: reference(i, m, keep), PROMPTS, RESPONSES, pad_token_id=PAD,
        temperature=0.7, policy_device="cpu", reference_device="cpu", batch_size=2,
        estimators={"kl": ESTIMATORS["kl"], "k3": ESTIMATORS["bregman"]})
    assert lengths == [len(r) for r in RESPONSES]
    gaps = []
    for prompt, response in zip(PROMPTS, RESPONSES):
        with torch.no_grad():
            p, q = (torch.log_softmax(m(torch.tensor([prompt + response]))[0].double() / 0.7, -1) for m in (policy, reference))
        gaps += [(p - q)[len(prompt) - 1 + t, token].item() for t, token in enumerate(response)]
    assert values["kl"].tolist() == pytest.approx(gaps, abs=1e-5)
    assert values["k3"].tolist() == pytest.approx([math.exp(-g) - 1 + g for g in gaps], rel=1e-4, abs=1e-6)
    quality = estimator_quality(lengths, values)["kl"]
    errors = (values["kl"] - values["true_kl"]).double()
    assert quality["bias"] == pytest.approx(errors.mean().item(), abs=1e-9)
    assert quality["mean"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-5)  # gaps are of two passes with other shapes
    assert quality["deviation"] == pytest.approx(errors.std().item())


def test_an_unbiased_estimator_shows_no_bias_and_a_biased_one_does():
    """40,000 tokens drawn from π itself: k1 and k3 agree with the true KL within their errors, clamping and k2 don't."""
    torch.manual_seed(0)
    logits = torch.randn(1, 1, 8)
    ref_logits = logits + 0.3 * torch.randn(1, 1, 8)
    tokens = torch.multinomial(logits[0, 0].softmax(-1), 40_000, replacement=True)[None]
    values = evaluate.divergences_of_batch(logits.expand(1, 40_000, 8), ref_logits.expand(1, 40_000, 8), tokens, 1.0, ESTIMATORS)
    quality = estimator_quality([1] * 40_000, values)
    for name in ("kl", "bregman", "clamped_kl", "squared_error", "negative_kl"):
        unbiased = abs(quality[name]["bias"]) < 3 * quality[name]["bias_se"]
        assert unbiased is (name in ("kl", "bregman")), name
    assert quality["bregman"]["deviation"] < quality["kl"]["deviation"]


def test_where_answers_have_too_few_tokens_for_the_true_kl_more_are_sampled(world):
    from data import load_tokenizer

    tokenizer, policy = load_tokenizer(world / "sft"), Llama.from_pretrained(world / "sft")
    benchmark = evaluate.load_benchmark(world / "data" / "evaluation.json", tokenizer, "tiny", 192)
    settings = {"max_new_tokens": 5, "temperature": 1.0}
    plain = evaluate.answer(policy, tokenizer, benchmark, **settings)
    more = evaluate.answer(policy, tokenizer, benchmark, kl_tokens=200, **settings)
    assert plain["more"] == [] and plain["responses"] == more["responses"]
    assert sum(map(len, more["responses"] + more["more"])) >= 200 and len(more["more"]) == len(more["more_prompts"])
    assert all(prompt in benchmark["prompts"] for prompt in more["more_prompts"])


def test_rewards_come_in_the_order_of_the_responses():
    scores = measure_reward(lambda ids, mask, n: (ids * mask).sum(1).float(), PROMPTS, RESPONSES, pad_token_id=9,
                            device="cpu", batch_size=2)
    assert scores == [sum(p) + sum(r) for p, r in zip(PROMPTS, RESPONSES)]  # were padding read, 9s would be in it


def sample(policy, temperature, **changes):
    settings = dict(max_new_tokens=6, temperature=temperature, eos_token_id=EOS, pad_token_id=PAD)
    return sample_responses(policy, PROMPTS, **(settings | changes))


def test_sampling_is_reproducible_from_its_seed():
    policy = tiny_llama(0)
    torch.manual_seed(1)
    first = sample(policy, 1.0, seed=5)
    torch.manual_seed(2)  # torch's own generator has no part in it
    assert first == sample(policy, 1.0, seed=5) != sample(policy, 1.0, seed=6)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_greedy_responses_do_not_depend_on_who_is_in_the_batch(batch_size):
    policy = tiny_llama(0)
    assert sample(policy, 0, batch_size=batch_size) == sample(policy, 0, batch_size=256)


def test_responses_run_through_eos_and_hold_no_padding():
    responses = sample(tiny_llama(0), 1.0, max_new_tokens=20, pad_token_id=EOS)
    assert any(EOS in r for r in responses)
    assert all(EOS not in r[:-1] and (r[-1] == EOS or len(r) == 20) for r in responses)


def test_measure_facts_pools_facts_and_counts_repeats_apart():
    from tiny.knowledge import entities, predicate, values

    copper = entities()["copper"]
    wrong = next(v for v in values()["element", "symbol"] if v != copper.facts["symbol"])
    true = f"{copper.subject} {predicate('element', 'number', copper.facts['number'])}."
    false = f"{copper.subject} {predicate('element', 'symbol', wrong)}."
    task = {"topics": ("copper",), "aspects": (), "facts": None, "sentences": None, "answer": None}
    found = evaluate.measure_facts([task, task], [f"{true} {false} {true}", true])
    assert found["fact_precision"] == pytest.approx(100 * 2 / 3)
    assert (found["facts"], found["repeats"]) == (1.5, 0.5)


def test_a_benchmark_without_judges_has_no_win_rate_and_the_miniature_worlds_has(world):
    from data import load_tokenizer

    tokenizer = load_tokenizer(world / "sft")
    policy, reward = Llama.from_pretrained(world / "sft"), lambda ids, mask, n: mask.sum(1).float()
    logits = lambda ids, mask, keep: policy(ids, mask, keep)  # noqa: E731

    def measured(file):
        benchmark = evaluate.load_benchmark(file, tokenizer, "tiny", 192)
        sampled = evaluate.answer(policy, tokenizer, benchmark, max_new_tokens=4, temperature=1.0)
        return benchmark, evaluate.measure(sampled, logits, logits, reward, tokenizer, benchmark, temperature=1.0,
                                           policy_device="cpu", reference_device="cpu")

    benchmark, result = measured(world / "data" / "evaluation.json")
    assert result["n"] == len(result["responses"]) == len(result["preferences"]) == len(benchmark["tasks"])
    assert result["true_kl"] == 0 and {"win_rate", "win_rate_se", "facts", "repeats", "reward"} <= set(result)
    (world / "plain.json").write_text(json.dumps([{"instruction": "Name a metal."}]))
    benchmark, result = measured(world / "plain.json")
    assert benchmark["about"] == [] and not {"win_rate", "preferences", "fact_precision"} & set(result)
    assert result["reward"] == len(benchmark["prompts"][0]) + result["tokens"]


# --- program -------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_neither_run_nor_adapter_is_one_clear_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(tmp_path)])
    assert evaluate.main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "neither a run folder" in error
