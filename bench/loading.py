"""How fast a model loads and how much memory that takes, beside transformers, for every layout that checkpoints come in.

    python bench/loading.py --model SMOLLM2_DIR --gguf smollm2.gguf     # a folder in any layout, and its GGUF file
    python bench/loading.py --preset tinyllama-1b --layers 4            # random weights of that shape

Each measurement is a process of its own, ours and transformers' AutoModelForCausalLM in turn, the other one first in every
second of `--rounds` rounds; the table holds medians and goes to bench/results/loading.md. Every layout is written anew to
a temporary folder in float32, which is deleted afterwards, and is read once before each measurement, so that all of them
find it in the page cache; twice the model's size of memory is filled and freed just before, as a virtual machine may take
long over memory that it hasn't touched for a while. What is timed is the loader, not the disk or the machine.

    start         seconds from the first line of the process, before torch is imported, to the loaded model
    load          seconds of the call to from_pretrained alone
    first token   seconds of the first forward pass, of one token: who maps a file reads it only here
    load peak     MB of resident memory that the call took at its highest (VmHWM), beyond what was resident before it
                  (VmRSS); pages of mapped files count as long as they are mapped, buffers of the page cache don't
    token peak    the same, up to the end of the first forward pass
    bound         the model's parameters plus its largest tensor, plus 10%: what ours promises for the load peak

Linux only: the figures are those of /proc/self/status.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MB = 10**6
META_NAMES = {"q_proj": "attention.wq", "k_proj": "attention.wk", "v_proj": "attention.wv", "o_proj": "attention.wo",
              "gate_proj": "feed_forward.w1", "up_proj": "feed_forward.w3", "down_proj": "feed_forward.w2",
              "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}


# ------------------------------------------------------------------------------------------------------- one measurement


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the highest so far) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def measure(loader: str, path: str, dtype: str) -> dict[str, float]:
    """Load in this process, which must not have imported torch yet."""
    start = time.perf_counter()
    import torch

    if loader == "ours":
        from model import Llama

        load = Llama.from_pretrained
    else:
        from transformers import AutoModelForCausalLM

        load = AutoModelForCausalLM.from_pretrained  # the name is looked up, and most of transformers imported, here
    settings = {"dtype": getattr(torch, dtype)}
    if loader == "transformers" and path.endswith(".gguf"):
        path, _, settings["gguf_file"] = path.rpartition("/")
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget how high the imports went
    called = time.perf_counter()
    model = load(path, **settings)
    loaded, peak = time.perf_counter(), resident("VmHWM") - before
    with torch.no_grad():
        model(torch.tensor([[1]]))
    token, token_peak = time.perf_counter(), resident("VmHWM") - before
    sizes = [parameter.nbytes for parameter in model.parameters()]  # a tied one is counted once
    return {"start": loaded - start, "load": loaded - called, "first token": token - loaded, "load peak": peak / MB,
            "token peak": token_peak / MB, "model": sum(sizes) / MB, "bound": 1.1 * (sum(sizes) + max(sizes)) / MB}


def in_turn(path: Path, size: int, dtype: str, loaders: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Medians over rounds of every figure, by loader, of a model of `size` bytes."""
    found: dict[str, list[dict[str, float]]] = {loader: [] for loader in loaders}
    for k in range(rounds):
        for loader in loaders[:: -1 if k % 2 else 1]:
            for file in [path] if path.is_file() else path.iterdir():
                with open(file, "rb") as opened:
                    while opened.read(2**24):
                        pass
            subprocess.run([sys.executable, "-c", f"b'x' * {2 * size}"], check=True)
            command = [sys.executable, __file__, "--measure", loader, str(path), dtype]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"loading.py: {loader} on {path.name}: {done.stderr.strip()[-500:]}")
            found[loader].append(json.loads(done.stdout.splitlines()[-1]))
    return {loader: {key: statistics.median(one[key] for one in many) for key in many[0]}
            for loader, many in found.items()}


# ---------------------------------------------------------------------------------------------------------- the layouts


def write_safetensors(model, folder: Path, shards: int = 1) -> None:
    from formats.write import ShardWriter, write_json

    tensors = dict(model.named_parameters())
    writer = ShardWriter(folder, limit=sum(tensor.nbytes for tensor in tensors.values()) // shards + 1)
    for name, tensor in tensors.items():
        writer.add(name, tensor.detach())
    writer.close()
    write_json(folder / "config.json", model.config.to_dict() | {"torch_dtype": "float32"})


def write_bins(model, folder: Path, shards: int = 3) -> None:
    """pytorch_model-0000k-of-0000n.bin and their index."""
    import torch

    from formats.write import write_json

    tensors, weight_map = {name: tensor.detach() for name, tensor in model.named_parameters()}, {}
    for k in range(shards):
        part, file = dict(list(tensors.items())[k::shards]), f"pytorch_model-{k + 1:05d}-of-{shards:05d}.bin"
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", model.config.to_dict() | {"torch_dtype": "float32"})


def write_meta(model, folder: Path, files: int) -> None:
    """params.json and consolidated.0k.pth, which always hold the output layer, tied or not. Rows of queries and keys stay
    in Hugging Face's order: the model is another one, which takes the same time."""
    import torch

    config, whole = model.config, {"output.weight": (model.lm_head.weight.detach(), 0)}
    for name, tensor in model.named_parameters():
        parts = name.split(".")
        if parts[1] == "layers":
            part = parts[-2]
            cut = None if tensor.dim() == 1 else 1 if part in ("o_proj", "down_proj") else 0
            whole[f"layers.{parts[2]}.{META_NAMES[part]}.weight"] = (tensor.detach(), cut)
        elif parts[1] in ("embed_tokens", "norm"):
            whole["tok_embeddings.weight" if tensor.dim() == 2 else "norm.weight"] = (tensor.detach(), tensor.dim() - 1 or None)
    for k in range(files):
        torch.save({name: (tensor if cut is None else tensor.chunk(files, dim=cut)[k]).clone()
                    for name, (tensor, cut) in whole.items()}, folder / f"consolidated.{k:02d}.pth")
    params = {"dim": config.hidden_size, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads,
              "n_kv_heads": config.num_key_value_heads, "norm_eps": config.rms_norm_eps, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(params), encoding="utf-8")


# (what the table calls it, how it is written, dtype of the loaded model, whether transformers reads it)
LAYOUTS = [
    ("safetensors", write_safetensors, "float32", True),
    ("safetensors, to bfloat16", write_safetensors, "bfloat16", True),
    ("safetensors, 3 shards", lambda model, folder: write_safetensors(model, folder, 3), "float32", True),
    (".bin, 3 shards", write_bins, "float32", True),
    ("Meta, 1 file", lambda model, folder: write_meta(model, folder, 1), "float32", False),
    ("Meta, 2 files", lambda model, folder: write_meta(model, folder, 2), "float32", False),
]


def source(args: argparse.Namespace):
    """The model to write: --model in float32, or random weights of --preset's shape."""
    import torch

    from model import Llama
    from shapes import SHAPES

    if args.model:
        return Llama.from_pretrained(args.model, dtype=torch.float32)
    shape = {"num_hidden_layers": args.layers} if args.layers else {}
    return Llama(SHAPES[args.preset](**shape))


# ----------------------------------------------------------------------------------------------------------- the program


def row(layout: str, loader: str, figures: dict[str, float]) -> str:
    """One line of the table; the bound is a promise of ours only."""
    holds = figures["load peak"] <= figures["bound"]
    bound = f"{figures['bound']:.0f} | {'yes' if holds else '**no**'}" if loader == "ours" else "| "
    return (f"| {layout} | {loader} | {figures['start']:.2f} | {figures['load']:.2f} | {figures['first token']:.2f} | "
            f"{figures['model']:.0f} | {figures['load peak']:.0f} | {figures['token peak']:.0f} | {bound} |")


def report(args: argparse.Namespace, rows: list[str]) -> str:
    """The page: command, machine, table, what the columns mean. Folders are named by their last part only."""
    import torch
    import transformers
    from ppo_step import command_line, machine

    columns = __doc__.partition("    start ")[2].partition("\n\nLinux")[0]
    return "\n".join([
        "# Loading a model", "", f"    {command_line()}", "",
        f"{machine()}; {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)} for torch, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}. "
        f"Medians of {args.rounds} rounds, a process each, all files in the page cache. Seconds and MB (10^6 bytes).", "",
        "| layout | loader | start | load | first token | model | load peak | token peak | bound | holds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |", *rows, "",
        "```", f"    start {columns}", "```", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, help="folder or .gguf file whose weights are used")
    parser.add_argument("--preset", default="smollm2-135m", help="else random weights of this shape (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="of the preset (default: all)")
    parser.add_argument("--gguf", type=Path, help="a .gguf file to load as well, as it is")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "loading.md")
    args = parser.parse_args()
    model, rows = source(args), []
    size = sum(parameter.nbytes for parameter in model.parameters())
    if args.model and args.model.suffix == ".gguf":
        args.gguf = args.gguf or args.model
    both = ["ours", "transformers"]
    for layout, write, dtype, theirs in LAYOUTS:
        with tempfile.TemporaryDirectory(prefix="loading-") as folder:
            write(model, Path(folder))
            os.sync()  # or its pages would be on their way to the disk while they are read
            figures = in_turn(Path(folder), size, dtype, both if theirs else both[:1], args.rounds)
        rows += [row(layout, loader, figures[loader]) for loader in figures]
        print("\n".join(rows[-len(figures):]), flush=True)
    if args.gguf:
        figures = in_turn(args.gguf.resolve(), size, "float32", both, args.rounds)
        rows += [row(f"GGUF, {args.gguf.name}", loader, figures[loader]) for loader in both]
    text = report(args, rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(text + f"\nwritten to {args.out}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*sys.argv[2:])))
    else:
        main()
