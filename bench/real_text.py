"""The study's question on real text: LoRA and full fine-tuning of SmolLM2-135M, without a penalty and with KL (docs/study.md).

    python bench/real_text.py --base smollm2 --preferences preferences.json --instructions evaluation.json \
        --device cuda:0 --jobs 4
    python bench/real_text.py --report                   # the tables alone, from the lines that are there

Preferences and instructions are AlpacaFarm's files. Two reward models are trained, each on one half of the instructions that
have preferences: one pays, the other, which no policy was trained against, judges the answers in pairs. PPO asks the first half's
instructions; evaluations ask those without preferences, which no model has met. A run that is done leaves a line of numbers, no
texts, in bench/results/study/real_text.jsonl; what has a line is not run again.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "bench"))

from ppo_step import machine  # noqa: E402

from evaluation.statistics import mean_and_error  # noqa: E402
from training.folder import append_line, read_lines  # noqa: E402

LINES = ROOT / "bench" / "results" / "study" / "real_text.jsonl"
# Rates five apart, as the best of each are in the miniature world; on this text neither was swept.
CELLS = {"lora, none": {"tuning": "lora", "estimator": "none", "learning-rate": "5e-4"},
         "lora, kl": {"tuning": "lora", "estimator": "kl", "beta": "0.1", "learning-rate": "5e-4"},
         "full, none": {"tuning": "full", "estimator": "none", "learning-rate": "1e-4"},
         "full, kl": {"tuning": "full", "estimator": "kl", "beta": "0.1", "learning-rate": "1e-4"}}
COMPARISONS = {"LoRA: kl less none": {"lora, kl": 1, "lora, none": -1}, "full: kl less none": {"full, kl": 1, "full, none": -1},
               "none: LoRA less full": {"lora, none": 1, "full, none": -1}, "kl: LoRA less full": {"lora, kl": 1, "full, kl": -1},
               "kl less none, full less LoRA": {"full, kl": 1, "full, none": -1, "lora, kl": -1, "lora, none": 1}}
SEEDS = (0, 1)
COMMON = {"prompt-template": "chat", "lr-steps": "100000", "rollout-batch-size": "32", "step-batch-size": "32",
          "micro-batch-size": "32", "rollout-micro-batch-size": "32", "response-length": "96", "query-length": "128",
          "temperature": "0.7", "dtype": "bfloat16"}
REWARD = {"prompt-template": "chat", "max-tokens": "384", "held-out": "0.2", "batch-size": "4", "micro-batch-size": "4",
          "learning-rate": "3e-4", "dtype": "bfloat16"}


def split(preferences: list[dict], instructions: list[dict], seed: int = 0) -> dict[str, list[dict]]:
    """reward, judge: preferences on each half of their instructions; ppo: the instructions of reward; evaluation: of neither."""
    def key(row: dict) -> tuple[str, str]:
        return row["instruction"], row.get("input") or ""

    draw = random.Random(seed)
    preferred = sorted(set(map(key, preferences)))
    draw.shuffle(preferred)
    first = set(preferred[: len(preferred) // 2])
    rest = [key(row) for row in instructions if key(row) not in set(preferred)]
    asked = {name: [{"instruction": instruction, "input": given} for instruction, given in keys]
             for name, keys in (("ppo", sorted(first)), ("evaluation", rest))}
    return asked | {"reward": [row for row in preferences if key(row) in first],
                    "judge": [row for row in preferences if key(row) not in first]}


def words(flags: dict[str, str]) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


def run(command: list[str], log: Path, seconds: float | None = None) -> None:
    """A program of ours, for so many seconds at most; its words go to the log. Raises RuntimeError with the last of them where it
    fails by itself."""
    with open(log, "w", encoding="utf-8") as file:
        program = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            code = program.wait(seconds)
        except subprocess.TimeoutExpired:
            program.kill()
            return
    if code:
        raise RuntimeError(f"{' '.join(command[:1])} ended with {code}: " + log.read_text(encoding="utf-8")[-1500:])


def train_rewards(args: argparse.Namespace) -> None:
    """Both at once; one that is there is not trained again."""
    def one(name: str) -> None:
        if not (args.work / name / "config.json").is_file():
            flags = REWARD | {"base": args.base, "data": str(args.work / f"{name}.json"), "out": str(args.work / name),
                              "device": args.device}
            run(["reward.py", *words(flags)], args.work / f"{name}.log")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, ("reward", "judge")))


def train_cell(args: argparse.Namespace, cell: str, seed: int, out: Path) -> None:
    """One policy."""
    if not (out / "curves.png").is_file():
        shutil.rmtree(out, ignore_errors=True)
        data = {"policy": args.base, "reward": str(args.work / "reward"), "data": str(args.work / "ppo.json"),
                "evaluation": str(args.work / "evaluation.json"), "policy-device": args.device, "reference-device": args.device}
        steps = {"steps": str(args.steps), "eval-every": str(args.eval_every), "save-every": str(args.steps)}
        run(["train.py", *words(COMMON | CELLS[cell] | data | steps | {"seed": str(seed), "out": str(out)})],
            Path(f"{out}.log"), max(1, args.end - time.monotonic()))


@cache
def open_judge(work: Path, base: str, device: str) -> tuple:
    """The held-out reward model, and the instructions whose answers it reads."""
    import torch

    from evaluation.measure import load_benchmark
    from formats.tokenizer import load_tokenizer
    from training.rewards import open_reader

    reader, _ = open_reader(str(work / "judge"), "--judge", "chat", None, dtype=torch.float32, device=device)
    limit = int(COMMON["query-length"])
    return reader, load_benchmark(work / "evaluation.json", load_tokenizer(base), "chat", limit).tasks


def judge(args: argparse.Namespace, cell: str, seed: int, folder: Path) -> None:
    """Scores the answers of a run's evaluations by the held-out reward model, and leaves its line."""
    import torch

    reader, tasks = open_judge(args.work, args.base, args.device)
    names = ("step", "n", "true_kl", "true_kl_se", "reward", "reward_se", "tokens", "finished", "rewards")
    evaluations = []
    for found in read_lines(folder / "evaluations.jsonl"):
        with torch.no_grad():
            scores = reader.score_texts(tasks, found["responses"], found["ended"])
        evaluations.append({name: found[name] for name in names} | {"judged": [round(score, 4) for score in scores]})
    steps = read_lines(folder / "metrics.jsonl")
    phases = [f"seconds_{part}" for part in ("generate", "score", "update")]
    cost = {"seconds": statistics.median(sum(step[phase] for phase in phases) for step in steps),
            "penalty": statistics.mean(step["penalty"] for step in steps),
            "deviation": statistics.mean(step["score_std"] for step in steps)}
    learned = {name: json.loads((args.work / name / "training.json").read_text())["history"][-1]["held_out"]
               for name in ("reward", "judge")}
    append_line(LINES, {"cell": cell, "seed": seed, "flags": COMMON | CELLS[cell], "steps": args.steps, **cost,
                        "rewards": learned, "evaluations": evaluations,
                        "machine": machine() + f" ({args.commit})" * bool(args.commit)})


# -------------------------------------------------------------------------------------------------------------- the report


def report(lines: list[dict], file: Path) -> None:
    """Tables of what the lines hold; errors are those of instructions, whose mean over the seeds counts once. Runs that were
    ended before their first evaluation after a step are left out."""
    lines = [line for line in lines if len(line["evaluations"]) > 1]
    cells = {cell: {line["seed"]: line["evaluations"] for line in lines if line["cell"] == cell} for cell in CELLS}
    last = min(len(line["evaluations"]) for line in lines) - 1  # what every run has reached
    right = {name: f"{100 * found['value']:.1f} ± {100 * found['standard_error']:.1f} % of {found['n']} pairs"
             for name, found in lines[0]["rewards"].items()}
    text = ["# The study on real text", "", f"`python bench/real_text.py`; {lines[0]['machine']}. SmolLM2-135M-Instruct, "
            f"{lines[0]['evaluations'][0]['n']} instructions; ± is the standard error over instructions, each counted once with "
            "its mean over the seeds, and says nothing of other seeds. Held out: a reward model of other preferences, which no "
            "policy was trained against. Right on instructions that they did not see: the one that pays "
            f"{right['reward']}, the one that judges {right['judge']}.", "",
            "| | seeds | step | reward | less the start's | true KL | tokens | held out, less the start's "
            "| wins over the start, % |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for cell, seeds in cells.items():
        runs = list(seeds.values())
        for k in range(1, min(map(len, runs), default=0)):
            text.append(f"| {cell} | {', '.join(map(str, sorted(seeds)))} | {runs[0][k]['step']} | "
                        f"{mean(runs, k, 'reward'):.2f} | {signed(gains(runs, k, 'rewards'))} | {mean(runs, k, 'true_kl'):.3f} | "
                        f"{mean(runs, k, 'tokens'):.1f} | {signed(gains(runs, k, 'judged'))} | {plain(wins(runs, k))} |")
    text += ["", f"At step {lines[0]['evaluations'][last]['step']}, paired by seed and instruction:", "",
             "| | seeds | by the reward model that pays | by the one held out |", "| --- | --- | --- | --- |"]
    for words, signs in COMPARISONS.items():
        seeds = sorted(set.intersection(*(set(cells[cell]) for cell in signs)))
        if seeds:
            runs = {cell: [cells[cell][seed] for seed in seeds] for cell in signs}
            found = [signed(combined(runs, signs, last, name)) for name in ("rewards", "judged")]
            text.append(f"| {words} | {', '.join(map(str, seeds))} | {' | '.join(found)} |")
    text += ["", f"| | seconds a step of {COMMON['rollout-batch-size']} responses, median, other runs beside it "
             "| penalty, share of the scores' deviation |",
             "| --- | --- | --- |"]
    for cell in filter(cells.get, cells):
        own = [line for line in lines if line["cell"] == cell]
        share = statistics.mean(line["penalty"] / line["deviation"] for line in own)
        text.append(f"| {cell} | {statistics.median(line['seconds'] for line in own):.0f} | {share:.3f} |")
    text += ["", "Every run:", "", "| | seed | step | reward, less the start's | true KL | held out, less the start's |",
             "| --- | --- | --- | --- | --- | --- |"]
    for line in lines:
        found = line["evaluations"]
        text += [f"| {line['cell']} | {line['seed']} | {found[k]['step']} | {signed(gains([found], k, 'rewards'))} | "
                 f"{found[k]['true_kl']:.3f} | {signed(gains([found], k, 'judged'))} |" for k in range(1, len(found))]
    file.write_text("\n".join(text) + "\n", encoding="utf-8")
    print(f"written to {file}")


def combined(runs: dict[str, list[list[dict]]], signs: dict[str, int], k: int, name: str) -> list[float]:
    """Of each instruction: the sum of the cells' values, each with its sign."""
    return [sum(values) for values in zip(*([sign * value for value in by_instruction(runs[cell], k, name)]
                                            for cell, sign in signs.items()), strict=True)]


def mean(runs: list[list[dict]], k: int, name: str) -> float:
    return statistics.mean(run[k][name] for run in runs)


def by_instruction(runs: list[list[dict]], k: int, name: str) -> list[float]:
    """The mean over the seeds of each instruction's value."""
    return [statistics.mean(values) for values in zip(*(run[k][name] for run in runs), strict=True)]


def gains(runs: list[list[dict]], k: int, name: str) -> list[float]:
    """Of each instruction over the start."""
    return [after - before for before, after in zip(by_instruction(runs, 0, name), by_instruction(runs, k, name), strict=True)]


def wins(runs: list[list[dict]], k: int) -> list[float]:
    """Of each instruction: how often, in %, the held-out model prefers the answer to the start's."""
    won = [[100.0 * (after > before) for before, after in zip(run[0]["judged"], run[k]["judged"], strict=True)] for run in runs]
    return [statistics.mean(values) for values in zip(*won, strict=True)]


def signed(values: Sequence[float]) -> str:
    value, error = mean_and_error(values)
    return f"{round(value, 2) + 0:+.2f} ± {error:.2f}"  # no -0.00


def plain(values: Sequence[float]) -> str:
    value, error = mean_and_error(values)
    return f"{value:.1f} ± {error:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", help="SmolLM2-135M-Instruct: folder or GGUF file")
    parser.add_argument("--preferences", type=Path, help="AlpacaFarm preferences")
    parser.add_argument("--instructions", type=Path, help="AlpacaFarm's 805 evaluation instructions")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "real_text", help="of models and runs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--eval-every", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=10_000, help="when runs are ended; what they had evaluated counts")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--commit", default="", help="where this checkout has no .git")
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    if not args.report:
        args.work.mkdir(parents=True, exist_ok=True)
        given = (json.loads(file.read_text(encoding="utf-8")) for file in (args.preferences, args.instructions))
        for name, rows in split(*given).items():
            (args.work / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
            print(f"{name}: {len(rows)} rows")
        start = time.monotonic()
        args.end = start + 60 * args.minutes
        train_rewards(args)
        print(f"two reward models: {time.monotonic() - start:.0f} s", flush=True)
        there = {(line["cell"], line["seed"]) for line in read_lines(LINES)}
        wanted = [(cell, seed) for seed in args.seeds for cell in CELLS if (cell, seed) not in there]
        writing = threading.Lock()

        def one(cell: str, seed: int) -> None:
            folder = args.work / f"{cell.replace(', ', '-')}-s{seed}"
            try:
                train_cell(args, cell, seed, folder)
            except RuntimeError as error:  # out of memory, say: what it has evaluated counts, and the others go on
                print(f"{cell}, seed {seed}: {error}", flush=True)
            if not read_lines(folder / "metrics.jsonl"):
                print(f"{cell}, seed {seed}: ended before its first step, and left no line", flush=True)
                return
            with writing:
                judge(args, cell, seed, folder)
            print(f"{cell}, seed {seed}: done after {time.monotonic() - start:.0f} s", flush=True)

        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda each: one(*each), wanted))
    report(read_lines(LINES), LINES.with_suffix(".md"))


if __name__ == "__main__":
    main()
