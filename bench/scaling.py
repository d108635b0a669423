"""Seconds and peak memory of a PPO step over the size of the rollout, in the miniature world: a line and a flat one.

    python bench/scaling.py            # 32 to 512 responses; writes bench/results/scaling.md and scaling.png

Every size is measured in processes of its own (bench/ppo_step.py), in turn; responses end at EOS; micro-batches are of 32.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from ppo_step import machine, one  # noqa: E402


def measure(sizes: list[int], rounds: int, prompts: Path) -> dict[int, tuple[float, float]]:
    """{responses: (seconds a step, peak in MiB)}, medians."""
    found: dict[int, list[dict]] = {size: [] for size in sizes}
    for k in range(rounds):
        for size in sizes[::-1 if k % 2 else 1]:
            found[size].append(one([sys.executable, str(ROOT / "bench" / "ppo_step.py"), "--measure", "--natural",
                                    f"--model={ROOT / 'tiny' / 'sft'}", f"--reward={ROOT / 'tiny' / 'reward'}",
                                    f"--prompts={prompts}", f"--batch={size}", "--step-batch=32", "--micro-batch=32",
                                    "--rollout-micro-batch=32", "--response-length=80", "--steps=3"], f"batch {size}"))
            print(f"round {k + 1} of {rounds}: {size} responses, {found[size][-1]['steps'][-1]['step']:.2f} s", flush=True)
    return {size: (statistics.median(step["step"] for run in runs for step in run["steps"]),
                   statistics.median(run["peak"] for run in runs) / 2**20) for size, runs in found.items()}


def draw(found: dict[int, tuple[float, float]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes, (seconds, peaks) = list(found), zip(*found.values(), strict=True)
    slope = sum(n * s for n, s in zip(sizes, seconds, strict=True)) / sum(n * n for n in sizes)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.plot(sizes, seconds, "o", color="#0072B2", label="measured")
    left.plot([0, sizes[-1]], [0, slope * sizes[-1]], color="#D55E00", label=f"{1000 * slope:.1f} ms a response")
    left.set(title="time follows the rollout", xlabel="responses a step", ylabel="seconds a step", ylim=(0, None))
    left.legend(frameon=False)
    right.plot(sizes, peaks, "o-", color="#0072B2")
    right.set(title="memory does not", xlabel="responses a step", ylabel="peak memory of the process, MiB",
              ylim=(0, 1.3 * max(peaks)))
    for axis in (left, right):
        axis.set_xticks(sizes)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    part = file.with_suffix(".part.png")
    figure.savefig(part, dpi=110)
    os.replace(part, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args()
    from data import format_prompt, load_instructions

    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        examples = load_instructions(ROOT / "tiny" / "data" / "ppo.json")[:2000]
        prompts.write_text("".join(json.dumps({"prompt": format_prompt(example, "tiny")}) + "\n" for example in examples),
                           encoding="utf-8")
        found = measure(args.sizes, args.rounds, prompts)
    lines = ["| responses a step | seconds | milliseconds a response | peak, MiB |", "| --- | --- | --- | --- |"]
    lines += [f"| {size} | {seconds:.2f} | {1000 * seconds / size:.1f} | {peak:.0f} |" for size, (seconds, peak) in found.items()]
    text = f"`python bench/scaling.py`: {machine()}; medians of {args.rounds} processes of 3 steps.\n\n" + "\n".join(lines) + "\n"
    (args.out / "scaling.md").write_text(text, encoding="utf-8")
    draw(found, args.out / "scaling.png")
    print(f"\n{text}\nwritten to {args.out / 'scaling.md'} and scaling.png")


if __name__ == "__main__":
    main()
