"""What report.py promises: the paper's tables and figures from run folders, honest errors, one page that loads nothing."""

import json
import math
import random
from datetime import date
import re

import pytest

from evaluation import figures, report, tables
from evaluation.figures import fit_in_words
from evaluation.results import configurations, load_run
from evaluation.statistics import Bend, bootstrap, bootstrap_crossed, paired_difference, win_rate
from evaluation.tables import table_1, table_2, table_3

CONFIG = {"estimator": "bregman", "tuning": "lora", "lora_dropout": 0.1, "lora_rank": 8, "beta": 0.02, "learning_rate": 5e-4,
          "steps": 20, "seed": 0, "out": "x", "policy": "no/such/model", "prompt_template": "tiny", "query_length": 192,
          "evaluation": "no/such/file.json"}


def evaluation(step: int, seed: int, wins: float, kl: float) -> dict:
    rng = random.Random(f"{seed} {step}")
    preferences = [1.0 + (rng.random() < wins) for _ in range(60)]
    rate, error = win_rate(preferences)
    return {"step": step, "n": 60, "win_rate": rate, "win_rate_se": error, "preferences": preferences, "judged": 60,
            "true_kl": kl, "true_kl_se": 0.01, "kl_tokens": 900, "tokens": 20 + step, "tokens_se": 1.0, "reward": 10 * kl,
            "reward_se": 0.1, "fact_precision": 80 - step, "fact_precision_se": 1.0, "factscore": 79 - step, "factscore_se": 1.1,
            "facts": 2.5, "abstained": 3, "repeats": 0.1, "about_tokens": 30.0, "about_tokens_se": 1.0,
            "responses": [f"answer {i} <at> {step}" for i in range(60)]}


def make_run(folder, seed=0, quality=False, **changes):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"seed": seed, "out": str(folder)} | changes))
    lines = [evaluation(step, seed, 0.35 + 0.01 * step, 0.004 * step) for step in (0, 10, 20)]
    if quality:
        lines[-1]["estimators"] = {"kl": {"mean": 0.08, "mean_se": 0.01, "bias": 0.0008, "bias_se": 0.01, "deviation": 0.8},
                                   "bregman": {"mean": 0.1, "mean_se": 0.01, "bias": 0.02, "bias_se": 0.01, "deviation": 0.4}}
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path):
    return [make_run(tmp_path / "b0", 0, quality=True), make_run(tmp_path / "b1", 1, shard="auto"),
            make_run(tmp_path / "b2", 2, baseline="runs/start"),
            make_run(tmp_path / "d", estimator="none", lora_dropout=0.5), make_run(tmp_path / "f", estimator="k1", tuning="full"),
            make_run(tmp_path / "h", estimator="none", learning_rate=1e-3)]


def test_runs_that_differ_in_their_seed_are_one_configuration(runs):
    found = configurations([load_run(run) for run in runs])
    assert [len(c.runs) for c in found] == [3, 1, 1, 1]
    assert [c.regularization for c in found] == ["Bregman", "Dropout only (p = 0.5)", "KL",
                                                 "No regularization, learning rate 0.001"]
    assert [c.adaptation for c in found] == ["LoRA", "LoRA", "Full model tuning", "LoRA"]


def test_one_estimator_has_one_name_and_equal_names_are_told_apart(tmp_path):
    named = [make_run(tmp_path / "k3", 0, estimator="k3"), make_run(tmp_path / "bregman", 1)]
    [found] = configurations([load_run(run) for run in named])
    assert len(found.runs) == 2 and found.name == "Bregman"
    # the dropout of an adapter that full tuning doesn't have is in no name
    alike = [make_run(tmp_path / name, tuning="full", lora_dropout=p) for name, p in (("one", 0.1), ("two", 0.2))]
    names = [c.name for c in configurations([load_run(run) for run in alike])]
    assert names == ["Bregman, full tuning (one)", "Bregman, full tuning (two)"]


def test_table_1_has_the_bootstrap_over_runs_and_the_error_of_a_single_one(runs):
    found = configurations([load_run(run) for run in runs])
    header, (sft, bregman, dropout, *_) = table_1(found).header, table_1(found).rows
    column = header.index("Win rate, %")
    rates = [run.evaluations[-1]["win_rate"] for run in found[0].runs]
    mean, error = bootstrap(rates)
    honest = bootstrap_crossed([run.evaluations[-1]["preferences"] for run in found[0].runs])[1]
    assert bregman[column] == f"{mean:.1f} ± {error:.1f} ({honest:.1f})" and bregman[header.index("Runs")] == "3"
    single = found[1].runs[0].evaluations
    assert dropout[column] == f"{single[-1]['win_rate']:.1f} ± {single[-1]['win_rate_se']:.1f}"
    gain, gain_error = paired_difference(single[0]["preferences"], single[-1]["preferences"])
    assert dropout[header.index("Gain over SFT")] == f"{gain:+.1f} ± {gain_error:.1f}"
    assert sft[:2] == ["–", "SFT, no PPO"]


def test_sft_is_a_mean_over_the_seeds_of_the_runs_and_changes_are_paired_by_seed(tmp_path):
    """One sampling of SFT beside three of the policy shows the luck of that one as a loss: 80 % here, where the three are 76."""
    for seed, (before, after) in enumerate([(80, 75), (74, 74), (74, 73)]):
        run = make_run(tmp_path / str(seed), seed)
        lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
        lines = [lines[0] | {"fact_precision": before, "fact_counts": [[before, 100]]},
                 lines[2] | {"fact_precision": after, "fact_counts": [[after, 100]]}]
        (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sft, bregman = table_2(configurations([load_run(tmp_path / str(seed)) for seed in range(3)])).rows
    assert sft[2].startswith("76.0") and bregman[2].startswith("74.0")
    assert bregman[3] == f"-2.0 ± {math.sqrt((9 + 4 + 1) / 2 / 3):.1f}"  # of −5, 0 and −1


def test_table_2_and_3_hold_what_was_measured_and_are_left_out_where_nothing_was(runs, tmp_path):
    found = configurations([load_run(run) for run in runs])
    assert table_2(found).rows[0] == ["SFT, no PPO", "79.0 ± 0.0", "80.0 ± 0.0", "–", "2.50", "30.0", "0.10", "3.0"]
    assert table_3(found).rows == [["LoRA PPO, Bregman", "0.0800 ± 0.0100", "+0.01 (10.0)", "+0.25 (5.0)"]]
    bare = make_run(tmp_path / "bare")
    lines = [{k: v for k, v in json.loads(line).items() if "fact" not in k}
             for line in (bare / "evaluations.jsonl").read_text().splitlines()]
    (bare / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = configurations([load_run(bare)])
    assert table_2(found) is None and table_3(found) is None


def test_what_evaluate_measured_replaces_what_training_measured_alike(tmp_path):
    run = make_run(tmp_path / "run")
    better = evaluation(20, 0, 0.9, 0.3) | {"judge": "annotators"}
    (run / "evaluation.json").write_text(json.dumps({"step-0020": better}))
    assert [e["win_rate"] for e in load_run(run).evaluations][-1] == better["win_rate"]
    assert [e["step"] for e in load_run(run).evaluations] == [0, 10, 20]


def test_the_report_says_what_its_figures_were_measured_on(runs, tmp_path, capsys):
    report.write_report(runs[:2], tmp_path / "alike")
    assert "measured on 60 instructions of no/such/file.json, judge annotators\n" in capsys.readouterr().out
    other = {f"step-{step:04d}": evaluation(step, 5, 0.5, 0.1) | {"judge": "gpt", "data": "x.json"} for step in (0, 20)}
    (runs[1] / "evaluation.json").write_text(json.dumps(other))
    report.write_report(runs[:2], tmp_path / "apart")
    said = capsys.readouterr().out
    assert "60 instructions of x.json, judge gpt" in said and "warning: these runs were not measured alike" in said
    assert "not measured alike" in (tmp_path / "apart" / "report.html").read_text(encoding="utf-8")


def test_the_numbers_of_the_runs_stand_under_every_table(runs, tmp_path):
    report.write_report(runs, tmp_path / "report")
    text, today = (tmp_path / "report" / "report.md").read_text(), date.today().isoformat()
    assert text.count(f"Runs: β 0.02, learning rate 0.0005 and 0.001, rank 8, steps 20; of {today}.") == 3


def test_answers_keep_their_line_breaks(runs, tmp_path):
    assert "white-space: pre-wrap" in next(line for line in report.STYLE.splitlines() if ".samples td" in line)


def test_judgements_of_two_judges_are_never_mixed(tmp_path):
    run = make_run(tmp_path / "run")
    others = {f"step-{step:04d}": evaluation(step, 5, 0.5, 0.1) | {"judge": "gpt"} for step in (0, 20)}
    (run / "evaluation.json").write_text(json.dumps(others))
    assert [(e["step"], e["judge"]) for e in load_run(run).evaluations] == [(0, "gpt"), (20, "gpt")]


@pytest.mark.parametrize("broken", ["no config", "bad config", "no evaluation", "SFT alone", "a step of text"])
def test_a_folder_that_cannot_be_reported_is_one_line_that_names_it(tmp_path, broken):
    run = make_run(tmp_path / "run")
    if broken == "no config":
        (run / "config.json").unlink()
    elif broken == "bad config":
        (run / "config.json").write_text("{")
    elif broken == "no evaluation":
        (run / "evaluations.jsonl").unlink()
    elif broken == "a step of text":
        with open(run / "evaluations.jsonl", "a", encoding="utf-8") as lines:
            lines.write(json.dumps(evaluation(30, 0, 0.4, 0.0) | {"step": "<script>alert(1)</script>"}) + "\n")
    else:
        (run / "evaluations.jsonl").write_text(json.dumps(evaluation(0, 0, 0.4, 0.0)) + "\n")
    with pytest.raises(ValueError, match=re.escape(str(run))) as caught:
        load_run(run)
    assert "\n" not in str(caught.value)


# --- the whole report --------------------------------------------------------------------------------------------------


def test_the_report_is_markdown_pictures_and_one_page_that_loads_nothing(runs, tmp_path, capsys):
    image = pytest.importorskip("matplotlib.image")
    report.write_report(runs, tmp_path / "out")
    names = {"report.md", "report.html", "figure1.png", "figure2.png", "figure3.png"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    for i in (1, 2, 3):
        pixels = image.imread(tmp_path / "out" / f"figure{i}.png")
        assert min(pixels.shape[:2]) > 500 and pixels.std() > 0.01
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3 and not re.search(r"(src|href)=['\"]?(http|//|figure)", page)
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "Table 1" in text and "![Figure 3" in text and "nan" not in text
    said = capsys.readouterr().out
    assert "Table 1" in said and all(name in said for name in names)


def test_a_figure_is_readable_on_a_phone(runs, tmp_path, monkeypatch):
    """390 pixels wide, no text is smaller than 9."""
    text_module = pytest.importorskip("matplotlib.text")
    sizes = []

    def look(figure, file, dpi=130):
        texts = [text for text in figure.findobj(text_module.Text) if text.get_text() and text.get_visible()]
        sizes.append(min(text.get_fontsize() for text in texts) / 72 * 390 / figure.get_figwidth())

    monkeypatch.setattr(figures, "save", look)
    figures.draw_figures(configurations([load_run(run) for run in runs]), tmp_path)
    assert len(sizes) == 3 and min(sizes) >= 9


def test_the_commit_of_the_runs_stands_under_their_tables(runs):
    about = {"commit": "abc1234", "torch": "2", "began": "2026-11-26"}
    (runs[0] / "about.json").write_text(json.dumps(about))
    assert report.settings_of_training([load_run(runs[0])]).endswith("; commit abc1234; of 2026-11-26.")


def test_answers_stand_before_and_after_and_are_escaped(runs, tmp_path, monkeypatch):
    tasks = [{"instruction": f"Question {i} <b>?", "input": "<script>alert(1)</script>"} for i in range(60)]
    monkeypatch.setattr(report, "instructions_of", lambda run: tasks)
    text = report.samples(configurations([load_run(run) for run in runs]))
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert "answer 0 &lt;at&gt; 0" in text and "answer 0 &lt;at&gt; 20" in text
    assert text.count("<details") == 4 and "the reference</small>" in text


def test_without_the_instructions_the_page_says_so(runs):
    assert "not where the runs found them" in report.samples(configurations([load_run(runs[0])]))


def test_without_matplotlib_the_tables_are_still_written(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    report.write_report(runs[:1], tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"report.md", "report.html"}
    assert "pip install matplotlib" in capsys.readouterr().out


def test_runs_without_a_judge_are_reported_by_their_reward(tmp_path):
    pytest.importorskip("matplotlib")
    run = make_run(tmp_path / "run")
    lines = [{k: v for k, v in json.loads(line).items() if "win" not in k and k not in ("preferences", "judged")}
             for line in (run / "evaluations.jsonl").read_text().splitlines()]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.write_report([run], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "Reward over PPO steps" in text and "| – |" in text


def test_the_words_under_figure_3_follow_the_fit():
    assert "no bend is found (p = 0.31)" in fit_in_words(Bend(0, 1, None, 1, 0.9, 0.31))
    assert "too few to look for a bend" in fit_in_words(Bend(0, 1, None, 1, 0.9, None))
    assert "beyond, it falls" in fit_in_words(Bend(0, 1, 0.4, -1, 0.9, 0.01))
    assert "beyond, it is flat" in fit_in_words(Bend(0, 1, 0.4, 0.05, 0.9, 0.01))
    assert "Too few points" in fit_in_words(None) and math.isclose(Bend(0, 1, 0.4, -1, 0.9, 0.01)(0.5), 0.3)


def test_an_answer_stays_on_its_line_and_within_the_terminal(monkeypatch):
    monkeypatch.setattr(tables.sys, "stdout", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setenv("COLUMNS", "20")
    assert tables.on_a_line("    after: one\ntwo three") == "    after: one ⏎ tw…"
    monkeypatch.setattr(tables.sys, "stdout", type("File", (), {"isatty": lambda self: False})())
    assert tables.on_a_line("    after: one\ntwo three") == "    after: one ⏎ two three"
