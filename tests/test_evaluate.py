"""What evaluate.py promises: win rates as AlpacaEval counts them, honest errors, KL over the whole vocabulary."""

import json
import math
import sys
from itertools import product

import pytest
import torch
from conftest import SIZES

import evaluate
from evaluate import (
    before_after,
    bootstrap,
    draw_curves,
    format_table,
    mean_and_error,
    measure_reward,
    measure_true_kl,
    paired_difference,
    ratio_and_error,
    sample_responses,
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
    assert result["true_kl"] == 0 and {"win_rate", "win_rate_se", "fact_precision", "repeats", "reward"} <= set(result)
    (world / "plain.json").write_text(json.dumps([{"instruction": "Name a metal."}]))
    benchmark, result = measured(world / "plain.json")
    assert benchmark["about"] == [] and not {"win_rate", "preferences", "fact_precision"} & set(result)
    assert result["reward"] == len(benchmark["prompts"][0]) + result["tokens"]


# --- showing -------------------------------------------------------------------------------------------------------


def test_the_table_has_a_column_a_policy_and_leaves_out_what_nobody_measured():
    sft = {"win_rate": 37.04, "win_rate_se": 1.66, "tokens": 20}
    table = format_table({"SFT": sft, "step-0020": {"tokens": 31.25}})
    header, _, *rows = table.split("\n")
    assert header.split() == ["SFT", "step-0020"]
    assert [row.split() for row in rows] == [["win", "rate,", "%", "37.0", "±", "1.7"], ["tokens", "20.0", "31.2"]]
    assert len({len(row) for row in (header, rows[1])}) == 1


def evaluation(step: int, preferences: list[float]) -> dict:
    rate, error = win_rate(preferences)
    return {"step": step, "n": len(preferences), "win_rate": rate, "win_rate_se": error, "preferences": preferences,
            "responses": [f"answer {i} at {step}" for i in range(len(preferences))]}


def test_before_and_after_show_the_paired_difference_and_answers_side_by_side():
    tasks = [{"instruction": f"Question {i}?", "input": "copper" if i == 2 else ""} for i in range(4)]
    text = before_after(evaluation(0, [1, 1, 2, 1]), evaluation(40, [1, 2, 2, 2]), tasks, pairs=2)
    assert "before" in text and "step 40" in text
    assert "win rate after − before: +50.0 ± 28.9 points (paired over 4, 1.7 standard errors)" in text
    assert text.count("Question") == 2
    assert "  Question 2? [copper]\n    before: answer 2 at 0\n    after:  answer 2 at 40" in text


def test_answers_that_did_not_change_are_not_shown_as_before_and_after():
    before, after = evaluation(0, [1, 1, 2]), evaluation(40, [1, 1, 2])
    after["responses"][:2] = before["responses"][:2]
    text = before_after(before, after, [{"instruction": f"Question {i}?"} for i in range(3)])
    assert "1 of the 1 answers that changed, of 3 in all" in text
    assert text.count("Question") == 1 and "Question 2?" in text


def test_before_and_after_without_judges_shows_no_win_rate():
    before, after = ({"step": step, "n": 1, "tokens": 3.0, "responses": ["x"]} for step in (0, 5))
    assert "win rate" not in before_after(before, after, [{"instruction": "Say x."}])


@pytest.fixture
def run_folder(tmp_path):
    keys = [key for _, lines in evaluate.PANELS for key, _ in lines]
    metrics = [{"step": step} | {key: 0.1 * step for key in keys} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    evaluations = [evaluation(step, [1, 2, 2]) for step in (0, 3)]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(e) + "\n" for e in evaluations))
    return tmp_path


def test_the_curves_are_a_readable_picture(run_folder):
    image = pytest.importorskip("matplotlib.image")
    file = draw_curves(run_folder)
    assert file == run_folder / "curves.png"
    pixels = image.imread(file)
    assert pixels.shape[0] > 500 and pixels.shape[1] > 1000 and pixels.std() > 0.01
    assert {p.name for p in run_folder.iterdir()} == {"metrics.jsonl", "evaluations.jsonl", "curves.png"}


def test_curves_without_evaluations_or_without_judges_are_drawn_too(run_folder):
    pytest.importorskip("matplotlib")
    (run_folder / "evaluations.jsonl").write_text(json.dumps({"step": 0, "reward": 0.1, "reward_se": 0.2}) + "\n")
    assert draw_curves(run_folder)
    (run_folder / "evaluations.jsonl").unlink()
    assert draw_curves(run_folder)


def test_a_failed_drawing_leaves_the_last_picture(run_folder, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    (run_folder / "curves.png").write_bytes(b"the last good picture")

    def fail(self, file, **settings):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure.Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        draw_curves(run_folder)
    assert (run_folder / "curves.png").read_bytes() == b"the last good picture"


def test_curves_without_matplotlib_are_left_out_without_an_error(run_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw_curves(run_folder) is None and not (run_folder / "curves.png").exists()


# --- program -------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_neither_run_nor_adapter_is_one_clear_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(tmp_path)])
    assert evaluate.main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "neither a run folder" in error
