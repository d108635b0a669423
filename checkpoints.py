"""Models that aren't Hugging Face folders, and how to make folders of them: GGUF, Meta's layout, the hub, AlpacaFarm.

    python model.py convert --model smollm2.gguf --out smollm2
    python model.py recover --base llama-7b --diff alpaca-farm-sft10k-wdiff --out sft10k

model.py calls `open_other` for what it doesn't know, so every `--policy` takes these too. The paper (section 2.1) starts
from AlpacaFarm's SFT-10k and reward model, which are published as differences to LLaMA-7B's weights: `recover` adds them
up and checks the sum of all weights. Departs from AlpacaFarm's own script: a tensor whose shape doesn't fit is an error,
not skipped, and no more than a shard is in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model import (LlamaConfig, Stored, bin_tensors, first_line, load_tensors, match_names, open_checkpoint, parse_json,
                   read_tensor, rope_frequencies, stored_tensors, with_bar, write_atomically)

# For each part of a layer, Meta's name, llama.cpp's, and the dimension that Meta cuts when it shards (None: it doesn't).
LAYER_NAMES = {
    "self_attn.q_proj": ("attention.wq", "attn_q", 0),
    "self_attn.k_proj": ("attention.wk", "attn_k", 0),
    "self_attn.v_proj": ("attention.wv", "attn_v", 0),
    "self_attn.o_proj": ("attention.wo", "attn_output", 1),
    "mlp.gate_proj": ("feed_forward.w1", "ffn_gate", 0),
    "mlp.up_proj": ("feed_forward.w3", "ffn_up", 0),
    "mlp.down_proj": ("feed_forward.w2", "ffn_down", 1),
    "input_layernorm": ("attention_norm", "attn_norm", None),
    "post_attention_layernorm": ("ffn_norm", "ffn_norm", None),
}
# What none of Meta's files says; Llama 3 is known by the size of its vocabulary. A text ends with end_of_text, a turn of
# its chat models with eot, a call of a tool with eom.
LLAMA_3 = {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "max_position_embeddings": 8192}


# ------------------------------------------------------------------------------------------------------------ finding


def open_other(path: str | os.PathLike) -> tuple[LlamaConfig, dict[str, Stored]]:
    """model.open_checkpoint for a .gguf file (or a folder with just one), Meta's layout, or a name on the hub.

    Raises FileNotFoundError or ValueError with one line that says what the path is instead.
    """
    path = local_copy(path)
    if (path / "config.json").is_file():
        return open_checkpoint(path)
    if (path / "params.json").is_file():
        return open_meta(path)
    if (path / "adapter_config.json").is_file():
        raise ValueError(f"{path}: an adapter, not a model; name its base model and the adapter apart (train.py: --policy "
                         "BASE --adapter DIR), or merge them: python lora.py merge")
    if gguf_file(path):
        return open_gguf(gguf_file(path))
    if path.is_file():
        raise ValueError(f"{path}: not a model; give its folder, or a .gguf file")
    if several := sorted(file.name for file in path.glob("*.gguf")):
        raise ValueError(f"{path}: holds {len(several)} .gguf files, name one of them: {', '.join(several)}")
    raise FileNotFoundError(f"{path / 'config.json'}: not found; a model is a folder with config.json and "
                            "model.safetensors, a folder of Meta's with params.json, a .gguf file, or org/name on the hub")


def local_copy(path: str | os.PathLike) -> Path:
    """The path itself, or for `org/name` (`org/name@revision`) that isn't a local one, the hub's files in its cache.

    Raises FileNotFoundError with one line where the hub can't be reached or has no such model.
    """
    if Path(path).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", str(path)):
        return Path(path)
    from huggingface_hub import HfApi, snapshot_download

    name, _, revision = str(path).partition("@")
    fetch = partial(snapshot_download, name, revision=revision or None, allow_patterns=[
        "*.json", "*.safetensors", "*.bin", "*.pth", "*.model", "*.jinja", "*.txt"])
    others = ["*.bin", "*.pth", "*/*"]
    try:
        # Not list_repo_files: without a network it retries for half a minute and prints a line each time.
        files = HfApi().model_info(name, revision=revision or None, timeout=10).siblings or []
        # Many repositories hold their weights twice: safetensors is the one worth the traffic.
        twice = any(file.rfilename.endswith(".safetensors") for file in files)
        return Path(fetch(ignore_patterns=others if twice else ["*/*"]))
    except Exception as error:  # its own kinds, httpx's and the operating system's
        with contextlib.suppress(Exception):  # what an earlier run fetched serves without a network
            return Path(fetch(ignore_patterns=others, local_files_only=True))
        raise FileNotFoundError(f"{path}: no such folder here, and the hub gave no such model "
                                f"({type(error).__name__}: {first_line(error)})") from error


def gguf_file(path: Path) -> Path | None:
    """The path itself where it is a .gguf file, or the only one in that folder."""
    found = [path] if path.is_file() and path.suffix == ".gguf" else list(path.glob("*.gguf"))
    return found[0] if len(found) == 1 else None


def rotate_half_order(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection from (x0 y0 x1 y1 ...) in each head, Meta's and llama.cpp's order of the pairs
    that RoPE turns, to (x0 x1 ... y0 y1 ...), Hugging Face's."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


# --------------------------------------------------------------------------------------------------------------- Meta


def open_meta(directory: Path) -> tuple[LlamaConfig, dict[str, Stored]]:
    """params.json and consolidated.00.pth, .01.pth, ...: one file for each GPU that the model was cut for."""
    files = sorted(directory.glob("consolidated.*.pth"))
    if not files:
        raise FileNotFoundError(f"{directory / 'consolidated.00.pth'}: not found, but params.json is there")
    # RoPE's frequencies, once or (LLaMA-1) in each layer, are recomputed.
    shards = {file: {name: tensor for name, tensor in bin_tensors(file).items() if not name.endswith("rope.freqs")}
              for file in files}
    config = parse_json(directory / "params.json", lambda params: meta_config(params, directory, shards))
    names = {"tok_embeddings.weight": ("model.embed_tokens.weight", 1), "norm.weight": ("model.norm.weight", None),
             "output.weight": ("lm_head.weight", 0)}
    for i in range(min(config.num_hidden_layers, len(shards[files[0]]))):
        names |= {f"layers.{i}.{meta}.weight": (f"model.layers.{i}.{hf}.weight", cut)
                  for hf, (meta, _, cut) in LAYER_NAMES.items()}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def read(name: str, hf_name: str, cut: int | None) -> Tensor:
        parts = [shards[file][name].read() for file in (files if cut is not None else files[:1])]
        if name == "tok_embeddings.weight" and parts[0].shape[1] == config.hidden_size:
            cut = 0  # Llama 3 cuts the vocabulary, its forebears the columns
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dim=cut)
        projection = hf_name.split(".")[-2]
        return rotate_half_order(tensor, heads[projection]) if projection in heads else tensor

    for file, shard in shards.items():
        for name in sorted(names.keys() ^ shard.keys()):
            raise ValueError(f"{file}: {'missing' if name in names else 'unexpected'} tensor "
                             f"{name if name.isprintable() else repr(name)}")
    return config, {hf: Stored(files[0], partial(read, name, hf, cut), copied=len(files) > 1 and cut is not None)
                    for name, (hf, cut) in names.items()}


def meta_config(params: dict[str, Any], directory: Path, shards: dict[Path, dict[str, Stored]]) -> LlamaConfig:
    """From params.json, and from the tensors what it leaves out or gives as a recipe (vocab_size, intermediate_size)."""
    first = next(iter(shards))

    def shape(name: str) -> torch.Size:
        if name not in shards[first]:
            raise FileNotFoundError(f"{first}: missing tensor {name}")
        return read_tensor(shards[first][name], name).shape

    width, (rows, columns) = params["dim"], shape("tok_embeddings.weight")
    cuts = max(1, width // max(1, shape("layers.0.attention.wq.weight")[0]))
    if cuts > 1024:  # no model was ever cut for as many GPUs
        raise ValueError(f"dim is {width!r}, of which layers.0.attention.wq.weight holds a {cuts}th: one of them is wrong")
    whole = {directory / f"consolidated.{k:02d}.pth" for k in range(cuts)}
    for file in sorted(whole ^ shards.keys()):
        raise FileNotFoundError(f"{file}: {'not found' if file in whole else 'unexpected'}, the model was cut into "
                                f"{cuts} file{'s' * (cuts > 1)}")
    vocab_size = rows * (cuts if columns == width else 1)
    return LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, num_hidden_layers=params["n_layers"],
        intermediate_size=shape("layers.0.feed_forward.w1.weight")[0] * cuts, num_attention_heads=params["n_heads"],
        num_key_value_heads=params.get("n_kv_heads"), rms_norm_eps=params["norm_eps"],
        **(LLAMA_3 if vocab_size == 128256 else {}), **meta_rope(params))


def meta_rope(params: dict[str, Any]) -> dict[str, Any]:
    """LlamaConfig's fields of RoPE."""
    rope: dict[str, Any] = {"rope_theta": params.get("rope_theta", 10000.0)}
    if params.get("use_scaled_rope"):
        # Llama 3.1 and 3.2 share the flag; the factor is in no file, and the small models of 3.2 have the larger one.
        factor = params.get("rope_scaling_factor", 32.0 if params["dim"] < 4096 else 8.0)
        rope["rope_scaling"] = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                "original_max_position_embeddings": 8192}
    return rope


# --------------------------------------------------------------------------------------------------------------- GGUF


def open_gguf(file: Path) -> tuple[LlamaConfig, dict[str, Stored]]:
    """llama.cpp's single file, read and dequantised to float32 by its own package, gguf."""
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise ValueError(f"{file}: reading GGUF needs the gguf package: pip install gguf") from None
    try:
        reader = GGUFReader(file)
    except Exception as error:  # struct, numpy and its own kinds
        raise ValueError(f"{file}: cannot be read, truncated or damaged ({first_line(error)})") from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        config = gguf_config(reader.fields, tensors)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{file}: {'lacks ' if isinstance(error, KeyError) else ''}{error}") from error
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
             "output.weight": "lm_head.weight"}
    for i in range(min(config.num_hidden_layers, len(tensors))):
        names |= {f"blk.{i}.{gguf}.{kind}": f"model.layers.{i}.{hf}.{kind}"
                  for hf, (_, gguf, _) in LAYER_NAMES.items() for kind in ("weight", "bias")}
    for name in sorted(tensors.keys() - names.keys()):
        raise ValueError(f"{file}: unexpected tensor {name if name.isprintable() else repr(name)}")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return config, {hf: Stored(file, partial(read_gguf, file, tensors[name], heads.get(hf.split(".")[-2])), copied=True)
                    for name, hf in names.items() if name in tensors}


def read_gguf(file: Path, tensor: Any, heads: int | None) -> Tensor:
    """One tensor in float32, reordered where it has heads that RoPE turns."""
    import numpy
    from gguf import dequantize

    # Not through the reader's mapping of the file, whose pages would all stay resident.
    packed = numpy.fromfile(file, numpy.uint8, count=tensor.n_bytes, offset=tensor.data_offset)
    packed = packed.view(tensor.data.dtype).reshape(tensor.data.shape)
    wide = torch.from_numpy(dequantize(packed, tensor.tensor_type))
    return rotate_half_order(wide, heads) if heads else wide


def gguf_config(fields: dict[str, Any], tensors: dict[str, Any]) -> LlamaConfig:
    """From the file's metadata. Raises ValueError for what isn't a LLaMA, KeyError for a field that is missing."""
    # The vocabulary and its merges are a hundred thousand strings.
    values = {name: field.contents() for name, field in fields.items() if not name.startswith("tokenizer.ggml.t")
              and name != "tokenizer.ggml.merges"}
    kind = values["general.architecture"]
    if kind != "llama" or values.get("llama.expert_count"):
        raise ValueError(f"architecture {kind!r}{' with experts' if kind == 'llama' else ''} is not supported: only "
                         "'llama' is")
    if "rope_freqs.weight" in tensors or values.get("llama.rope.scaling.type", "none") != "none":
        raise ValueError("scaled RoPE is not read from GGUF: use the model's Hugging Face folder")
    return LlamaConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]), hidden_size=values["llama.embedding_length"],
        intermediate_size=values["llama.feed_forward_length"], num_hidden_layers=values["llama.block_count"],
        num_attention_heads=values["llama.attention.head_count"],
        num_key_value_heads=values.get("llama.attention.head_count_kv"),
        head_dim=values.get("llama.attention.key_length"), max_position_embeddings=values["llama.context_length"],
        rms_norm_eps=values["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=values.get("llama.rope.freq_base", 10000.0), tie_word_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors, mlp_bias="blk.0.ffn_up.bias" in tensors,
        bos_token_id=values.get("tokenizer.ggml.bos_token_id"), eos_token_id=values.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=values.get("tokenizer.ggml.padding_token_id"))


# ------------------------------------------------------------------------------------------------------------ writing


class ShardWriter:
    """Writes tensors as they come into a folder of safetensors, in shards of at most `limit` bytes, and their index."""

    def __init__(self, directory: Path, limit: int = 2 * 2**30):
        self.directory, self.limit = directory, limit
        self.waiting: dict[str, Tensor] = {}
        self.shards: list[list[str]] = []
        self.size = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self.waiting and sum(t.nbytes for t in self.waiting.values()) + tensor.nbytes > self.limit:
            self.flush()
        self.waiting[name] = tensor.contiguous()
        self.size += tensor.nbytes

    def flush(self) -> None:
        self.shards.append(list(self.waiting))
        tensors, self.waiting = self.waiting, {}
        write_atomically(self.directory / f"part-{len(self.shards)}", lambda file: save_file(tensors, file, {"format": "pt"}))

    def close(self) -> None:
        """Writes the rest and gives the files the names by which loaders look for them."""
        self.flush()
        n, weight_map = len(self.shards), {}
        for k, names in enumerate(self.shards, start=1):
            file = "model.safetensors" if n == 1 else f"model-{k:05d}-of-{n:05d}.safetensors"
            (self.directory / f"part-{k}").rename(self.directory / file)
            weight_map |= dict.fromkeys(names, file)
        if n > 1:
            index = {"metadata": {"total_size": self.size}, "weight_map": weight_map}
            write_json(self.directory / "model.safetensors.index.json", index)


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `out` when all went well and is deleted otherwise."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: already holds files; name a new folder")
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        yield part
        if out.is_dir():
            out.rmdir()
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def copy_tokenizer(source: Path, directory: Path) -> None:
    """The tokenizer's files; out of a GGUF file they are made."""
    from data import TOKENIZER_FILES, load_tokenizer

    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    if not (source / "config.json").is_file() and gguf_file(source):
        load_tokenizer(source).save(directory)


def convert(model: str | os.PathLike, out: str | os.PathLike, dtype: torch.dtype | None = None,
            progress: bool = False) -> None:
    """Write a model of any layout, with its tokenizer, as a Hugging Face folder; dtype None keeps what is stored."""
    source = local_copy(model)
    like, stored = match_names(source, *open_checkpoint(source))
    with new_folder(Path(out)) as part:
        if progress:
            print(f"{len(stored)} tensors, {like.config.num_hidden_layers} layers", flush=True)
        writer = ShardWriter(part)
        for _, name, tensor in load_tensors(stored, dtype, progress=progress, like=like):
            writer.add(name, tensor)
            if name == "model.embed_tokens.weight":
                stored_dtype = str(tensor.dtype).removeprefix("torch.")
        writer.close()
        write_json(part / "config.json", like.config.to_dict() | {"torch_dtype": stored_dtype})
        copy_tokenizer(source, part)


# ---------------------------------------------------------------------------------- AlpacaFarm's weight differences


def recover(base: str | os.PathLike, diff: str | os.PathLike, out: str | os.PathLike,
            dtype: torch.dtype | None = None, progress: bool = False) -> float:
    """Write AlpacaFarm's model: weight = difference + base, tensor by tensor in float32; returns the sum of all weights.

    The base is LLaMA-7B; its embedding and output layer first get one row more, the [PAD] token's, the mean of the
    others. A reward model's difference holds its head as a whole. The sum must be the one in model_sum.txt. Any
    mismatch of names, shapes or sums raises ValueError, and nothing is written.
    """
    base, diff = local_copy(base), local_copy(diff)
    expected, description = model_sum(diff / "model_sum.txt"), parse_json(diff / "config.json", dict)
    differences = stored_tensors(diff, difference=True)
    config, weights = open_checkpoint(base)
    check_names(diff, differences, base, weights)
    total = frequencies = 0.0
    with new_folder(Path(out)) as part:
        writer = ShardWriter(part)
        for name in with_bar(differences, "recover", progress):
            tensor = read_tensor(differences[name], name).float()
            if name.endswith("rotary_emb.inv_freq"):
                frequencies += tensor.double().sum().item()
                continue
            if not name.startswith("reward_head."):
                tensor = tensor + base_weight(weights, name.removeprefix("backbone_model."), tensor, differences[name])
            total += tensor.double().sum().item()
            writer.add(name, tensor.to(dtype or tensor.dtype))
        check_sum(diff, expected, total, frequencies, config)
        writer.close()
        description.pop("dtype", None)  # transformers 5's name for the next
        stored_dtype = str(dtype or torch.float32).removeprefix("torch.")
        write_json(part / "config.json", description | {"torch_dtype": stored_dtype})
        copy_tokenizer(diff, part)
    return total


def check_names(diff: Path, differences: dict[str, Stored], base: Path, weights: dict[str, Stored]) -> None:
    """Every difference has its weight and every weight its difference: a skipped one would leave half a model."""
    apart = ("rotary_emb.inv_freq", "reward_head.weight", "reward_head.bias")
    ours = {name.removeprefix("backbone_model.") for name in differences if not name.endswith(apart)}
    theirs = {name for name in weights if not name.endswith(apart)}
    for name in sorted(ours - theirs):
        raise ValueError(f"{diff}: tensor {name} has no counterpart in the base model {base}")
    for name in sorted(theirs - ours):
        raise ValueError(f"{diff}: missing tensor {name}, which the base model {base} has")


def base_weight(weights: dict[str, Stored], name: str, difference: Tensor, where: Stored) -> Tensor:
    """The base's weight in float32, with [PAD]'s row where the difference has it."""
    weight = read_tensor(weights[name], name).float()
    if name in ("model.embed_tokens.weight", "lm_head.weight") and len(difference) == len(weight) + 1:
        weight = torch.cat((weight, weight.mean(dim=0, keepdim=True)))
    if weight.shape != difference.shape:
        raise ValueError(f"{where.file}: tensor {name} has shape {tuple(difference.shape)}, in the base model "
                         f"{tuple(weight.shape)}: not the model that the difference was made from")
    return weight


def model_sum(file: Path) -> float:
    """The number in model_sum.txt."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; a weight difference comes with the sum to check")
    text = file.read_text(encoding="utf-8", errors="replace").strip()
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{file}: holds {text[:40]!r}, not a number") from None


def check_sum(diff: Path, expected: float, total: float, frequencies: float, config: LlamaConfig) -> None:
    """total against model_sum.txt's. Models of that time stored RoPE's frequencies in every layer, and whether the sum
    counts them depends on the version of transformers that made it: either is right, and no other number."""
    rope = config.num_hidden_layers * rope_frequencies(config, torch.device("cpu")).double().sum().item()
    found = (total, total + rope, total + rope + frequencies)
    if not any(math.isclose(x, expected, rel_tol=1e-5, abs_tol=1e-8) for x in found):
        raise ValueError(f"{diff}: the recovered weights sum to {total:.6g}, model_sum.txt says {expected:.6g}: the base "
                         "model is not the one that the difference was made from, or a file is damaged")


# ------------------------------------------------------------------------------------------------------------ program


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for bad input."""
    parser = argparse.ArgumentParser(prog="model.py", description="Make Hugging Face model folders of other formats.")
    programs = parser.add_subparsers(dest="program", required=True)
    converting = programs.add_parser("convert", help="of a GGUF file, a folder of Meta's, or a model on the hub")
    converting.add_argument("--model", required=True, help=".gguf file, folder, or org/name")
    recovering = programs.add_parser("recover", help="of AlpacaFarm's weight difference to LLaMA-7B")
    recovering.add_argument("--base", required=True, help="LLaMA-7B, in any layout")
    recovering.add_argument("--diff", required=True, help="folder of the difference, or org/name on the hub")
    for program in (converting, recovering):
        program.add_argument("--out", required=True, help="new folder for the model and its tokenizer")
        program.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="on disk (default: as stored)")
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    try:
        if args.program == "convert":
            convert(args.model, args.out, dtype, progress=True)
        else:
            total = recover(args.base, args.diff, args.out, dtype, progress=True)
            print(f"the weights sum to {total:.6g}, as model_sum.txt says")
    except (ValueError, OSError) as error:
        print(f"model.py: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in Path(args.out).iterdir())
    print(f"written to {args.out}: {size / 2**30:.2f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
