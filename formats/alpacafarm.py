# SPDX-License-Identifier: MIT
"""AlpacaFarm's files: models published as differences to LLaMA-7B's weights, and its reward model's layout.

The paper (section 2.1) starts from AlpacaFarm's SFT-10k and reward model. `recover` adds difference and base and checks the
sum of all weights. Departs from AlpacaFarm's own script: a tensor whose shape doesn't fit is an error, not skipped, and no
more than a shard is in memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from formats.read import local_copy
from formats.tensors import UNQUANTISED, Stored, judge_names, parse_json, read_tensor, read_weight, stored_tensors, with_bar
from formats.tokenizer import copy_tokenizer
from formats.write import ShardWriter, new_folder, write_json


def recover(open_model: Callable[[Path], tuple[nn.Module, dict[str, Stored]]], base: str | os.PathLike,
            diff: str | os.PathLike, out: str | os.PathLike, dtype: torch.dtype | None = None, progress: bool = False) -> float:
    """Write AlpacaFarm's model: weight = difference + base, tensor by tensor in float32; returns the sum of all weights.

    The base is LLaMA-7B; its embedding and output layer first get one row more, the [PAD] token's, the mean of the
    others. A reward model's difference holds its head as a whole. The sum must be the one in model_sum.txt. Any
    mismatch of names, shapes or sums raises ValueError, and nothing is written.
    """
    base, diff = local_copy(base), local_copy(diff)
    expected, description = model_sum(diff / "model_sum.txt"), parse_json(diff / "config.json", judge_difference)
    model, weights = open_model(base)
    differences = stored_tensors(diff, difference=True)
    judge_names(differences)
    check_counterparts(diff, differences, base, weights)
    total = frequencies = 0.0
    with new_folder(Path(out)) as part:
        writer = ShardWriter(part)
        for name in with_bar(differences, "recover", progress):
            tensor = read_weight(differences[name], name).float()
            if name.endswith("rotary_emb.inv_freq"):
                frequencies += tensor.double().sum().item()
                continue
            if not name.startswith("reward_head."):
                tensor = tensor + base_weight(weights, name.removeprefix("backbone_model."), tensor, differences[name])
            total += tensor.double().sum().item()
            writer.add(name, tensor.to(dtype or tensor.dtype))
        check_sum(diff, expected, total, frequencies, model.config)
        writer.close()
        description.pop("dtype", None)  # transformers 5's name for the next
        stored_dtype = str(dtype or torch.float32).removeprefix("torch.")
        write_json(part / "config.json", description | {"torch_dtype": stored_dtype})
        copy_tokenizer(diff, part)
    return total


def judge_difference(description: dict[str, Any]) -> dict[str, Any]:
    """config.json of a difference, as it is; ValueError for another family's or a quantised model's."""
    kind = description.get("model_type", "llama")
    if kind not in ("llama", "reward_model"):
        raise ValueError(f"model_type {kind!r} is not supported: differences to LLaMA are, 'llama' or 'reward_model'")
    if description.get("quantization_config"):
        raise ValueError(f"quantization_config: {UNQUANTISED}")
    return description


def check_counterparts(diff: Path, differences: dict[str, Stored], base: Path, weights: dict[str, Stored]) -> None:
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
    weight = read_weight(weights[name], name).float()
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
    text = file.read_text(encoding="utf-8-sig", errors="replace").strip()
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{file}: holds {text[:40]!r}, not a number") from None


def check_sum(diff: Path, expected: float, total: float, frequencies: float, config: Any) -> None:
    """total against model_sum.txt's. Models of that time stored RoPE's frequencies in every layer, and whether the sum
    counts them depends on the version of transformers that made it: either is right, and no other number."""
    rope = config.num_hidden_layers * sum(config.rope_theta ** (-i / config.head_dim) for i in range(0, config.head_dim, 2))
    sums = (total, total + rope, total + rope + frequencies)
    if not any(math.isclose(x, expected, rel_tol=1e-5, abs_tol=1e-8) for x in sums):
        raise ValueError(f"{diff}: the recovered weights sum to {total:.6g}, model_sum.txt says {expected:.6g}: the base "
                         "model is not the one that the difference was made from, or a file is damaged")


def as_llama(description: dict[str, Any]) -> dict[str, Any]:
    """A stored reward model's config.json as a LLaMA's, where it is AlpacaFarm's, which has a model_type of its own."""
    return description | {"model_type": "llama"} if description.get("model_type") == "reward_model" else description


def backbone_fields(directory: Path, description: dict[str, Any], stored: Mapping[str, Stored]) -> dict[str, Any]:
    """config.json's fields of a stored reward model's backbone. AlpacaFarm's file names no sizes: there they are read off
    three tensors, with LLaMA's head size of 128 unless the file says otherwise."""
    if description.get("model_type") != "reward_model":
        return description

    def shape(name: str) -> torch.Size:
        name = f"backbone_model.model.{name}.weight"
        if name not in stored:
            raise ValueError(f"{directory}: AlpacaFarm's layout, but without {name}")
        return read_tensor(stored[name], name).shape

    (vocab_size, hidden_size), head_dim = shape("embed_tokens"), description.get("head_dim", 128)
    layers = {name.split(".")[3] for name in stored if name.startswith("backbone_model.model.layers.")}
    sizes = {"vocab_size": vocab_size, "hidden_size": hidden_size, "intermediate_size": shape("layers.0.mlp.gate_proj")[0],
             "head_dim": head_dim, "num_hidden_layers": len(layers), "num_attention_heads": hidden_size // head_dim,
             "num_key_value_heads": shape("layers.0.self_attn.k_proj")[0] // head_dim}
    return sizes | as_llama(description)
