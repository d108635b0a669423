# SPDX-License-Identifier: MIT
"""The paper's Tables 1 and 2 and Figures 1 to 3 from finished runs: `python evaluate.py report RUNS... --out DIR`.

Reads what training and evaluate.py left in the run folders (evaluations.jsonl, evaluation.json) and computes nothing anew: a
configuration of several runs has means with the paper's bootstrap error, one of a single run the standard error over the
evaluation instructions. DIR gets report.md, figure1.png to figure3.png, and report.html, one file that holds all of it and
answers before and after side by side.
"""

import base64
import html
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from evaluation.figures import Figure, draw_figures
from evaluation.measure import load_benchmark
from evaluation.results import Configuration, Run, configurations, load_run, read_object, settings_in_words
from evaluation.tables import Table, as_html, as_markdown, table_1, table_2, table_3
from formats.tokenizer import load_tokenizer
from formats.write import write_text


def write_report(folders: Sequence[Path], out: Path, judge: str | None = None) -> None:
    """The whole report, of what that judge said or else of each run's fullest evaluation; says what it shows and wrote."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; the report needs a folder")
    runs = [load_run(folder, judge) for folder in folders]
    configs = configurations(runs)
    out.mkdir(parents=True, exist_ok=True)
    tables = [table._replace(caption=f"{table.caption} {settings_of_training(runs)}")
              for table in (table_1(configs), table_2(configs), table_3(configs)) if table]
    figures = draw_figures(configs, out)
    title = f"LoRA-based PPO: {len(configs)} configuration{'s' * (len(configs) > 1)}, {len(runs)} run{'s' * (len(runs) > 1)}"
    markdown = "\n".join([f"# {title}\n", *shown(runs), "", *map(as_markdown, tables),
                          *(f"### {f.title}\n\n![{f.title}]({f.file.name})\n\n{f.caption}\n" for f in figures)])
    for name, text in (("report.md", markdown), ("report.html", page(title, tables, figures, runs, samples(configs)))):
        write_text(out / name, text)
    print("\n".join([*shown(runs), "", *map(as_markdown, tables)]))
    print(f"written to {out}: " + ", ".join(["report.html", "report.md", *(f.file.name for f in figures)]))


def shown(runs: Sequence[Run]) -> list[str]:
    """Which evaluations the figures are from, where a run has several, and whether the runs were measured alike."""
    used = {settings_in_words(run.evaluations[-1]) for run in runs}
    lines = [f"measured on {', '.join(sorted(used))}"]
    if len(used) > 1:
        lines.append("warning: these runs were not measured alike, and their figures are not to be compared")
    lines += [f"{run.folder} also holds: {'; '.join(run.others)} (report --judge NAME shows another judge's)" for run in runs
              if run.others]
    return lines


def settings_of_training(runs: Sequence[Run]) -> str:
    """The numbers that most decide a run, each with all its values, and when the runs began."""
    names = {"beta": "β", "learning_rate": "learning rate", "lora_rank": "rank", "lora_alpha": "α", "steps": "steps",
             "rollout_batch_size": "responses a step"}
    found = {words: sorted({run.config[key] for run in runs if run.config.get(key) is not None}) for key, words in names.items()}
    abouts = [read_object(file) if (file := run.folder / "about.json").is_file() else {
        "began": date.fromtimestamp((run.folder / "config.json").stat().st_mtime).isoformat()} for run in runs]
    days, commits = (sorted({about[key] for about in abouts if key in about}) for key in ("began", "commit"))
    return ("Runs: " + ", ".join(f"{words} {' and '.join(f'{x:g}' for x in values)}" for words, values in found.items() if values)
            + (f"; commit {', '.join(commits)}" if commits else "") + f"; of {' to '.join(dict.fromkeys((days[0], days[-1])))}.")


def instructions_of(run: Run) -> list[dict] | None:
    """The evaluation instructions that the run's responses answer; None where they can't be found any more."""
    config = run.config
    file = run.evaluations[-1].get("data") or config["evaluation"]
    try:
        tokenizer = load_tokenizer(config["policy"]).for_template(config["prompt_template"], config.get("system"))
        tasks = load_benchmark(file, tokenizer, config["prompt_template"], config["query_length"]).tasks
    except (ValueError, OSError, TypeError):
        return None
    n = len(run.evaluations[-1]["responses"])
    return tasks[:n] if len(tasks) >= n else None


def samples(configs: Sequence[Configuration], count: int = 8) -> str:
    """Answers before and after, for each configuration the same instructions; HTML."""
    tasks = instructions_of(configs[0].runs[0])
    if tasks is None:
        return "<p>The evaluation instructions are not where the runs found them, so no answers are shown.</p>"
    first = configs[0].runs[0].evaluations
    changed = [i for i in range(len(tasks)) if first[0]["responses"][i] != first[-1]["responses"][i]] or list(range(len(tasks)))
    rows = changed[::max(1, len(changed) // count)][:count]
    blocks = []
    for c in configs:
        before, after = c.runs[0].evaluations[0], c.runs[0].evaluations[-1]
        if max(rows) >= min(len(before["responses"]), len(after["responses"])):
            continue
        body = "".join(
            "<tr><td>" + html.escape(tasks[i]["instruction"]) + (f"<pre>{html.escape(tasks[i]['input'])}</pre>"
                                                                 if tasks[i].get("input") else "")
            + "</td>" + "".join(f"<td>{html.escape(e['responses'][i])}{verdict(e, i)}</td>" for e in (before, after)) + "</tr>"
            for i in rows)
        blocks.append(f"<details{' open' if c is configs[0] else ''}><summary>{html.escape(c.adaptation)} PPO, "
                      f"{html.escape(c.regularization)}</summary><table class=samples><thead><tr><th>Instruction</th><th>SFT</th>"
                      f"<th>step {html.escape(str(after['step']))}</th></tr></thead><tbody>{body}</tbody></table></details>")
    return "".join(blocks)


def verdict(evaluation: dict, i: int) -> str:
    """How an answer fared against the reference output."""
    if "preferences" not in evaluation or evaluation["preferences"][i] is None:
        return ""
    p = evaluation["preferences"][i]
    word = "ties with" if p in (0, 1.5) else "beats" if p > 1.5 else "loses to"
    return f"<small class={'win' if p > 1.5 else 'other'}>{word} the reference</small>"


STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .86rem; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
th { background: var(--soft); } .caption { font-size: .88rem; opacity: .8; max-width: 60rem; }
img { max-width: 100%; background: #fff; border-radius: 6px; }
.samples { table-layout: fixed; } .samples td { width: 33%; overflow-wrap: anywhere; white-space: pre-wrap; }
pre { white-space: pre-wrap; font-size: .8rem; }
small { display: block; margin-top: .3rem; opacity: .75; } small.win { font-weight: 600; opacity: 1; }
summary { cursor: pointer; padding: .4rem 0; font-weight: 600; }
"""


def page(title: str, tables: Sequence[Table], figures: Sequence[Figure], runs: Sequence[Run], answers: str) -> str:
    """The report as one HTML file: pictures inside, nothing loaded from anywhere."""
    pictures = "".join(
        f"<h2>{html.escape(f.title)}</h2><img alt='{html.escape(f.title, quote=True)}' "
        f"src='data:image/png;base64,{base64.b64encode(f.file.read_bytes()).decode()}'>"
        f"<p class=caption>{html.escape(f.caption)}</p>" for f in figures)
    measured = "".join(f"<p>{html.escape(line)}</p>" for line in shown(runs))
    listed = "".join(f"<li><code>{html.escape(str(run.folder))}</code></li>" for run in runs)
    return (f"<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>{measured}"
            f"{''.join(map(as_html, tables))}{pictures}<h2>Answers before and after</h2>{answers}<h2>Runs</h2><ul>{listed}</ul>"
            "</body></html>\n")
