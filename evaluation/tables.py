# SPDX-License-Identifier: MIT
"""Tables: of a run for the terminal, and the paper's Tables 1 and 2 of finished runs, with a third on the estimators of KL."""

import html
import shutil
import sys
from collections.abc import Sequence
from typing import NamedTuple

from evaluation.results import NAMES, Configuration, first_of_each_seed, paired_changes
from evaluation.statistics import bootstrap, bootstrap_crossed, paired_difference

ROWS = [("win rate, %", "win_rate", 1), ("pairs judged", "judged", 0), ("reward", "reward", 2),
        ("true KL, nats/token", "true_kl", 4), ("tokens", "tokens", 1), ("finished, %", "finished", 1),
        ("fact precision, %", "fact_precision", 1), ("facts per answer", "facts", 2), ("repeats per answer", "repeats", 2)]


def format_table(columns: dict[str, dict]) -> str:
    """A table with a column a policy and a row a figure, standard errors behind ±."""
    lines = [f"{'':<22}" + "".join(f"{name:>18}" for name in columns)]
    lines.append("-" * len(lines[0]))
    for title, key, digits in ROWS:
        cells = [format_cell(result, key, digits) for result in columns.values()]
        if any(cells):
            lines.append(f"{title:<22}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def format_cell(result: dict, key: str, digits: int) -> str:
    if key not in result:
        return ""
    error, sign = result.get(key + "_se"), "+" if result.get("is_change") else ""
    return f"{result[key]:{sign}.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def before_after(before: dict, after: dict, tasks: Sequence[dict], pairs: int = 3) -> str:
    """The table of two evaluations with their paired differences, and some answers side by side."""
    columns = {"before": before, f"step {after['step']}": after}
    if changes := paired_changes(before, after):
        columns["after − before"] = changes | {"is_change": True}
    lines = [format_table(columns)]
    if "preferences" in before:
        lines.append(f"win rate after − before: {difference_in_words(before['preferences'], after['preferences'])}")
    changed = [i for i in range(len(tasks)) if before["responses"][i] != after["responses"][i]]
    if changed:
        lines += ["", f"{min(pairs, len(changed))} of the {len(changed)} answers that changed, of {len(tasks)} in all:"]
    for i in changed[::max(1, len(changed) // pairs)][:pairs]:
        asked = tasks[i]["instruction"] + (f" [{tasks[i]['input']}]" if tasks[i].get("input") else "")
        answers = [f"    before: {before['responses'][i]}", f"    after:  {after['responses'][i]}"]
        lines += ["", *map(on_a_line, (f"  {asked}", *answers))]
    return "\n".join(lines)


def on_a_line(text: str) -> str:
    """Line breaks as ⏎, and on a terminal no more than fits into its width; a file gets all of it."""
    text = text.replace("\n", " ⏎ ")
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else len(text)
    return text if len(text) <= columns else text[:columns - 1] + "…"


def changes_in_words(before: dict, after: dict) -> str:
    """Every paired difference in a line."""
    changes = paired_changes(before, after) | {"is_change": True}
    return ", ".join(f"{title.removesuffix(', %')} {format_cell(changes, key, digits)}"
                     for title, key, digits in ROWS if key in changes)


def difference_in_words(before: Sequence[float | None], after: Sequence[float | None]) -> str:
    """The paired difference of two win rates."""
    pairs = sum(b is not None and a is not None for b, a in zip(before, after, strict=True))
    if not pairs:
        return "not measured (no instruction was judged in both)"
    difference, error = paired_difference(before, after)
    in_errors = f", {difference / error:.1f} standard errors" if error else ""
    return f"{difference:+.1f} ± {error:.1f} points (paired over {pairs}{in_errors})"


def quality_table(result: dict) -> str:
    """What each estimator says on the tokens on which the true KL was measured."""
    true = result["true_kl"]
    lines = [f"true KL {true:.4f} ± {result['true_kl_se']:.4f} nats per token over {result['kl_tokens']:,} tokens; what each "
             "penalty says on the same tokens:",
             f"{'estimator':<18}{'mean':>20}{'bias':>20}{'bias/KL':>9}{'deviation/KL':>14}"]
    for name, q in result["estimators"].items():
        scaled = [f"{x / true:.2f}" if true else "-" for x in (q["bias"], q["deviation"])]
        lines.append(f"{name:<18}{q['mean']:>11.4f} ± {q['mean_se']:.4f}{q['bias']:>11.4f} ± {q['bias_se']:.4f}"
                     f"{scaled[0]:>9}{scaled[1]:>14}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------- of finished runs


def over_runs(evaluations: Sequence[dict], key: str) -> tuple[float, float] | None:
    """(mean, standard error) of a figure: bootstrap over several runs (Table 1), over the instructions of a single one."""
    values = [e[key] for e in evaluations if key in e]
    if not values:
        return None
    return bootstrap(values) if len(values) > 1 else (values[0], evaluations[0].get(key + "_se", 0.0))


def win_rate_cell(evaluations: Sequence[dict]) -> str:
    """The paper's figure, and for several runs in brackets the error over runs and instructions both."""
    plain = cell(over_runs(evaluations, "win_rate"), 1)
    preferences = [e["preferences"] for e in evaluations if "preferences" in e]
    if len(evaluations) < 2 or len(preferences) < len(evaluations) or len(set(map(len, preferences))) > 1:
        return plain
    return f"{plain} ({bootstrap_crossed(preferences)[1]:.1f})"


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]
    caption: str


def cell(figure: tuple[float, float] | None, digits: int, sign: str = "") -> str:
    return "–" if figure is None else f"{figure[0]:{sign}.{digits}f} ± {figure[1]:.{digits}f}"


def table_1(configs: Sequence[Configuration]) -> Table:
    """Adaptation, regularization, estimator and win rate, as in the paper; then what else changed."""
    sft = first_of_each_seed(configs)
    rows = [["–", "SFT, no PPO", "–", win_rate_cell(sft), "–", "0", cell(over_runs(sft, "reward"), 2),
             cell(over_runs(sft, "tokens"), 1), str(len(sft)), "0"]]
    for c in configs:
        last = c.last()
        rows.append([c.adaptation, c.regularization, c.formula, win_rate_cell(last),
                     cell(c.changes("win_rate"), 1, "+"), cell(over_runs(last, "true_kl"), 3),
                     cell(over_runs(last, "reward"), 2), cell(over_runs(last, "tokens"), 1), str(len(c.runs)),
                     "/".join(str(step) for step in sorted({e["step"] for e in last}))])
    judges = sorted({e.get("judge", "annotators") for e in sft if "win_rate" in e})
    caption = (f"Win rate against the reference outputs on {sft[0]['n']} evaluation instructions"
               + (f" (judge: {', '.join(judges)})" if judges else " (no judge: –)")
               + ". ± is the standard error: over the instructions for one run, by bootstrap over runs for several (the paper's; "
               "in brackets over runs and instructions both). SFT is sampled once with each seed of the runs. Gain: points over "
               "SFT, paired by seed and instruction. KL: true KL to SFT in nats per token.")
    return Table("Table 1. Win rate by regularization", ["Adaptation", "Regularization", "Divergence estimator", "Win rate, %",
                                                         "Gain over SFT", "True KL", "Reward", "Tokens", "Runs", "Step"],
                 rows, caption)


def table_2(configs: Sequence[Configuration]) -> Table | None:
    """Factuality; None where nobody measured it."""
    def row(name: str, evaluations: Sequence[dict], change: tuple[float, float] | None) -> list[str]:
        return [name, cell(over_runs(evaluations, "factscore"), 1), cell(over_runs(evaluations, "fact_precision"), 1),
                cell(change, 1, "+"),
                *(f"{figure[0]:.{digits}f}" if (figure := over_runs(evaluations, key)) else "–" for key, digits in (
                    ("facts", 2), ("about_tokens", 1), ("repeats", 2), ("abstained", 1)))]

    sft = first_of_each_seed(configs)
    if not any("fact_precision" in e for c in configs for e in [*sft, *c.last()]):
        return None
    rows = [row("SFT, no PPO", sft, None)]
    rows += [row(f"{c.adaptation} PPO, {c.regularization}", c.last(), c.changes("fact_precision")) for c in configs]
    return Table("Table 2. Factuality", ["Configuration", "FActScore, %", "Fact precision, %", "Change of precision",
                                         "Facts per answer", "Tokens per answer", "Repeats per answer", "Answers without facts"],
                 rows, "FActScore is the mean share of true facts over the answers that state any (each answer weighs the same); "
                 "fact precision is the share over all stated facts (each fact weighs the same); its change is paired with SFT "
                 "by seed and question.")


def table_3(configs: Sequence[Configuration]) -> Table | None:
    """How good each estimator is on the tokens of each policy; None where it wasn't measured."""
    measured = [(c, run.evaluations[-1]) for c in configs for run in c.runs[:1] if "estimators" in run.evaluations[-1]]
    if not measured:
        return None
    names = list(measured[0][1]["estimators"])
    rows = []
    for c, last in measured:
        true, quality = last["true_kl"], last["estimators"]
        rows.append([f"{c.adaptation} PPO, {c.regularization}", f"{true:.4f} ± {last['true_kl_se']:.4f}",
                     *(f"{round(quality[n]['bias'] / true, 2) + 0.0:+.2f} ({quality[n]['deviation'] / true:.1f})"
                       for n in names)])
    tokens = sorted({last["kl_tokens"] for _, last in measured})
    span = " to ".join(f"{t:,}" for t in dict.fromkeys([tokens[0], tokens[-1]]))
    return Table("Table 3. How good are the estimates of KL?", ["Policy trained with", "True KL per token",
                                                                *(NAMES.get(n, n) for n in names)], rows,
                 f"On {span} tokens of each policy's own answers: bias over the true KL and, in brackets, deviation at a single "
                 "token over the true KL. 0 is unbiased, −1 an estimator that says 0.")


def as_markdown(table: Table) -> str:
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    text = "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines)
    return f"### {table.title}\n\n{text}\n\n{table.caption}\n"


def as_html(table: Table) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in table.header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in table.rows)
    return (f"<h2>{html.escape(table.title)}</h2><div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
            f"</table></div><p class=caption>{html.escape(table.caption)}</p>")
