# SPDX-License-Identifier: MIT
"""Adapters on disk beyond PEFT's folders: the paper's released files, and a base model's folder written anew with one merged.

    file, tensors, settings, head = read_released("bregman/pytorch_model.bin", part="policy")
    config, stored = open_base("models/sft")                                 # of any architecture
    size = rewrite("models/sft", config, stored, "merged", changes)          # {name: function of the tensor}

lora.py calls them. Of the released files (`simsun131/alpacafarm_ppo_lora`): policy tensors are named
model.layers.N.self_attn.q_proj.lora_A, value tensors base_model.model.layers.N.self_attn.q_proj.lora_A, which looks like
PEFT's and is not; neither rank nor alpha is stored, they are the paper's 8 and 64 (section 2.2).
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from formats.read import check_tie, refuse_unfinished
from formats.tensors import (FLOATS, UNQUANTISED, Stored, bin_tensors, judge_names, parse_json, read_tensor, read_weight,
                             refuse_difference, stored_tensors)
from formats.write import any_console, new_folder, write_json, write_tensors

RELEASED_VALUE_PREFIX = "base_model."
RELEASED_HEAD = ("value_head", "value_head_bias")
RELEASED_RANK, RELEASED_DROPOUT = 8, 0.1
Changes = Mapping[str, Callable[[Tensor], Tensor]]  # by the name of a stored tensor
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
               "chat_template.jinja", "vocab.json", "merges.txt")  # what a merged model takes over from its base


def read_released(path: Path, part: str | None, value_model: bool = False
                  ) -> tuple[Path, dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """(file, tensors by bare name, rank and dropout, the value head) of the paper's released pytorch_model.bin.

    The file holds a policy and a value model: part is "policy" or "value"; None takes what fits, or the only one there.
    """
    file = path / "pytorch_model.bin" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no adapter_config.json (PEFT) and no pytorch_model.bin (released weights)")
    stored = {name: read_tensor(tensor, name) for name, tensor in bin_tensors(file).items()}
    head = {name: stored.pop(name).clone() for name in RELEASED_HEAD if name in stored}
    for name, tensor in head.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{file}: tensor {name} is NaN or infinite")
    value = {name.removeprefix(RELEASED_VALUE_PREFIX): tensor for name, tensor in stored.items()
             if name.startswith(RELEASED_VALUE_PREFIX)}
    policy = {name: tensor for name, tensor in stored.items() if not name.startswith(RELEASED_VALUE_PREFIX)}
    if part is None:
        wanted = "value" if value_model else "policy"
        part = wanted if (value and policy) else "value" if value else "policy"
    tensors = value if part == "value" else policy
    if not tensors:
        raise ValueError(f"{file}: holds no adapter of the {part} model")
    if value_model:
        tensors = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    ranks = (tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A") and tensor.dim())
    settings = {"rank": next(ranks, RELEASED_RANK), "dropout": RELEASED_DROPOUT}
    return file, tensors, settings, head if part == "value" else {}


def open_base(base: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Stored]]:
    """(config.json, every tensor that counts) of a Hugging Face folder; ValueError for another kind of checkpoint."""
    base = Path(base)
    gguf = base.suffix == ".gguf" or any(base.glob("*.gguf"))
    if not (base / "config.json").is_file() and (gguf or (base / "params.json").is_file()):
        raise ValueError(f"{base}: {'GGUF' if gguf else 'Meta'} format: first make a Hugging Face folder of it: "
                         f"`python model.py convert --model {base} --out DIR`")
    refuse_unfinished(base)
    if not (base / "config.json").is_file():
        raise FileNotFoundError(f"{base}: not a Hugging Face folder: no config.json")
    config = parse_json(base / "config.json", dict)  # judged before any weights are looked at
    for field in ("quantization_config", "compression_config"):
        if config.get(field):
            raise ValueError(f"{base / 'config.json'}: {field}: {UNQUANTISED}")
    llama = config.get("model_type", "llama") in ("llama", "reward_model")  # only of those differences are published
    stored = stored_tensors(base, difference=not llama)
    judge_names(stored)
    norm = "model.norm.weight"
    if llama and norm in stored:
        refuse_difference(base, read_weight(stored[norm], norm))
    if config.get("tie_word_embeddings") and _embedding(stored):
        check_tie(stored, _embedding(stored))
        stored.pop("lm_head.weight", None)  # the embedding itself, which old files store a second time
    return config, stored


def _embedding(stored: dict[str, Stored]) -> str | None:
    return next((name for name in stored if name.endswith("embed_tokens.weight")), None)


def tied_output(config: dict[str, Any], stored: dict[str, Stored]) -> dict[str, Stored]:
    """open_base's embedding under the name of the output layer, where that is tied to it and has no weight of its own."""
    name = _embedding(stored)
    # Models other than LLaMA may be tied without a word of it in their config.json.
    tied = config.get("tie_word_embeddings", config.get("model_type", "llama") != "llama")
    return {"lm_head.weight": stored[name]} if tied and name and "lm_head.weight" not in stored else {}


def rewrite(base: str | os.PathLike, config: dict[str, Any], stored: dict[str, Stored], out: str | os.PathLike,
            changes: Changes, dtype: torch.dtype | None = None, progress: bool = False) -> int:
    """Write open_base's folder anew as `out`, with changes[name](tensor) for the tensors there; returns the bytes of all tensors.

    A changed tensor comes in float32 and is rounded once, to dtype or to what it was; with dtype every other one is, too. No
    dtype means float32 where rounding would take half of the changes: they would drown in its noise. Files keep their names
    and are in memory one at a time; `out` appears when all of it is written.
    """
    files: dict[Path, list[str]] = {}
    for name, tensor in stored.items():
        files.setdefault(tensor.file, []).append(name)
    weight_map, total = {}, 0
    with new_folder(Path(out)) as folder, tqdm(total=len(stored), unit="tensor", disable=not progress) as bar:
        if (share := rounding_share(stored, changes, dtype)) > 0.5:
            if progress:
                print(f"rounding to {dtype or 'what the base is stored in'} takes {min(share, 1):.0%} of the update"
                      + ("" if dtype else ": written in float32"), flush=True)
            dtype = dtype or torch.float32
        copy_model_files(Path(base), folder, config, dtype)
        for file, names in files.items():
            rewritten = f"{file.stem.removeprefix('pytorch_')}.safetensors"
            sizes = rewrite_file(folder / rewritten, {name: stored[name] for name in names}, changes, dtype, bar.update)
            weight_map |= dict.fromkeys(sizes, rewritten)
            total += sum(sizes.values())
        if set(weight_map.values()) != {"model.safetensors"}:
            write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def rounding_share(stored: dict[str, Stored], changes: Changes, dtype: torch.dtype | None) -> float:
    """Norm of the errors of rounding the changed tensors, to dtype or to what they were, over the norm of the changes."""
    errors = updates = 0.0
    for name, change in changes.items():
        weight = read_weight(stored[name], name)
        if (rounded := dtype or weight.dtype).itemsize < 4:
            exact = change(weight)
            errors += (exact.to(rounded).float() - exact).square().sum().item()
            updates += (exact - weight.float()).square().sum().item()
    return math.sqrt(errors / updates) if updates else 0.0


def rewrite_file(target: Path, stored: dict[str, Stored], changes: Changes, dtype: torch.dtype | None,
                 tick: Callable[[], object]) -> dict[str, int]:
    """Write the tensors of one file and return the bytes of each; on return its memory is free again."""
    tensors = {}
    for name, where in stored.items():
        tensor = read_tensor(where, name)
        wanted = dtype if dtype and tensor.dtype in FLOATS else tensor.dtype
        new = (changes[name](tensor) if name in changes else tensor).to(wanted)
        if new is not tensor and not bool(new.isfinite().all()):
            raise ValueError(f"{where.file}: tensor {name} is infinite or NaN once merged and in {new.dtype}")
        # Tensors of a .bin may share memory or be strided, which safetensors doesn't store.
        tensors[name] = new if where.file.suffix == ".safetensors" else new.clone(memory_format=torch.contiguous_format)
        tick()
    write_tensors(target, tensors)
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def copy_model_files(base: Path, folder: Path, config: dict[str, Any], dtype: torch.dtype | None) -> None:
    """Configuration and tokenizer, as they are but for the dtype and what the caller changed in config."""
    for pattern in MODEL_FILES:
        for file in base.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        newer = {"dtype": name} if "dtype" in config else {}  # transformers 5's name for it
        config = config | newer | {"torch_dtype": name}
    if config != parse_json(folder / "config.json", dict):
        write_json(folder / "config.json", config)


def main(merge_checkpoint: Callable[..., tuple[int, int]], argv: Sequence[str] | None = None) -> int:
    """`python lora.py merge`; exit code 0, or 2 with one line for bad input."""
    any_console()
    parser = argparse.ArgumentParser(prog="lora.py", description="LoRA on disk; see `python lora.py merge --help`.")
    merge = parser.add_subparsers(dest="command", required=True).add_parser(
        "merge", help="fold an adapter into its base model",
        description="Fold an adapter into its base model and write one plain Hugging Face folder, for transformers, "
                    "vLLM or llama.cpp's converter. Each adapted weight becomes W + scaling * B A, computed in float32 "
                    "and rounded once; the rest, tokenizer too, is the base's. A failed run leaves nothing behind.")
    for flag, text in (("--base", "Hugging Face folder of the model that the adapter was trained on"),
                       ("--adapter", "PEFT folder, such as a run's step-0020/policy, or the paper's pytorch_model.bin"),
                       ("--out", "new folder for the merged model")):
        merge.add_argument(flag, required=True, metavar="DIR", help=text)
    merge.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                       help="of all weights; default: as stored, or float32 where rounding would take half of the update")
    args = parser.parse_args(argv)
    try:
        dtype = getattr(torch, args.dtype) if args.dtype else None
        layers, size = merge_checkpoint(args.base, args.adapter, args.out, dtype, progress=True)
    except (ValueError, OSError) as error:
        print(f"lora.py: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}: {layers} layers merged, {size / 1e6:,.1f} MB")
    return 0
