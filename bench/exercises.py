"""What the exercises of docs/class/ come to: every answer applied to a copy of the project, and trained with.

    python bench/exercises.py                  # all, about half an hour on one core; what is done is kept
    python bench/exercises.py --only 03 08     # some

A run is the README's but for its flags: 25 steps, seed 0. Each leaves a line in bench/results/class.jsonl, of which
bench/results/class.md is made.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ppo_step import machine  # noqa: E402
from tqdm import tqdm  # noqa: E402

from evaluation.statistics import paired_difference, win_rate  # noqa: E402
from training.folder import append_line, read_lines  # noqa: E402

ANSWERS = ROOT / "docs" / "class" / "answers"
LINES = ROOT / "bench" / "results" / "class.jsonl"


class Exercise(NamedTuple):
    """A run with an answer's patch (None: the project as it is)."""

    name: str
    patch: str | None
    flags: str


RUNS = [
    Exercise("00 as it is", None, "--estimator bregman"),
    Exercise("01 hellinger", "01-an-estimator", "--estimator hellinger"),
    Exercise("02 spread over all tokens", "02-where-the-score-lands", "--estimator bregman --landing spread"),
    Exercise("02 on sentences' ends", "02-where-the-score-lands", "--estimator bregman --landing sentences"),
    Exercise("03 rloo, 4 answers", "03-without-a-value-model", "--estimator bregman --advantage rloo --answers 4"),
    Exercise("03 grpo, 4 answers", "03-without-a-value-model", "--estimator bregman --advantage grpo --answers 4"),
    Exercise("04 none", None, "--estimator none"),
    Exercise("04 bregman in the reward, beta 0.3", None, "--estimator bregman --beta 0.3"),
    Exercise("04 kl in the reward, beta 0.3", None, "--estimator kl --beta 0.3"),
    Exercise("04 squared_error in the reward, beta 0.3", None, "--estimator squared_error --beta 0.3"),
    Exercise("04 kl in the loss, beta 0.3", "04-kl-in-the-loss", "--estimator kl --beta 0.3 --kl-in-loss"),
    Exercise("04 squared_error in the loss, beta 0.3", "04-kl-in-the-loss", "--estimator squared_error --beta 0.3 --kl-in-loss"),
    Exercise("04 bregman in the loss, beta 0.3", "04-kl-in-the-loss", "--estimator bregman --beta 0.3 --kl-in-loss"),
    Exercise("05 rewards not scaled", None, "--estimator bregman --no-whiten-rewards"),
    Exercise("05 advantages not whitened", "05-no-whitening", "--estimator bregman --no-whiten-advantages"),
    Exercise("06 mask too long", "06-mask-too-long", "--estimator bregman --steps 5"),
    Exercise("06 mask too short", "06-mask-too-short", "--estimator bregman --steps 5"),
    Exercise("07 EOS never sampled", "07-eos-never-sampled", "--estimator bregman --steps 5"),
    Exercise("07 no EOS at all", "07-no-eos-at-all", "--estimator bregman --steps 5"),
    Exercise("08 alpha 1", "08-alpha", "--estimator bregman"),
    Exercise("09 a reward to hack", "09-a-reward-to-hack", "--estimator bregman --reward hackable.py:informative"),
    Exercise("09 a reward to hack, further", "09-a-reward-to-hack",
             "--estimator none --reward hackable.py:informative --learning-rate 1e-3 --lr-steps 100000 --steps 40"),
]


def run(exercise: Exercise, copy: Path) -> dict:
    """In a copy of the project."""
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", ".venv", "__pycache__", ".*_cache", "results"))
    if exercise.patch:
        subprocess.run(["git", "apply", str(ANSWERS / f"{exercise.patch}.patch")], cwd=copy, check=True)
    done = subprocess.run([sys.executable, "train.py", *exercise.flags.split(), "--out", "run"], cwd=copy, capture_output=True,
                          text=True)
    said = [line for line in done.stdout.splitlines() if line.startswith(("warning, step", "self-check"))]
    return {"name": exercise.name, "flags": exercise.flags, "patch": exercise.patch, "code": done.returncode, "said": said,
            "error": next((line for line in done.stderr.splitlines() if "train.py: " in line), ""), "machine": machine(),
            "metrics": read_lines(copy / "run" / "metrics.jsonl"),
            "evaluations": [{name: x for name, x in evaluation.items() if name == "preferences" or isinstance(x, float)}
                            for evaluation in read_lines(copy / "run" / "evaluations.jsonl")]}


def row(found: dict, as_it_is: dict) -> str:
    """Of the table."""
    metrics, evaluations = found["metrics"], found["evaluations"]
    if found["code"]:
        return f"| {found['name']} | `{found['flags']}` | stopped, exit code {found['code']} |||||||||"
    last = evaluations[-1]
    rate, error = win_rate(last["preferences"])
    change, its_error = paired_difference(evaluations[0]["preferences"], last["preferences"])
    beside, error_beside = paired_difference(as_it_is["evaluations"][-1]["preferences"], last["preferences"])
    scores = f"{metrics[0]['score_mean']:.2f} → {metrics[-1]['score_mean']:.2f}"
    seconds = [sum(m[f"seconds_{phase}"] for m in metrics) / len(metrics) for phase in ("generate", "score", "update")]
    return (f"| {found['name']} | `{found['flags']}` | {scores} | {rate:.1f} ± {error:.1f} | {change:+.1f} ± {its_error:.1f} | "
            f"{'–' if found is as_it_is else f'{beside:+.1f} ± {error_beside:.1f}'} | "
            f"{metrics[1]['true_kl']:.1e} | {last['true_kl']:.4f} | {last['tokens']:.1f} | "
            f"{last['fact_precision']:.1f} | {100 * metrics[-1]['finished']:.0f} | "
            f"{' + '.join(f'{s:.2f}' for s in seconds)} |")


def write(lines: list[dict], file: Path) -> None:
    lines = sorted(lines, key=lambda line: line["name"])  # the first is the project as it is
    machines = sorted({line["machine"] for line in lines})
    text = ["# The exercises of docs/class", "", "`python bench/exercises.py`; one seed each (0), so that only differences of "
            "several errors mean anything; ± is the error over 805 instructions, differences are paired by them. Seconds are "
            "of a machine that did other things, too.", "", *(f"- {name}" for name in machines), "",
            "| exercise | flags | score of a step, first → last | win rate, % | its rise, points | less as it is, points | "
            "true KL after one step | true KL | tokens | facts, % | finished, % | seconds a step: generate + score + update |",
            "| " + " | ".join(["---"] * 12) + " |",
            *(row(line, lines[0]) for line in lines), "", "What the runs said:", ""]
    for line in lines:
        text += [f"- {line['name']}: {said}" for said in [*line["said"], *([line["error"]] if line["error"] else [])]]
    file.write_text("\n".join(text) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], help="exercises whose name begins so")
    args = parser.parse_args()
    done = {line["name"] for line in read_lines(LINES)}
    wanted = [e for e in RUNS if e.name not in done and e.name.startswith(tuple(args.only))]
    for exercise in tqdm(wanted, desc="exercises", unit="run"):
        with tempfile.TemporaryDirectory() as folder:
            append_line(LINES, run(exercise, Path(folder) / "copy"))
        write(read_lines(LINES), LINES.with_suffix(".md"))
    print(f"written: {LINES.with_suffix('.md')}")


if __name__ == "__main__":
    main()
