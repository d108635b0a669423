"""What a run shows of itself: readable tables, answers before and after, a picture that never destroys the last one."""

import json
import sys

import pytest

from evaluation import figures
from evaluation.figures import draw_curves
from evaluation.statistics import win_rate
from evaluation.tables import before_after, format_table, quality_table

# --- tables --------------------------------------------------------------------------------------------------------


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


def test_before_and_after_are_compared_in_pairs():
    """Rewards 1 and 3 become 2 and 6: +2.5, whose error is that of the differences 1 and 3, not of two means."""
    before, after = evaluation(0, [1, 2]), evaluation(5, [2, 2])
    before |= {"reward": 2.0, "reward_se": 1.0, "rewards": [1.0, 3.0], "fact_precision": 50.0, "fact_counts": [[1, 2], [2, 4]]}
    after |= {"reward": 4.0, "reward_se": 2.0, "rewards": [2.0, 6.0], "fact_precision": 75.0, "fact_counts": [[3, 4], [3, 4]]}
    lines = before_after(before, after, [{"instruction": "a"}, {"instruction": "b"}]).split("\n")
    assert lines[0].endswith("after − before")
    reward, facts = (next(line for line in lines if line.startswith(name)) for name in ("reward", "fact precision"))
    assert reward.split()[1:] == ["2.00", "±", "1.00", "4.00", "±", "2.00", "+2.00", "±", "1.00"]
    assert facts.endswith("+25.0 ± 0.0")


def test_a_difference_that_nobody_measured_is_said_to_be_so():
    before, after = evaluation(0, [1, 2]), evaluation(5, [2, 2])
    before["preferences"], after["preferences"] = [1, None], [None, 2]
    text = before_after(before, after, [{"instruction": "a"}, {"instruction": "b"}])
    assert "win rate after − before: not measured (no instruction was judged in both)" in text


def test_before_and_after_without_judges_shows_no_win_rate():
    before, after = ({"step": step, "n": 1, "tokens": 3.0, "responses": ["x"]} for step in (0, 5))
    assert "win rate" not in before_after(before, after, [{"instruction": "Say x."}])


def test_the_quality_of_the_estimates_is_shown_beside_the_true_kl():
    result = {"true_kl": 0.08, "true_kl_se": 0.002, "kl_tokens": 28_010, "estimators": {
        "kl": {"mean": 0.084, "mean_se": 0.01, "bias": 0.004, "bias_se": 0.01, "deviation": 0.8}}}
    first, _, row = quality_table(result).split("\n")
    assert "0.0800 ± 0.0020 nats per token over 28,010 tokens" in first
    assert row.split() == ["kl", "0.0840", "±", "0.0100", "0.0040", "±", "0.0100", "0.05", "10.00"]


# --- curves --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path):
    keys = [key for _, lines in figures.PANELS for key, _ in lines]
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


def drawn(run_folder, monkeypatch):
    """The axes of curves.png, by their titles, and the title of all."""
    pytest.importorskip("matplotlib")
    kept = []
    monkeypatch.setattr(figures, "save", lambda figure, *rest, **more: kept.append(figure))
    draw_curves(run_folder)
    return {axis.get_title(): axis for axis in kept[0].axes}, kept[0].get_suptitle()


def test_two_evaluations_are_bars_and_more_are_a_curve(run_folder, monkeypatch):
    """Two points make no curve."""
    axes, _ = drawn(run_folder, monkeypatch)
    panel = axes["win rate, % (± standard error)"]
    assert [bar.get_height() for bar in panel.patches] == pytest.approx([200 / 3, 200 / 3])
    assert [label.get_text() for label in panel.get_xticklabels()] == ["before", "step 3"]
    with open(run_folder / "evaluations.jsonl", "a") as file:
        file.write(json.dumps(evaluation(6, [2, 2, 2])) + "\n")
    axes, _ = drawn(run_folder, monkeypatch)
    panel = axes["win rate, % (± standard error)"]
    assert not panel.patches and list(panel.lines[0].get_xdata()) == [0, 3, 6]


def test_the_true_kl_of_few_responses_has_a_band_and_what_is_clipped_axes_of_its_own(run_folder, monkeypatch):
    lines = [json.loads(line) | {"true_kl_se": 0.05} for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    axes, _ = drawn(run_folder, monkeypatch)
    [band] = axes["KL to the reference, nats/token"].collections
    low, high = band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()
    assert (low, high) == pytest.approx((0.1 - 0.05, 0.3 + 0.05))
    assert not axes["reward model's score"].collections
    assert len(axes["policy: share clipped"].lines) == len(axes["value: share clipped"].lines) == 1


def test_reward_and_win_rate_stand_over_the_distance_from_the_start(run_folder, monkeypatch):
    found = [evaluation(step, wins) | {"reward": reward, "reward_se": 0.1, "true_kl": kl} for step, wins, reward, kl in (
        (0, [1, 2], 0.0, 0.0), (5, [2, 2], 0.5, 0.04), (9, [1, 1], 1.0, 0.25))]
    (run_folder / "evaluations.jsonl").write_text("".join(json.dumps(e) + "\n" for e in found))
    axes, _ = drawn(run_folder, monkeypatch)
    panel = axes["on the evaluation instructions"]
    assert list(panel.lines[0].get_xdata()) == pytest.approx([0, 0.2, 0.5]) and list(panel.lines[0].get_ydata()) == [0, 0.5, 1]
    assert list(axes[""].lines[0].get_ydata()) == pytest.approx([50, 100, 0])  # the win rate's own axis


def test_the_title_says_what_the_run_was(run_folder, monkeypatch):
    assert drawn(run_folder, monkeypatch)[1] == run_folder.name
    config = {"estimator": "jensen_shannon", "beta": 0.02, "tuning": "lora", "lora_rank": 8, "learning_rate": 5e-4, "seed": 3}
    (run_folder / "config.json").write_text(json.dumps(config))
    assert drawn(run_folder, monkeypatch)[1] == "jensen shannon, β 0.02; LoRA of rank 8, learning rate 0.0005, seed 3"
    (run_folder / "config.json").write_text(json.dumps(config | {"estimator": "none", "tuning": "full"}))
    assert drawn(run_folder, monkeypatch)[1] == "no penalty; full fine-tuning, learning rate 0.0005, seed 3"


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
