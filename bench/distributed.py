"""One run by 1, 2 and 4 processes over gloo: equal figures, other numbers of processes at a resume, kills, signals, restarts.

    python bench/distributed.py                    # all of it, about a quarter of an hour on two cores
    python bench/distributed.py --only kill restart

Every run is a small one of the miniature world under torchrun. "The same" means: samples and answers equal, every metric within
1e-3 of its size (or of 0.001, where it is less), weights within 1e-4. Exit code 1 where one is not.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kill_resume import write_data  # noqa: E402
from training.folder import checkpoints, damage, newest_whole  # noqa: E402

TINY = ROOT / "tiny"
FLAGS = {"policy": TINY / "sft", "reward": TINY / "reward", "data": TINY / "data" / "ppo.json", "prompt-template": "tiny",
         "steps": 6, "save-every": 1, "rollout-batch-size": 32, "step-batch-size": 16, "micro-batch-size": 4,
         "rollout-micro-batch-size": 8, "response-length": 24, "temperature": 0.7, "learning-rate": 5e-4}


class Bench:
    """The runs of one call, in one folder, each compared with the first."""

    def __init__(self, folder: Path):
        self.folder, self.wrong = folder, 0
        self.evaluation = folder / "evaluation.json"
        tasks = json.loads((TINY / "data" / "evaluation.json").read_text(encoding="utf-8"))[:64]
        self.evaluation.write_text(json.dumps(tasks), encoding="utf-8")
        shutil.copy(TINY / "data" / "about.json", folder)
        self.reference: Path | None = None

    def start(self, name: str, processes: int, *torchrun: str, resume: bool = False, **changes) -> subprocess.Popen:
        """train.py by so many processes (1: without torchrun), what it says in <name>.log."""
        given = ({"resume": True} if resume else FLAGS | {"evaluation": self.evaluation}) | changes
        flags = [str(word) for flag, value in ({"out": self.folder / name} | given).items()
                 for word in ([f"--{flag}"] if value is True else [f"--{flag}", value])]
        how = ["-m", "torch.distributed.run", *(torchrun or ["--standalone"]), "--nproc-per-node", str(processes)]
        if processes == 1 and not torchrun:
            how = []
        log = open(self.folder / f"{name}.log", "a", encoding="utf-8")
        return subprocess.Popen([sys.executable, *how, str(ROOT / "train.py"), *flags], stdout=log, stderr=log,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})

    def by_one(self) -> Path:
        """The run of one process."""
        if not self.reference:
            self.reference = self.folder / "one"
            if self.start("one", 1).wait():
                sys.exit(f"it failed: {(self.folder / 'one.log').read_text()[-2000:]}")
        return self.reference

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(encoding="utf-8")

    def say(self, what: str, found: str, right: bool = True) -> None:
        self.wrong += not right
        print(f"| {what} | {found}{'' if right else ' **WRONG**'} |", flush=True)

    def compare(self, what: str, name: str, before: str = "") -> None:
        found, right = self.difference(self.folder / name)
        self.say(what, before + found, right)

    def difference(self, out: Path) -> tuple[str, bool]:
        """(how far a run is from that of one process, in words, whether that counts as the same)."""
        one = self.by_one()
        first, second = ([[json.loads(line) for line in open(folder / f"{name}.jsonl", encoding="utf-8")]
                          for name in ("metrics", "samples", "evaluations")] for folder in (one, out))
        if len(first[0]) != len(second[0]):
            return f"only {len(second[0])} steps", False
        texts = first[1] == second[1] and [e["responses"] for e in first[2]] == [e["responses"] for e in second[2]]
        gaps = [abs(a[k] - b[k]) / max(abs(a[k]), 1e-3) for a, b in zip(first[0], second[0], strict=True) for k in a
                if not k.startswith("seconds_")]
        last = f"step-{FLAGS['steps']:04d}"
        weights = 0.0
        for file in (one / last).glob("*/*.safetensors"):
            a, b = load_file(file), load_file(out / file.relative_to(one))
            weights = max([weights, *((a[k] - b[k]).abs().max().item() for k in a)])
        right = texts and max(gaps) <= 1e-3 and weights <= 1e-4
        words = f"answers {'identical' if texts else 'DIFFER'}, metrics within {max(gaps):.1e}, weights within {weights:.1e}"
        return words, right


def workers(run: subprocess.Popen) -> dict[int, int]:
    """{rank: pid} of those that torchrun started."""
    found = {}
    for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split():
        try:
            names = dict(pair.partition("=")[::2] for pair in Path(f"/proc/{pid}/environ").read_text().split("\0"))
        except OSError:
            continue
        if "RANK" in names:
            found[int(names["RANK"])] = int(pid)
    return found


def wait_for_step(run: subprocess.Popen, out: Path, step: int) -> None:
    while run.poll() is None and not (out / f"step-{step:04d}").is_dir():
        time.sleep(0.005)


def alive(pids: dict[int, int]) -> list[int]:
    def lives(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    return [rank for rank, pid in pids.items() if lives(pid)]


# --------------------------------------------------------------------------------------------------------------- scenes


def same(bench: Bench) -> None:
    """2 and 4 processes."""
    for n in (2, 4):
        bench.start(f"by-{n}", n).wait()
        bench.compare(f"{n} processes", f"by-{n}")


def speed(bench: Bench) -> None:
    """Seconds of a step of the miniature world's own size (128 responses of up to 80 tokens), one thread a process; each way once
    in every round, the last two of whose three steps count."""
    ways = {"1 process": (1, {}), "2 processes": (2, {}), "2, --shard whole": (2, {"shard": "whole"}),
            "2, --shard in-step": (2, {"shard": "in-step"})}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(3):
        for k, way in enumerate(list(ways) if turn % 2 == 0 else list(ways)[::-1]):
            name, (n, changes) = f"speed-{turn}-{k}", ways[way]
            size = {"rollout-batch-size": 128, "step-batch-size": 64, "micro-batch-size": 16, "rollout-micro-batch-size": 64,
                    "response-length": 80, "steps": 3, "save-every": 3}
            bench.start(name, n, **size, **changes, evaluation=bench.evaluation).wait()
            lines = [json.loads(line) for line in open(bench.folder / name / "metrics.jsonl", encoding="utf-8")]
            seconds[way] += [sum(v for k, v in m.items() if k.startswith("seconds_")) for m in lines[1:]]
    one = median(seconds["1 process"])
    for way, found in seconds.items():
        bench.say(f"a step by {way}", f"{median(found):.2f} s ({min(found):.2f} to {max(found):.2f}), "
                  f"{median(found) / one:.2f} of one process's")


def shard(bench: Bench) -> None:
    """--shard, sampled whole and in step."""
    for n in (2, 4):
        for how in ("whole", "in-step"):
            name = f"shard-{how}-{n}"
            bench.start(name, n, shard=how).wait()
            bench.compare(f"{n} processes, --shard {how}", name)


def shard_resume(bench: Bench) -> None:
    """Sharded by two, and resumed by others, sharded or not."""
    for ended, changes in ((1, {}), (4, {"shard": "whole"})):
        name = f"shard-2-to-{ended}"
        bench.start(name, 2, shard="in-step").wait()
        for step in checkpoints(bench.folder / name)[2:]:
            shutil.rmtree(step)
        bench.start(name, ended, resume=True, **changes).wait()
        bench.compare(f"sharded by 2, resumed at step 2 by {ended}" + (", --shard whole" if changes else ""), name)


def shard_failures(bench: Bench) -> None:
    """SIGKILL and SIGTERM to one of two sharded processes, and torchrun's restart."""
    name, out = "shard-kill", bench.folder / "shard-kill"
    run = bench.start(name, 2, shard="in-step")
    wait_for_step(run, out, 2)
    pids, begun = workers(run), time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    while alive(pids) and time.monotonic() - begun < 60:
        time.sleep(0.02)
    over = time.monotonic() - begun
    code, whole = run.wait(), [damage(step) is None for step in checkpoints(out)]
    said = sum(line.startswith("train.py: ") for line in bench.log(name).splitlines())
    bench.say("--shard, SIGKILL to rank 1 of 2", f"the other ended after {over:.1f} s, with {said} message; {len(whole)} "
              f"checkpoints, {sum(whole)} of them whole", code == 1 and all(whole) and over < 60 and said == 1)
    bench.start(name, 2, resume=True).wait()
    bench.compare("... and resumed", name)
    run = bench.start("shard-restart", 2, "--standalone", "--max-restarts", "1", shard="whole")
    wait_for_step(run, bench.folder / "shard-restart", 2)
    os.kill(workers(run)[0], signal.SIGKILL)
    code, resumed = run.wait(), bench.log("shard-restart").count("resumed from")
    found, right = bench.difference(bench.folder / "shard-restart")
    bench.say("--shard, SIGKILL to rank 0 of 2 under --max-restarts 1",
              f"exit code {code}, resumed by itself {resumed} time; {found}", right and code == 0 and resumed == 1)


def loading(bench: Bench) -> None:
    """By rows on three processes, in memory: each may take a third of the model and its largest tensor."""
    import torch

    from bench.loading import LAYOUTS
    from model import Llama, LlamaConfig

    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab_size=16000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8,
                              num_attention_heads=16))
    size, largest = (f(p.nbytes for p in model.parameters()) for f in (sum, max))
    for layout, write, dtype, _ in LAYOUTS:
        if dtype != "float32":
            continue
        folder = bench.folder / layout.replace(" ", "-").replace(".", "")
        folder.mkdir()
        write(model, folder)
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", __file__,
                               "--load", str(folder)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        peaks = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak ")]
        bound = size / 3 + largest
        bench.say(f"3 processes load {layout} ({size / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB)",
                  f"at most {', '.join(f'{peak / 1e6:.0f}' for peak in peaks)} MB more of their own; a third and the largest "
                  f"tensor: {bound / 1e6:.0f} MB", len(peaks) == 3 and max(peaks) <= 1.1 * bound)
        shutil.rmtree(folder)


def load_by_rows(folder: Path) -> None:
    """In each of loading's three processes: prints what it took of memory of its own, without mapped pages of files, whose number
    is the kernel's choice."""
    import threading

    import torch

    from bench.loading import resident
    from model import Llama
    from training import launch
    from training.shard import Shards, machine_mesh

    with launch.joined():
        part = Shards(machine_mesh("cpu"), whole=False).rows(torch.float32, "cpu")
        seen, loaded = [resident("RssAnon")], threading.Event()

        def look() -> None:
            while not loaded.wait(0.002):
                seen.append(resident("RssAnon"))

        looking = threading.Thread(target=look)
        looking.start()
        model = Llama.from_pretrained(folder, part=part)
        loaded.set()
        looking.join()
        print(f"peak {max(*seen, resident('RssAnon')) - seen[0]}", flush=True)
        del model


def resume(bench: Bench) -> None:
    """On another number of processes than it was begun on."""
    for begun, ended in ((1, 4), (4, 1), (4, 2)):
        name = f"from-{begun}-to-{ended}"
        bench.start(name, begun).wait()
        for step in checkpoints(bench.folder / name)[2:]:
            shutil.rmtree(step)
        bench.start(name, ended, resume=True).wait()
        bench.compare(f"begun by {begun}, resumed at step 2 by {ended}", name)


def kill(bench: Bench) -> None:
    """SIGKILL to one rank: the others end by themselves, and the run can be resumed."""
    for rank in (0, 1):
        name = f"kill-{rank}"
        out = bench.folder / name
        run = bench.start(name, 2)
        wait_for_step(run, out, 2)
        pids = workers(run)
        begun = time.monotonic()
        os.kill(pids[rank], signal.SIGKILL)
        while alive(pids) and time.monotonic() - begun < 60:
            time.sleep(0.02)
        over = time.monotonic() - begun
        code, whole = run.wait(), [damage(step) is None for step in checkpoints(out)]
        bench.say(f"SIGKILL to rank {rank} of 2", f"the other ended after {over:.1f} s, torchrun with code {code}; "
                  f"{len(whole)} checkpoints, {sum(whole)} of them whole", code == 1 and all(whole) and over < 60)
        bench.start(name, 2, resume=True).wait()
        bench.compare("... and resumed", name)


def stop(bench: Bench) -> None:
    """Signals that ask to stop."""
    def to_rank(run: subprocess.Popen) -> None:
        os.kill(workers(run)[1], signal.SIGTERM)

    def to_torchrun(run: subprocess.Popen) -> None:
        run.send_signal(signal.SIGINT)

    for what, name, send in (("SIGTERM to rank 1 of 2", "term", to_rank), ("SIGINT to torchrun", "int", to_torchrun)):
        out = bench.folder / name
        run = bench.start(name, 2)
        wait_for_step(run, out, 2)
        send(run)
        run.wait()
        said = [line for line in bench.log(name).splitlines() if line.startswith("stopped by")]
        newest = newest_whole(out)
        steps = sum(1 for _ in open(out / "metrics.jsonl", encoding="utf-8"))
        right = len(said) == 1 and newest.name == f"step-{steps:04d}"
        bench.say(what, f"“{said[0].partition(';')[0] if said else 'nothing said'}”, {newest.name} saved", right)
        bench.start(name, 2, resume=True).wait()
        bench.compare("... and resumed", name)


def restart(bench: Bench) -> None:
    """torchrun --max-restarts: the run goes on by itself."""
    for trial, rank in enumerate((0, 1, 0, 1)):
        name = f"restart-{trial}"
        run = bench.start(name, 2, "--standalone", "--max-restarts", "1")
        wait_for_step(run, bench.folder / name, 2)
        os.kill(workers(run)[rank], signal.SIGKILL)
        code, log = run.wait(), bench.log(name)
        found, right = bench.difference(bench.folder / name)
        resumed = log.count("resumed from")
        bench.say(f"SIGKILL to rank {rank} of 2 under --max-restarts 1",
                  f"exit code {code}, resumed by itself {resumed} time; {found}", right and code == 0 and resumed == 1)


def nodes(bench: Bench) -> None:
    """Two nodes, both this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    how = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id"]
    for name, changes in (("nodes", {}), ("nodes-shard", {"shard": "in-step"})):  # each shares weights among its own two
        runs = [bench.start(name, 2, *how, name, "--local-addr", "localhost", **changes) for _ in range(2)]
        codes = [run.wait() for run in runs]
        bench.compare("two torchruns of 2 processes, as on two nodes" + ", --shard in-step" * bool(changes), name,
                      f"exit codes {codes}; ")


def lost_node(bench: Bench) -> None:
    """One of two nodes is gone, and the other goes on by itself."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    how = ["--nnodes", "1:2", "--max-restarts", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}",
           "--rdzv-id", "bench", "--local-addr", "localhost"]
    first = bench.start("lost-node", 1, *how)
    time.sleep(2)  # it is then the one that keeps the rendezvous
    second = bench.start("lost-node", 1, *how)
    wait_for_step(first, bench.folder / "lost-node", 2)
    for pid in [*workers(second).values(), second.pid]:
        os.kill(pid, signal.SIGKILL)
    begun, code = time.monotonic(), (first.wait(), second.wait())[0]
    found, right = bench.difference(bench.folder / "lost-node")
    resumed = bench.log("lost-node").count("resumed from")
    bench.say("--nnodes 1:2 --max-restarts 1, one of two nodes killed", f"exit code {code}, resumed by itself {resumed} time and "
              f"through {time.monotonic() - begun:.0f} s later; {found}", right and code == 0 and resumed == 1)


def run_program(folder: Path, name: str, processes: int, program: str, *argv: object, torchrun: tuple = ()) -> subprocess.Popen:
    """Any program by so many processes, what it says in folder/<name>.log."""
    how = ["-m", "torch.distributed.run", "--standalone", *torchrun, "--nproc-per-node", processes] if processes > 1 else []
    log = open(folder / f"{name}.log", "a", encoding="utf-8")
    return subprocess.Popen([str(word) for word in (sys.executable, *how, ROOT / program, *argv)], stdout=log, stderr=log,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def gaps_between(a: object, b: object) -> list[float]:
    """Of two results, each number's difference over its size (or over 0.001); infinity where anything else differs."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [gap for key in a for gap in gaps_between(a[key], b[key])]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [gap for x, y in zip(a, b, strict=True) for gap in gaps_between(x, y)]
    if isinstance(a, float) and isinstance(b, float):
        return [abs(a - b) / max(abs(a), 1e-3)]
    return [0.0 if a == b else float("inf")]


def compare_stage(bench: Bench, what: str, one: Path, other: Path, before: str = "") -> None:
    """Two folders of sft.py or reward.py."""
    if not (other / "config.json").is_file():
        bench.say(what, f"{before}no model", False)
        return
    first, second = (json.loads((out / "training.json").read_text(encoding="utf-8")) for out in (one, other))
    for row in first["history"] + second["history"]:
        row.pop("tokens_per_second", None)
    gap, weights = max(gaps_between(first, second)), 0.0
    for file in one.rglob("*.safetensors"):
        a, b = load_file(file), load_file(other / file.relative_to(one))
        weights = max([weights, *((a[k] - b[k]).abs().max().item() for k in a)])
    found = f"figures of its epochs within {gap:.1e}, weights within {weights:.1e}"
    bench.say(what, before + found, gap <= 1e-3 and weights <= 1e-4)


def stages(bench: Bench) -> None:
    """sft.py, reward.py and evaluate.py by 1, 2 and 4 processes; a kill of one under --max-restarts, and a resume by one."""
    for program in ("sft.py", "reward.py"):
        folder = bench.folder / program.removesuffix(".py")
        folder.mkdir()
        flags = [*write_data(program, folder), "--micro-batch-size", 2, "--save-every", 1]  # 8 of 58: the last batch has two
        for n in (1, 2, 4):
            run_program(folder, f"by-{n}", n, program, *flags, "--out", folder / f"by-{n}").wait()
            if n > 1:
                compare_stage(bench, f"{program}, {n} processes", folder / "by-1", folder / f"by-{n}")
        run = run_program(folder, "killed", 2, program, *flags, "--out", folder / "killed", torchrun=("--max-restarts", "1"))
        wait_for_step(run, folder / "killed", 5)
        os.kill(workers(run)[1], signal.SIGKILL)
        code, log = run.wait(), (folder / "killed.log").read_text(encoding="utf-8")
        compare_stage(bench, f"{program}, SIGKILL to rank 1 of 2 under --max-restarts 1", folder / "by-1", folder / "killed",
                      f"exit code {code}, resumed by itself {log.count('resumed from')} time; ")
        run = run_program(folder, "term", 4, program, *flags, "--out", folder / "term")
        wait_for_step(run, folder / "term", 5)
        os.kill(workers(run)[3], signal.SIGTERM)
        run.wait()
        said = [line for line in (folder / "term.log").read_text(encoding="utf-8").splitlines() if line.startswith("stopped by")]
        run_program(folder, "term", 1, program, "--resume", "--out", folder / "term").wait()
        compare_stage(bench, f"{program}, SIGTERM to rank 3 of 4, resumed by one", folder / "by-1", folder / "term",
                      f"“{said[0].partition(';')[0] if said else 'nothing said'}”; ")
    found = {}
    for n in (1, 2, 4):
        out = Path(shutil.copytree(bench.by_one(), bench.folder / f"evaluated-by-{n}"))
        run_program(bench.folder, out.name, n, "evaluate.py", out, "--kl-tokens", 4000).wait()
        found[n] = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
        if n > 1:
            gap = max(gaps_between(found[1], found[n]))
            bench.say(f"evaluate.py, {n} processes", f"answers and judgements identical, figures within {gap:.1e}", gap <= 1e-3)


SCENES = {scene.__name__: scene for scene in (same, speed, shard, resume, shard_resume, loading, kill, stop, restart,
                                              shard_failures, nodes, lost_node, stages)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=SCENES, default=list(SCENES))
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # what `loading` starts three of
    args = parser.parse_args()
    if args.load:
        load_by_rows(args.load)
        return 0
    bench = Bench(Path(tempfile.mkdtemp(prefix="distributed-")))
    print(f"{ROOT.name}: {' '.join(sys.argv)}; {os.cpu_count()} cores\n\n| what | found |\n| --- | --- |", flush=True)
    for name in args.only:
        SCENES[name](bench)
    if bench.wrong:
        print(f"\n{bench.wrong} are wrong: look at {bench.folder}")
        return 1
    shutil.rmtree(bench.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
