"""Is it LoRA that regularises? Runs of the miniature world, LoRA beside full fine-tuning, and what they say (docs/study.md).

    python bench/study.py --tier quick                 # as many runs at once as there are cores
    python bench/study.py --tier full                  # more cells and seeds; goes on from what is there
    python bench/study.py --report                     # tables and figures alone, from the lines that are there

A run is one `python train.py`; when it is done it leaves a line in bench/results/study/runs.jsonl with all that the tables need,
its preferences instruction by instruction included, and its folder goes. What has a line is never run again; a run that was
killed goes on from its last checkpoint. Runs come in order: first the sweeps of learning rates, at whose best all others stand,
then seed by seed, so that what is there when the machine stops are whole seeds.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ppo_step import machine  # noqa: E402
from tqdm import tqdm  # noqa: E402
from study_report import best_rate, write_report  # noqa: E402

from training.folder import append_line, read_lines  # noqa: E402

LINES = ROOT / "bench" / "results" / "study" / "runs.jsonl"
# The rate stays where it is after its warm-up: a falling one would be another one at every step, and end what is to be seen.
COMMON = {"steps": 40, "lr-steps": 100_000, "eval-every": 5, "save-every": 20, "keep": 1}
RATES = {"lora": (2.5e-4, 5e-4, 1e-3, 2e-3), "full": (2.5e-5, 5e-5, 1e-4, 2e-4)}
FIVE = ("none", "kl", "clamped_kl", "jensen_shannon", "bregman")
SWEPT = 2  # seeds that decide on a rate; a third comes at the end, and changes no choice
STRONG = 0.3  # beta at which the penalty takes a considerable share of the reward


@dataclass(frozen=True)
class Cell:
    """What is the same in all seeds; name is unique."""

    name: str
    tuning: str
    estimator: str = "none"
    rate: float | None = None  # None: the best of the sweep
    beta: float = 0.02
    more: tuple[tuple[str, str], ...] = field(default=())  # further flags

    def flags(self, rates: dict[str, float]) -> dict[str, str]:
        """Of train.py; rates: the best of each tuning."""
        rate = self.rate or rates[self.tuning]
        own = {"tuning": self.tuning, "estimator": self.estimator, "beta": self.beta, "learning-rate": f"{rate:g}"}
        return {name: str(value) for name, value in (COMMON | own | dict(self.more)).items()}


def main_cells() -> list[Cell]:
    return [Cell(f"{tuning}, {estimator}", tuning, estimator) for estimator in FIVE for tuning in RATES]


def strong_cells(*names: str, tunings: tuple[str, ...] = tuple(RATES)) -> list[Cell]:
    return [Cell(f"{tuning}, {name}, beta {STRONG}", tuning, name, beta=STRONG) for name in names for tuning in tunings]


def adapter_cells() -> list[Cell]:
    mlp = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    # alpha / rank stays 8: else another rank would be another learning rate too
    return [Cell("lora, alpha 1", "lora", more=(("lora-alpha", "1"),)),
            Cell("lora, rank 1", "lora", more=(("lora-rank", "1"), ("lora-alpha", "8"))),
            Cell("lora, rank 64", "lora", more=(("lora-rank", "64"), ("lora-alpha", "512"))),
            Cell("lora, all layers", "lora", more=(("lora-targets", mlp),))]


def swept_cells(rates: dict[str, set[float]]) -> list[Cell]:
    return [Cell(f"{tuning}, rate {rate:g}", tuning, rate=rate) for tuning in rates for rate in sorted(rates[tuning])]


def after_the_sweep(tier: str) -> list[tuple[Cell, int]]:
    """Those that decide most come first, seed by seed: no penalty beside one that matters, then the adapter, then the rest."""
    deciding = [cell for cell in main_cells() if cell.estimator == "none"] + strong_cells("kl")
    if tier == "quick":
        return [(cell, seed) for seed in range(2) for cell in deciding]
    strong = strong_cells("jensen_shannon", "bregman", "squared_error", "clamped_kl", tunings=("lora",))
    order = [(deciding, 5), ([*strong, *adapter_cells()], 3), (strong_cells("jensen_shannon"), 5), (main_cells(), 5),
             ([Cell("lora, squared_error", "lora", "squared_error")], 3), (swept_cells({k: set(v) for k, v in RATES.items()}), 3)]
    pairs = [(cell, seed) for cells, seeds in order for seed in range(seeds) for cell in cells]
    return list(dict.fromkeys(pairs))


# ----------------------------------------------------------------------------------------------------------------- runs


class Study:
    """The runs of one call."""

    def __init__(self, out: Path, jobs: int):
        self.out, self.jobs, self.writing = out, jobs, threading.Lock()
        self.starts: dict[int, threading.Lock] = {}
        self.threads = str(max(1, (os.cpu_count() or 1) // jobs))

    def folder(self, cell: Cell, seed: int) -> Path:
        return self.out / f"{re.sub('[^a-z0-9.]+', '-', cell.name)}-s{seed}"

    def run(self, cell: Cell, seed: int, flags: dict[str, str]) -> None:
        """Trains one, from where it stands, and leaves its line."""
        folder, start = self.folder(cell, seed), self.out / f"start-s{seed}"
        with self.starts[seed]:  # the first of a seed measures its start, for all
            begun = time.monotonic()
            training = self.train(folder, flags | {"seed": str(seed)} | ({"baseline": str(start)} if start.is_dir() else {}))
            while not start.is_dir() and training.poll() is None:
                time.sleep(0.5)
                if lines := read_lines(folder / "evaluations.jsonl"):
                    part = start.with_name(f".{start.name}")
                    part.mkdir(exist_ok=True)
                    (part / "evaluations.jsonl").write_text(json.dumps(lines[0]) + "\n", encoding="utf-8")
                    part.rename(start)
        if code := training.wait():
            raise RuntimeError(f"{cell.name}, seed {seed}: exit code {code}; see {folder}.log")
        with self.writing:
            LINES.parent.mkdir(parents=True, exist_ok=True)
            append_line(LINES, line(cell, seed, flags, folder) | {"seconds": round(time.monotonic() - begun)})
        shutil.rmtree(folder)

    def train(self, folder: Path, flags: dict[str, str]) -> subprocess.Popen:
        """train.py, from the last checkpoint where there is one; a folder without one is begun anew."""
        resume = any(folder.glob("step-*"))
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        words = ["--resume"] if resume else [word for name, value in flags.items() for word in (f"--{name}", value)]
        with open(f"{folder}.log", "w", encoding="utf-8") as log:
            return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words, "--out", str(folder)], stdout=log,
                                    stderr=log, env=os.environ | {"OMP_NUM_THREADS": self.threads})

    def all_of(self, wanted: list[tuple[Cell, int, dict[str, str]]]) -> None:
        """As many at once as jobs; a bar over their steps."""
        wanted = [each for each in wanted if not known(*each)]
        self.out.mkdir(parents=True, exist_ok=True)
        self.starts = {seed: threading.Lock() for _, seed, _ in wanted}
        steps = COMMON["steps"]
        with ThreadPoolExecutor(self.jobs) as pool, tqdm(total=steps * len(wanted), unit="step", smoothing=0.02) as bar:
            running = {pool.submit(self.run, *each): each for each in wanted}
            while running:
                ended, _ = wait(running, timeout=5, return_when=FIRST_COMPLETED)
                for run in ended:
                    del running[run]
                    if error := run.exception():
                        pool.shutdown(cancel_futures=True)
                        sys.exit(f"study.py: {error}")
                taken = sum(len(read_lines(self.folder(cell, seed) / "metrics.jsonl")) for cell, seed, _ in running.values())
                bar.set_description(f"{len(running)} runs left")
                bar.update(steps * (len(wanted) - len(running)) + taken - bar.n)


def swept(study: Study) -> dict[str, float]:
    """The best rate of each tuning, without a penalty: those of RATES are tried, and further ones while the best is the last."""
    rates = {tuning: set(tried) for tuning, tried in RATES.items()}
    while True:
        study.all_of([(cell, seed, cell.flags({})) for seed in range(SWEPT) for cell in swept_cells(rates)])
        best = {tuning: best_rate(read_lines(LINES), tuning, SWEPT) for tuning in rates}
        beyond = {tuning: {max(rates[tuning]): 2 * rate, min(rates[tuning]): rate / 2}.get(rate) for tuning, rate in best.items()}
        if not any(beyond.values()):
            return best
        for tuning, rate in beyond.items():
            rates[tuning] |= {rate} if rate else set()


def line(cell: Cell, seed: int, flags: dict[str, str], folder: Path) -> dict:
    """What the tables need of a run."""
    def evaluation(found: dict) -> dict:
        names = ("step", "win_rate", "true_kl", "true_kl_se", "reward", "tokens", "fact_precision", "repeats", "finished")
        return {name: round(found[name], 5) for name in names} | {
            "facts": [sum(part) for part in zip(*found["fact_counts"], strict=True)],
            "wins": "".join({1: "0", 2: "1", None: "-"}.get(p, "h") for p in found["preferences"])}

    metrics = read_lines(folder / "metrics.jsonl")
    curves = {name: [float(f"{m[name]:.4g}") for m in metrics]
              for name in ("score_mean", "score_std", "penalty", "kl_k1", "length", "entropy", "clip_fraction", "grad_norm")}
    return {"cell": cell.name, "tuning": cell.tuning, "estimator": cell.estimator, "beta": cell.beta, "seed": seed,
            "flags": flags, "evaluations": [evaluation(e) for e in read_lines(folder / "evaluations.jsonl")],
            "metrics": curves, "machine": machine()}


def known(cell: Cell, seed: int, flags: dict[str, str]) -> bool:
    """Whether there is a line; a run under another name that had the same flags gives it."""
    same = [run for run in read_lines(LINES) if run["seed"] == seed and (run["cell"] == cell.name or run["flags"] == flags)]
    if same and all(run["cell"] != cell.name for run in same):
        append_line(LINES, same[0] | {"cell": cell.name, "seconds": 0})
    return bool(same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tier", choices=("quick", "full"), default="quick")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "study", help="of runs that are not done yet")
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    if not args.report:
        study = Study(args.out.resolve(), args.jobs)
        rates = swept(study)
        print(f"best rates without a penalty: {rates}")
        study.all_of([(cell, seed, cell.flags(rates)) for cell, seed in after_the_sweep(args.tier)])
    print(f"written: {write_report(read_lines(LINES), LINES.parent)}")


if __name__ == "__main__":
    main()
