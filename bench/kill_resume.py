"""Kills a run with SIGKILL at random moments, resumes it, and compares it bit for bit with a run that was never stopped.

    python bench/kill_resume.py                    # 30 kills, a third of them while a checkpoint is being written
    python bench/kill_resume.py --kills 5 --seed 1
    python bench/kill_resume.py --program sft.py   # stage 1; reward.py: stage 2

Every trial is a fresh run of the miniature world, killed once or twice and resumed until it is through. Compared are the
metrics (without the seconds), samples and evaluations line by line, and every tensor of every checkpoint: adapters, value head,
optimiser, random states. Of stages 1 and 2, which leave no checkpoints: every byte of the folder but the measured speed. Whenever
one is killed, a folder with config.json must hold a model that loads. Exit code 1 when anything differs.
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
PPO = ["--policy", TINY / "sft", "--reward", TINY / "reward", "--data", TINY / "data" / "ppo.json", "--prompt-template", "tiny",
         "--steps", 6, "--save-every", 1, "--rollout-batch-size", 32, "--step-batch-size", 16, "--micro-batch-size", 16,
         "--rollout-micro-batch-size", 32, "--response-length", 24, "--temperature", 0.7, "--learning-rate", 5e-4,
         "--eval-every", 3]
STAGES = ["--prompt-template", "tiny", "--epochs", 3, "--batch-size", 8, "--learning-rate", 1e-3, "--save-every", 3,
          "--device", "cpu"]


def write_data(program: str, folder: Path) -> list:
    """A small set of data in the folder; returns the flags of a run on it."""
    tasks = json.loads((TINY / "data" / "evaluation.json").read_text(encoding="utf-8"))[:64]
    data = folder / "data.json"
    if program == "train.py":
        data.write_text(json.dumps(tasks[:32]), encoding="utf-8")
        shutil.copy(TINY / "data" / "about.json", folder)
        return [*PPO, "--evaluation", data]
    pairs = [{"output_1": task["output"], "output_2": other["output"], "preference": 1 + i % 2}
             for i, (task, other) in enumerate(zip(tasks, tasks[1:] + tasks[:1], strict=True))]
    data.write_text(json.dumps([task | pair for task, pair in zip(tasks, pairs, strict=True)]), encoding="utf-8")
    base = {"sft.py": ["--model", TINY / "sft", "--validation", 0.1], "reward.py": ["--base", TINY / "sft", "--held-out", 0.1]}
    return [*base[program], "--data", data, *STAGES]


def start(program: str, out: Path, flags: list) -> subprocess.Popen:
    """A new run, or the one that is there."""
    begun = (out / ("config.json" if program == "train.py" else "training.json")).is_file()
    command = [sys.executable, ROOT / program, "--out", out, *(["--resume"] if begun else flags)]
    log = open(out.with_suffix(".log"), "a", encoding="utf-8")
    return subprocess.Popen([str(part) for part in command], stdout=log, stderr=log)


def contents(program: str, out: Path) -> dict:
    """Everything a run computed, in a form that == compares."""
    found: dict = {}
    if program != "train.py":
        found = {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}
        record = json.loads(found["training.json"])
        rows = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in record["history"]]
        return found | {"training.json": record | {"history": rows}}
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
        if now >= after and (not writing or any(out.glob(".*.part"))):
            run.send_signal(signal.SIGKILL)
            run.wait()
            return f"{now:.2f} s" + (" (while writing)" if writing else "")
        time.sleep(0.0005 if writing else 0.005)
    return ""


def half_a_model(program: str, out: Path) -> bool:
    """Whether a killed stage left a folder that looks like a model and is none."""
    if program == "train.py" or not (out / "config.json").exists():
        return False
    sys.path.insert(0, str(ROOT))
    from model import Llama
    from reward import RewardModel

    try:
        (Llama if program == "sft.py" else RewardModel).from_pretrained(out)
    except (ValueError, OSError):
        return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--program", choices=("train.py", "sft.py", "reward.py"), default="train.py")
    args = parser.parse_args()
    rng, folder, program = random.Random(args.seed), Path(tempfile.mkdtemp(prefix="kill-resume-")), args.program
    flags = write_data(program, folder)

    print("a run that nobody stops ...", flush=True)
    begun = time.monotonic()
    whole = folder / "whole"
    if start(program, whole, flags).wait():
        sys.exit(f"it failed: {whole.with_suffix('.log').read_text()[-2000:]}")
    length, expected = time.monotonic() - begun, contents(program, whole)
    print(f"took {length:.1f} s", flush=True)

    kills = writes = different = trial = 0
    while kills < args.kills:
        out, moments, trial = folder / f"trial{trial}", [], trial + 1
        run = start(program, out, flags)
        half = False
        for _ in range(rng.choice([1, 1, 2])):
            writing = rng.random() < 1 / 3
            moment = kill(run, out, writing, rng.uniform(0, length * (0.7 if writing else 1)))
            if not moment:
                break
            moments.append(moment)
            writes += writing
            half |= half_a_model(program, out)
            run = start(program, out, flags)
        code = run.wait()
        same = code == 0 and not half and contents(program, out) == expected
        kills += len(moments)
        different += not same
        verdict = "the same" if same else f"DIFFERENT (exit code {code}{', half a model' * half})"
        print(f"killed after {', '.join(moments) or '- (too late)'}: {verdict}  "
              f"[{kills} of {args.kills}]", flush=True)
        if same:
            shutil.rmtree(out)
            os.unlink(out.with_suffix(".log"))
    print(f"{kills} kills in {trial} runs, {writes} while something was being written; {different} runs differ from the one that "
          "was never stopped")
    if not different:
        shutil.rmtree(folder)
    else:
        print(f"look at {folder}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
