# SPDX-License-Identifier: MIT
"""GGUF, llama.cpp's single file, read and dequantised to float32 by its own package: pip install gguf."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.meta import LAYER_NAMES, rotate_half_order
from formats.tensors import Stored, first_line


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
        names |= {f"blk.{i}.{gguf}.{kind}": f"model.layers.{i}.{hf}.{kind}"
                  for hf, (_, gguf, _) in LAYER_NAMES.items() for kind in ("weight", "bias")}
    for name in sorted(tensors.keys() - names.keys()):
        raise ValueError(f"{file}: unexpected tensor {name if name.isprintable() else repr(name)}")
    queries = fields["num_attention_heads"]
    heads = {"q_proj": queries, "k_proj": fields["num_key_value_heads"] or queries}
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
    return {
        "vocab_size": int(tensors["token_embd.weight"].shape[1]), "hidden_size": values["llama.embedding_length"],
        "intermediate_size": values["llama.feed_forward_length"], "num_hidden_layers": values["llama.block_count"],
        "num_attention_heads": values["llama.attention.head_count"],
        "num_key_value_heads": values.get("llama.attention.head_count_kv"),
        "head_dim": values.get("llama.attention.key_length"), "max_position_embeddings": values["llama.context_length"],
        "rms_norm_eps": values["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": values.get("llama.rope.freq_base", 10000.0), "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "bos_token_id": values.get("tokenizer.ggml.bos_token_id"), "eos_token_id": values.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": values.get("tokenizer.ggml.padding_token_id")}
