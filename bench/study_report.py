"""Tables and figures of bench/study.py, from its lines alone: write_report(lines, folder).

A run's wins are a matrix (evaluations, instructions) of 0, ½ and 1. Every figure of win rates is a weighted sum of its rows (the
win rate at a step, at the peak, the mean over steps, at a given KL between two evaluations), and so is every difference between
cells: one number for each seed and instruction. Its error is that of runs and instructions drawn anew, both (the pigeonhole
bootstrap, evaluation/statistics.py). The peak of a cell is, for each seed, where the mean of its other seeds is highest: its own
highest point would be too high by chance.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from evaluation.statistics import bootstrap_crossed, mean_and_error

FIXED = 20  # the step at which cells are compared
SIGHT = 2.8  # errors: a difference that large is seen with 80 % chance at the 5 % level
WINS = {"0": 0.0, "h": 0.5, "1": 1.0, "-": math.nan}


class Run(NamedTuple):
    """One line of runs.jsonl."""

    wins: Tensor    # (evaluations, instructions), the start first
    steps: list[int]
    line: dict

    def curve(self, name: str) -> list[float]:
        """A figure at each evaluation."""
        return [e[name] for e in self.line["evaluations"]]


Cells = dict[str, dict[int, Run]]  # by cell and seed


def read(lines: Sequence[dict]) -> Cells:
    cells: Cells = {}
    for line in lines:
        wins = torch.tensor([[WINS[c] for c in e["wins"]] for e in line["evaluations"]], dtype=torch.float64)
        run = Run(wins, [e["step"] for e in line["evaluations"]], line)
        cells.setdefault(line["cell"], {})[line["seed"]] = run
    return cells


# ------------------------------------------------------------------------------------------------------- figures of runs


def at_step(cell: dict[int, Run], seed: int, step: int = FIXED) -> Tensor:
    """Wins (instructions,) at a step."""
    run = cell[seed]
    return run.wins[run.steps.index(step)]


def peak_of(cell: dict[int, Run], seed: int) -> int:
    """The evaluation at which the other seeds' mean is highest; of a single seed, its own highest."""
    others = [run for s, run in cell.items() if s != seed] or list(cell.values())
    return int(torch.stack([run.wins.nanmean(1) for run in others]).mean(0).argmax())


def at_peak(cell: dict[int, Run], seed: int) -> Tensor:
    return cell[seed].wins[peak_of(cell, seed)]


def over_steps(cell: dict[int, Run], seed: int) -> Tensor:
    """The area under the curve, as a mean over the evaluations after the start."""
    return cell[seed].wins[1:].mean(0)


def at_kl(cell: dict[int, Run], seed: int, kl: float) -> Tensor | None:
    """Where the run first has that true KL, between two evaluations in proportion of √KL; None: it never has."""
    run = cell[seed]
    roots = [math.sqrt(max(0.0, x)) for x in run.curve("true_kl")]
    for i, (a, b) in enumerate(zip(roots, roots[1:], strict=False)):
        if a <= math.sqrt(kl) <= b and b > a:
            share = (math.sqrt(kl) - a) / (b - a)
            return (1 - share) * run.wins[i] + share * run.wins[i + 1]
    return None


Measure = Callable[[dict[int, Run], int], Tensor | None]
MEASURES: dict[str, Measure] = {f"at step {FIXED}": at_step, "at the peak": at_peak, "mean over steps": over_steps}


class Found(NamedTuple):
    """A difference in points, its error, from how many seeds."""

    mean: float
    error: float
    seeds: int

    def p(self) -> float:
        """Of no difference, two-sided."""
        return math.erfc(abs(self.mean) / self.error / math.sqrt(2)) if self.error else float(self.mean == 0)

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.error:.1f}" if self.seeds else "–"


def contrast(cells: Cells, weights: dict[str, float], measure: Measure) -> Found:
    """Σ weight · measure(cell), over the seeds that all these cells have, in points of win rate."""
    seeds = sorted(set.intersection(*(set(cells.get(name, {})) for name in weights)))
    rows = []
    for seed in seeds:
        found = [measure(cells[name], seed) for name in weights]
        if all(x is not None for x in found):
            rows.append(sum(w * x for w, x in zip(weights.values(), found, strict=True)))
    if not rows:
        return Found(math.nan, math.nan, 0)
    # As preferences from 1 to 2, whose win rate is then 50 + half of the difference over its largest possible size.
    size = sum(abs(w) for w in weights.values())
    rate, error = bootstrap_crossed([[None if x != x else 1.5 + x / (2 * size) for x in row.tolist()] for row in rows])
    return Found((rate - 50) * 2 * size, error * 2 * size, len(rows))


def level(cells: Cells, name: str, measure: Measure) -> Found:
    """The measure itself, in %."""
    return contrast(cells, {name: 1.0}, measure)


def scalar(cells: Cells, a: str, b: str, value: Callable[[Run], float | None]) -> Found:
    """value(a) − value(b) by seed: mean and error over seeds."""
    pairs = [(value(cells[a][s]), value(cells[b][s])) for s in sorted(cells.get(a, {}).keys() & cells.get(b, {}).keys())]
    differences = [x - y for x, y in pairs if x is not None and y is not None]
    return Found(*mean_and_error(differences), len(differences)) if len(differences) > 1 else Found(math.nan, math.nan, 0)


def where(run: Run, name: str, value: float, of: str) -> float | None:
    """`of` where the curve `name` first crosses value upwards, between two evaluations in proportion."""
    x, y = run.curve(name), run.curve(of)
    for i, (a, b) in enumerate(zip(x, x[1:], strict=False)):
        if a <= value <= b and b > a:
            return y[i] + (value - a) / (b - a) * (y[i + 1] - y[i])
    return None


def share_of_reward(runs: dict[int, Run]) -> float:
    """The penalty of a response, β · penalty · tokens, over the deviation of scores: mean over steps and seeds."""
    shares = [run.line["beta"] * abs(p) * n / s for run in runs.values() for p, n, s in zip(
        *(run.line["metrics"][name] for name in ("penalty", "length", "score_std")), strict=True) if s]
    return sum(shares) / len(shares)


def holm(ps: dict[str, float]) -> dict[str, float]:
    """Holm's corrected p-values."""
    corrected, highest = {}, 0.0
    for k, (name, p) in enumerate(sorted(ps.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, p * (len(ps) - k)))
        corrected[name] = highest
    return corrected


def best_rate(lines: Sequence[dict], tuning: str, seeds: int) -> float:
    """Of the sweep's first seeds: the rate whose mean curve over them rises highest. Not by `at_peak`: where the curve falls
    steeply, that of two seeds says more of how far their peaks lie apart than of how high they are."""
    cells = read([line for line in lines if line["seed"] < seeds])
    names = [name for name in cells if name.startswith(f"{tuning}, rate ")]
    best = max(names, key=lambda name: torch.stack([run.wins.nanmean(1) for run in cells[name].values()]).mean(0).max())
    return float(best.rpartition(" ")[2])


# --------------------------------------------------------------------------------------------------------------- tables


def row(*cells: object) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def head(*names: str) -> list[str]:
    return [row(*names), row(*["---"] * len(names))]


def table_of_cells(cells: Cells) -> list[str]:
    """What every cell comes to."""
    lines = head("cell", "seeds", *(f"win rate {name}, %" for name in MEASURES), "steps to the peak", "true KL there",
                 "tokens there", "fact precision there, %", "last step's win rate, %", "penalty / deviation of scores")
    for name, runs in cells.items():
        peaks = {seed: peak_of(runs, seed) for seed in runs}

        def mean(key: str, digits: int, runs=runs, peaks=peaks) -> str:
            values = [run.curve(key)[peaks[seed]] for seed, run in runs.items()]
            return f"{sum(values) / len(values):.{digits}f}"

        levels = [level(cells, name, measure) for measure in MEASURES.values()]
        last = level(cells, name, lambda cell, seed: cell[seed].wins[-1])
        lines.append(row(name, len(runs), *(f"{x.mean:.1f} ± {x.error:.1f}" for x in levels), mean("step", 0), mean("true_kl", 3),
                         mean("tokens", 1), mean("fact_precision", 1), f"{last.mean:.1f} ± {last.error:.1f}",
                         f"{share_of_reward(runs):.3f}"))
    return lines


def table_of_runs(lines: Sequence[dict]) -> list[str]:
    """Each by itself, at its own highest point, which is too high by chance."""
    table = head("run", "seed", "highest win rate, %", "step", "true KL there", "tokens there", "fact precision there, %",
                 "last step's win rate, %", "win rate at each evaluation, %")
    for line in lines:
        cells, name, seed = read([line]), line["cell"], line["seed"]
        run, i = cells[name][seed], peak_of(cells[name], seed)
        highest, last = level(cells, name, at_peak), level(cells, name, lambda cell, seed: cell[seed].wins[-1])
        table.append(row(name, seed, f"{highest.mean:.1f} ± {highest.error:.1f}", run.steps[i],
                         *(f"{run.curve(key)[i]:.{digits}f}" for key, digits in (("true_kl", 3), ("tokens", 1),
                                                                                 ("fact_precision", 1))),
                         f"{last.mean:.1f} ± {last.error:.1f}", ", ".join(f"{x:.1f}" for x in run.curve("win_rate"))))
    return table


def table_of_contrasts(cells: Cells, asked: dict[str, dict[str, float]]) -> list[str]:
    """{question: weights of cells} by all measures; what is seen with 80 % chance stands beside the error."""
    lines = head("difference, points", "seeds", *MEASURES, f"smallest that would be seen ({next(iter(MEASURES))})")
    for question, weights in asked.items():
        found = [contrast(cells, weights, measure) for measure in MEASURES.values()]
        if found[0].seeds:
            lines.append(row(question, found[0].seeds, *found, f"{SIGHT * found[0].error:.1f}"))
    return lines


def questions(cells: Cells) -> dict[str, dict[str, dict[str, float]]]:
    """By heading."""
    penalties = ("kl", "clamped_kl", "jensen_shannon", "bregman")
    cost = {f"{tuning}: {p} less none": {f"{tuning}, {p}": 1.0, f"{tuning}, none": -1.0} for tuning in ("lora", "full")
            for p in penalties}
    strong = {f"{tuning}: {p} at beta 0.3 less none": {f"{tuning}, {p}, beta 0.3": 1.0, f"{tuning}, none": -1.0}
              for tuning in ("lora", "full") for p in (*penalties, "squared_error")}
    both = {f"{p}{b}, full less LoRA": {f"full, {p}{b}": 1.0, "full, none": -1.0, f"lora, {p}{b}": -1.0, "lora, none": 1.0}
            for b in ("", ", beta 0.3") for p in penalties}
    rates = {f"{tuning}: rate {other:g} less {best:g}": {f"{tuning}, rate {other:g}": 1.0, f"{tuning}, rate {best:g}": -1.0}
             for tuning, best in (("lora", 5e-4), ("full", 1e-4)) for other in (best / 4, best / 2, best * 2, best * 4)}
    return {
        "(a) LoRA and full fine-tuning, no penalty": {"LoRA less full": {"lora, none": 1.0, "full, none": -1.0}},
        "(a) The sweep's rates beside the best": rates,
        "(b) What a penalty brings": cost | strong,
        "(b) ... and how much more of it under full fine-tuning: the paper's conjecture": both,
        "(e, f, g) The adapter": {f"{name} less rank 8, alpha 64": {f"lora, {name}": 1.0, "lora, none": -1.0}
                                  for name in ("alpha 1", "rank 1", "rank 64", "all layers")},
    }


def table_at_equal_kl(cells: Cells) -> list[str]:
    """(c)"""
    lines = head("true KL, nats a token", "seeds", "LoRA, %", "full, %", "LoRA less full, points")
    for kl in (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8):
        measure = lambda cell, seed, kl=kl: at_kl(cell, seed, kl)  # noqa: E731
        both = contrast(cells, {"lora, none": 1.0, "full, none": -1.0}, measure)
        if both.seeds > 1:
            lora, full = (level(cells, f"{tuning}, none", measure) for tuning in ("lora", "full"))
            lines.append(row(kl, both.seeds, f"{lora.mean:.1f} ± {lora.error:.1f}", f"{full.mean:.1f} ± {full.error:.1f}", both))
    return lines


def table_of_facts(cells: Cells) -> list[str]:
    """(d)"""
    lines = head("at equal", "seeds", "fact precision of LoRA less that of full, points")
    for what, name, values in (("tokens", "tokens", (19, 21, 23, 25, 27)), ("win rate, %", "win_rate", (40, 42, 44, 46))):
        for value in values:
            found = scalar(cells, "lora, none", "full, none", lambda run, n=name, v=value: where(run, n, v, "fact_precision"))
            if found.seeds:
                lines.append(row(f"{what} {value}", found.seeds, found))
    return lines


def table_of_order(cells: Cells, beta: str) -> list[str]:
    """(h)"""
    penalties = ("kl", "clamped_kl", "jensen_shannon", "bregman", "squared_error")
    names = [name for name in (f"lora, {p}" + f", {beta}" * bool(beta) for p in penalties) if name in cells]
    found = {name: contrast(cells, {name: 1.0, "lora, none": -1.0}, over_steps) for name in names}
    found = {name: x for name, x in found.items() if x.seeds > 1}
    corrected = holm({name: x.p() for name, x in found.items()})
    lines = head("penalty", "seeds", "share of the scores' deviation", "less none, mean over steps, points", "p, Holm's")
    for name, x in sorted(found.items(), key=lambda item: -item[1].mean):
        p = f"{corrected[name]:.2f}" if corrected[name] >= 0.005 else "< 0.01"
        lines.append(row(name, x.seeds, f"{share_of_reward(cells[name]):.3f}", x, p))
    return lines


def write_report(lines: Sequence[dict], folder: Path) -> Path:
    """study.md and the figures."""
    cells = read(lines)
    machines = sorted({line["machine"] for line in lines})
    hours = sum(line["seconds"] for line in lines) / 3600
    text = ["# The study of LoRA and full fine-tuning", "",
            f"`python bench/study.py`; {len(lines)} runs, {hours:.1f} hours of them, one at a core; on (dirty: by the lines of "
            "these runs)", "",
            *(f"- {name}" for name in machines), "",
            "± is the error over runs and instructions both; of facts over runs. A cell's name is its tuning and penalty, at the "
            "best learning rate of its tuning's sweep.", "", "## Every cell", "", *table_of_cells(cells)]
    for title, asked in questions(cells).items():
        table = table_of_contrasts(cells, asked)
        text += ["", f"## {title}", "", *table] if len(table) > 2 else []
    for title, table in (("(c) At equal true KL, no penalty", table_at_equal_kl(cells)),
                         ("(d) Facts, no penalty", table_of_facts(cells)),
                         ("(h) Penalties at beta 0.02, LoRA", table_of_order(cells, "")),
                         ("(h) Penalties at beta 0.3, LoRA", table_of_order(cells, "beta 0.3"))):
        text += ["", f"## {title}", "", *table] if len(table) > 2 else []
    text += ["", "## Every run", "", *table_of_runs(lines)]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "study.md"
    file.write_text("\n".join(text) + "\n", encoding="utf-8")
    draw(cells, folder)
    return file


# -------------------------------------------------------------------------------------------------------------- figures

MARKS = {"none": ("o", "-"), "kl": ("s", "--"), "clamped_kl": ("^", ":"), "jensen_shannon": ("D", "-."),
         "bregman": ("v", (0, (5, 1))), "squared_error": ("P", (0, (1, 1)))}


def draw(cells: Cells, folder: Path) -> None:
    """curves.png: win rate over steps, LoRA and full side by side, with a penalty and without; strong.png: LoRA with every strong
    one; kl.png: over √KL; rates.png: the sweeps. Markers and dashes tell them apart without colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, tuning in zip(axes, ("lora", "full"), strict=True):
        for name, label, (mark, dash) in (("none", "no penalty", MARKS["none"]), ("kl", "KL, β 0.02", MARKS["clamped_kl"]),
                                          ("kl, beta 0.3", "KL, β 0.3", MARKS["kl"])):
            if runs := cells.get(f"{tuning}, {name}"):
                curve(axis, runs, "step", mark, dash, label)
        axis.set(title={"lora": "LoRA", "full": "full fine-tuning"}[tuning], xlabel="PPO steps")
        if axis.containers:
            axis.legend(fontsize=8)
    axes[0].set_ylabel("win rate, %")
    save(figure, folder / "curves.png")

    figure, axis = pyplot.subplots(figsize=(6, 4))
    for name, (mark, dash) in MARKS.items():
        if runs := cells.get("lora, none" if name == "none" else f"lora, {name}, beta 0.3"):
            curve(axis, runs, "step", mark, dash, name.replace("_", " "))
    axis.set(title="LoRA, penalties at β 0.3", xlabel="PPO steps", ylabel="win rate, %")
    if len(axis.containers) > 1:
        axis.legend(fontsize=8)
        save(figure, folder / "strong.png")

    figure, axis = pyplot.subplots(figsize=(6, 4))
    for tuning, mark, dash in (("lora", "o", "-"), ("full", "s", "--")):
        if runs := cells.get(f"{tuning}, none"):
            curve(axis, runs, "true_kl", mark, dash, {"lora": "LoRA", "full": "full fine-tuning"}[tuning], math.sqrt)
    axis.set(xlabel="√ true KL, √ nats a token", ylabel="win rate, %", title="no penalty")
    if axis.containers:
        axis.legend(fontsize=8)
    save(figure, folder / "kl.png")

    figure, axis = pyplot.subplots(figsize=(6, 4))
    for tuning, mark, dash in (("lora", "o", "-"), ("full", "s", "--")):
        rates = sorted((float(name.rpartition(" ")[2]), level(cells, name, at_peak)) for name in cells
                       if name.startswith(f"{tuning}, rate "))
        if rates:
            axis.errorbar([r for r, _ in rates], [x.mean for _, x in rates], [x.error for _, x in rates], marker=mark,
                          linestyle=dash, capsize=3, label={"lora": "LoRA", "full": "full fine-tuning"}[tuning])
    axis.set(xscale="log", xlabel="learning rate", ylabel="win rate at the peak, %", title="no penalty")
    axis.legend(fontsize=8)
    save(figure, folder / "rates.png")


def curve(axis, runs: dict[int, Run], x: str, mark: str, dash: object, label: str,
          scale: Callable[[float], float] = float) -> None:
    """The mean over seeds with its error (of runs alone)."""
    places = [scale(max(0.0, sum(run.curve(x)[i] for run in runs.values()) / len(runs)))
              for i in range(min(len(run.steps) for run in runs.values()))]
    found = [mean_and_error([run.curve("win_rate")[i] for run in runs.values()]) for i in range(len(places))]
    axis.errorbar(places, [m for m, _ in found], [e for _, e in found], marker=mark, linestyle=dash, capsize=3, markersize=5,
                  label=label)


def save(figure, file: Path) -> None:
    """Unless nothing of it has been run yet."""
    if any(axis.containers for axis in figure.axes):
        figure.tight_layout()
        figure.savefig(file, dpi=110)
