"""The paper's Tables 1 and 2 and Figures 1 to 3 from finished runs: `python evaluate.py report RUNS... --out DIR`.

Reads what training and evaluate.py left in the run folders (evaluations.jsonl, evaluation.json) and computes nothing anew. Runs
that differ in nothing but their seed are one configuration: its figures are means with the paper's bootstrap error (Table 1);
a configuration of one run has the standard error over the evaluation instructions. DIR gets report.md, figure1.png to
figure3.png, and report.html, one file that holds all of it and answers before and after side by side.

Figure 3's fit: reward is linear in sqrt(KL) as long as the policy stays near the reference (section 4; Bai et al. 2022). The
place where that ends is estimated as the corner of a line with one bend.
"""

import base64
import html
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data import load_tokenizer
from divergences import ALIASES
from evaluate import bootstrap, load_benchmark, mean_and_error, paired_difference, read_lines
from runfolder import write_text

NAMES = {"clamped_kl": "Clamped KL", "kl": "KL", "bregman": "Bregman", "squared_error": "Squared error",
         "jensen_shannon": "Jensen-Shannon", "none": "No regularization", "negative_kl": "Negative KL"}
FORMULAS = {"clamped_kl": "max(0, log π − log π_ref)", "kl": "log π − log π_ref", "bregman": "π_ref/π − 1 − log(π_ref/π)",
            "squared_error": "½ (log π − log π_ref)²",
            "jensen_shannon": "½ max(0, log π − log m) + ½ max(0, log π_ref − log m), m = ½(π + π_ref)", "none": "–",
            "negative_kl": "log π_ref − log π"}
# What two runs of one configuration may differ in.
PER_RUN = ("out", "seed", "save_every", "eval_every", "policy_device", "reference_device", "micro_batch_size",
           "rollout_micro_batch_size", "gradient_checkpointing")
# Okabe and Ito's colours, told apart by colour-blind readers too; yellow, pale on white, is a grey here.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C8C8C"]
MARKERS = "osD^vP*X"


# ------------------------------------------------------------------------------------------------------------- runs


@dataclass
class Run:
    """A finished run: its configuration and its evaluations by step, SFT's first."""

    folder: Path
    config: dict
    evaluations: list[dict]


@dataclass
class Configuration:
    """Runs that differ in their seed only."""

    name: str        # short, for legends
    adaptation: str
    regularization: str
    formula: str
    runs: list[Run]

    def at_step(self) -> dict[int, list[dict]]:
        """Evaluations by step, over the runs that have one there."""
        steps = sorted({e["step"] for run in self.runs for e in run.evaluations})
        return {step: [e for run in self.runs for e in run.evaluations if e["step"] == step] for step in steps}

    def last(self) -> list[dict]:
        return [run.evaluations[-1] for run in self.runs]


def load_run(folder: Path) -> Run:
    """Raises ValueError where the folder is no run, or one that was never evaluated."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: holds no config.json, so it is no run folder of train.py")
    config = read_object(folder / "config.json")
    missing = [key for key in ("estimator", "tuning", "lora_dropout") if key not in config]
    if missing:
        raise ValueError(f"{folder}/config.json: lacks {missing[0]}: it is no configuration of a run")
    during = by_step(folder / "evaluations.jsonl", read_lines(folder / "evaluations.jsonl"))
    file = folder / "evaluation.json"
    after = by_step(file, read_object(file).values()) if file.is_file() else {}
    if after:
        newest = next(iter(after.values()))
        alike = (newest["n"], newest.get("judge", "annotators"))
        during = {step: e for step, e in during.items() if (e["n"], "annotators") == alike}
    evaluations = [e for _, e in sorted((during | after).items())]
    if not evaluations or evaluations[0]["step"] or len(evaluations) < 2:
        raise ValueError(f"{folder}: has no evaluation of SFT and of a checkpoint; python evaluate.py {folder} --step all makes "
                         "them")
    return Run(folder, config, evaluations)


def read_object(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return dict(content.items())
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: no JSON object ({error})") from None


def by_step(file: Path, evaluations: Iterable[dict]) -> dict[int, dict]:
    """Evaluations by their PPO step, with the figures that every table needs."""
    found = {}
    for e in evaluations:
        lacks = [key for key in ("step", "n", "true_kl", "true_kl_se", "tokens", "tokens_se", "responses") if key not in e]
        if lacks:
            raise ValueError(f"{file}: an evaluation lacks {lacks[0]}: it was written by another version, or by hand")
        found[e["step"]] = e
    return found


def configurations(runs: Sequence[Run]) -> list[Configuration]:
    """The runs by configuration, in the order in which they were named."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        alike = {key: value for key, value in run.config.items() if key not in PER_RUN}
        groups.setdefault(json.dumps(alike, sort_keys=True), []).append(run)
    firsts = [group[0].config for group in groups.values()]
    return [describe(group, firsts) for group in groups.values()]


def describe(group: list[Run], firsts: Sequence[dict]) -> Configuration:
    """Names as in Table 1, and whatever else sets this configuration apart from the others."""
    config = group[0].config
    estimator = ALIASES.get(config["estimator"], config["estimator"])
    dropout = config["lora_dropout"]
    full = config["tuning"] == "full"
    if estimator == "none" and dropout > 0.1 and not full:
        regularization = f"Dropout only (p = {dropout:g})"
    else:
        regularization = NAMES.get(estimator, estimator) + (f", dropout {dropout:g}" if dropout != 0.1 and not full else "")
    usual = {key: max((f.get(key) for f in firsts), key=[f.get(key) for f in firsts].count) for key in config}
    apart = [f"{key.replace('_', ' ')} {value}" for key, value in config.items()
             if value != usual[key] and key not in (*PER_RUN, "estimator", "lora_dropout", "tuning")]
    regularization += "".join(f", {what}" for what in apart)
    name = regularization + (", full tuning" if full else "")
    return Configuration(name, "Full model tuning" if full else "LoRA", regularization, FORMULAS.get(estimator, estimator), group)


# ------------------------------------------------------------------------------------------------------- statistics


def over_runs(evaluations: Sequence[dict], key: str) -> tuple[float, float] | None:
    """(mean, standard error) of a figure: bootstrap over several runs (Table 1), over the instructions of a single one."""
    values = [e[key] for e in evaluations if key in e]
    if not values:
        return None
    return bootstrap(values) if len(values) > 1 else (values[0], evaluations[0].get(key + "_se", 0.0))


def gain(configuration: Configuration) -> tuple[float, float] | None:
    """Win rate over SFT's in points, paired by instruction: with its error for one run, over the runs for several."""
    pairs = [(run.evaluations[0].get("preferences"), run.evaluations[-1].get("preferences")) for run in configuration.runs]
    if not all(before and after for before, after in pairs):
        return None
    gains = [paired_difference(before, after) for before, after in pairs]
    return gains[0] if len(gains) == 1 else mean_and_error([g for g, _ in gains])


class Bend(NamedTuple):
    """y = intercept + slope · x up to x = corner, then on with slope_after; corner None: one line fits as well."""

    intercept: float
    slope: float
    corner: float | None
    slope_after: float
    r_squared: float  # of the part before the corner

    def __call__(self, x: float) -> float:
        beyond = max(0.0, x - self.corner) if self.corner is not None else 0.0
        return self.intercept + self.slope * x + (self.slope_after - self.slope) * beyond


def fit_bend(x: Sequence[float], y: Sequence[float], fewest: int = 3) -> Bend | None:
    """Least squares of a line with at most one bend; None for fewer than 3 points or all at one x.

    Every corner that leaves `fewest` points on either side is tried at 200 places. The bend stays where BIC, which charges
    for its two further parameters, prefers it to the straight line.
    """
    xs, ys = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    if len(x) < 3 or xs.max() == xs.min():
        return None
    n = len(x)

    def solve(corner: float | None) -> tuple[float, Tensor]:
        columns = [torch.ones_like(xs), xs] + ([(xs - corner).clamp(min=0)] if corner is not None else [])
        design = torch.stack(columns, 1)
        weights = torch.linalg.lstsq(design, ys[:, None]).solution[:, 0]
        return (design @ weights - ys).square().sum().item(), weights

    def bic(residual: float, parameters: int) -> float:
        return n * math.log(max(residual, 1e-12) / n) + parameters * math.log(n)

    residual, weights = solve(None)
    order = xs.sort().values
    corner = None
    if n >= 2 * fewest:
        places = torch.linspace(order[fewest - 1].item(), order[-fewest].item(), 200).tolist()
        found = min(((*solve(place), place) for place in places), key=lambda f: f[0])
        if bic(found[0], 4) < bic(residual, 2):
            _, weights, corner = found
    intercept, slope = weights[0].item(), weights[1].item()
    before = xs <= corner if corner is not None else torch.ones_like(xs, dtype=torch.bool)
    part = ys[before]
    unexplained = (part - intercept - slope * xs[before]).square().sum().item()
    total = (part - part.mean()).square().sum().item()
    return Bend(intercept, slope, corner, slope + weights[2].item() if corner is not None else slope,
                1 - unexplained / total if total else 1.0)


# ----------------------------------------------------------------------------------------------------------- tables


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]
    caption: str


def cell(figure: tuple[float, float] | None, digits: int) -> str:
    return "–" if figure is None else f"{figure[0]:.{digits}f} ± {figure[1]:.{digits}f}"


def table_1(found: Sequence[Configuration]) -> Table:
    """Adaptation, regularization, estimator and win rate, as in the paper; then what else changed."""
    sft = [run.evaluations[0] for c in found for run in c.runs]
    first = sft[0]
    rows = [["–", "SFT, no PPO", "–", cell(over_runs([first], "win_rate"), 1), "–", "0", cell(over_runs([first], "reward"), 2),
             cell(over_runs([first], "tokens"), 1), "–", "0"]]
    for c in found:
        last = c.last()
        change = gain(c)
        rows.append([c.adaptation, c.regularization, c.formula, cell(over_runs(last, "win_rate"), 1),
                     "–" if change is None else f"{change[0]:+.1f} ± {change[1]:.1f}", cell(over_runs(last, "true_kl"), 3),
                     cell(over_runs(last, "reward"), 2), cell(over_runs(last, "tokens"), 1), str(len(c.runs)),
                     "/".join(str(step) for step in sorted({e["step"] for e in last}))])
    judges = sorted({e.get("judge", "annotators") for e in sft if "win_rate" in e})
    caption = (f"Win rate against the reference outputs on {first['n']} evaluation instructions"
               + (f" (judge: {', '.join(judges)})" if judges else " (no judge: –)")
               + ". ± is the standard error: over the instructions where there is one run, by bootstrap over runs where there "
               "are several. Gain: points over SFT, paired by instruction. KL: true KL to SFT in nats per token.")
    return Table("Table 1. Win rate by regularization", ["Adaptation", "Regularization", "Divergence estimator", "Win rate, %",
                                                         "Gain over SFT", "True KL", "Reward", "Tokens", "Runs", "Step"],
                 rows, caption)


def table_2(found: Sequence[Configuration]) -> Table | None:
    """Factuality; None where nobody measured it."""
    def row(name: str, evaluations: Sequence[dict]) -> list[str]:
        repeats = over_runs(evaluations, "repeats")
        return [name, cell(over_runs(evaluations, "factscore"), 1), cell(over_runs(evaluations, "fact_precision"), 1),
                *(f"{figure[0]:.{digits}f}" if figure else "–" for figure, digits in (
                    (over_runs(evaluations, "facts"), 2), (over_runs(evaluations, "about_tokens"), 1), (repeats, 2),
                    (over_runs(evaluations, "abstained"), 1)))]

    first = [found[0].runs[0].evaluations[0]]
    if not any("fact_precision" in e for c in found for e in [*first, *c.last()]):
        return None
    rows = [row("SFT, no PPO", first), *(row(f"{c.adaptation} PPO, {c.regularization}", c.last()) for c in found)]
    return Table("Table 2. Factuality", ["Configuration", "FActScore, %", "Fact precision, %", "Facts per answer",
                                         "Tokens per answer", "Repeats per answer", "Answers without facts"], rows,
                 "FActScore is the mean share of true facts over the answers that state any (each answer weighs the same); fact "
                 "precision is the share over all stated facts (each fact weighs the same).")


def table_3(found: Sequence[Configuration]) -> Table | None:
    """How good each estimator is on the tokens of each policy; None where it wasn't measured."""
    measured = [(c, run.evaluations[-1]) for c in found for run in c.runs[:1] if "estimators" in run.evaluations[-1]]
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


# ---------------------------------------------------------------------------------------------------------- figures


class Figure(NamedTuple):
    file: Path
    title: str
    caption: str


def draw_over_steps(axis, found: Sequence[Configuration], key: str, label: str) -> None:
    """A figure over PPO steps, a line a configuration; the bars are standard errors, set beside each other."""
    longest = max(e["step"] for c in found for e in c.last())
    for i, c in enumerate(found):
        points = [(step, over_runs(evaluations, key)) for step, evaluations in c.at_step().items()]
        points = [(step, *figure) for step, figure in points if figure]
        if points:
            steps, means, errors = zip(*points, strict=True)
            shift = (i - (len(found) - 1) / 2) * 0.006 * longest
            axis.errorbar([s + shift for s in steps], means, yerr=errors, label=c.name, color=COLORS[i % 8],
                          marker=MARKERS[i % 8], markersize=5, capsize=2, linewidth=1.4, elinewidth=0.8)
    axis.set(xlabel="PPO step", ylabel=label)


def rated(found: Sequence[Configuration]) -> tuple[str, str]:
    """(key, label) of what stands for success: win rate where it was judged, else the reward."""
    judged = all("win_rate" in e for c in found for e in c.last())
    return ("win_rate", "win rate, %") if judged else ("reward", "reward (standardised)")


def figure_1(pyplot, found: Sequence[Configuration], file: Path) -> Figure:
    figure, axis = pyplot.subplots(figsize=(9, 4.6), layout="constrained")
    key, label = rated(found)
    draw_over_steps(axis, found, key, label)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    save(pyplot, figure, file)
    best = max(((over_runs(es, key) or (-math.inf, 0), c.name, step) for c in found for step, es in c.at_step().items()))
    return Figure(file, f"Figure 1. {key.replace('_', ' ').capitalize()} over PPO steps",
                  f"Each point is an evaluation with its standard error. The highest is {best[0][0]:.1f} ± {best[0][1]:.1f} at "
                  f"step {best[2]} ({best[1]}); curves whose bars overlap are not told apart by this data.")


def figure_2(pyplot, found: Sequence[Configuration], file: Path) -> Figure:
    figure, axes = pyplot.subplots(1, 2, figsize=(11.5, 4.6), layout="constrained")
    draw_over_steps(axes[0], found, "true_kl", "true KL to SFT, nats per token")
    draw_over_steps(axes[1], found, "tokens", "response length, tokens")
    axes[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    save(pyplot, figure, file)
    ends = sorted((over_runs(c.last(), "true_kl")[0], c.name) for c in found)
    return Figure(file, "Figure 2. True KL (left) and response length (right) over PPO steps",
                  f"KL over the whole vocabulary, on each policy's own answers to the evaluation instructions. At the end it is "
                  f"lowest with {ends[0][1]} ({ends[0][0]:.3f}) and highest with {ends[-1][1]} ({ends[-1][0]:.3f}).")


def figure_3(pyplot, found: Sequence[Configuration], file: Path) -> Figure:
    figure, axes = pyplot.subplots(1, 2, figsize=(11.5, 4.6), layout="constrained")
    key, label = rated(found)
    for i, c in enumerate(found):
        style = {"color": COLORS[i % 8], "marker": MARKERS[i % 8]}
        for run in c.runs:
            kl = [max(0.0, e["true_kl"]) for e in run.evaluations]
            axes[0].errorbar(kl, [e[key] for e in run.evaluations], yerr=[e[key + "_se"] for e in run.evaluations], capsize=2,
                             linewidth=0.7, elinewidth=0.7, markersize=5, label=c.name if run is c.runs[0] else None, **style)
            if "reward" in run.evaluations[0]:
                axes[1].errorbar([math.sqrt(k) for k in kl], [e["reward"] for e in run.evaluations],
                                 yerr=[e["reward_se"] for e in run.evaluations], fmt="none", ecolor=style["color"],
                                 elinewidth=0.7, capsize=2)
                axes[1].scatter([math.sqrt(k) for k in kl], [e["reward"] for e in run.evaluations], s=28, zorder=3,
                                label=c.name if run is c.runs[0] else None, **style)
    axes[0].set(xlabel="true KL to SFT, nats per token", ylabel=label)
    axes[1].set(xlabel="√KL, KL in nats per token", ylabel="reward (standardised)")
    points = [(math.sqrt(max(0.0, e["true_kl"])), e["reward"])
              for c in found for run in c.runs for e in run.evaluations if "reward" in e]
    fit = fit_bend(*zip(*points, strict=True)) if points else None
    if fit:
        draw_fit(axes[1], fit, max(x for x, _ in points))
    axes[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    save(pyplot, figure, file)
    return Figure(file, f"Figure 3. {key.replace('_', ' ').capitalize()} over KL (left), reward over √KL (right)",
                  "A point is an evaluated checkpoint; lines follow one run, bars are standard errors. " + fit_in_words(fit))


def draw_fit(axis, fit: Bend, end: float) -> None:
    straight = fit.corner if fit.corner is not None else end
    axis.plot([0, straight], [fit(0), fit(straight)], color="black", linewidth=1.3, label="linear fit")
    if fit.corner is not None:
        axis.plot([straight, end], [fit(straight), fit(end)], color="black", linewidth=1.3, linestyle="--")
        axis.axvline(straight, color="black", linewidth=0.8, linestyle=":")
        axis.annotate(f"bend at {straight:.2f}", (straight, axis.get_ylim()[0]), xytext=(4, 6), textcoords="offset points",
                      fontsize=9)


def fit_in_words(fit: Bend | None) -> str:
    if fit is None:
        return "Too few points for a fit of reward over √KL."
    line = f"Reward is {fit.intercept:.2f} + {fit.slope:.2f} · √KL (R² {fit.r_squared:.2f})"
    if fit.corner is None:
        return line + " over all points: a bend would not fit better (BIC). So the reward itself shows no over-optimisation."
    way = "falls" if fit.slope_after < -0.1 * abs(fit.slope) else "is flat" if fit.slope_after < 0.25 * fit.slope else "goes on"
    return line + f" up to √KL = {fit.corner:.2f}; beyond, it {way} (slope {fit.slope_after:.2f})."


def save(pyplot, figure, file: Path) -> None:
    for axis in figure.axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    part = file.with_name(f".{file.stem}.part.png")
    figure.savefig(part, dpi=130)
    pyplot.close(figure)
    os.replace(part, file)


def draw_figures(found: Sequence[Configuration], out: Path) -> list[Figure]:
    """The three pictures; none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("figures left out: they need matplotlib (pip install matplotlib)")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawings: list[Callable] = [figure_1, figure_2, figure_3]
    return [draw(pyplot, found, out / f"{draw.__name__.replace('_', '')}.png") for draw in drawings]


# ---------------------------------------------------------------------------------------------------------- samples


def instructions_of(run: Run) -> list[dict] | None:
    """The evaluation instructions that the run's responses answer; None where they can't be found any more."""
    config = run.config
    file = run.evaluations[-1].get("data") or config["evaluation"]
    try:
        tokenizer = load_tokenizer(config["policy"]).for_template(config["prompt_template"])
        tasks = load_benchmark(file, tokenizer, config["prompt_template"], config["query_length"])["tasks"]
    except (ValueError, OSError, TypeError):
        return None
    n = len(run.evaluations[-1]["responses"])
    return tasks[:n] if len(tasks) >= n else None


def samples(found: Sequence[Configuration], count: int = 8) -> str:
    """Answers before and after, for each configuration the same instructions; HTML."""
    tasks = instructions_of(found[0].runs[0])
    if tasks is None:
        return "<p>The evaluation instructions are not where the runs found them, so no answers are shown.</p>"
    first = found[0].runs[0].evaluations
    changed = [i for i in range(len(tasks)) if first[0]["responses"][i] != first[-1]["responses"][i]] or list(range(len(tasks)))
    rows = changed[::max(1, len(changed) // count)][:count]
    blocks = []
    for c in found:
        before, after = c.runs[0].evaluations[0], c.runs[0].evaluations[-1]
        if max(rows) >= min(len(before["responses"]), len(after["responses"])):
            continue
        body = "".join(
            "<tr><td>" + html.escape(tasks[i]["instruction"]) + (f"<pre>{html.escape(tasks[i]['input'])}</pre>"
                                                                 if tasks[i].get("input") else "")
            + "</td>" + "".join(f"<td>{html.escape(e['responses'][i])}{verdict(e, i)}</td>" for e in (before, after)) + "</tr>"
            for i in rows)
        blocks.append(f"<details{' open' if c is found[0] else ''}><summary>{html.escape(c.adaptation)} PPO, "
                      f"{html.escape(c.regularization)}</summary><table class=samples><thead><tr><th>Instruction</th><th>SFT</th>"
                      f"<th>step {after['step']}</th></tr></thead><tbody>{body}</tbody></table></details>")
    return "".join(blocks)


def verdict(evaluation: dict, i: int) -> str:
    """How an answer fared against the reference output."""
    if "preferences" not in evaluation or evaluation["preferences"][i] is None:
        return ""
    p = evaluation["preferences"][i]
    word = "ties with" if p in (0, 1.5) else "beats" if p > 1.5 else "loses to"
    return f"<small class={'win' if p > 1.5 else 'other'}>{word} the reference</small>"


# ------------------------------------------------------------------------------------------------------------- page

STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .86rem; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
th { background: var(--soft); } .caption { font-size: .88rem; opacity: .8; max-width: 60rem; }
img { max-width: 100%; background: #fff; border-radius: 6px; }
.samples { table-layout: fixed; } .samples td { width: 33%; overflow-wrap: anywhere; }
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
    listed = "".join(f"<li><code>{html.escape(str(run.folder))}</code></li>" for run in runs)
    return (f"<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
            f"{''.join(map(as_html, tables))}{pictures}<h2>Answers before and after</h2>{answers}<h2>Runs</h2><ul>{listed}</ul>"
            "</body></html>\n")


def write(folders: Sequence[Path], out: Path) -> None:
    """The whole report; says what it wrote."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; the report needs a folder")
    runs = [load_run(folder) for folder in folders]
    found = configurations(runs)
    out.mkdir(parents=True, exist_ok=True)
    tables = [table for table in (table_1(found), table_2(found), table_3(found)) if table]
    figures = draw_figures(found, out)
    title = f"LoRA-based PPO: {len(found)} configuration{'s' * (len(found) > 1)}, {len(runs)} run{'s' * (len(runs) > 1)}"
    markdown = "\n".join([f"# {title}\n", *map(as_markdown, tables),
                          *(f"### {f.title}\n\n![{f.title}]({f.file.name})\n\n{f.caption}\n" for f in figures)])
    for name, text in (("report.md", markdown), ("report.html", page(title, tables, figures, runs, samples(found)))):
        write_text(out / name, text)
    print("\n".join(map(as_markdown, tables)))
    print(f"written to {out}: " + ", ".join(["report.html", "report.md", *(f.file.name for f in figures)]))
