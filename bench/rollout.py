"""Sampled tokens per second, ours and `generate` of transformers, on the same model, prompts and lengths.

    python bench/rollout.py --model SMOLLM2_DIR --prompts prompts.jsonl
    python bench/rollout.py --model SMOLLM2_DIR --prompts prompts.jsonl --device cuda --batch 256

Every measurement is a process of its own, the sides in turn over --rounds rounds; each samples exactly --response-length
tokens a row (no EOS) once to warm up and --repeats timed times. Ours carries adapters that are not zero, as in a rollout:
folded into float32 weights, rounded beside bf16 ones; transformers samples from the bare model, as from one with its
adapters merged. The tables hold medians.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from ppo_step import command_line, machine, one  # noqa: E402


def padded_prompts(args):
    """(ids, mask) of --batch prompts, left-padded to --prompt-length."""
    import torch

    from data import left_pad
    from formats.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.model)
    texts = [json.loads(line)["prompt"] for line in Path(args.prompts).read_text(encoding="utf-8").splitlines()]
    ids = [p for p in map(tokenizer.encode, texts) if len(p) <= args.prompt_length]
    ids, mask = left_pad([ids[i % len(ids)] for i in range(args.batch)], 0)
    short = args.prompt_length - ids.shape[1]
    return tuple(torch.nn.functional.pad(x, (short, 0)).to(args.device) for x in (ids, mask))


def ours(args, dtype):
    """A function that samples once."""
    import torch

    from lora import add_lora, lora_layers
    from model import Llama, generate
    from training.models import folded

    model = add_lora(Llama.from_pretrained(args.model, dtype=dtype, device=args.device)).eval()
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=1e-3)
    ids, mask = padded_prompts(args)
    draw = torch.Generator(args.device).manual_seed(0)

    def sample():
        with folded(model):
            return generate(model, ids, mask, args.response_length, eos_token_id=[], pad_token_id=0, generator=draw)

    return sample


def theirs(args, dtype):
    """The same with transformers."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
    model.generation_config.eos_token_id = None
    settings = GenerationConfig(max_new_tokens=args.response_length, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                pad_token_id=0)
    ids, mask = padded_prompts(args)

    def sample():
        with torch.no_grad():
            return model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, ids.shape[1]:]

    return sample


def measure(args) -> None:
    import resource

    import torch

    torch.manual_seed(0)
    side, dtype = args.measure.split("-")
    sample = {"ours": ours, "transformers": theirs}[side](args, getattr(torch, dtype))
    seconds = []
    for _ in range(args.repeats + 1):
        start = time.perf_counter()
        shape = tuple(sample().shape)
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        assert shape == (args.batch, args.response_length), shape
    print(json.dumps({"seconds": seconds[1:], "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--prompts", required=True, help='JSON lines with a field "prompt"')
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt-length", type=int, default=48)
    parser.add_argument("--response-length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="file to write the table to")
    parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args)
        return
    sides = [f"{side}-{dtype}" for dtype in args.dtypes for side in ("ours", "transformers")]
    if "transformers-float32" not in sides:
        sides.append("transformers-float32")
    found: dict[str, list[float]] = {side: [] for side in sides}
    for k in range(args.rounds):
        for side in sides[::-1 if k % 2 else 1]:
            result = one([sys.executable, __file__, *sys.argv[1:], f"--measure={side}"], side)
            found[side] += result["seconds"]
            print(f"round {k + 1} of {args.rounds}, {side}: {min(result['seconds']):.2f} s, {result['peak'] / 2**30:.2f} GiB",
                  flush=True)
    speed = {side: args.batch * args.response_length / statistics.median(seconds) for side, seconds in found.items()}
    lines = ["| | tokens a second | over transformers, float32 | over transformers, same dtype |", "| --- | --- | --- | --- |"]
    for side in sides:
        name, dtype = side.split("-")
        lines.append(f"| {name}, {dtype} | {speed[side]:.0f} | {speed[side] / speed['transformers-float32']:.2f} | "
                     f"{speed[side] / speed[f'transformers-{dtype}']:.2f} |")
    text = (f"`{command_line()}`\n\n{machine()}; {Path(args.model).name}, batch "
            f"{args.batch}, {args.prompt_length} + {args.response_length} tokens; medians of {args.rounds} processes of "
            f"{args.repeats} each.\n\n" + "\n".join(lines) + "\n")
    print("\n" + text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
