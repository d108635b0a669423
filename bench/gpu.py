"""First contact with a GPU: everything that this project wants to know of one, in ten minutes (docs/gpu.md).

    python bench/gpu.py --minutes 9                        # writes bench/results/gpu.json as it goes, and gpu.md from it
    python bench/gpu.py --parts step sampling              # some of it
    python bench/gpu.py --rehearse                         # all of it on a CPU, at toy sizes
    python bench/gpu.py --report                           # gpu.md alone, from the file that is there

Parts run in this order, each a process of its own that is ended when its time is up; what it had found by then stays:

    tests      the tests marked `gpu`: logits, gradients, sampling, resuming, placement, beside the CPU's
    step       a PPO step of LLaMA-7B shapes in the paper's setting: seconds by phase, memory beside --plan, share of the peak
    compiled   the same with --compile
    sampling   tokens a second of the same shapes, ours and transformers' generate on the same weights
    profile    of one decode step and one update micro-batch: kernels, launches, the ten that take longest
    small      a step of SmolLM2's and of TinyLlama's shapes, for whoever has a card of 24 GB
    miniature  python train.py as it stands, whole
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "bench"))

from gpu_report import in_words  # noqa: E402
from ppo_step import PHASES, floors, machine, random_model, random_models  # noqa: E402

LIMITS = {"tests": 150, "step": 150, "compiled": 200, "sampling": 170, "profile": 60, "small": 60, "miniature": 150}  # seconds
STARTING = 5  # seconds that a part needs to begin with: less is not tried
MARK = "RESULT "
TOY = dict(batch=8, step_batch=4, micro_batch=2, rollout_micro_batch=4, prompt_length=8, response_length=6)
# Section 2.2: 256 rollouts of 192 + 300 tokens, 128 an optimiser step, two epochs.
PAPER = dict(batch=256, step_batch=128, micro_batch=8, rollout_micro_batch=64, prompt_length=192, response_length=300)


# --------------------------------------------------------------------------------------------------------------- parts

Found = Iterator[tuple[str, dict]]  # (name of a figure, its values), as they come


def tests(args: SimpleNamespace) -> Found:
    """pytest -m gpu, in a process that this one waits for."""
    only = ["-k", "logits"] if args.rehearse else []
    words = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--show-capture=no", "tests/test_gpu.py", *only]
    run = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    lines = (run.stdout + run.stderr).strip().splitlines()
    yield "tests", {"summary": lines[-1], "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
                    "log": lines[-300:] if run.returncode else []}


def step(args: SimpleNamespace) -> Found:
    """The paper's setting."""
    yield "step", timed_step(args, args.shape, **(TOY if args.rehearse else PAPER))


def compiled(args: SimpleNamespace) -> Found:
    """The same with layers that torch.compile has fused; in a rehearsal it traces and makes no code."""
    backend = "aot_eager" if args.rehearse else "inductor"
    yield "compiled", timed_step(args, args.shape, backend, **(TOY if args.rehearse else PAPER))


def small(args: SimpleNamespace) -> Found:
    """What one consumer card is bought for."""
    if args.rehearse:
        yield args.shape, timed_step(args, args.shape, **TOY)
        return
    short = dict(batch=32, step_batch=16, micro_batch=8, rollout_micro_batch=64, prompt_length=48, response_length=64)
    paper = dict(batch=64, step_batch=32, micro_batch=8, rollout_micro_batch=64, prompt_length=192, response_length=300)
    yield "smollm2-135m", timed_step(args, "smollm2-135m", **short)
    yield "tinyllama-1b", timed_step(args, "tinyllama-1b", **paper)


def timed_step(args: SimpleNamespace, shape: str, backend: str | None = None, **sizes: int) -> dict:
    """One small step to warm up and one of that size, as train.py takes it; backend: of torch.compile."""
    import torch

    from training.devices import compile_layers
    from training.memory import plan

    how = SimpleNamespace(shape=shape, device=args.device, **sizes)
    dtype = torch.bfloat16
    models, prompts = random_models(how, dtype)
    if backend:
        compile_layers(models.policy, backend), compile_layers(models.value.backbone, backend)
    few = min(sizes["step_batch"], 2 * sizes["micro_batch"])
    _, first = take_step(models, prompts, SimpleNamespace(**vars(how) | {"batch": few, "step_batch": few}), args.device)
    reset_peak(args.device)
    run, found = take_step(models, prompts, how, args.device, steps_before=1)
    policy = models.policy.config
    found["plan_gib"] = sum(plan(run, policy, policy)[run.policy_device].values()) / 2**30
    found |= {"shape": shape, "dtype": "bfloat16", "first_seconds": first["seconds"]} | sizes
    del models
    floor = floors(policy, how, dtype, sizes["batch"] * sizes["prompt_length"], sizes["batch"] * sizes["response_length"],
                   sizes["response_length"])
    return found | {"floor": floor}


def take_step(models, prompts, how: SimpleNamespace, device: str, steps_before: int = 0) -> tuple:
    """(the run's configuration, seconds by phase, peak memory, tokens) of one PPO step."""
    import torch

    import train
    from data import PromptStream
    from ppo import PPOConfig
    from training.checkpoint import State
    from training.config import RunConfig

    config = PPOConfig(rollout_batch_size=how.batch, step_batch_size=how.step_batch, micro_batch_size=how.micro_batch,
                       rollout_micro_batch_size=how.rollout_micro_batch, response_length=how.response_length)
    run = RunConfig(policy="", reward="", data="", policy_device=device, reference_device=device, dtype="bfloat16", steps=1,
                    query_length=how.prompt_length, ppo=config)
    state = State(torch.optim.Adam(models.trained(), lr=1e-6, eps=config.adam_eps), prompts, PromptStream(len(prompts.ids), 0),
                  torch.Generator(device).manual_seed(0), torch.Generator().manual_seed(0), config.beta)
    state.step = steps_before  # the first of all checks that policy and reference are equal
    start = time.perf_counter()
    metrics, rollout, _ = train.ppo_step(models, state, run)
    synchronize(device)
    seconds = time.perf_counter() - start
    phases = {phase: metrics[f"seconds_{phase}"] for phase in PHASES}
    tokens = int(rollout.mask.sum())
    return run, {"seconds": seconds, "phases": phases | {"rest": seconds - sum(phases.values())},
                 "peak_gib": peak(device) / 2**30, "sampled_per_second": tokens / phases["generate"]}


def sampling(args: SimpleNamespace) -> Found:
    """Ours with adapters as in a rollout; transformers on the same weights without: its own cache, then static and compiled."""
    import torch

    from lora import add_lora, lora_layers
    from model import generate
    from training import decode
    from training.models import folded

    rows, prompt, response = (3, 8, 6) if args.rehearse else (64, 192, 128)
    model = random_model(args.shape, torch.bfloat16, args.device)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (rows, prompt), generator=draw).to(args.device)
    size = {"rows": rows, "prompt": prompt, "response": response}
    theirs = transformers_model(model)
    add_lora(model)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=1e-3)

    def choice() -> decode.Choice:
        return decode.Choice(torch.rand(response, rows, device=args.device), eos_token_id=[], pad_token_id=0)

    def ours() -> torch.Tensor:
        with folded(model):
            return decode.sample(model, ids, torch.ones_like(ids), choice())

    def plain() -> torch.Tensor:
        with folded(model):
            return generate(model, ids, None, response, **vars(choice()))

    def with_transformers(cache: str | None) -> torch.Tensor:
        from transformers import GenerationConfig

        how = GenerationConfig(max_new_tokens=response, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0,
                               cache_implementation=cache)
        with torch.no_grad():
            return theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)[:, prompt:]

    yield "ours", size | speed(ours, args.device)
    yield "ours, the plain twin (model.generate)", size | speed(plain, args.device)
    yield "transformers", size | speed(lambda: with_transformers(None), args.device)
    if not args.rehearse:  # its compiler takes a minute
        yield "transformers, static cache, compiled", size | speed(lambda: with_transformers("static"), args.device)


def transformers_model(model):
    """The same LLaMA in transformers, on the very same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    config = LlamaConfig(**{name: getattr(model.config, name) for name in names})
    with torch.device("meta"):
        theirs = LlamaForCausalLM(config)
    theirs.load_state_dict(model.state_dict(), assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to(model.lm_head.weight.device)  # no weight: it isn't loaded
    theirs.generation_config.eos_token_id = None
    return theirs.eval()


def speed(sample: Callable, device: str, repeats: int = 2) -> dict:
    """Tokens a second of the best of some repeats, after one to warm up; how long that took."""
    seconds, warming = [], None
    for _ in range(repeats + 1):
        start = time.perf_counter()
        shape = sample().shape
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    warming, *seconds = seconds
    return {"tokens_per_second": shape.numel() / min(seconds), "ms_per_token": 1000 * min(seconds) / shape[1],
            "first_seconds": warming, "seconds": seconds}


def profile(args: SimpleNamespace) -> Found:
    """Kernels of one decode step in the middle of the paper's lengths, and of forward and backward of one update micro-batch."""
    import torch

    import ppo
    from lora import add_lora
    from model import KVCache
    from training import decode
    from training.models import folded

    rows, prompt, response, micro = (3, 8, 6, 2) if args.rehearse else (64, 192, 300, 8)
    policy = add_lora(random_model(args.shape, torch.bfloat16, args.device)).eval()
    config, device = policy.config, args.device
    ids = torch.ones(rows, prompt + response // 2, dtype=torch.long, device=device)
    draws = torch.rand(64, rows, device=device)

    def plain(cache: KVCache) -> None:
        cache.length = ids.shape[1] - 1
        policy.lm_head(policy.hidden(ids[:, -1:], torch.ones_like(ids), cache)[:, -1])

    with folded(policy), torch.no_grad():
        cache = KVCache(config, rows, prompt + response, torch.bfloat16, device)
        yield "decode step, model.generate's", {"layers": config.num_hidden_layers} | kernels(lambda: plain(cache), device)
        state = decode.Rows(policy, ids, torch.ones_like(ids), decode.Choice(draws, [], 0))
        width = -(-ids.shape[1] // decode.COLUMNS) * decode.COLUMNS
        step = partial(state.step, width)
        yield "decode step, one by one", {"layers": config.num_hidden_layers} | kernels(step, device)
        if decode.replays(torch.device(device)):
            replay = decode.record(step, ids.device).replay
            yield "decode step, replayed", {"layers": config.num_hidden_layers} | kernels(replay, device)

    ids = torch.ones(micro, prompt, dtype=torch.long, device=device)
    answers = torch.ones(micro, response, dtype=torch.long, device=device)
    text = ppo.pack(ids, torch.ones_like(ids), answers, torch.ones_like(answers).bool())

    def update() -> None:
        logprobs, _ = ppo.response_logprobs(lambda ids, mask, keep: policy(ids, mask, keep), text, 1.0)
        logprobs.mean().backward()

    policy.train()
    yield "update micro-batch", {"layers": config.num_hidden_layers} | kernels(update, device)


def kernels(call: Callable, device: str) -> dict:
    """How many kernels (on a CPU: operations) one call starts, what they take, and the ten that take most."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    gpu = device.startswith("cuda")
    for _ in range(3):
        call()
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    wall = time.perf_counter() - start
    with profiler(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
        call()
        synchronize(device)

    def took(event) -> float:  # microseconds
        return event.self_device_time_total if gpu else event.self_cpu_time_total

    events = sorted((e for e in seen.key_averages() if took(e) > 0 and not e.key.startswith("cuda")), key=took, reverse=True)
    return {"launches": sum(e.count for e in events), "kernels_ms": sum(map(took, events)) / 1000, "wall_ms": 1000 * wall,
            "heaviest": [{"name": e.key[:90], "count": e.count, "ms": took(e) / 1000} for e in events[:10]]}


def miniature(args: SimpleNamespace) -> Found:
    """The README's first command."""
    with tempfile.TemporaryDirectory() as folder:
        out, few = Path(folder) / "run", []
        if args.rehearse:
            for name in ("evaluation", "about"):
                tasks = json.loads((ROOT / "tiny" / "data" / f"{name}.json").read_text(encoding="utf-8"))[:16]
                (Path(folder) / f"{name}.json").write_text(json.dumps(tasks), encoding="utf-8")
            few = ["--evaluation", str(Path(folder) / "evaluation.json"), "--steps", "1", "--rollout-batch-size", "8",
                   "--step-batch-size", "8", "--micro-batch-size", "8", "--response-length", "8"]
        start = time.perf_counter()
        words = ["train.py", "--estimator", "bregman", "--policy-device", args.device, "--reference-device", args.device, *few]
        run = subprocess.run([sys.executable, *words, "--out", str(out)], cwd=ROOT, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if run.returncode:
            raise RuntimeError("train.py: " + (run.stdout + run.stderr)[-2000:])
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        ends = [json.loads(line) for line in (out / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()]
    phases = {phase: sum(m[f"seconds_{phase}"] for m in lines) for phase in PHASES}
    names = ("win_rate", "win_rate_se", "reward", "reward_se", "true_kl", "tokens", "fact_precision")
    yield "miniature", {"seconds": seconds, "steps": len(lines), "phases": phases | {"rest": seconds - sum(phases.values())},
                        "before": {name: ends[0][name] for name in names}, "after": {name: ends[-1][name] for name in names},
                        "self_check": [line for line in (run.stdout + run.stderr).splitlines() if "self-check" in line][:1]}


PARTS = {part.__name__: part for part in (tests, step, compiled, sampling, profile, small, miniature)}


def synchronize(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def reset_peak(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> float:
    import torch

    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0.0


# --------------------------------------------------------------------------------------------- one part after the other


def run_all(args: argparse.Namespace) -> None:
    """Each part in turn as long as there is time; the file is written anew after each figure. Parts that aren't run keep what the
    file holds of them."""
    end = time.monotonic() + 60 * args.minutes
    found, machine = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}, about(args)
    for name in args.parts:
        limit = min(LIMITS[name], end - time.monotonic())
        if limit < STARTING:
            print(f"{name}: no time is left", flush=True)
            continue
        print(f"{name}: up to {limit:.0f} s", flush=True)
        begun = time.monotonic()
        found[name] = part = {"machine": machine}
        for line in lines_of(args, name, limit):
            if line.startswith(MARK):
                part |= json.loads(line.removeprefix(MARK))
                write(found, args.out)
        part["part_seconds"] = round(time.monotonic() - begun, 1)
        write(found, args.out)
        print(f"{name}: {part['part_seconds']} s", flush=True)
    print(f"written to {args.out} and {args.out.with_suffix('.md')}")


def lines_of(args: argparse.Namespace, name: str, limit: float) -> Iterator[str]:
    """What the part prints, until it ends or its time is up: then it goes, with all that it started."""
    words = [sys.executable, __file__, "--part", name, "--device", args.device, *(["--rehearse"] if args.rehearse else [])]
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(
            words, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True) as part:
        def stop(*_: object) -> None:
            os.killpg(part.pid, signal.SIGKILL)
            late.append(True)

        late: list[bool] = []
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, limit)
        yield from part.stdout
        code = part.wait()
        signal.setitimer(signal.ITIMER_REAL, 0)
        if code:
            errors.seek(0)
            last = ["its time was up"] if late else errors.read().splitlines()[-25:]
            yield MARK + json.dumps({"ended": last})


def about(args: argparse.Namespace) -> dict:
    """Which card, driver and versions."""
    import torch
    import transformers

    where, commit = machine().split("; commit ")
    found = {"device": args.device, "machine": where, "commit": args.commit or commit.split(",")[0],
             "date": datetime.date.today().isoformat(), "transformers": transformers.__version__, "rehearsal": args.rehearse}
    if args.device.startswith("cuda"):
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        found["cuda"] = torch.version.cuda
    return found


def write(found: dict, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    part.replace(file)
    file.with_suffix(".md").write_text(in_words(found), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default=None, help="default: cuda:0, with --rehearse cpu")
    parser.add_argument("--rehearse", action="store_true", help="at toy sizes, on a CPU")
    parser.add_argument("--commit", default="", help="where this checkout has no .git")
    parser.add_argument("--out", type=Path, default=None, help="default: bench/results/gpu.json; of a rehearsal: runs/gpu.json")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.device = args.device or ("cpu" if args.rehearse else "cuda:0")
    args.shape = "toy" if args.rehearse else "llama-7b"
    args.out = args.out or ROOT / ("runs" if args.rehearse else "bench/results") / "gpu.json"
    if args.part:
        for name, values in PARTS[args.part](args):
            print(MARK + json.dumps({name: values}), flush=True)
        return
    if args.report:
        write(json.loads(args.out.read_text(encoding="utf-8")), args.out)
        return
    run_all(args)


if __name__ == "__main__":
    main()
