"""What measure.py promises: KL over the whole vocabulary, answers in order, a benchmark that knows its judges."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import SIZES

from data import left_pad
from divergences import ESTIMATORS
from evaluation import measure
from evaluation.measure import (estimator_quality, load_benchmark, measure_reward, measure_true_kl, sample_responses,
                                token_divergences)
from evaluation.statistics import ratio_and_error
from formats.tokenizer import load_tokenizer
from model import Llama, LlamaConfig, generate
from ppo import Actors
from training.config import RunConfig
from training.rewards import LoadedReward
from training.models import build_models

V, EOS, PAD = 12, 2, 0


def tiny_llama(seed: int) -> Llama:
    torch.manual_seed(seed)
    return Llama(LlamaConfig(vocab_size=V, **(SIZES | {"initializer_range": 0.5}))).eval()


def actors(policy, reference) -> Actors:
    """The two models of which the KL is measured."""
    return Actors(policy, None, reference, None, None, EOS, PAD)


def test_answers_are_what_one_generator_draws_batch_by_batch():
    """The miniature world was made so, and is rebuilt byte for byte."""
    policy, draw, expected = tiny_llama(0), torch.Generator().manual_seed(5), [[]] * len(PROMPTS)
    order = sorted(range(len(PROMPTS)), key=lambda i: len(PROMPTS[i]))
    for rows in (order[:3], order[3:]):
        ids, mask = left_pad([PROMPTS[i] for i in rows], PAD)
        for i, response in zip(rows, generate(policy, ids, mask, 6, 0.7, eos_token_id=EOS, pad_token_id=PAD, generator=draw)):
            tokens = response.tolist()
            expected[i] = tokens[:tokens.index(EOS) + 1] if EOS in tokens else tokens
    tokenizer = SimpleNamespace(stop_ids=(EOS,), pad_token_id=PAD)
    assert sample_responses(policy, tokenizer, PROMPTS, max_new_tokens=6, temperature=0.7, seed=5, batch_size=3) == expected


@pytest.mark.parametrize("room", [1, 2, 9])
def test_answers_dont_depend_on_how_many_have_room_at_once(monkeypatch, room):
    def answers() -> list[list[int]]:
        tokenizer = SimpleNamespace(stop_ids=(EOS,), pad_token_id=PAD)
        return sample_responses(tiny_llama(0), tokenizer, PROMPTS, max_new_tokens=6, temperature=0.7, seed=5)

    expected = answers()
    monkeypatch.setattr("evaluation.measure.rows_at_once", lambda policy, length: room)
    assert answers() == expected


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
    lengths, values = token_divergences(actors(policy, reference), PROMPTS, RESPONSES, temperature, batch_size=batch_size)
    assert expected[0] > 0.1
    assert measure.per_token(lengths, values["true_kl"]) == pytest.approx(expected, rel=1e-4)
    assert measure_true_kl(actors(policy, reference), PROMPTS, RESPONSES, temperature) == pytest.approx(expected, rel=1e-4)


def test_true_kl_stops_after_max_tokens():
    seen = []

    def logits(ids, mask, keep):
        seen.append(len(ids))
        return torch.zeros(len(ids), keep, V)

    _, values = token_divergences(actors(logits, logits), PROMPTS, RESPONSES, 1.0, max_tokens=6, batch_size=1)
    assert values["true_kl"].tolist() == [0] * 6 and len(seen) == 2 * 2  # 2 + 4 tokens, by policy and reference


def test_estimates_stand_beside_the_true_kl_at_every_token():
    """Each estimator sees the sampled token's two log-probabilities, computed here one sequence at a time."""
    policy, reference = tiny_llama(0), tiny_llama(1)
    lengths, values = token_divergences(actors(policy, reference), PROMPTS, RESPONSES, 0.7,
                                        {"kl": ESTIMATORS["kl"], "k3": ESTIMATORS["bregman"]}, batch_size=2)
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
    values = measure.divergences_of_batch(logits.expand(1, 40_000, 8), ref_logits.expand(1, 40_000, 8), tokens, 1.0, ESTIMATORS)
    quality = estimator_quality([1] * 40_000, values)
    for name in ("kl", "bregman", "clamped_kl", "squared_error", "negative_kl"):
        unbiased = abs(quality[name]["bias"]) < 3 * quality[name]["bias_se"]
        assert unbiased is (name in ("kl", "bregman")), name
    assert quality["bregman"]["deviation"] < quality["kl"]["deviation"]


def test_where_answers_have_too_few_tokens_for_the_true_kl_more_are_sampled(world):
    tokenizer, policy = load_tokenizer(world / "sft"), Llama.from_pretrained(world / "sft")
    benchmark = load_benchmark(world / "data" / "evaluation.json", tokenizer, "tiny", 192)
    settings = {"max_new_tokens": 5, "temperature": 1.0}
    plain = measure.answer(policy, tokenizer, benchmark, **settings)
    more = measure.answer(policy, tokenizer, benchmark, kl_tokens=200, **settings)
    assert plain.more == [] and plain.responses == more.responses
    assert sum(map(len, more.responses + more.more)) >= 200 and len(more.more) == len(more.more_prompts)
    assert all(prompt in benchmark.prompts for prompt in more.more_prompts)


def test_the_true_kl_is_read_in_a_seeded_order_not_from_the_top_of_the_file(world, monkeypatch):
    """A file sorted by kind would give the KL of its first kinds."""
    tokenizer = load_tokenizer(world / "sft")
    run = RunConfig.from_dict({"policy": str(world / "sft"), "reward": str(world / "reward"), "response_length": 4,
                               "policy_device": "cpu", "reference_device": "cpu"})
    models = build_models(run, tokenizer)
    benchmark, seen, honest = load_benchmark(world / "data" / "evaluation.json", tokenizer, "tiny", 192), [], token_divergences
    monkeypatch.setattr(measure, "token_divergences", lambda actors, prompts, *rest: seen.append(prompts) or honest(
        actors, prompts, *rest))
    for _ in range(2):
        measure.evaluate_policy(models, run, benchmark, "test")
    assert seen[0] == seen[1] != benchmark.prompts and sorted(seen[0]) == sorted(benchmark.prompts)


def test_rewards_come_in_the_order_of_the_responses():
    scores = measure_reward(lambda ids, mask, n: (ids * mask).sum(1).float(), PROMPTS, RESPONSES, pad_token_id=9,
                            device="cpu", batch_size=2)
    assert scores == [sum(p) + sum(r) for p, r in zip(PROMPTS, RESPONSES)]  # were padding read, 9s would be in it


def sample(policy, temperature, **changes):
    tokenizer = SimpleNamespace(eos_token_id=EOS, stop_ids=(EOS,), pad_token_id=changes.pop("pad_token_id", PAD))
    return sample_responses(policy, tokenizer, PROMPTS, **({"max_new_tokens": 6, "temperature": temperature} | changes))


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
    found = measure.measure_facts([task, task], [f"{true} {false} {true}", true])
    assert found["fact_precision"] == pytest.approx(100 * 2 / 3)
    assert (found["facts"], found["repeats"]) == (1.5, 0.5)


def test_a_benchmark_without_judges_has_no_win_rate_and_the_miniature_worlds_has(world, tmp_path):
    tokenizer = load_tokenizer(world / "sft")
    run = RunConfig.from_dict({"policy": str(world / "sft"), "reward": str(world / "reward"), "response_length": 4,
                               "rollout_batch_size": 128, "policy_device": "cpu", "reference_device": "cpu"})
    models = build_models(run, tokenizer)
    models.rewards = LoadedReward(lambda ids, mask, n: mask.sum(1).float(), None)

    def measured(file):
        benchmark = load_benchmark(file, tokenizer, "tiny", 192)
        return benchmark, measure.evaluate_now(models, run, benchmark, "test")

    benchmark, result = measured(world / "data" / "evaluation.json")
    assert result["n"] == len(result["responses"]) == len(result["preferences"]) == len(benchmark.tasks)
    assert result["true_kl"] == 0 and {"win_rate", "win_rate_se", "facts", "repeats", "reward"} <= set(result)
    (tmp_path / "plain.json").write_text(json.dumps([{"instruction": "Name a metal."}]))
    benchmark, result = measured(tmp_path / "plain.json")
    assert benchmark.about == [] and not {"win_rate", "preferences", "fact_precision"} & set(result)
    assert result["reward"] == len(benchmark.prompts[0]) + result["tokens"]
