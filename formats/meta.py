# SPDX-License-Identifier: MIT
"""Meta's own layout of LLaMA: params.json, and consolidated.00.pth, .01.pth, ..., one file for each GPU it was cut for.

Read off the tensors where params.json leaves a size out or gives a recipe for it. Names and RoPE's order of rows become
Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.tensors import UNQUANTISED, Stored, bin_tensors, judge_names, parse_json, read_tensor

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


def open_meta(directory: Path, build: Callable[[dict[str, Any]], Any]) -> tuple[Any, dict[str, Stored]]:
    """(build(fields of a config.json), every tensor under its Hugging Face name), as read.open_checkpoint's."""
    parse_json(directory / "params.json", judge)
    files = sorted(directory.glob("consolidated.*.pth"))
    if not files:
        raise FileNotFoundError(f"{directory / 'consolidated.00.pth'}: not found, but params.json is there")
    # RoPE's frequencies, once or (LLaMA-1) in each layer, are recomputed.
    shards = {file: {name: tensor for name, tensor in bin_tensors(file).items() if not name.endswith("rope.freqs")}
              for file in files}

    def describe(params: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        fields = config_fields(params, directory, shards)
        return fields, build(fields)

    fields, config = parse_json(directory / "params.json", describe)
    names = {"tok_embeddings.weight": ("model.embed_tokens.weight", 1), "norm.weight": ("model.norm.weight", None),
             "output.weight": ("lm_head.weight", 0)}
    for i in range(min(fields["num_hidden_layers"], len(shards[files[0]]))):
        names |= {f"layers.{i}.{meta}.weight": (f"model.layers.{i}.{hf}.weight", cut)
                  for hf, (meta, _, cut) in LAYER_NAMES.items()}
    queries = fields["num_attention_heads"]
    heads = {"q_proj": queries, "k_proj": fields["num_key_value_heads"] or queries}

    def read(name: str, hf_name: str, cut: int | None) -> Tensor:
        parts = [shards[file][name].read() for file in (files if cut is not None else files[:1])]
        if name == "tok_embeddings.weight" and parts[0].shape[1] == fields["hidden_size"]:
            cut = 0  # Llama 3 cuts the vocabulary, its forebears the columns
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dim=cut)
        projection = hf_name.split(".")[-2]
        return rotate_half_order(tensor, heads[projection]) if projection in heads else tensor

    for file, shard in shards.items():
        judge_names(shard)
        for name in sorted(names.keys() ^ shard.keys()):
            raise ValueError(f"{file}: {'missing' if name in names else 'unexpected'} tensor "
                             f"{name if name.isprintable() else repr(name)}")
    return config, {hf: Stored(files[0], partial(read, name, hf, cut), copied=len(files) > 1 and cut is not None)
                    for name, (hf, cut) in names.items()}


def judge(params: dict[str, Any]) -> None:
    """Raises ValueError for params.json of what is no LLaMA, before any weights are looked at."""
    if params.get("quantization_args"):
        raise ValueError(f"quantization_args: {UNQUANTISED}")
    for field in ("moe", "moe_args", "sliding_window", "vision_chunk_size", "vision_args"):
        if params.get(field):
            raise ValueError(f"{field} is not supported: only plain LLaMAs are, without experts, windows or pictures")


def config_fields(params: dict[str, Any], directory: Path, shards: dict[Path, dict[str, Stored]]) -> dict[str, Any]:
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
    sizes = {"vocab_size": vocab_size, "hidden_size": width, "num_hidden_layers": params["n_layers"],
             "intermediate_size": shape("layers.0.feed_forward.w1.weight")[0] * cuts, "num_attention_heads": params["n_heads"],
             "num_key_value_heads": params.get("n_kv_heads"), "rms_norm_eps": params["norm_eps"]}
    return sizes | (LLAMA_3 if vocab_size == 128256 else {}) | rope_fields(params)


def rope_fields(params: dict[str, Any]) -> dict[str, Any]:
    """The fields of RoPE."""
    rope: dict[str, Any] = {"rope_theta": params.get("rope_theta", 10000.0)}
    if params.get("use_scaled_rope"):
        # Llama 3.1 and 3.2 share the flag; the factor is in no file, and the small models of 3.2 have the larger one.
        factor = params.get("rope_scaling_factor", 32.0 if params["dim"] < 4096 else 8.0)
        rope["rope_scaling"] = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                "original_max_position_embeddings": 8192}
    return rope


def rotate_half_order(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection from (x0 y0 x1 y1 ...) in each head, Meta's and llama.cpp's order of the pairs
    that RoPE turns, to (x0 x1 ... y0 y1 ...), Hugging Face's."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
