"""Kills a run with SIGKILL at random moments, resumes it, and compares it bit for bit with a run that was never stopped.

    python bench/kill_resume.py                    # 30 kills, a third of them while a checkpoint is being written
    python bench/kill_resume.py --kills 5 --seed 1

Every trial is a fresh run of the miniature world, killed once or twice and resumed until it is through. Compared are the
metrics (without the seconds), samples and evaluations line by line, and every tensor of every checkpoint: adapters, value head,
optimiser, random states. Exit code 1 when any of them differs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny"
FLAGS = ["--policy", TINY / "sft", "--reward", TINY / "reward", "--data", TINY / "data" / "ppo.json", "--prompt-template", "tiny",
         "--steps", 6, "--save-every", 1, "--rollout-batch-size", 32, "--step-batch-size", 16, "--micro-batch-size", 16,
         "--rollout-micro-batch-size", 32, "--response-length", 24, "--temperature", 0.7, "--learning-rate", 5e-4,
         "--eval-every", 3]


def start(out: Path, evaluation: Path, resume: bool) -> subprocess.Popen:
    flags = ["--resume"] if resume else [*FLAGS, "--evaluation", evaluation]
    command = [sys.executable, ROOT / "train.py", "--out", out, *flags]
    log = open(out.with_suffix(".log"), "a", encoding="utf-8")
    return subprocess.Popen([str(part) for part in command], stdout=log, stderr=log)


def contents(out: Path) -> dict:
    """Everything a run computed, in a form that == compares."""
    found: dict = {}
    for name in ("metrics", "samples", "evaluations"):
        lines = [json.loads(line) for line in (out / f"{name}.jsonl").read_text(encoding="utf-8").split("\n") if line]
        found[name] = [{k: v for k, v in line.items() if not k.startswith("seconds_")} for line in lines]
    for file in sorted(out.glob("step-*/*/*.safetensors")):
        found[str(file.relative_to(out))] = {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}
    for file in sorted(out.glob("step-*/trainer/state.pt")):
        found[str(file.relative_to(out))] = plain(torch.load(file, weights_only=True))
    return found


def plain(x):
    if isinstance(x, torch.Tensor):
        return x.numpy().tobytes()
    return {k: plain(v) for k, v in x.items()} if isinstance(x, dict) else [plain(v) for v in x] if isinstance(x, list) else x


def kill(run: subprocess.Popen, out: Path, writing: bool, after: float) -> str:
    """Waits for the moment, kills, and says when it was; "" when the run was through before."""
    begun = time.monotonic()
    while run.poll() is None:
        now = time.monotonic() - begun
        if now >= after and (not writing or any(out.glob(".step-*.part"))):
            run.send_signal(signal.SIGKILL)
            run.wait()
            return f"{now:.2f} s" + (" (writing a checkpoint)" if writing else "")
        time.sleep(0.0005 if writing else 0.005)
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, folder = random.Random(args.seed), Path(tempfile.mkdtemp(prefix="kill-resume-"))
    evaluation = folder / "evaluation.json"
    tasks = json.loads((TINY / "data" / "evaluation.json").read_text(encoding="utf-8"))[:32]
    evaluation.write_text(json.dumps(tasks), encoding="utf-8")
    shutil.copy(TINY / "data" / "about.json", folder)

    print("a run that nobody stops ...", flush=True)
    begun = time.monotonic()
    whole = folder / "whole"
    if start(whole, evaluation, resume=False).wait():
        sys.exit(f"it failed: {whole.with_suffix('.log').read_text()[-2000:]}")
    length, expected = time.monotonic() - begun, contents(whole)
    print(f"took {length:.1f} s", flush=True)

    kills = different = trial = 0
    while kills < args.kills:
        out, moments, trial = folder / f"trial{trial}", [], trial + 1
        run = start(out, evaluation, resume=False)
        for _ in range(rng.choice([1, 1, 2])):
            writing = rng.random() < 1 / 3
            moment = kill(run, out, writing, rng.uniform(0, length * (0.7 if writing else 1)))
            if not moment:
                break
            moments.append(moment)
            run = start(out, evaluation, resume=(out / "config.json").is_file())
        code = run.wait()
        same = code == 0 and contents(out) == expected
        kills += len(moments)
        different += not same
        print(f"killed after {', '.join(moments) or '- (too late)'}: {'the same' if same else f'DIFFERENT (exit code {code})'}  "
              f"[{kills} of {args.kills}]", flush=True)
        if same:
            shutil.rmtree(out)
            os.unlink(out.with_suffix(".log"))
    print(f"{kills} kills in {trial} runs, {different} runs differ from the one that was never stopped")
    if not different:
        shutil.rmtree(folder)
    else:
        print(f"look at {folder}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
