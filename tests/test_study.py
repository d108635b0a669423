"""The study's figures by hand: what a peak is, what is subtracted from what, and that every run's flags are train.py's."""

import math

import pytest

from bench import study_report as report
from bench.study_report import Found, contrast, holm, read, where
from training.config import build_config, build_parser


def line(cell: str, seed: int, wins: list[str], **curves: list[float]) -> dict:
    """A run of that many evaluations, every 10 steps; wins: a character an instruction."""
    rates = [100 * sum({"1": 1, "h": 0.5, "0": 0}[c] for c in row) / len(row) for row in wins]
    given = {"win_rate": rates, "true_kl": [0.0] * len(wins), "tokens": [20.0] * len(wins), "fact_precision": [70.0] * len(wins)}
    given |= curves
    metrics = {"penalty": [0.1, 0.3], "length": [10.0, 10.0], "score_std": [1.0, 2.0]}
    return {"cell": cell, "tuning": cell.split(",")[0], "estimator": "none", "beta": 0.5, "seed": seed, "flags": {},
            "seconds": 60, "machine": "none", "metrics": metrics, "evaluations": [
                {"step": 10 * i, "wins": row} | {name: curve[i] for name, curve in given.items()} for i, row in enumerate(wins)]}


def test_the_peak_of_a_seed_is_where_the_others_are_highest():
    """Each seed's own highest point would be too high by chance."""
    cells = read([line("lora, none", 0, ["0000", "0001", "1111"]), line("lora, none", 1, ["0000", "0111", "0001"])])
    assert [report.peak_of(cells["lora, none"], seed) for seed in (0, 1)] == [1, 2]
    assert [report.at_peak(cells["lora, none"], seed).mean().item() for seed in (0, 1)] == [0.25, 0.25]
    alone = read([line("x", 0, ["0000", "0001", "1111"])])
    assert report.peak_of(alone["x"], 0) == 2


def test_a_contrast_is_in_points_over_the_seeds_that_all_have(monkeypatch):
    monkeypatch.setattr(report, "FIXED", 10)
    cells = read([line("a", 0, ["0000", "1111"]), line("b", 0, ["0000", "0000"]), line("a", 1, ["0000", "1111"])])
    every = contrast(cells, {"a": 1.0, "b": -1.0}, lambda cell, seed: report.at_step(cell, seed, 10))
    assert every == Found(pytest.approx(100.0), pytest.approx(0.0, abs=1e-9), 1)
    half = read([line("a", s, ["0000", "1100"]) for s in (0, 1)] + [line("b", s, ["0000", "h0h0"]) for s in (0, 1)])
    found = contrast(half, {"a": 1.0, "b": -1.0}, lambda cell, seed: report.at_step(cell, seed, 10))
    # By instruction ½, 1, −½, 0: mean ¼; both seeds alike, so that the error is that of four instructions.
    deviation = math.sqrt(sum((x - 0.25) ** 2 for x in (0.5, 1, -0.5, 0)) / 4)
    assert found.mean == pytest.approx(25) and found.error == pytest.approx(100 * deviation / 2, rel=0.1)
    assert str(contrast(half, {"a": 1.0, "c": -1.0}, report.over_steps)) == "–"


def test_an_interaction_weighs_four_cells():
    """(full: penalty less none) less (LoRA: penalty less none): (75 − 25) − (50 − 50) = 50."""
    wins = {"full, kl": "1110", "full, none": "1000", "lora, kl": "1100", "lora, none": "1100"}
    cells = read([line(cell, 0, ["0000", row]) for cell, row in wins.items()])
    weights = {"full, kl": 1.0, "full, none": -1.0, "lora, kl": -1.0, "lora, none": 1.0}
    assert contrast(cells, weights, report.over_steps).mean == pytest.approx(50)


def test_the_win_rate_at_a_kl_lies_between_two_evaluations_by_its_root():
    cells = read([line("a", 0, ["0000", "1000", "1111"], true_kl=[0.0, 0.01, 0.09])])
    assert report.at_kl(cells["a"], 0, 0.04).tolist() == pytest.approx([1.0, 0.5, 0.5, 0.5])  # √: 0.2, halfway from 0.1 to 0.3
    assert report.at_kl(cells["a"], 0, 0.16) is None
    run = cells["a"][0]
    assert where(run, "win_rate", 25.0, "true_kl") == 0.01 and where(run, "win_rate", 30.0, "tokens") == 20.0


def test_the_penalty_is_weighed_against_the_deviation_of_scores():
    """β 0.5 · 10 tokens · (0.1 / 1 and 0.3 / 2), on average."""
    assert report.share_of_reward(read([line("a", 0, ["00"])])["a"]) == pytest.approx((0.5 + 0.75) / 2)


def test_holm_corrects_the_smallest_most():
    assert holm({"a": 0.01, "b": 0.02, "c": 0.2}) == {"a": 0.03, "b": 0.04, "c": 0.2}
    assert holm({"a": 0.4, "b": 0.02}) == {"b": 0.04, "a": 0.4} and holm({"a": 0.6, "b": 0.6}) == {"a": 1.0, "b": 1.0}


def test_the_best_rate_is_that_of_the_highest_peak():
    rates = {1e-3: "1100", 5e-4: "1110", 2e-3: "1000"}
    lines = [line(f"lora, rate {rate:g}", seed, ["0000", row]) for rate, row in rates.items() for seed in (0, 1)]
    assert report.best_rate([*lines, line("full, rate 1", 0, ["0000", "1111"])], "lora", 2) == 5e-4


def test_tables_and_figures_are_made_of_lines_alone(tmp_path):
    lines = [line(cell, seed, ["0010", "1h10", "1100"], true_kl=[0.0, 0.02, 0.3], tokens=[18.0, 22.0, 26.0])
             for cell in ("lora, none", "lora, kl", "full, none", "full, kl", "lora, rate 0.001", "full, rate 0.0001")
             for seed in (0, 1)]
    text = report.write_report(lines, tmp_path).read_text()
    assert "| kl, full less LoRA | 2 | +0.0 ± 0.0 |" in text and "## (c) At equal true KL" in text
    assert "12 runs, 0.2 hours" in text
    assert {p.name for p in tmp_path.iterdir()} == {"study.md", "curves.png", "kl.png", "rates.png"}


def test_every_run_of_the_study_is_one_of_train_py(monkeypatch):
    monkeypatch.syspath_prepend("bench")
    from bench import study

    cells = [cell for cell, _ in study.after_the_sweep("full")]
    assert len({cell.name for cell in cells}) == len({repr(cell) for cell in cells})
    for cell in cells:
        words = [word for name, value in cell.flags({"lora": 1e-3, "full": 1e-4}).items() for word in (f"--{name}", value)]
        run = build_config(vars(build_parser("").parse_args(words)))
        assert (run.tuning, run.estimator, run.ppo.beta) == (cell.tuning, cell.estimator, cell.beta)
        assert "rank" not in cell.name or run.lora_alpha / run.lora_rank == 8
    quick = [(cell.name, seed) for cell, seed in study.after_the_sweep("quick")]
    assert set(quick) <= {(cell.name, seed) for cell, seed in study.after_the_sweep("full")}
