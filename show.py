"""What a run shows of itself: tables of figures, answers before and after, and curves.png. report.py has the paper's tables."""

import os
from collections.abc import Sequence
from pathlib import Path

from evaluate import paired_difference, read_lines

# ----------------------------------------------------------------------------------------------------------- tables

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
    error = result.get(key + "_se")
    return f"{result[key]:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def before_after(before: dict, after: dict, tasks: Sequence[dict], pairs: int = 3) -> str:
    """The table of two evaluations, the paired difference of their win rates, and some answers side by side."""
    lines = [format_table({"before": before, f"step {after['step']}": after})]
    if "preferences" in before:
        difference, error = paired_difference(before["preferences"], after["preferences"])
        in_errors = f", {difference / error:.1f} standard errors" if error else ""
        lines.append(f"win rate after − before: {difference:+.1f} ± {error:.1f} points (paired over {before['n']}{in_errors})")
    changed = [i for i in range(len(tasks)) if before["responses"][i] != after["responses"][i]]
    if changed:
        lines += ["", f"{min(pairs, len(changed))} of the {len(changed)} answers that changed, of {len(tasks)} in all:"]
    for i in changed[::max(1, len(changed) // pairs)][:pairs]:
        asked = tasks[i]["instruction"] + (f" [{tasks[i]['input']}]" if tasks[i].get("input") else "")
        lines += ["", f"  {asked}", f"    before: {before['responses'][i]}", f"    after:  {after['responses'][i]}"]
    return "\n".join(lines)


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


# ----------------------------------------------------------------------------------------------------------- curves

PANELS = [
    ("reward model's score", [("score_mean", "score"), ("shaped_reward", "shaped (Eq. 3)")]),
    ("KL to the reference, nats/token", [("true_kl", "true KL"), ("kl_k1", "k1"), ("kl_k3", "k3")]),
    ("response length, tokens", [("length", "tokens")]),
    ("share clipped", [("clip_fraction", "policy"), ("value_clip_fraction", "value")]),
    ("value loss", [("value_loss", "value loss")]),
]
COLORS = ["#0072B2", "#D55E00", "#009E73"]  # Okabe and Ito: told apart by colour-blind readers too


def draw_curves(run: Path) -> Path | None:
    """curves.png of a run folder from its metrics.jsonl and evaluations.jsonl; None when matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics, evaluations = read_lines(run / "metrics.jsonl"), read_lines(run / "evaluations.jsonl")
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), layout="constrained")
    steps = [m["step"] for m in metrics]
    for axis, (title, lines) in zip(axes.flat, PANELS):
        for (key, name), color in zip(lines, COLORS):
            axis.plot(steps, [m[key] for m in metrics], label=name, color=color, linewidth=1.4)
        axis.set(title=title, xlabel="PPO step")
        if len(lines) > 1:
            axis.legend(frameon=False)
    draw_win_rate(axes.flat[5], evaluations)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(run.name)
    part = run / ".curves.part.png"
    figure.savefig(part, dpi=110)
    pyplot.close(figure)
    os.replace(part, run / "curves.png")
    return run / "curves.png"


def draw_win_rate(axis, evaluations: list[dict]) -> None:
    """Win rate with its standard error where there are judges, else the reward on the evaluation instructions."""
    key, title = ("win_rate", "win rate, %") if all("win_rate" in e for e in evaluations) else ("reward", "evaluation reward")
    found = [e for e in evaluations if key in e]
    axis.errorbar([e["step"] for e in found], [e[key] for e in found], yerr=[e[key + "_se"] for e in found], marker="o",
                  color=COLORS[0], capsize=3, linewidth=1.4)
    axis.set(title=f"{title} (± standard error)", xlabel="PPO step")
