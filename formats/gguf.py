# SPDX-License-Identifier: MIT
"""GGUF, llama.cpp's single file, read and dequantised to float32 by its own package: pip install gguf.

LLaMA's and Mistral's are its architecture "llama", beside "qwen2" and "qwen3". Only the first has RoPE's pairs side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.meta import LAYER_NAMES, rotate_half_order
from formats.tensors import Stored, first_line

NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}  # Qwen3's
# Of every Llama 3 with scaled RoPE; its factor is the largest number in the file's rope_freqs.
LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def gguf_file(path: Path) -> Path | None:
    """The path itself where it is a .gguf file, or the only one in that folder."""
    files = [path] if path.is_file() and path.suffix == ".gguf" else list(path.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def open_gguf(file: Path, build: Callable[[dict[str, Any]], Any]) -> tuple[Any, dict[str, Stored]]:
    """(build(fields of a config.json), every tensor under its Hugging Face name), as read.open_checkpoint's."""
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
        fields = config_fields(reader.fields, tensors)
        config = build(fields)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{file}: {'lacks ' if isinstance(error, KeyError) else ''}{error}") from error
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
             "output.weight": "lm_head.weight"}
    for i in range(min(fields["num_hidden_layers"], len(tensors))):
        layer = {hf: gguf for hf, (_, gguf, _) in LAYER_NAMES.items()} | NORMS
        names |= {f"blk.{i}.{gguf}.{kind}": f"model.layers.{i}.{hf}.{kind}"
                  for hf, gguf in layer.items() for kind in ("weight", "bias")}
    for name in sorted(tensors.keys() - names.keys() - {"rope_freqs.weight"}):
        raise ValueError(f"{file}: unexpected tensor {name if name.isprintable() else repr(name)}")
    queries = fields["num_attention_heads"]
    heads = {"q_proj": queries, "k_proj": fields["num_key_value_heads"] or queries} if fields["model_type"] == "llama" else {}
    return config, {hf: Stored(file, partial(read_gguf, file, tensors[name], heads.get(hf.split(".")[-2])), copied=True)
                    for name, hf in names.items() if name in tensors}


def stop_ids(file: Path) -> list[int]:
    """The tokens that end a response by the file: of a text, of a turn, of a message. None of them without the gguf package,
    which the model in the file needs anyway."""
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        return []
    found = GGUFReader(file).fields
    names = [f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom")]
    return [int(found[name].contents()) for name in names if name in found]


def read_gguf(file: Path, tensor: Any, heads: int | None) -> Tensor:
    """One tensor in float32, reordered where it has heads that RoPE turns."""
    import numpy
    from gguf import dequantize

    # Not through the reader's mapping of the file, whose pages would all stay resident.
    packed = numpy.fromfile(file, numpy.uint8, count=tensor.n_bytes, offset=tensor.data_offset)
    packed = packed.view(tensor.data.dtype).reshape(tensor.data.shape)
    wide = torch.from_numpy(dequantize(packed, tensor.tensor_type))
    return rotate_half_order(wide, heads) if heads else wide


def config_fields(fields: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """From the file's metadata. Raises ValueError for what is neither LLaMA nor Qwen, KeyError for a field that is missing."""
    # The vocabulary and its merges are a hundred thousand strings.
    values = {name: field.contents() for name, field in fields.items() if not name.startswith("tokenizer.ggml.t")
              and name != "tokenizer.ggml.merges"}
    kind = values["general.architecture"]
    if kind not in ("llama", "qwen2", "qwen3") or values.get(f"{kind}.expert_count"):
        experts = " with experts" if values.get(f"{kind}.expert_count") else ""
        raise ValueError(f"architecture {kind!r}{experts} is not supported: 'llama', 'qwen2' and 'qwen3' are")
    values = {name.removeprefix(f"{kind}."): value for name, value in values.items()}
    theta, head_dim = values.get("rope.freq_base", 10000.0), values.get("attention.key_length")
    return {
        "model_type": kind, "vocab_size": int(tensors["token_embd.weight"].shape[1]), "hidden_size": values["embedding_length"],
        "intermediate_size": values["feed_forward_length"], "num_hidden_layers": values["block_count"],
        "num_attention_heads": values["attention.head_count"], "num_key_value_heads": values.get("attention.head_count_kv"),
        "head_dim": head_dim, "max_position_embeddings": values["context_length"],
        "rms_norm_eps": values["attention.layer_norm_rms_epsilon"], "rope_theta": theta,
        "rope_scaling": scaled_rope(values, tensors, theta), "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "bos_token_id": values.get("tokenizer.ggml.bos_token_id"), "eos_token_id": values.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": values.get("tokenizer.ggml.padding_token_id")}


def scaled_rope(values: dict[str, Any], tensors: dict[str, Any], theta: float) -> dict[str, Any] | None:
    """config.json's rope_scaling. Llama 3's stands in the file as the tensor rope_freqs, by what each frequency is divided; it is
    taken for the published recipe only if that gives these very numbers."""
    kind = values.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in tensors:
        divisors = torch.tensor(tensors["rope_freqs.weight"].data.copy()).double()
        turns = 8192 / (2 * math.pi) * theta ** (-torch.arange(len(divisors)) / len(divisors)).double()
        unscaled = ((turns - 1) / 3).clamp(0, 1)  # from low_freq_factor 1 to high_freq_factor 4
        if torch.allclose(1 / (unscaled + (1 - unscaled) / divisors.max()), divisors, rtol=1e-4):
            return LLAMA_3 | {"factor": divisors.max().item()}
        kind = "of other frequencies (rope_freqs)"
    if kind in ("linear", "yarn"):
        original = values.get("rope.scaling.original_context_length")
        return {"rope_type": kind, "factor": values["rope.scaling.factor"]} | (
            {"original_max_position_embeddings": original} if kind == "yarn" and original else {})
    if kind != "none":
        raise ValueError(f"scaled RoPE {kind} is not read from GGUF: use the model's Hugging Face folder")
    return None
