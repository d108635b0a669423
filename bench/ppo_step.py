"""Seconds and memory of one PPO step, ours and TRL's, on the same model, prompts and lengths.

    python bench/ppo_step.py --model SMOLLM2_DIR --prompts prompts.jsonl --peer-python PEER_ENV/bin/python
    python bench/ppo_step.py --model SMOLLM2_DIR --prompts prompts.jsonl --natural      # EOS on, prompts of mixed length
    python bench/ppo_step.py --model SMOLLM2_DIR --prompts prompts.jsonl --before OTHER_CHECKOUT   # this code beside an older one
    python bench/ppo_step.py --shape llama-7b --device cuda --dtypes bfloat16 --batch 256 --step-batch 128 \\
        --micro-batch 8 --prompt-length 192 --response-length 300                       # random weights, ours alone

Prompts are lines {"prompt": text}. Every measurement is a process of its own, in turn over --rounds rounds; each takes one
step to warm up and --steps timed ones, and the table holds medians over all timed steps. Ours is `train.ppo_step`, as
training runs it, with everything it does (the true KL too, which the peer doesn't measure: column "rest"). The peer is
described in bench/peer_step.py. Peak memory is that of the whole process (VmHWM; on a GPU torch's own count).

`floor` is what the arithmetic of a phase costs at the speeds that this machine reaches in the same process: operations of
its matrix products over their measured rate, plus the bytes that have to be moved, each intermediate once out and once in,
over the measured rate of copies of that size. See `floors` for the count.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "bench"))

from shapes import SHAPES  # noqa: E402

PHASES = ("generate", "score", "update")


# ------------------------------------------------------------------------------------------------------- one measurement


def random_model(shape: str, dtype, device: str):
    """A LLaMA of that shape with random weights, made on the device; 13B is the largest that one 80 GB GPU may hold."""
    import torch

    from model import Llama

    config = SHAPES[shape]()
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = Llama(config)
        torch.set_default_dtype(torch.float32)
    return model.eval()


def random_models(args, dtype):
    """Four models of random weights on one device, as train.py places them there, and prompts of random ids."""
    import torch

    from data import Prompts
    from lora import add_lora
    from model import ValueModel
    from training.models import Models
    from training.rewards import Asked, LoadedReward

    policy, backbone = (random_model(args.shape, dtype, args.device) for _ in range(2))
    add_lora(policy), add_lora(backbone)
    head = torch.randn(backbone.config.hidden_size, device=args.device)
    tokenizer = SimpleNamespace(eos_token_id=-1, stop_ids=(-1,), pad_token_id=0, decode=str)

    def score(ids, mask, n):
        return backbone.hidden(ids, mask)[:, -1].float() @ head

    models = Models(policy, ValueModel(backbone), policy, LoadedReward(score, None), Asked(tokenizer, "alpaca"), tokenizer,
                    args.device, args.device, shared=True, shared_critic=True, start={}, notes=[])
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, policy.config.vocab_size, (args.batch * 4, args.prompt_length), generator=draw).tolist()
    return models, Prompts(ids, [{"instruction": ""}] * len(ids), 0)


def stored_models(args, run):
    """The models of --model as train.py builds them, and the prompts."""
    from data import Prompts
    from formats.tokenizer import load_tokenizer
    from training.models import build_models

    tokenizer = load_tokenizer(args.model)
    models = build_models(run, tokenizer)
    texts = [json.loads(line)["prompt"] for line in Path(args.prompts).read_text(encoding="utf-8").splitlines()]
    ids = [tokenizer.encode(text) for text in texts]
    if not args.natural:
        ids = [p for p in ids if len(p) <= args.prompt_length]
        models.tokenizer = replace(tokenizer, eos_token_id=-1, other_stops=())  # no response ends before its time
    return models, Prompts(ids, [{"instruction": text} for text in texts], 0)


def measure_ours(args) -> dict:
    """Timed steps of train.ppo_step in this process."""
    import torch

    import train
    from data import PromptStream
    from ppo import PPOConfig
    from training.checkpoint import State
    from training.config import RunConfig

    config = PPOConfig(rollout_batch_size=args.batch, step_batch_size=args.step_batch, micro_batch_size=args.micro_batch,
                       rollout_micro_batch_size=args.rollout_micro_batch, response_length=args.response_length)
    run = RunConfig(policy=args.model, reward=args.reward, data="", policy_device=args.device, reference_device=args.device,
                    dtype=args.dtype, compile=args.compile, steps=args.steps + 1, ppo=config)
    models, prompts = random_models(args, getattr(torch, args.dtype)) if args.shape else stored_models(args, run)
    optimizer = torch.optim.Adam(models.trained(), lr=config.learning_rate, eps=config.adam_eps)
    state = State(optimizer, prompts, PromptStream(len(prompts.ids), 0), torch.Generator(args.device).manual_seed(0),
                  torch.Generator().manual_seed(0), config.beta)
    torch.manual_seed(0)
    steps = []
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        metrics, rollout, _ = train.ppo_step(models, state, run)
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        step = {"step": time.perf_counter() - start} | {p: metrics[f"seconds_{p}"] for p in PHASES}
        step["rest"] = step["step"] - sum(step[p] for p in PHASES)
        steps.append(step)
    peak = torch.cuda.max_memory_allocated() if args.device.startswith("cuda") else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lengths = [rollout.prompt_mask.sum(1).tolist(), rollout.mask.sum(1).tolist()]
    found = {"steps": steps[1:], "peak": peak, "tokens": [sum(lengths[0]), sum(lengths[1])],
             "floor": floors(models.policy.config, args, getattr(torch, args.dtype), *map(sum, lengths), max(lengths[1]))}
    print(json.dumps(found))
    return found


# ------------------------------------------------------------------------------------------------------------- the floor


def rate(call, amount: float, device: str) -> float:
    """Amount a second, of the fastest of several calls."""
    import torch

    times = []
    for _ in range(8):
        start = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return amount / min(times)


def floors(config, args, dtype, prompt_tokens: int, response_tokens: int, longest: int) -> dict[str, float]:
    """Seconds of each phase at this machine's speeds, for this many real tokens. Per token and layer:

    operations    2 · parameters of the layer forward, and as many for the gradient of its input (W is frozen), plus
                  attention over the mean length; the head 2 · D · V at response positions only
    bytes         what a layer writes once and reads once if all elementwise work is fused into one pass: two norms, q, k, v,
                  attention, two residual sums, gate, up and their product; the backward pass moves it twice
    """
    import torch

    D, F_, L, V = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size
    H, KV = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    size, device = dtype.itemsize, args.device
    rows, batch = args.micro_batch * (prompt_tokens + response_tokens) // args.batch, args.batch
    x, few = (torch.randn(n, D, device=device, dtype=dtype) for n in (rows, args.rollout_micro_batch))
    weights = [torch.randn(F_, D, device=device, dtype=dtype) for _ in range(min(L, 30))]  # as many as a pass meets
    head = torch.randn(V, D, device=device, dtype=dtype)
    many = torch.nn.functional.linear
    matmul = rate(lambda: [many(x, w) for w in weights], 2 * rows * D * F_ * len(weights), device)
    to_logits = rate(lambda: many(x[:rows // 2], head), 2 * (rows // 2) * D * V, device)
    read = rate(lambda: [many(few, w) for w in weights], size * D * F_ * len(weights), device)  # weights, at one token a row
    y, big = torch.empty_like(x), torch.empty(2**26, device=device, dtype=torch.uint8)
    copy = rate(lambda: y.copy_(x), 2 * x.nbytes, device)
    far = rate(lambda: big[2**25:].copy_(big[:2**25]), 2**26, device)  # logits fit no cache

    body = L * (2 * D * H + 2 * D * KV + 3 * D * F_)  # parameters of the layers' matrices
    tokens, context = prompt_tokens + response_tokens, (prompt_tokens + response_tokens) / batch
    ops = 2 * body + 2 * L * H * context  # of a token: causal attention sees half of the context, twice
    moved = 2 * size * L * (7 * D + H + 2 * KV + 3 * F_)
    forward = tokens * (ops / matmul + moved / copy)
    logits = response_tokens * (2 * D * V / to_logits + 2 * V * size / far)
    cache = response_tokens * (size * L * 2 * KV * context * 0.75) / far  # what is there already, on average
    decode = longest * -(-batch // args.rollout_micro_batch) * size * (body + D * V) / read
    prefill = prompt_tokens * (ops / matmul + moved / copy)
    passes = 3 if size == 4 else 4  # in float32 the sampler's log-probabilities stand for the policy's pass
    found = {"generate": prefill + decode + cache, "score": passes * forward + (passes - 2) * logits,
             "update": 2 * (2 * (2 * ops / matmul + 3 * moved / copy) * tokens + 2.5 * logits)}
    return found | {"matmul": matmul, "copy": copy, "far": far, "read": read}


# ------------------------------------------------------------------------------------------------------------ side by side


def one(command: list[str], name: str) -> dict:
    """The last line that a measuring process prints, as JSON; whatever went wrong ends the comparison with its last words."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"ppo_step.py: {name}: {done.stderr.strip()[-800:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def in_turn(args) -> dict[str, list[dict]]:
    """Everything measured, by side ("float32" and "bfloat16" are ours)."""
    def flags(*names: str) -> list[str]:
        return [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names if getattr(args, name)]

    both = flags("batch", "step_batch", "prompt_length", "response_length", "steps", "device", "prompts", "model")
    both += ["--natural"] if args.natural else []
    measured = ["--measure", *both, *flags("rollout_micro_batch", "shape", "reward")]
    sides = {}
    for dtype, micro in zip(args.dtypes, args.micro_batch, strict=True):
        its = [*measured, f"--dtype={dtype}", f"--micro-batch={micro}"]
        for name, root in {dtype: ROOT, f"before, {dtype}": args.before}.items():
            if root:
                sides[name] = [sys.executable, str(root.resolve() / "bench" / "ppo_step.py"), *its]
        if args.compile:
            sides[f"{dtype}, compiled"] = [*sides[dtype], "--compile"]
    if args.peer_python:
        sides[f"TRL, {args.peer_dtype}"] = [args.peer_python, str(ROOT / "bench" / "peer_step.py"), *both,
                                            f"--dtype={args.peer_dtype}", f"--micro-batch={args.peer_micro_batch}"]
    found: dict[str, list[dict]] = {side: [] for side in sides}
    for k in range(args.rounds):
        for side, command in list(sides.items())[::-1 if k % 2 else 1]:
            found[side].append(one(command, side))
            seconds = statistics.median(step["step"] for step in found[side][-1]["steps"])
            print(f"round {k + 1} of {args.rounds}, {side}: {seconds:.1f} s a step, {found[side][-1]['peak'] / 2**30:.1f} GiB",
                  flush=True)
    return found


def median(runs: list[dict], key: str) -> float:
    return statistics.median(step[key] for run in runs for step in run["steps"])


def title(side: str) -> str:
    """A side's name in the tables."""
    return side if side.startswith(("before", "TRL")) else f"ours, {side}"


def table(found: dict[str, list[dict]]) -> str:
    """Markdown: a row a side, with phases, peaks, floors and the ratio to the peer."""
    trl = next((runs for side, runs in found.items() if side.startswith("TRL")), None)
    lines = ["| | step, s | generate | score | update | rest | peak, GiB | tokens a second | step / other's | peak / other's |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for side, runs in found.items():
        peer = trl or found.get(f"before, {side}")
        step, peak = median(runs, "step"), statistics.median(run["peak"] for run in runs)
        speed = statistics.median(run["tokens"][1] for run in runs) / median(runs, "generate")
        ratios = ["", ""]
        if peer and not side.startswith(("before", "TRL")):
            ratios = [f"1 / {median(peer, 'step') / step:.2f}", f"1 / {statistics.median(r['peak'] for r in peer) / peak:.2f}"]
        name = title(side)
        lines.append(f"| {name} | {step:.1f} | " + " | ".join(f"{median(runs, p):.1f}" for p in (*PHASES, "rest"))
                     + f" | {peak / 2**30:.2f} | {speed:.0f} | " + " | ".join(ratios) + " |")
    lines += ["", "| over the floor | generate | score | update | sum | matmul, GFLOP/s | copy, GB/s | far copy | weights read |",
              "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for side, runs in found.items():
        if side.startswith("TRL"):
            continue
        floor = {key: statistics.median(run["floor"][key] for run in runs) for key in runs[0]["floor"]}
        cells = [f"{median(runs, p):.1f} / {floor[p]:.1f} = {median(runs, p) / floor[p]:.2f}" for p in PHASES]
        whole = sum(median(runs, p) for p in PHASES) / sum(floor[p] for p in PHASES)
        lines.append(f"| {title(side)} | " + " | ".join(cells) + f" | {whole:.2f} | {floor['matmul'] / 1e9:.0f} | "
                     f"{floor['copy'] / 1e9:.0f} | {floor['far'] / 1e9:.0f} | {floor['read'] / 1e9:.0f} |")
    return "\n".join(lines)


def write_reward(model: str, folder: Path) -> None:
    """A reward model on the policy's weights, with a random head: time doesn't depend on what it says."""
    import shutil

    import torch

    from formats.tokenizer import TOKENIZER_FILES
    from model import Llama
    from reward import RewardModel

    torch.manual_seed(0)
    RewardModel(Llama.from_pretrained(model)).save_pretrained(folder)
    for file in Path(model).iterdir():
        if file.name in TOKENIZER_FILES:
            shutil.copy(file, folder)


def command_line() -> str:
    """The command that was given, without the folders of this machine."""
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    return " ".join(["python", "bench/" + Path(sys.argv[0]).name, *words])


def machine() -> str:
    """Processor, torch, commit and date: what a results file says of where its figures are from."""
    import torch

    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
                 platform.processor()) if sys.platform == "linux" else platform.processor()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return (f"{os.cpu_count()} cores of {model}{gpu}, torch {torch.__version__}; commit {commit or 'unknown'}, "
            f"{datetime.date.today().isoformat()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="", help="Hugging Face folder")
    parser.add_argument("--shape", default="", choices=("", *SHAPES), help="random weights of this shape instead of --model")
    parser.add_argument("--prompts", default="", help='JSON lines with a field "prompt"')
    parser.add_argument("--peer-python", default="", help="python of an environment with TRL; without it ours alone")
    parser.add_argument("--peer-dtype", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument("--peer-micro-batch", type=int, default=0, help="default: a whole minibatch at once")
    parser.add_argument("--before", type=Path, default=None, help="another checkout of this project, to be measured in turn")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=32, help="responses a PPO step")
    parser.add_argument("--step-batch", type=int, default=16, help="responses an optimiser step")
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[8], help="responses at once, for all dtypes or for each")
    parser.add_argument("--rollout-micro-batch", type=int, default=32)
    parser.add_argument("--prompt-length", type=int, default=48)
    parser.add_argument("--response-length", type=int, default=64)
    parser.add_argument("--natural", action="store_true", help="responses end at EOS, and prompts of any length are taken")
    parser.add_argument("--compile", action="store_true", help="ours with train.py's --compile too")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--out", type=Path, default=None, help="file to write the tables to")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    parser.add_argument("--reward", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile and args.shape:
        parser.error("--compile: needs --model; the random weights of --shape stay plain")
    if len(args.micro_batch) == 1:
        args.micro_batch *= len(args.dtypes)
    if args.measure:
        args.micro_batch = args.micro_batch[0]
        measure_ours(args)
        return
    if not args.shape and not (args.model and args.prompts):
        parser.error("name --model and --prompts, or a --shape with random weights")
    with tempfile.TemporaryDirectory() as folder:
        if not args.shape:
            write_reward(args.model, Path(folder))
            args.reward = folder
        found = in_turn(args)
    lengths = "natural lengths" if args.natural else f"{args.prompt_length} + {args.response_length} tokens"
    text = (f"`{command_line()}`\n\n{machine()}; {args.shape or Path(args.model).name}, batch {args.batch}, {lengths}; "
            f"medians of {args.rounds} processes of {args.steps} steps each.\n\n{table(found)}\n")
    print("\n" + text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
