"""How a PPO step grows: seconds and peak memory over the size of the rollout, the length of responses and the size of the model.

    python bench/scaling.py            # all three; writes bench/results/scaling.md and scaling.png
    python bench/scaling.py --over response --rounds 1

Every point is measured in processes of its own (bench/ppo_step.py), in turn. Over the rollout: the miniature world, whose
responses end at EOS. Over length and size: random weights and responses of full length; the miniature model's shape, and others.
Beside the time stands that of the arithmetic alone at this machine's speeds, `ppo_step.floors`; a power is fitted to either.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from ppo_step import machine, one  # noqa: E402
from shapes import SHAPES  # noqa: E402

from training.memory import parameters  # noqa: E402

SIZES = ("miniature-64", "miniature", "miniature-256", "miniature-512")
SWEEPS = {"rollout": (32, 64, 128, 256, 512), "response": (64, 128, 256, 512, 1024, 2048),
          "model": tuple(parameters(SHAPES[name]()) for name in SIZES)}
LABELS = {"rollout": "responses a step", "response": "tokens a response", "model": "parameters"}


def words(sweep: str, value: int, prompts: Path) -> list[str]:
    """Of bench/ppo_step.py, for one point."""
    if sweep == "rollout":
        return [f"--model={ROOT / 'tiny' / 'sft'}", f"--reward={ROOT / 'tiny' / 'reward'}", f"--prompts={prompts}", "--natural",
                f"--batch={value}", "--step-batch=32", "--micro-batch=32", "--rollout-micro-batch=32", "--response-length=80",
                "--steps=3"]
    shape, length = ("miniature", value) if sweep == "response" else (SIZES[SWEEPS["model"].index(value)], 64)
    return [f"--shape={shape}", "--batch=16", "--step-batch=16", "--micro-batch=8", "--rollout-micro-batch=16",
            "--prompt-length=32", f"--response-length={length}", f"--steps={1 if length > 500 else 2}"]


def measure(sweep: str, rounds: int, prompts: Path) -> list[dict]:
    """Medians of each point: seconds, floor and peak in MiB."""
    found: dict[int, list[dict]] = {value: [] for value in SWEEPS[sweep]}
    for k in range(rounds):
        for value in list(found)[::-1 if k % 2 else 1]:
            program = [sys.executable, str(ROOT / "bench" / "ppo_step.py"), "--measure"]
            found[value].append(one([*program, *words(sweep, value, prompts)], f"{sweep} {value}"))
            seconds = found[value][-1]["steps"][-1]["step"]
            print(f"round {k + 1} of {rounds}: {value:,} {LABELS[sweep]}, {seconds:.2f} s", flush=True)
    return [{"at": value, "seconds": statistics.median(step["step"] for run in runs for step in run["steps"]),
             "floor": statistics.median(sum(run["floor"][phase] for phase in ("generate", "score", "update")) for run in runs),
             "peak": statistics.median(run["peak"] for run in runs) / 2**20} for value, runs in found.items()]


def power(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """(a, b) of y ≈ a · x^b, by least squares of the logarithms."""
    u, v = [math.log(each) for each in x], [math.log(each) for each in y]
    mean_u, mean_v = statistics.mean(u), statistics.mean(v)
    b = sum((p - mean_u) * (q - mean_v) for p, q in zip(u, v, strict=True)) / sum((p - mean_u) ** 2 for p in u)
    return math.exp(mean_v - b * mean_u), b


def table(sweep: str, points: list[dict]) -> str:
    lines = [f"| {LABELS[sweep]} | seconds | over the one before | the arithmetic alone | over the one before | peak, MiB |",
             "| --- | --- | --- | --- | --- | --- |"]
    for k, p in enumerate(points):
        grown = ["", ""] if k == 0 else [f"× {p[name] / points[k - 1][name]:.2f}" for name in ("seconds", "floor")]
        lines.append(f"| {p['at']:,} | {p['seconds']:.2f} | {grown[0]} | {p['floor']:.3f} | {grown[1]} | {p['peak']:.0f} |")
    own, its = (power([p["at"] for p in points], [p[name] for p in points])[1] for name in ("seconds", "floor"))
    return "\n".join(lines) + f"\n\nFitted powers: seconds {own:.2f}, the arithmetic alone {its:.2f}."


def draw(found: dict[str, list[dict]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(found), figsize=(3.4 * len(found), 5.6), layout="constrained", squeeze=False)
    for (above, below), (sweep, points) in zip(axes.T, found.items(), strict=True):
        x = [p["at"] for p in points]
        for name, mark, colour, label in (("seconds", "o", "#0072B2", "measured"), ("floor", "s", "#D55E00", "arithmetic alone")):
            a, b = power(x, [p[name] for p in points])
            above.plot(x, [p[name] for p in points], mark, color=colour, label=f"{label}: power {b:.2f}")
            above.plot(x, [a * each**b for each in x], color=colour, linestyle="-" if name == "seconds" else "--")
        above.set(title=f"time over {LABELS[sweep]}", ylabel="seconds a step", xscale="log", yscale="log")
        above.legend(frameon=False, fontsize=8)
        below.plot(x, [p["peak"] for p in points], "o-", color="#0072B2")
        below.set(xlabel=LABELS[sweep], ylabel="peak memory, MiB", xscale="log", ylim=(0, 1.15 * max(p["peak"] for p in points)))
        for axis in (above, below):
            axis.set_xticks(x, [f"{each / 1e6:.1f}M" if each > 10**5 else f"{each:,}" for each in x])
            axis.minorticks_off()
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    part = file.with_suffix(".part.png")
    figure.savefig(part, dpi=110)
    os.replace(part, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--over", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args()
    from data import format_prompt, load_instructions

    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        examples = load_instructions(ROOT / "tiny" / "data" / "ppo.json")[:2000]
        prompts.write_text("".join(json.dumps({"prompt": format_prompt(example, "tiny")}) + "\n" for example in examples),
                           encoding="utf-8")
        found = {sweep: measure(sweep, args.rounds, prompts) for sweep in args.over}
    text = (f"# How a PPO step grows\n\n`python bench/scaling.py`: {machine()}; medians of {args.rounds} processes.\n\n"
            + "\n\n".join(f"## Over {LABELS[sweep]}\n\n{table(sweep, points)}" for sweep, points in found.items()) + "\n")
    (args.out / "scaling.md").write_text(text, encoding="utf-8")
    draw(found, args.out / "scaling.png")
    print(f"\n{text}\nwritten to {args.out / 'scaling.md'} and scaling.png")


if __name__ == "__main__":
    main()
