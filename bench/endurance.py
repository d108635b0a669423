"""Watches a long run of a very small model from outside: memory, open files and seconds a step must not grow.

    python bench/endurance.py                 # 1,000 steps of 8 responses of the miniature world, about 5 minutes

Resident memory and open files are read from /proc after each step; the slopes are least squares over the second half, when
caches are warm, with the standard error of the slope. Exit code 1 when memory grows by more than 2 KiB a step, files grow, or
a step takes more than 10 % longer at the end than in the middle.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny"
FLAGS = ["--policy", TINY / "sft", "--reward", TINY / "reward", "--data", TINY / "data" / "ppo.json", "--prompt-template", "tiny",
         "--rollout-batch-size", 8, "--step-batch-size", 8, "--micro-batch-size", 8, "--rollout-micro-batch-size", 8,
         "--response-length", 16, "--temperature", 0.7, "--learning-rate", 1e-5, "--save-every", 50, "--keep", 2]


def slope(values: list[float]) -> tuple[float, float]:
    """(least-squares slope per step, its standard error)."""
    n = len(values)
    centre, mean = (n - 1) / 2, statistics.fmean(values)
    spread = sum((i - centre) ** 2 for i in range(n))
    found = sum((i - centre) * (v - mean) for i, v in enumerate(values)) / spread
    residual = sum((v - mean - found * (i - centre)) ** 2 for i, v in enumerate(values))
    return found, (residual / (n - 2) / spread) ** 0.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, ROOT / "train.py", *FLAGS, "--steps", args.steps, "--lr-steps", args.steps, "--out", out]
        run = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process, metrics = Path(f"/proc/{run.pid}"), out / "metrics.jsonl"
        memory: list[float] = []
        files: list[float] = []
        seen = 0
        while run.poll() is None:
            lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            if lines > seen:
                try:
                    resident = next(line for line in (process / "status").read_text().splitlines() if line.startswith("VmRSS"))
                    memory.append(int(resident.split()[1]))
                    files.append(len(list((process / "fd").iterdir())))
                except (OSError, StopIteration):
                    break
                seen = lines
                if seen % 100 == 0:
                    print(f"step {seen}: {memory[-1] / 1024:.0f} MiB, {files[-1]} files", flush=True)
            time.sleep(0.02)
        if run.wait():
            sys.exit("the run failed")
        steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    seconds = [sum(v for k, v in m.items() if k.startswith("seconds_")) for m in steps]
    late = memory[len(memory) // 2:]
    (grows, error), (opens, _) = slope(late), slope(files[len(files) // 2:])
    middle, end = (statistics.median(seconds[int(len(seconds) * a):int(len(seconds) * b)]) for a, b in ((0.4, 0.6), (0.8, 1.0)))
    print(f"{len(steps)} steps: memory {memory[0] / 1024:.0f} MiB at first, {memory[len(memory) // 2] / 1024:.0f} in the middle, "
          f"{memory[-1] / 1024:.0f} at the end; slope over the second half {grows:+.2f} ± {error:.2f} KiB a step")
    print(f"open files {files[0]:.0f} at first, {files[-1]:.0f} at the end (slope {opens:+.4f})")
    print(f"a step takes {middle:.3f} s in the middle, {end:.3f} s at the end (medians)")
    return int(grows > 2 or files[-1] > files[len(files) // 2] + 2 or end > 1.1 * middle)


if __name__ == "__main__":
    sys.exit(main())
