# SPDX-License-Identifier: MIT
"""Adapters on disk beyond PEFT's folders: the paper's released files, and a base model's folder written anew with one merged.

    file, tensors, settings, head = read_released("bregman/pytorch_model.bin", part="policy")
    config, stored = open_base("models/sft")
    size = rewrite("models/sft", config, stored, "merged", change)          # change(name, tensor) -> tensor

lora.py calls them. Of the released files (`simsun131/alpacafarm_ppo_lora`): policy tensors are named
model.layers.N.self_attn.q_proj.lora_A, value tensors base_model.model.layers.N.self_attn.q_proj.lora_A, which looks like
PEFT's and is not; neither rank nor alpha is stored, they are the paper's 8 and 64 (section 2.2).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from formats.read import refuse_unfinished
from formats.tensors import Stored, bin_tensors, parse_json, read_tensor, stored_tensors
from formats.write import new_folder, write_json, write_tensors

RELEASED_VALUE_PREFIX = "base_model."
RELEASED_HEAD = ("value_head", "value_head_bias")
RELEASED_RANK, RELEASED_DROPOUT = 8, 0.1
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
    value = {name.removeprefix(RELEASED_VALUE_PREFIX): tensor for name, tensor in stored.items()
             if name.startswith(RELEASED_VALUE_PREFIX)}
    policy = {name: tensor for name, tensor in stored.items() if not name.startswith(RELEASED_VALUE_PREFIX)}
    if part is None:
        wanted = "value" if value_model else "policy"
        part = wanted if (value and policy) else "value" if value else "policy"
    tensors = value if part == "value" else policy
    if not tensors:
        raise ValueError(f"{file}: holds no adapters of the {part} model")
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
    config, stored = parse_json(base / "config.json", dict), stored_tensors(base)
    if config.get("quantization_config"):
        raise ValueError(f"{base / 'config.json'}: quantization_config: adapters can only be merged into unquantised weights")
    if config.get("tie_word_embeddings") and any(name.endswith("embed_tokens.weight") for name in stored):
        stored.pop("lm_head.weight", None)  # the embedding itself, which old files store a second time
    return config, stored


def rewrite(base: str | os.PathLike, config: dict[str, Any], stored: dict[str, Stored], out: str | os.PathLike,
            change: Callable[[str, Tensor], Tensor], dtype: torch.dtype | None = None, progress: bool = False) -> int:
    """Write open_base's folder anew as `out`, with change(name, tensor) for every tensor; returns the bytes of all tensors.

    A changed tensor comes in float32 and is rounded once, to dtype or to what it was; with dtype every other one is, too.
    Files keep their names and are in memory one at a time; `out` appears when all of it is written.
    """
    files: dict[Path, list[str]] = {}
    for name, tensor in stored.items():
        files.setdefault(tensor.file, []).append(name)
    weight_map, total = {}, 0
    with new_folder(Path(out)) as folder, tqdm(total=len(stored), unit="tensor", disable=not progress) as bar:
        copy_model_files(Path(base), folder, config, dtype)
        for file, names in files.items():
            rewritten = f"{file.stem.removeprefix('pytorch_')}.safetensors"
            sizes = rewrite_file(folder / rewritten, {name: stored[name] for name in names}, change, dtype, bar.update)
            weight_map |= dict.fromkeys(sizes, rewritten)
            total += sum(sizes.values())
        if set(weight_map.values()) != {"model.safetensors"}:
            write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def rewrite_file(target: Path, stored: dict[str, Stored], change: Callable[[str, Tensor], Tensor], dtype: torch.dtype | None,
                 tick: Callable[[], object]) -> dict[str, int]:
    """Write the tensors of one file and return the bytes of each; on return its memory is free again."""
    tensors = {}
    for name, where in stored.items():
        tensor = read_tensor(where, name)
        wanted = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        new = change(name, tensor).to(wanted)
        if new is not tensor and not bool(new.isfinite().all()):
            raise ValueError(f"{where.file}: tensor {name} is infinite or NaN once merged and in {new.dtype}")
        # Tensors of a .bin may share memory or be strided, which safetensors doesn't store.
        tensors[name] = new if where.file.suffix == ".safetensors" else new.clone(memory_format=torch.contiguous_format)
        tick()
    write_tensors(target, tensors)
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def copy_model_files(base: Path, folder: Path, config: dict[str, Any], dtype: torch.dtype | None) -> None:
    """Configuration and tokenizer, as they are but for the dtype."""
    for pattern in MODEL_FILES:
        for file in base.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        newer = {"dtype": name} if "dtype" in config else {}  # transformers 5's name for it
        write_json(folder / "config.json", config | newer | {"torch_dtype": name})
