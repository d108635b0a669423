# SPDX-License-Identifier: MIT
"""Pictures: a run's curves.png, and the paper's Figures 1 to 3 of finished runs. All of them need matplotlib.

Figure 3's fit: reward is linear in sqrt(KL) as long as the policy stays near the reference (section 4; Bai et al. 2022). The
place where that ends is estimated as the corner of a line with one bend.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.results import Configuration, read_object
from evaluation.statistics import Bend, fit_bend
from evaluation.tables import over_runs
from formats.write import write_atomically
from training.folder import read_lines

# Okabe and Ito's colours, told apart by colour-blind readers too; yellow, pale on white, is a grey here.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C8C8C"]
MARKERS = "osD^vP*X"


def load_pyplot() -> Any:
    """matplotlib's pyplot, drawing to files; None where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, file: Path, dpi: int = 130) -> None:
    """The picture with a light grid, whole or not at all."""
    for axis in figure.axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    write_atomically(file, lambda part: figure.savefig(part, format="png", dpi=dpi))


# ------------------------------------------------------------------------------------------------------- a run's curves

PANELS = [
    ("reward model's score", [("score_mean", "score"), ("shaped_reward", "shaped (Eq. 3)")]),
    ("KL to the reference, nats/token", [("true_kl", "true KL, few responses"), ("kl_k1", "k1"), ("kl_k3", "k3")]),
    ("response length, tokens", [("length", "tokens")]),
    ("policy: share clipped", [("clip_fraction", "policy")]),
    ("value: share clipped", [("value_clip_fraction", "value")]),
    ("value loss", [("value_loss", "value loss")]),
]
BANDS = {"true_kl": "true_kl_se"}  # what is known of few responses only, with its standard error


def draw_curves(run: Path) -> Path | None:
    """curves.png of a run folder from its metrics.jsonl and evaluations.jsonl; None when matplotlib is missing."""
    if (pyplot := load_pyplot()) is None:
        return None
    metrics, evaluations = read_lines(run / "metrics.jsonl"), read_lines(run / "evaluations.jsonl")
    figure, axes = pyplot.subplots(2, 4, figsize=(16, 7), layout="constrained")
    steps = [m["step"] for m in metrics]
    for axis, (title, lines) in zip(axes.flat, PANELS):
        for (key, name), color in zip(lines, COLORS):
            draw_metric(axis, steps, [(m[key], m.get(BANDS.get(key), 0.0)) for m in metrics], name, color)
        axis.set(title=title, xlabel="PPO step")
        if len(lines) > 1:
            axis.legend(frameon=False)
    draw_win_rate(axes.flat[6], evaluations)
    draw_over_kl(axes.flat[7], evaluations)
    figure.suptitle(title_of(run))
    save(figure, run / "curves.png", dpi=110)
    pyplot.close(figure)
    return run / "curves.png"


def draw_metric(axis, steps: list[int], found: list[tuple[float, float]], name: str, color: str) -> None:
    """A line of values, pale inside of a band of one error where there are errors."""
    values, errors = zip(*found, strict=True) if found else ((), ())
    axis.plot(steps, values, label=name, color=color, linewidth=0.8 if any(errors) else 1.4, alpha=0.6 if any(errors) else 1.0)
    if any(errors):
        axis.fill_between(steps, *([v + sign * e for v, e in found] for sign in (-1, 1)), color=color, alpha=0.2, linewidth=0)


def title_of(run: Path) -> str:
    """What the run was, from its config.json, where there is one; else the folder's name."""
    if not (run / "config.json").is_file():
        return run.name
    config = read_object(run / "config.json")
    tuning = f"LoRA of rank {config['lora_rank']}" if config["tuning"] == "lora" else "full fine-tuning"
    penalty = f"{config['estimator'].replace('_', ' ')}, β {config['beta']:g}" if config["estimator"] != "none" else "no penalty"
    return f"{penalty}; {tuning}, learning rate {config['learning_rate']:g}, seed {config['seed']}"


def judged_key(evaluations: list[dict]) -> tuple[str, str]:
    """(figure, title) of the win rate where there are judges, else of the reward on the evaluation instructions."""
    return ("win_rate", "win rate, %") if all("win_rate" in e for e in evaluations) else ("reward", "evaluation reward")


def draw_win_rate(axis, evaluations: list[dict]) -> None:
    """Over steps, with its standard error; of two evaluations bars, before and after: two points make no curve."""
    key, title = judged_key(evaluations)
    shown = [e for e in evaluations if key in e]
    values, errors = [e[key] for e in shown], [e[key + "_se"] for e in shown]
    if len(shown) > 2:
        axis.errorbar([e["step"] for e in shown], values, errors, marker="o", color=COLORS[0], capsize=3, linewidth=1.4)
        axis.set(xlabel="PPO step")
    else:
        names = ["before" if e["step"] == 0 else f"step {e['step']}" for e in shown]
        axis.bar(names, values, yerr=errors, color=COLORS[:len(shown)], capsize=4, width=0.5)
    axis.set(title=f"{title} (± standard error)")


def draw_over_kl(axis, evaluations: list[dict]) -> None:
    """The reward model's score and the judges' verdict over the distance from the start: where they part, the reward model is
    over-optimised."""
    shown = [e for e in evaluations if "true_kl" in e and "reward" in e]
    places = [math.sqrt(max(0.0, e["true_kl"])) for e in shown]
    axis.set(title="on the evaluation instructions", xlabel="√ true KL, √ nats/token")
    axis.errorbar(places, [e["reward"] for e in shown], [e["reward_se"] for e in shown], marker="o", color=COLORS[0], capsize=3)
    axis.set_ylabel("reward ●", color=COLORS[0])
    if shown and all("win_rate" in e for e in shown):
        other = axis.twinx()
        other.errorbar(places, [e["win_rate"] for e in shown], [e["win_rate_se"] for e in shown], marker="s", linestyle="--",
                       color=COLORS[1], capsize=3)
        other.set_ylabel("win rate, % ■", color=COLORS[1])


# ----------------------------------------------------------------------------------------------------- of finished runs


WIDTH = 5.4  # inches: shown 390 pixels wide, as on a phone, text of 10 points is 10 pixels high


class Figure(NamedTuple):
    file: Path
    title: str
    caption: str


def draw_figures(configs: Sequence[Configuration], out: Path) -> list[Figure]:
    """The three pictures; none without matplotlib."""
    if (pyplot := load_pyplot()) is None:
        print("figures left out: they need matplotlib (pip install matplotlib)")
        return []
    drawings: list[Callable] = [figure_1, figure_2, figure_3]
    figures = [draw(pyplot, configs, out / f"{draw.__name__.replace('_', '')}.png") for draw in drawings]
    pyplot.close("all")
    return figures


def figure_1(pyplot, configs: Sequence[Configuration], file: Path) -> Figure:
    figure, axis = pyplot.subplots(figsize=(WIDTH, 4.2 + 0.22 * len(configs)), layout="constrained")
    key, label = rated(configs)
    draw_over_steps(axis, configs, key, label)
    legend_below(figure, axis)
    save(figure, file)
    best = max(((over_runs(es, key) or (-math.inf, 0), c.name, step) for c in configs for step, es in c.at_step().items()))
    return Figure(file, f"Figure 1. {key.replace('_', ' ').capitalize()} over PPO steps",
                  f"Each point is an evaluation with its standard error. The highest is {best[0][0]:.1f} ± {best[0][1]:.1f} at "
                  f"step {best[2]} ({best[1]}); curves whose bars overlap are not told apart by this data.")


def figure_2(pyplot, configs: Sequence[Configuration], file: Path) -> Figure:
    figure, axes = pyplot.subplots(2, 1, figsize=(WIDTH, 7.6 + 0.22 * len(configs)), layout="constrained")
    draw_over_steps(axes[0], configs, "true_kl", "true KL to SFT, nats per token")
    draw_over_steps(axes[1], configs, "tokens", "response length, tokens")
    legend_below(figure, axes[1])
    save(figure, file)
    ends = sorted((over_runs(c.last(), "true_kl")[0], c.name) for c in configs)
    return Figure(file, "Figure 2. True KL (above) and response length (below) over PPO steps",
                  f"KL over the whole vocabulary, on each policy's own answers to the evaluation instructions. At the end it is "
                  f"lowest with {ends[0][1]} ({ends[0][0]:.3f}) and highest with {ends[-1][1]} ({ends[-1][0]:.3f}).")


def figure_3(pyplot, configs: Sequence[Configuration], file: Path) -> Figure:
    figure, axes = pyplot.subplots(2, 1, figsize=(WIDTH, 7.6 + 0.22 * len(configs)), layout="constrained")
    key, label = rated(configs)
    for i, c in enumerate(configs):
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
              for c in configs for run in c.runs for e in run.evaluations if "reward" in e]
    fit = fit_bend(*zip(*points, strict=True)) if points else None
    if fit:
        draw_fit(axes[1], fit, max(x for x, _ in points))
    legend_below(figure, axes[1] if points else axes[0])
    save(figure, file)
    return Figure(file, f"Figure 3. {key.replace('_', ' ').capitalize()} over KL (above), reward over √KL (below)",
                  "A point is an evaluated checkpoint; lines follow one run, bars are standard errors. " + fit_in_words(fit))


def legend_below(figure, axis) -> None:
    """One for all panels, where it takes no width."""
    figure.legend(*axis.get_legend_handles_labels(), frameon=False, loc="outside lower center", fontsize=10)


def draw_over_steps(axis, configs: Sequence[Configuration], key: str, label: str) -> None:
    """A figure over PPO steps, a line a configuration; the bars are standard errors, set beside each other."""
    longest = max(e["step"] for c in configs for e in c.last())
    for i, c in enumerate(configs):
        points = [(step, over_runs(evaluations, key)) for step, evaluations in c.at_step().items()]
        points = [(step, *figure) for step, figure in points if figure]
        if points:
            steps, means, errors = zip(*points, strict=True)
            shift = (i - (len(configs) - 1) / 2) * 0.006 * longest
            axis.errorbar([s + shift for s in steps], means, yerr=errors, label=c.name, color=COLORS[i % 8],
                          marker=MARKERS[i % 8], markersize=5, capsize=2, linewidth=1.4, elinewidth=0.8)
    axis.set(xlabel="PPO step", ylabel=label)


def rated(configs: Sequence[Configuration]) -> tuple[str, str]:
    """(key, label) of what stands for success: win rate where it was judged, else the reward."""
    judged = all("win_rate" in e for c in configs for e in c.last())
    return ("win_rate", "win rate, %") if judged else ("reward", "reward (standardised)")


def draw_fit(axis, fit: Bend, end: float) -> None:
    straight = fit.corner if fit.corner is not None else end
    axis.plot([0, straight], [fit(0), fit(straight)], color="black", linewidth=1.3, label="linear fit")
    if fit.corner is not None:
        axis.plot([straight, end], [fit(straight), fit(end)], color="black", linewidth=1.3, linestyle="--")
        axis.axvline(straight, color="black", linewidth=0.8, linestyle=":")
        axis.annotate(f"bend at {straight:.2f}", (straight, axis.get_ylim()[0]), xytext=(4, 6), textcoords="offset points")


def fit_in_words(fit: Bend | None) -> str:
    if fit is None:
        return "Too few points for a fit of reward over √KL."
    line = f"Reward is {fit.intercept:.2f} + {fit.slope:.2f} · √KL (R² {fit.r_squared:.2f})"
    if fit.corner is None:
        return line + (f" over all points; no bend is found (p = {fit.p:.2f})." if fit.p is not None
                       else " over all points, which are too few to look for a bend.")
    way = "falls" if fit.slope_after < -0.1 * abs(fit.slope) else "is flat" if fit.slope_after < 0.25 * fit.slope else "goes on"
    return line + f" up to √KL = {fit.corner:.2f}; beyond, it {way} (slope {fit.slope_after:.2f}; p = {fit.p:.3f})."
