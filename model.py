# SPDX-License-Identifier: MIT
"""LLaMA and its kin in one file: configuration, model, cached sampling, a scalar value head, Hugging Face folders.

The paper (Sun, Gupta, Iyyer 2023) trains a LLaMA-7B policy and value model; section 2.1 names the checkpoints. Mistral,
Qwen2, Qwen2.5 and Qwen3 differ from it by a bias or a norm (FAMILIES). Parameter names are those of the published files, so
loading needs no map:

    model = Llama.from_pretrained("path/to/llama-7b", dtype=torch.bfloat16, device="cuda:0")
    tokens = generate(model, input_ids, attention_mask, max_new_tokens=300, eos_token_id=2, pad_token_id=0)
    value = ValueModel(Llama.from_pretrained("path/to/reward-backbone"))

Beside formats/, checkpoints are read from Hugging Face folders (or by name from its hub), Meta's folders and GGUF files, one
tensor at a time; a copy of this file alone reads Hugging Face folders in safetensors. As a program it makes Hugging Face
folders of all of them, and AlpacaFarm's models of its published weight differences:

    python model.py convert --model smollm2.gguf --out smollm2
    python model.py recover --base llama-7b --diff alpaca-farm-sft10k-wdiff --out sft10k

Departs from the released code, which calls transformers' LLaMA and `generate`: rotary embeddings stay in float32 in a
bf16 model; rows that reached EOS leave the batch; a tensor of the wrong name or shape is an error, never a skip.

Dimensions: B batch, P prompt (left-padded), T response (right-padded), S sequence = P + T, V vocabulary, D hidden,
L layers, H query heads, Hkv key and value heads, Dh size of a head, N rows of the batch still unfinished.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

# MKL 2024.2, part of torch's x86 wheels, finds out the processor at its first sin, exp, sqrt, ..., and a second thread that
# calls meanwhile may get kernels of 4 digits (docs/reliability.md). So one thread makes that call, before there are two.
torch.zeros(1, device="cpu").sin()


# -------------------------------------------------------------------------------------------------------- configuration

# By config.json's model_type: the name of transformers' classes. Qwen2 has biases on q, k and v, Qwen3 norms of each head's
# queries and keys; Mistral is a LLaMA with a sliding window, which is not computed (see `longest`).
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


@dataclass
class LlamaConfig:
    """The shape of a LLaMA, under Hugging Face's field names; the defaults are LLaMA-7B's.

    rope_scaling: None, or a dict with rope_type "linear", "dynamic" (factor), "llama3" (factor, low_freq_factor,
    high_freq_factor, original_max_position_embeddings) or "yarn". eos_token_id may be a list, as in Llama 3.
    Raises ValueError naming the field for sizes that do not divide and for variants this file does not compute.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None
    initializer_range: float = 0.02
    model_type: str = "llama"
    sliding_window: int | None = None  # how far back a position sees; None: to the first

    def __post_init__(self) -> None:
        heads = self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = heads
        self._check_types()
        if self.head_dim is None:
            if self.hidden_size % heads:
                raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {heads}")
            self.head_dim = self.hidden_size // heads
        if heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {heads} must be a multiple of num_key_value_heads "
                             f"{self.num_key_value_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: RoPE rotates pairs of coordinates")
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported: LLaMA's is 'silu'")
        self.rope_scaling = _checked_rope_scaling(self.rope_scaling, self.max_position_embeddings)

    def _check_types(self) -> None:
        """A config.json may hold anything; "false" for a flag would count as true."""
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "max_position_embeddings"):
            value = getattr(self, name)
            if not (type(value) is int and 0 < value < 10**8 or name == "head_dim" and value is None):
                raise ValueError(f"{name} is {value!r}: it must be a whole number from 1 up, below 100 million")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}: it must be a number above 0")
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            value = getattr(self, name)
            if type(value) is not bool:
                raise ValueError(f"{name} is {value!r}: it must be true or false")

    @property
    def longest(self) -> int | None:
        """Tokens of the longest sequence that is computed here as the model was made; None: any.

        Up to a sliding window's length there is no difference to plain attention, and up to max_position_embeddings none
        between dynamic RoPE and plain. Nothing beyond is computed.
        """
        dynamic = self.rope_scaling and self.rope_scaling["rope_type"] == "dynamic"
        return min(filter(None, (self.sliding_window, self.max_position_embeddings if dynamic else None)), default=None)

    @classmethod
    def llama_7b(cls, **overrides: Any) -> LlamaConfig:
        """LLaMA-7B, the paper's model (AlpacaFarm's checkpoints have vocab_size=32001)."""
        return cls(**overrides)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LlamaConfig:
        """Read a Hugging Face config.json, of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

        Fields that do not change the computation (use_cache, transformers_version, ...) are left out.
        """
        model_type = values.get("model_type", "llama")
        if model_type not in FAMILIES or values.get("text_config"):
            parts = " with a text_config" if values.get("text_config") else ""
            raise ValueError(f"model_type {model_type!r}{parts} is not supported: {', '.join(FAMILIES)} are; others train with "
                             "ppo.py and lora.py taken by themselves, as python examples/hf_ppo.py does")
        if quantised := [name for name in ("quantization_config", "compression_config") if values.get(name)]:
            raise ValueError(f"{quantised[0]}: the model is quantised: name the unquantised one that it was made of")
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        if model_type != "llama":  # what transformers doesn't read for these counts for nothing here
            known |= {"mlp_bias": False, "attention_bias": model_type == "qwen3" and known.get("attention_bias", False)}
        windowed = model_type == "mistral" or model_type != "llama" and values.get("use_sliding_window", False)
        known["sliding_window"] = values.get("sliding_window", 4096) if windowed else None
        rope = values.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise ValueError(f"rope_parameters is {rope!r}: it must be an object or null")
        if rope:
            rope = dict(rope)
            known["rope_theta"] = rope.pop("rope_theta", known.get("rope_theta", cls.rope_theta))
            known["rope_scaling"] = rope
        if known.get("pad_token_id") == -1:  # early conversions of LLaMA-7B say so where there is none
            known["pad_token_id"] = None
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json that transformers 4 and 5 both read."""
        window = {"use_sliding_window": True} if self.sliding_window and self.model_type != "mistral" else {}
        return {"architectures": [f"{FAMILIES[self.model_type]}ForCausalLM"]} | asdict(self) | window


def _checked_rope_scaling(scaling: dict[str, Any] | None, max_position_embeddings: int) -> dict[str, Any] | None:
    """None for plain RoPE, else a copy under `rope_type` (old files say `type`) with every number it needs."""
    if not isinstance(scaling, dict | None):
        raise ValueError(f"rope_scaling is {scaling!r}: it must be an object or null")
    scaling = dict(scaling or {})
    kind = scaling.pop("type", "default")
    kind = scaling.setdefault("rope_type", kind)
    needs = {"default": (), "linear": ("factor",), "dynamic": ("factor",),
             "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
             "yarn": ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings")}
    if kind not in needs:
        raise ValueError(f"rope_scaling type {kind!r} is not supported: use one of {sorted(needs)}")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor {scaling['partial_rotary_factor']} is not supported: LLaMA's is 1")
    if kind == "yarn":
        if scaling.get("mscale") or scaling.get("mscale_all_dim") or not scaling.get("truncate", True):
            raise ValueError("rope_scaling of type 'yarn' with mscale or without truncate is not supported")
        usual = {"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": max_position_embeddings}
        scaling = usual | {key: value for key, value in scaling.items() if value is not None}
    missing = [key for key in needs[kind] if key not in scaling]
    if missing:
        raise ValueError(f"rope_scaling of type {kind!r} lacks {', '.join(missing)}")
    for key in needs[kind]:
        if type(scaling[key]) not in (int, float) or not 0 < scaling[key] < math.inf:
            raise ValueError(f"rope_scaling's {key} is {scaling[key]!r}: it must be a number above 0")
    return None if kind == "default" else scaling


# ---------------------------------------------------------------------------------------------- positions and the cache


def rope_frequencies(config: LlamaConfig, device: torch.device) -> Tensor:
    """Radians that each pair of coordinates turns per position: (Dh / 2,), float32 (Su et al. 2021, section 3.2)."""
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None or scaling["rope_type"] == "dynamic":
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    if scaling["rope_type"] == "yarn":
        return yarn_frequencies(config, frequencies)
    # Llama 3.1 slows only the slow pairs: those that turn fewer than `low` times over the original context are slowed
    # by the full factor, those that turn more than `high` times not at all, and between them it is a blend.
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    unscaled = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (unscaled + (1 - unscaled) / scaling["factor"])


def yarn_frequencies(config: LlamaConfig, frequencies: Tensor) -> Tensor:
    """YaRN (Peng et al. 2023, section 3.2): pairs that turn more than beta_fast times over the original context stay, those
    that turn less than beta_slow times are slowed by factor, and between these two pairs it is a blend."""
    scaling, last = config.rope_scaling, config.head_dim - 1

    def pair_that_turns(times: float) -> float:
        radians = scaling["original_max_position_embeddings"] / (times * 2 * math.pi)
        return config.head_dim * math.log(radians) / (2 * math.log(config.rope_theta))

    first = max(math.floor(pair_that_turns(scaling["beta_fast"])), 0)
    end = min(math.ceil(pair_that_turns(scaling["beta_slow"])), last)
    pairs = torch.arange(len(frequencies), device=frequencies.device, dtype=torch.float32)
    slowed = ((pairs - first) / max(end - first, 1e-3)).clamp(0, 1)
    return frequencies * (1 - slowed + slowed / scaling["factor"])


def rope_tables(config: LlamaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and signed sin of every rotation for positions (B, S): two of (B, S, 1, Dh), float32.

    Computed from the positions at each call: a stored table would be lost when a model is built on the meta device.
    """
    angles = positions.view(*positions.shape, 1, 1).float() * rope_frequencies(config, positions.device)
    sin, cos = angles.sin(), angles.cos()
    if (scaling := config.rope_scaling) and scaling["rope_type"] == "yarn":  # sharper attention: Peng et al. 2023, section 3.4
        stretch = scaling.get("attention_factor") or 0.1 * math.log(max(1.0, scaling["factor"])) + 1
        cos, sin = cos * stretch, sin * stretch
    return cos.repeat(1, 1, 1, 2), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (i, i + Dh/2) of x (B, S, heads, Dh) by its angle, in float32; sin carries the sign."""
    cos, sin = rope
    wide = x.float()
    return (wide * cos + wide.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


def position_ids(attention_mask: Tensor) -> Tensor:
    """0, 1, 2, ... over the real tokens of each row, so that left padding never changes a logit: (B, S) → (B, S)."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def attention_bias(attention_mask: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
    """0 where the last `queries` positions may look and −inf elsewhere: mask (B, S) → (B, 1, queries, S)."""
    S, device = attention_mask.shape[1], attention_mask.device
    key = torch.arange(S, device=device)
    query = torch.arange(S - queries, S, device=device).unsqueeze(1)
    # Every position sees itself, padding too: a row with nothing to attend to would be 0/0 = NaN in the softmax.
    allowed = (key <= query) & attention_mask.bool().unsqueeze(1) | (key == query)
    bias = torch.zeros(allowed.shape, dtype=dtype, device=device)
    return bias.masked_fill_(allowed.logical_not(), -torch.inf).unsqueeze(1)


class KVCache:
    """Keys and values of every layer for one generation, allocated once: store is (L, 2, B, Hkv, S_max, Dh).

    `rows` of the batch and `length` positions are in use; nothing beyond them is ever read.
    """

    def __init__(self, config: LlamaConfig, rows: int, max_length: int, dtype: torch.dtype, device: torch.device):
        shape = (config.num_hidden_layers, 2, rows, config.num_key_value_heads, max_length, config.head_dim)
        self.store = torch.empty(shape, dtype=dtype, device=device)
        self.rows, self.length = rows, 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write S new positions (B, Hkv, S, Dh) of one layer and return all of that layer, (B, Hkv, length + S, Dh)."""
        end = self.length + keys.shape[2]
        stored = self.store[layer, :, : self.rows, :, :end]
        stored[0, :, :, self.length :] = keys
        stored[1, :, :, self.length :] = values
        return stored[0], stored[1]

    def drop(self, finished: Tensor) -> Tensor:
        """Forget the rows marked in finished (N,) and return, for each row left, its old index.

        Surviving rows from the end move into the gaps, so that a row is copied at most once for each one that finishes
        and rows can leave as soon as they end; keeping the order would copy the whole cache each time.
        """
        left = int((~finished).sum())
        order = torch.arange(left, device=finished.device)
        gaps = finished[:left].nonzero()[:, 0]
        movers = (~finished[left:]).nonzero()[:, 0] + left
        order[gaps] = movers
        self.store[:, :, gaps, :, : self.length] = self.store[:, :, movers, :, : self.length]
        self.rows = left
        return order


# ------------------------------------------------------------------------------------------------------------ the model


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension (Zhang and Sennrich 2019), computed in float32 whatever x is."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)  # one kernel of six; no faster on a CPU
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class Attention(nn.Module):
    """Causal self-attention with rotary positions; H query heads share Hkv keys and values (Ainslie et al. 2023)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        bias, qwen2, qwen3 = config.attention_bias, config.model_type == "qwen2", config.model_type == "qwen3"
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=bias or qwen2)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=bias or qwen2)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=bias or qwen2)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if qwen3 else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if qwen3 else nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], bias: Tensor | None,
                extend: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """(B, S, D) → (B, S, D). bias None: causal over these S positions, or one query that sees the whole cache."""
        B, S, _ = x.shape
        q = rotate(self.q_norm(self.q_proj(x).view(B, S, -1, self.head_dim)), rope).transpose(1, 2)  # (B, H, S, Dh)
        k = rotate(self.k_norm(self.k_proj(x).view(B, S, -1, self.head_dim)), rope).transpose(1, 2)  # (B, Hkv, S, Dh)
        v = self.v_proj(x).view(B, S, -1, self.head_dim).transpose(1, 2)
        if extend is not None:
            k, v = extend(k, v)
        if S == 1:
            # One query a head: the heads of a group stand as that many queries, and the cache isn't repeated for them.
            q = q.reshape(B, k.shape[1], -1, self.head_dim)
            return self.o_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).reshape(B, 1, -1))
        return self.o_proj(attend(q, k, v, bias).transpose(1, 2).reshape(B, S, -1))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q kᵀ / sqrt(Dh) + bias) v: (B, H, S, Dh), (B, Hkv, S, Dh) twice → (B, H, S, Dh). bias None: causal."""
    dtype, group = q.dtype, q.shape[1] // k.shape[1]
    if q.device.type == "cpu":
        if dtype == torch.bfloat16 and torch.is_grad_enabled():  # torch's backward pass is several times slower in bf16
            q, k, v, bias = q.float(), k.float(), v.float(), bias if bias is None else bias.float()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, enable_gqa=group > 1)
        return out.to(dtype)
    if group > 1:  # a GPU's fast kernels take either a mask or shared heads, not both
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer 2020)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, inner, bias=bias)
        self.up_proj = nn.Linear(D, inner, bias=bias)
        self.down_proj = nn.Linear(inner, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention and MLP, each on a normed input and added back."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], bias: Tensor | None,
                extend: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, bias, extend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A LLaMA language model with Hugging Face's parameter names; a new one is random, normal(0, initializer_range).

    Set `gradient_checkpointing = True` to recompute each layer in the backward pass: about a third more time for
    activations of one layer instead of L.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self._tie()

    def _tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, logits_to_keep: int = 0) -> Tensor:
        """Next-token logits, (B, S) → (B, S, V) in the model's dtype.

        attention_mask (B, S) is 1 on real tokens; None means no padding. With logits_to_keep = K > 0 only the last K
        positions go through the output layer, whose logits are the largest tensor of all: (B, K, V).
        """
        x = self.hidden(input_ids, attention_mask)
        if logits_to_keep:
            # A copy, since of a view torch makes a batch of matrix products, ten times slower on a CPU.
            x = x.narrow(1, x.shape[1] - logits_to_keep, logits_to_keep).clone()
        return self.lm_head(x)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Hidden states after the final norm, (B, S) → (B, S, D).

        With a cache the S tokens continue what it holds: attention_mask is then (B, cache.length + S), and the cache
        grows by S positions. No value is read back from the device and no tensor is indexed with [] or ~, so that a
        check of placement can run this on fake tensors of a device that the machine lacks.
        """
        S = input_ids.shape[1]
        past = cache.length if cache is not None else 0
        if self.config.longest is not None and past + S > self.config.longest:
            raise ValueError(f"a sequence of {past + S} tokens: this model is computed up to {self.config.longest} (its sliding "
                             "window, or where dynamic RoPE begins)")
        if attention_mask is None and past:
            attention_mask = input_ids.new_ones(len(input_ids), past + S)
        x = self.model.embed_tokens(input_ids)
        if attention_mask is None:
            positions, bias = torch.arange(S, device=input_ids.device).unsqueeze(0), None
        else:
            positions = position_ids(attention_mask).narrow(1, past, S)
            bias = attention_bias(attention_mask, S, x.dtype)
        rope = rope_tables(self.config, positions)
        recompute = self.gradient_checkpointing and cache is None and torch.is_grad_enabled()
        for index, layer in enumerate(self.model.layers):
            if recompute:
                x = checkpoint(layer, x, rope, bias, use_reentrant=False)
            elif cache is None:
                x = layer(x, rope, bias)
            else:
                x = layer(x, rope, bias, lambda k, v, index=index: cache.extend(index, k, v))
        if cache is not None:
            cache.length += S
        return self.model.norm(x)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, dtype: torch.dtype | None = None,
                        device: torch.device | str | None = None, progress: bool = False,
                        part: Callable[[Tensor], Tensor] | None = None) -> Llama:
        """Read a Hugging Face folder (or org/name on its hub), a folder of Meta's, or a GGUF file.

        dtype None keeps what is stored (GGUF: float32). The model is built without memory and filled tensor by tensor,
        so at most one tensor is in memory twice. It comes back in eval mode; `progress` shows a bar from the second
        second on; part: see formats.tensors.load_tensors. Raises FileNotFoundError or ValueError naming the file and the
        tensor.
        """
        try:
            from formats.tensors import load_tensors
        except ImportError:  # this file was copied alone
            model, tensors = open_plain_folder(Path(path), dtype, device)
        else:
            model, stored = open_model(path)
            tensors = ((name, tensor) for _, name, tensor in load_tensors(stored, dtype, device, progress, model, part))
        fill(model, tensors)
        model._tie()
        return model.eval()

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write config.json and model.safetensors, which transformers loads as LlamaForCausalLM or the family's own.

        A tied lm_head is stored once; one that an adapter was merged into is tied no more, and config.json says so.
        Adapters of lora.py are not part of it: merge them first to store their effect.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        embedding = self.model.embed_tokens.weight
        tied = self.lm_head.weight.data_ptr() == embedding.data_ptr()  # once unmerged it is another parameter, on the same memory
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.named_parameters()
                   if not name.endswith((".lora_A", ".lora_B")) and not (tied and name == "lm_head.weight")}
        fields = {"tie_word_embeddings": tied, "torch_dtype": str(embedding.dtype).removeprefix("torch.")}
        text = json.dumps(self.config.to_dict() | fields, indent=2) + "\n"
        _write(directory / "model.safetensors", lambda file: save_file(tensors, file, {"format": "pt"}))
        _write(directory / "config.json", lambda file: file.write_text(text, encoding="utf-8"))


class ValueModel(nn.Module):
    """A scalar for every position: a backbone with `.hidden` and `.config.hidden_size`, and a float32 head D → 1.

    The head starts at zero (released code), so that the first advantages are the rewards themselves. The backbone's
    output layer is never computed. To train adapters and head, call add_lora on `.backbone`: on the whole it would
    freeze the head too.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        device = next(backbone.parameters()).device
        self.head = nn.Linear(backbone.config.hidden_size, 1, device="meta")  # no random start, no draw from the RNG
        self.head.weight = nn.Parameter(torch.zeros(1, backbone.config.hidden_size, dtype=torch.float32, device=device))
        self.head.bias = nn.Parameter(torch.zeros(1, dtype=torch.float32, device=device))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, S) → values (B, S), float32."""
        return self.head(self.backbone.hidden(input_ids, attention_mask).float()).squeeze(-1)


# ------------------------------------------------------------------------------------------------------------- sampling


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """One token a row from softmax(logits / temperature), by inverting its distribution function: (N, V) → (N,).

    uniforms (N,) in [0, 1) carry all the randomness: one number a row, where torch.multinomial draws V of them.
    top_p keeps the smallest set of likeliest tokens whose probability reaches top_p (Holtzman et al. 2020).
    Temperature 0 takes the likeliest token.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        probabilities, tokens = probabilities.sort(dim=-1, descending=True)
    cdf = probabilities.cumsum(-1)
    mass = cdf[:, -1:]
    if top_p < 1:
        mass = cdf.gather(-1, torch.searchsorted(cdf, top_p * mass))
    # right=True steps over tokens of probability zero. Times a uniform of at most 1 - 2^-24, float32's largest below 1,
    # the mass is always rounded to less than itself, so that no token outside the nucleus can be picked.
    index = torch.searchsorted(cdf, uniforms[:, None] * mass, right=True)
    return (tokens.gather(-1, index) if top_p < 1 else index)[:, 0]


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off inside, and every module's own mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_generate(input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, temperature: float,
                    top_p: float) -> None:
    if attention_mask.shape != input_ids.shape or input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids {tuple(input_ids.shape)} and attention_mask {tuple(attention_mask.shape)} must "
                         "be one shape (B, P), neither zero")
    if not bool(attention_mask[:, -1].bool().all()):
        raise ValueError("attention_mask ends in padding: prompts must be padded on the left")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: at least 1")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: a number from 0 (greedy) up")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: above 0 and at most 1")


@torch.no_grad()
def generate(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int,
             temperature: float = 1.0, top_p: float = 1.0, eos_token_id: int | Sequence[int] | None = None,
             pad_token_id: int | None = None, generator: torch.Generator | Tensor | None = None,
             progress: Callable[[int], None] | None = None,
             return_logprobs: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Sample a response to each left-padded prompt: (B, P) → (B, T), T the longest response, at most max_new_tokens.

    A response runs through its first EOS and holds pad_token_id after it. eos_token_id None means config.json's, an
    empty sequence means never to stop; pad_token_id None means config.json's, else the EOS.
    One uniform a row and token is drawn from `generator` before the first token, max_new_tokens · B in all: equal
    states give equal samples, and what one row draws doesn't depend on when another ends. `generator` may also be
    these draws themselves, (max_new_tokens, B) in [0, 1): a row's answer then doesn't depend on which rows are beside it.
    The model is in eval mode inside (no dropout) and gets its own modes back. `progress` is called with the number of
    unfinished rows at each token. With return_logprobs the result is (responses, logprobs (B, T)): the log-probability
    of each token under softmax(logits / temperature), float32, 0 after the EOS. Raises ValueError for bad arguments,
    FloatingPointError for logits that are NaN or infinite.
    With lora.py, merge_lora before and unmerge_lora after a long generation saves its per-token cost.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    check_generate(input_ids, attention_mask, max_new_tokens, temperature, top_p)
    if return_logprobs and (temperature == 0 or top_p < 1):
        raise ValueError(f"return_logprobs with temperature {temperature} and top_p {top_p}: the tokens are not drawn from "
                         "softmax(logits / temperature)")
    eos = model.config.eos_token_id if eos_token_id is None else eos_token_id
    eos = [eos] if isinstance(eos, int) else list(eos or ())
    pad = model.config.pad_token_id if pad_token_id is None else pad_token_id
    pad = pad if pad is not None else (eos or [0])[0]

    (B, P), device = input_ids.shape, input_ids.device
    rows = torch.arange(B, device=device)  # the place in the batch of each of the N rows still going
    responses = torch.full((B, max_new_tokens), pad, dtype=torch.long, device=device)
    mask = torch.cat((attention_mask.bool(), rows.new_ones(B, max_new_tokens, dtype=torch.bool)), dim=1)
    uniforms = generator if isinstance(generator, Tensor) else \
        torch.rand(max_new_tokens, B, generator=generator, device=generator.device if generator else device)
    if uniforms.shape != (max_new_tokens, B):
        raise ValueError(f"draws {tuple(uniforms.shape)} must be (max_new_tokens, B) = {(max_new_tokens, B)}")
    uniforms = uniforms.to(device)
    stops = torch.tensor(eos, dtype=torch.long, device=device)
    logprobs = torch.zeros(responses.shape, device=device)
    cache = KVCache(model.config, B, P + max_new_tokens, model.lm_head.weight.dtype, device)
    with eval_mode(model):
        state = model.hidden(input_ids, mask[:, :P], cache)[:, -1]
        for t in range(max_new_tokens):
            logits = model.lm_head(state).float()  # (N, V)
            if not bool(logits.amax(-1).isfinite().all()):
                raise FloatingPointError(f"the policy's logits at response token {t} are NaN or infinite: it can't be sampled")
            token = sample_tokens(logits, uniforms[t, rows], temperature, top_p)
            responses[rows, t] = token
            if return_logprobs:
                scaled = logits / temperature
                logprobs[rows, t] = scaled.gather(1, token[:, None])[:, 0] - scaled.logsumexp(-1)
            finished = torch.isin(token, stops)
            if bool(finished.any()):
                order = cache.drop(finished)
                rows, mask, token = rows[order], mask[order], token[order]
            if progress is not None:
                progress(cache.rows)
            if not cache.rows or t + 1 == max_new_tokens:
                return (responses[:, : t + 1], logprobs[:, : t + 1]) if return_logprobs else responses[:, : t + 1]
            state = model.hidden(token[:, None], mask[:, : P + t + 1], cache)[:, -1]


# ---------------------------------------------------------------------------------------------------------- checkpoints


class _NoInit(TorchFunctionMode):
    """Skips torch.nn.init. On the meta device it has nothing to fill, yet imports torch's compiler: a second, 80 MB."""

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def without_memory(config: LlamaConfig) -> Llama:
    """A model on the meta device: names and shapes, to be filled with tensors."""
    try:
        with torch.device("meta"), _NoInit():
            return Llama(config)
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes whose product no machine can count
        raise ValueError(f"no model of these sizes can be built ({str(error).splitlines()[0]})") from error


def open_model(path: str | os.PathLike) -> tuple[Llama, dict[str, Any]]:
    """(a model without memory, the stored tensors that fill it, formats.tensors.Stored by name) of any layout."""
    from formats.read import open_checkpoint
    from formats.tensors import check_names

    config, stored = open_checkpoint(path, LlamaConfig.from_dict)
    if len(stored) < config.num_hidden_layers:  # else a nonsensical number would be built for hours
        raise ValueError(f"{path}: num_hidden_layers is {config.num_hidden_layers}, but there are {len(stored)} tensors")
    model = without_memory(config)
    return model, check_names(path, stored, dict(model.named_parameters()))  # a tied lm_head is in it once, as the embedding


def fill(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Puts each tensor in the place of the parameter of that name."""
    for name, tensor in tensors:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))


def open_plain_folder(path: Path, dtype: torch.dtype | None, device: Any) -> tuple[Llama, Iterable[tuple[str, Tensor]]]:
    """(a model without memory, its tensors) for a copy of this file without formats/: config.json and *.safetensors."""
    config = LlamaConfig.from_dict(json.loads((path / "config.json").read_text(encoding="utf-8-sig")))
    tensors = {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    model = without_memory(config)
    for name, parameter in model.named_parameters():  # a tied lm_head is in it once, as the embedding
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != parameter.shape or not tensor.is_floating_point() or tensor.itemsize == 1:
            raise ValueError(f"{path}: tensor {name} is missing, quantised, or not of shape {tuple(parameter.shape)}")
    return model, [(name, tensors[name].to(device, dtype)) for name, _ in model.named_parameters()]


def _write(file: Path, write: Callable[[Path], object]) -> None:
    """Write beside the file and rename: a crash in between leaves the last good file whole."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes files that only their owner may read
        os.replace(temporary, file)
    except SafetensorError as error:  # its own kind for a full disk
        raise OSError(f"{file}: cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def main() -> int:
    """convert and recover, which need more than this file."""
    from formats import convert

    return convert.main(open_model)


if __name__ == "__main__":
    sys.exit(main())
