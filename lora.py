# SPDX-License-Identifier: MIT
"""Low-rank adaptation of linear layers (Hu et al. 2021), as in the paper's section 2.2: add, switch off, merge, store.

    h_out = W h_in + (alpha / rank) B A h_in,    W frozen, A and B trained                                       (Eq. 1)

    add_lora(model)                          # rank 8, alpha 64, dropout 0.1 on q, k, v and o of every layer
    with lora_disabled(model): ...           # the base model, bit for bit: the reference policy for free
    with lora_weights(model, start): ...     # base + an earlier state of the adapters: the reference of a second run
    save_lora(model, "run/policy")           # loads in PEFT as it is

It works on any module with nn.Linear layers and imports nothing of this project. Beside formats/ it also reads the paper's
released adapters, and as a program it folds stored adapters into the stored weights of their base, one shard at a time:

    python lora.py merge --base models/sft --adapter runs/kl-s0/step-0020/policy --out models/ppo --dtype bfloat16

Departs from the released code: adapters are float32 whatever the base's dtype, because at the paper's learning rate of 1e-5
most bf16 updates round away; and merging is an explicit step, never a side effect of `.eval()`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ALPHA = 64  # section 2.2; what an adapter is scaled by whose file doesn't say
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PEFT_PREFIX = "base_model.model."  # PEFT names tensors base_model.model.<module>.lora_A.weight


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained low-rank update: base(x) + scaling · B A dropout(x).

    It takes over the base's weight and bias (the same tensors under the same state-dict names) and adds
    lora_A (rank, in) and lora_B (out, rank), both float32. B starts at zero, so a new adapter changes nothing; A is
    drawn from torch's global generator, or with draw=False left for load_lora to fill.
    While merged, the forward uses the merged weight alone, without dropout, and A and B get no gradient.
    """

    def __init__(self, base: nn.Linear, rank: int = 8, alpha: float = 64, dropout: float = 0.1,
                 use_rslora: bool = False, draw: bool = True):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank is {rank}: at least 1")
        if not math.isfinite(alpha):
            raise ValueError(f"alpha is {alpha}: a finite number")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}: from 0 up to but not 1")
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=device))
        if draw:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # the start of Hu et al.'s code and of PEFT
        self.rank, self.dropout, self.enabled = rank, dropout, True
        self.set_scaling(alpha, use_rslora)
        self.register_buffer("base_weight", None, persistent=False)  # the base's weight while merged, else None
        self.cast: tuple[Tensor, Tensor] | None = None  # A and scaling · B in the base's dtype, inside lora_cast
        self.train(base.training)

    def set_scaling(self, alpha: float, use_rslora: bool = False) -> None:
        """Set the factor of the update from alpha."""
        self.alpha, self.use_rslora = alpha, use_rslora
        self.scaling = lora_scaling(self.rank, alpha, use_rslora)

    @property
    def merged(self) -> bool:
        return self.base_weight is not None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out) in the base's dtype; the low-rank path runs in float32."""
        if not self.enabled:
            return F.linear(x, self.base_weight if self.merged else self.weight, self.bias)
        out = F.linear(x, self.weight, self.bias)
        if self.merged:
            return out
        if self.cast is not None:
            lora_A, scaled_B = self.cast
            return out + F.linear(F.linear(x, lora_A), scaled_B)
        # Eq. 1: out + scaling · B A dropout(x), that is F.linear(F.linear(F.dropout(x.float(), p), A) * scaling, B)
        dropout = self.dropout if self.training else 0.0
        return out + LowRank.apply(x, self.lora_A, self.lora_B, self.scaling, dropout).to(out.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Put W + scaling · B A in place of W, computed in float32 and rounded once; twice is once."""
        if not self.merged:
            merged = merged_weight(self.weight, self.lora_A, self.lora_B, self.scaling)
            self.base_weight = self.weight.detach()
            # A new parameter, not a change in place: another model may share this weight (the reward model's backbone).
            self.weight = nn.Parameter(merged, requires_grad=False)

    def unmerge(self) -> None:
        """Put the kept W back: subtracting the update instead would leave rounding errors behind."""
        if self.merged:
            self.weight, self.base_weight = nn.Parameter(self.base_weight, requires_grad=False), None

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
                f"alpha={self.alpha}, dropout={self.dropout}, merged={self.merged}")


def lora_scaling(rank: int, alpha: float, use_rslora: bool = False) -> float:
    """alpha / rank, or alpha / sqrt(rank) with use_rslora (Kalajdzievski 2023)."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def merged_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float,
                  dtype: torch.dtype | None = None) -> Tensor:
    """W + scaling · B A (out, in), computed in float32 and rounded once, to dtype or else to the weight's own."""
    return (weight.float() + scaling * (lora_B.float() @ lora_A.float())).to(dtype or weight.dtype)


# -------------------------------------------------------------------------------------- the same formula in less memory


class LowRank(torch.autograd.Function):
    """(x (..., in), A, B, scaling, dropout) → scaling · B A dropout(x), float32.

    In plain torch: F.linear(F.linear(F.dropout(x.float(), dropout), A) * scaling, B). Autograd would keep
    x.float(), its dropout and a mask for each of the four adapters of a layer; this keeps x, which they share, and one
    byte an element for the mask.
    """

    @staticmethod
    def forward(ctx, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float) -> Tensor:
        keep = keep_mask(x, dropout) if dropout else None
        ctx.scaling = scaling / (1 - round(dropout * 65536) / 65536)  # what is kept stands for what is not
        with torch.autocast(x.device.type, enabled=False):  # it would round what is float32 on purpose, and only forward
            low = F.linear(_kept(x, keep), lora_A) * ctx.scaling
            ctx.save_for_backward(x, lora_A, lora_B, low, keep)
            # Cast to x's dtype by the caller: torch 2.11 compiled gradients of zero where a cast here had nothing to do.
            return F.linear(low, lora_B)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x, lora_A, lora_B, low, keep = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            wide = grad.float().flatten(0, -2)  # (N, out)
            grad_low = (wide @ lora_B).mul_(ctx.scaling)  # (N, rank)
            grad_A = grad_low.t() @ _kept(x, keep).flatten(0, -2)
            grad_B = wide.t() @ low.flatten(0, -2)
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = (grad_low @ lora_A).view(x.shape).to(x.dtype)
                grad_x = grad_x if keep is None else grad_x.mul_(keep if x.is_cuda else keep.to(x.dtype))
        return grad_x, grad_A, grad_B, None, None


def _kept(x: Tensor, keep: Tensor | None) -> Tensor:
    """x in float32, with zeros for what was dropped."""
    if keep is None:
        return x.float()
    if x.is_cuda:  # one pass over memory instead of three
        return torch.mul(x, keep, out=torch.empty_like(x, dtype=torch.float32))
    return (x * keep.to(x.dtype)).float()  # a CPU multiplies mixed types far slower


def keep_mask(like: Tensor, dropout: float) -> Tensor:
    """1 where dropout keeps an element and 0 elsewhere, of like's shape, uint8, from torch's global generator.

    Sixteen random bits decide an element, so that the probability is rounded to 1/65536. On a CPU this takes a fifth of
    F.dropout's time, which draws a number for each element and was the largest cost of the adapters.
    """
    if torch.compiler.is_compiling():  # it can't follow random_
        if like.is_cuda:  # drawn inside the kernel that uses the mask
            return (torch.rand(like.shape, device=like.device) >= round(dropout * 65536) / 65536).to(torch.uint8)
        words = torch.randint(-2**63, 2**63 - 1, (-(-like.numel() // 4),), device=like.device)
    else:
        words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device).random_(-2**63, None)
    drawn = words.view(torch.int16)[: like.numel()].view(like.shape)  # uniform over -32768 ... 32767
    return torch.ge(drawn, round(dropout * 65536) - 32768, out=torch.empty_like(drawn, dtype=torch.uint8))


# ----------------------------------------------------------------------------------------------- add, switch off, merge


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every adapted layer of the model by its name, relative to the module passed."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """lora_A and lora_B of every adapted layer, for an optimiser."""
    return [parameter for layer in lora_layers(model).values() for parameter in (layer.lora_A, layer.lora_B)]


def add_lora(model: nn.Module, rank: int = 8, alpha: float = 64, dropout: float = 0.1,
             targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj")) -> nn.Module:
    """Adapt in place every nn.Linear whose name ends in one of targets, freeze all else and return the model.

    The defaults are the paper's (section 2.2: alpha 1 instead of 64 costs about 6 points of win rate). A is drawn
    from torch's global generator. Raises ValueError when nothing matches or the model is already adapted.
    """
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = [name for name in linear if _matches(name, targets)]
    if lora_layers(model):
        raise ValueError(f"the model already has LoRA layers ({next(iter(lora_layers(model)))}, ...): add them once")
    if not names:
        raise ValueError(f"targets {list(targets)} match no nn.Linear of {type(model).__name__}")
    _adapt(model, dict.fromkeys(names, (rank, alpha)), dropout)
    return model


def _matches(name: str, targets: Sequence[str]) -> bool:
    """PEFT's rule: the whole name, or its last parts."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _adapt(model: nn.Module, sizes: Mapping[str, tuple[int, float]], dropout: float, use_rslora: bool = False,
           draw: bool = True) -> None:
    """Adapts the layers that sizes names, each with its (rank, alpha)."""
    model.requires_grad_(False)
    for name, (rank, alpha) in sizes.items():
        owner, _, leaf = name.rpartition(".")
        base = model.get_submodule(name)
        setattr(model.get_submodule(owner), leaf, LoRALinear(base, rank, alpha, dropout, use_rslora, draw))


@contextlib.contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base, bit for bit, merged or not. Nests, and restores after an exception.

    Raises ValueError for a model without adapters: as a reference it would be the policy itself, and every KL zero.
    """
    layers = list(lora_layers(model).values())
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA layers to switch off")
    with _temporarily(layers, "enabled", [False] * len(layers)):
        yield


@contextlib.contextmanager
def lora_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the adapters hold `tensors`, a lora_snapshot taken earlier, instead of their own, bit for bit.

    The reference of a policy that starts from a trained adapter: base + that adapter, not the bare base. Nothing is
    copied: the parameters point at `tensors` (float32, on their device), and back afterwards, after an exception too.
    For use under torch.no_grad: a backward pass or optimiser step inside would use or change the snapshot; one after
    it, through a graph built before, is as if nothing had happened. Raises ValueError for no adapters or merged ones, a
    missing or unexpected name, a wrong shape, and tensors that are the adapters' own memory: every KL would be zero.
    """
    own = _adapters(model)
    if any(layer.merged for layer in lora_layers(model).values()):
        raise ValueError("the model's adapters are merged: call unmerge_lora before lora_weights")
    if odd := sorted(own.keys() ^ tensors.keys()):
        raise ValueError(f"{'missing' if odd[0] in own else 'unexpected'} tensor {odd[0]} in the adapters' snapshot")
    for name, parameter in own.items():
        if tensors[name].shape != parameter.shape:
            raise ValueError(f"tensor {name} in the adapters' snapshot has shape {tuple(tensors[name].shape)}, not "
                             f"{tuple(parameter.shape)}")
        if tensors[name].untyped_storage()._cdata == parameter.untyped_storage()._cdata:  # fake tensors have this too
            raise ValueError(f"tensor {name} is the very memory of the adapter: lora_snapshot takes a copy")
    with _temporarily(list(own.values()), "data", [tensors[name].detach().to(own[name]) for name in own]):
        yield


@contextlib.contextmanager
def lora_cast(model: nn.Module) -> Iterator[None]:
    """Inside, the adapters compute in the base's dtype, beside the weights: for sampling from a bf16 model.

    Folded into bf16 weights, an update smaller than their last bit would vanish as a whole; rounded by itself it keeps
    eight bits. Sampling was a tenth faster than with the float32 path (bench/README.md). A and B get no gradient inside.
    The model must not be merged.
    """
    layers = list(lora_layers(model).values())
    dtypes = [layer.weight.dtype for layer in layers]
    cast = [(layer.lora_A.detach().to(dtype), (layer.scaling * layer.lora_B.detach()).to(dtype))
            for layer, dtype in zip(layers, dtypes, strict=True)]
    with _temporarily(layers, "cast", cast):
        yield


@contextlib.contextmanager
def _temporarily(owners: Sequence[Any], attribute: str, values: Sequence[Any]) -> Iterator[None]:
    """Inside, each owner's attribute has its value; the old ones are back afterwards, after an exception too."""
    before = [getattr(owner, attribute) for owner in owners]
    try:
        for owner, value in zip(owners, values, strict=True):
            setattr(owner, attribute, value)
        yield
    finally:
        for owner, value in zip(owners, before, strict=True):
            setattr(owner, attribute, value)


def merge_lora(model: nn.Module) -> nn.Module:
    """Fold every adapter into its weight, for sampling or for storing one whole model. Idempotent; returns the model.

    A merged model must not be trained: its adapters get no gradient. It holds each adapted weight twice.
    """
    for layer in lora_layers(model).values():
        layer.merge()
    return model


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Undo merge_lora, bit for bit. Idempotent; returns the model."""
    for layer in lora_layers(model).values():
        layer.unmerge()
    return model


# -------------------------------------------------------------------------------------------------------------- storing


def _adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA layers: call add_lora or load_lora first")
    return {f"{PEFT_PREFIX}{name}.{leaf}.weight": getattr(layer, leaf)
            for name, layer in layers.items() for leaf in ("lora_A", "lora_B")}


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters under PEFT's names, base_model.model.<name>.lora_A.weight, <name> relative to the module passed.

    They are views, which follow the model as it trains; lora_snapshot keeps what it is now.
    """
    return {name: parameter.detach() for name, parameter in _adapters(model).items()}


def lora_snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of lora_state_dict, for lora_weights."""
    return {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}


def save_lora(model: nn.Module, directory: str | os.PathLike, base_model_name_or_path: str | None = None) -> None:
    """Write adapter_model.safetensors and adapter_config.json, which PEFT loads onto the base model as they are."""
    tensors = {name: tensor.contiguous() for name, tensor in lora_state_dict(model).items()}
    layers = lora_layers(model)
    layer = next(iter(layers.values()))
    rank, ranks = _common({name: each.rank for name, each in layers.items()})
    # An adapter has one use_rslora: where a layer has another, its alpha becomes the one that scales as much.
    alpha, alphas = _common({name: each.alpha if each.use_rslora == layer.use_rslora else
                             each.scaling / lora_scaling(each.rank, 1, layer.use_rslora) for name, each in layers.items()})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model_name_or_path,
              "r": rank, "rank_pattern": ranks, "lora_alpha": alpha, "alpha_pattern": alphas, "lora_dropout": layer.dropout,
              "use_rslora": layer.use_rslora, "target_modules": _target_modules(model, layers), "bias": "none",
              "fan_in_fan_out": False, "inference_mode": True}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2) + "\n"
    _write(directory / "adapter_model.safetensors", lambda file: save_file(tensors, file, {"format": "pt"}))
    _write(directory / "adapter_config.json", lambda file: file.write_text(text, encoding="utf-8"))


def _common(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(the commonest of the layers' values, {a pattern of PEFT's that matches one layer: its value} for all others)."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {f"^{re.escape(name)}": value for name, value in values.items() if value != common}


def _target_modules(model: nn.Module, layers: dict[str, LoRALinear]) -> list[str]:
    """The short names that select exactly the adapted layers (q_proj, ...), else their full names."""
    short = sorted({name.rpartition(".")[2] for name in layers})
    linear = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, LoRALinear))}
    exact = {name for name in linear if _matches(name, short)} == set(layers)
    return short if exact else sorted(layers)


def load_lora(model: nn.Module, path: str | os.PathLike, part: str | None = None) -> dict[str, Tensor]:
    """Read adapters into the model: a PEFT folder, or (beside formats/) the paper's released pytorch_model.bin or its folder.

    A model without adapters gets them first, with the stored configuration, everything else frozen (a ValueModel's
    head too). An adapted one keeps its dropout and takes the stored rank's scaling; the released files hold no
    alpha, so there it keeps its own (new: 64). Those files hold a policy and a value model: part is "policy" or
    "value", None takes "value" for a module with a `backbone` and "policy" otherwise, or the only part there.

    Returns what the file holds besides adapters, untouched: the released value_head (1, D) and value_head_bias (1)
    when the value part was read, else nothing. Raises FileNotFoundError, or ValueError naming file and tensor, before
    anything in the model has changed.
    """
    if part not in (None, "policy", "value"):
        raise ValueError(f"part is {part!r}: 'policy', 'value' or None")
    file, tensors, settings, rest = _read_adapter(Path(path), part, value_model=hasattr(model, "backbone"))
    adapted = lora_layers(model)
    if any(layer.merged for layer in adapted.values()):
        raise ValueError(f"{file}: the model's adapters are merged: call unmerge_lora before loading")
    linear = adapted or {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    sizes = _adapted_layers(file, tensors, settings, linear, dict(model.named_parameters(remove_duplicate=False)),
                            f"{type(model).__name__} has no {'adapter there' if adapted else 'such linear layer'}")
    for name, layer in adapted.items():
        if name not in sizes:
            raise ValueError(f"{file}: missing tensor {name}.lora_A")
        if layer.rank != sizes[name][0]:
            raise ValueError(f"{file}: {name}.lora_A has rank {sizes[name][0]}, the model's adapter {layer.rank}")
    if not adapted:
        # Nothing is drawn: a run that loads adapters into one more model must not differ from then on.
        _adapt(model, sizes, settings["dropout"], draw=False)
    for name, layer in lora_layers(model).items():
        if "alpha" in settings:
            layer.set_scaling(sizes[name][1], settings["use_rslora"])
        with torch.no_grad():
            layer.lora_A.copy_(tensors[f"{name}.lora_A"])
            layer.lora_B.copy_(tensors[f"{name}.lora_B"])
    return rest


def _read_adapter(path: Path, part: str | None, value_model: bool = False
                  ) -> tuple[Path, dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """(file, tensors by bare name, settings, the value head) of a PEFT folder or a released file."""
    if (path / "adapter_config.json").is_file():
        return *_read_peft(path), {}
    try:
        from formats.adapters import read_released
    except ImportError:  # this file was copied alone
        raise FileNotFoundError(f"{path}: no adapter_config.json: not an adapter in PEFT's layout") from None
    return read_released(path, part, value_model)


# What PEFT's settings must be: otherwise A and B are not the whole change, or the stored base isn't what they change.
PEFT_PLAIN = {"peft_type": ("LORA",), "bias": ("none", None),
              "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
              **dict.fromkeys(("use_dora", "modules_to_save", "fan_in_fan_out", "lora_bias", "layer_replication",
                               "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "use_qalora",
                               "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"), (None, False, {}, []))}
WAY_OUT = ("merge it with PEFT first, PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(DIR), and name "
           "DIR as the model")
IS_RANK = (lambda x: type(x) is int and 0 < x < 10**6, "a whole number from 1 up")
IS_ALPHA = (lambda x: type(x) in (int, float) and 0 < abs(x) < 1e30, "a finite number other than 0")
PEFT_NUMBERS = {"r": IS_RANK, "lora_alpha": IS_ALPHA,
                "lora_dropout": (lambda x: type(x) in (int, float) and 0 <= x < 1, "a number from 0 up to but not 1"),
                "use_rslora": (lambda x: type(x) is bool, "true or false")}


def _read_peft(directory: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """(file, tensors by bare name, settings) of a PEFT folder.

    The tensors tell which layers are adapted: target_modules may be a pattern, and isn't read.
    """
    config_file = directory / "adapter_config.json"
    config = {"lora_dropout": 0.0, "use_rslora": False} | _read_json(config_file)
    for key, allowed in PEFT_PLAIN.items():
        if config.get(key, allowed[0]) not in allowed:
            where = " (it can where the base has biases)" if key == "lora_bias" else ""
            raise ValueError(f"{config_file}: {key} {config[key]!r:.60} is not supported: {allowed[0]!r} is; {WAY_OUT}{where}")
    for key, (right, words) in PEFT_NUMBERS.items():
        if not right(config.get(key)):
            raise ValueError(f"{config_file}: not a LoRA configuration of PEFT: {key} is {config.get(key)!r:.60}, not {words}")
    settings = dict(zip(("rank", "alpha", "dropout", "use_rslora"), (config[key] for key in PEFT_NUMBERS), strict=True))
    for key, (right, words) in (("rank_pattern", IS_RANK), ("alpha_pattern", IS_ALPHA)):
        settings[key] = config.get(key) or {}
        if not (isinstance(settings[key], dict) and all(map(right, settings[key].values()))):
            raise ValueError(f"{config_file}: {key} is {settings[key]!r:.60}: it must give {words} for each pattern of names")
        try:
            list(map(re.compile, settings[key]))
        except re.error as error:
            raise ValueError(f"{config_file}: {key}: {error.pattern!r:.60} is no regular expression ({error})") from error
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (file := directory / name).is_file():
            return file, {_bare_name(file, name): tensor for name, tensor in _read_tensors(file).items()}, settings
    raise FileNotFoundError(f"{directory / 'adapter_model.safetensors'}: not found beside adapter_config.json")


def _bare_name(file: Path, name: str) -> str:
    """base_model.model.X.lora_A.weight → X.lora_A; base_model.model.X.base_layer.weight, a copy of the base's → X.weight"""
    if name.startswith(2 * PEFT_PREFIX):
        raise ValueError(f"{file}: tensor {name} is wrapped twice, as when a PEFT model is made of a PEFT model and "
                         f"stored: take one {PEFT_PREFIX} off every name")
    bare = name.removeprefix(PEFT_PREFIX)
    if bare != name and bare.endswith((".lora_A.weight", ".lora_B.weight")):
        return bare.removesuffix(".weight")
    return bare.replace(".base_layer.", ".")


def _adapted_layers(file: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], layers: Collection[str],
                    weights: Mapping[str, Tensor], lacks: str) -> dict[str, tuple[int, float]]:
    """{layer: (rank, alpha)} of those that tensors adapt, each of which must be one of layers, else `lacks`, and fit it.

    weights: the base's, X.weight (out, in) for each layer X. PEFT stores a copy of the output layer's beside its adapter:
    passed over where it is the same.
    """
    if not any("lora_" in name for name in tensors):
        raise ValueError(f"{file}: holds no adapter: none of its {len(tensors)} tensors is a lora_A or lora_B")
    sizes = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf not in ("lora_A", "lora_B"):
            if name not in weights or not _same(tensor, weights[name]):
                raise ValueError(f"{file}: unexpected tensor {name}: neither the lora_A or lora_B of a layer nor the same as in "
                                 f"the base; {WAY_OUT}")
            continue
        if layer not in layers:
            raise ValueError(f"{file}: unexpected tensor {name}: {lacks}")
        rank, alpha = sizes[layer] = _rank_and_alpha(layer, settings)
        out, into = weights[f"{layer}.weight"].shape
        shape = (rank, into) if leaf == "lora_A" else (out, rank)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{file}: tensor {name} has shape {tuple(tensor.shape)}, not {shape} as rank {rank} asks")
        if tensor.dtype not in FLOATS or not bool(tensor.float().isfinite().all()):
            raise ValueError(f"{file}: tensor {name} ({tensor.dtype}) holds NaN, infinity or no floating-point numbers")
        twin = f"{layer}.{'lora_B' if leaf == 'lora_A' else 'lora_A'}"
        if twin not in tensors:
            raise ValueError(f"{file}: missing tensor {twin}")
    return sizes


def _rank_and_alpha(layer: str, settings: Mapping[str, Any]) -> tuple[int, float]:
    """Of a layer, by PEFT's rule (get_pattern_key): the first pattern that is the name, or its end from a dot on."""
    def of_layer(key: str, default: float) -> Any:
        patterns = settings.get(f"{key}_pattern", {})
        return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer)), default)

    return of_layer("rank", settings["rank"]), of_layer("alpha", settings.get("alpha", ALPHA))


def _same(copy: Tensor, weight: Tensor) -> bool:
    """Whether a stored copy is the weight, in the coarser of their two dtypes."""
    weight = weight.detach().cpu()
    return copy.shape == weight.shape and (torch.equal(copy.to(weight.dtype), weight) or torch.equal(copy, weight.to(copy.dtype)))


def _layer_of(name: str) -> str:
    """X.lora_A → X"""
    return name.rpartition(".")[0]


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors or .bin file, on the CPU, mapped and so read from disk only when they are used.

    Pickled code in a .bin is refused, not run.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # Before torch 1.6 a .bin was no zip file, and can't be mapped.
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # torch, pickle, zip and safetensors each raise their own kinds for a damaged file
        # Of torch's several lines one tells the reason; the others tell how to run the pickled code after all.
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "WeightsUnpickler error: " in line), lines[0])
        raise ValueError(f"{file}: cannot be read: truncated, damaged or more than tensors "
                         f"({reason.strip().partition('. ')[0]})") from error
    if not (isinstance(stored, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in stored.items())):
        raise ValueError(f"{file}: holds something other than tensors by name")
    return stored


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, not a JSON object")
    return content


def _write(file: Path, write: Callable[[Path], object]) -> None:
    """Write beside the file and rename: a crash in between leaves the last good file whole."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes files that only their owner may read, and a server often runs as another user
        os.replace(temporary, file)
    except SafetensorError as error:  # its own kind for a full disk
        raise OSError(f"{file}: cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------- the program: lora.py merge


@torch.no_grad()
def merge_checkpoint(base: str | os.PathLike, adapter: str | os.PathLike, out: str | os.PathLike,
                     dtype: torch.dtype | None = None, progress: bool = False) -> tuple[int, int]:
    """Write base + adapter as one plain Hugging Face folder, out; returns (merged layers, bytes of all tensors).

    base: a Hugging Face folder, safetensors or .bin, in one file or in shards; the file names are kept. adapter: a
    PEFT folder or the paper's released pytorch_model.bin, of which the policy is taken. Every adapted weight becomes
    what merge_lora makes of it, all else is unchanged; with dtype every tensor is rounded to it, once. Without, all are
    stored as they were, or in float32 where rounding would take half of the update. An output layer that is adapted and
    tied to the embedding gets a weight of its own. One shard is in memory at a time. All names and shapes are checked
    before anything is written; out appears when it is complete. Needs formats/. Raises FileNotFoundError or ValueError
    naming file and tensor, also when out already holds files.
    """
    from formats.adapters import open_base, rewrite, tied_output
    from formats.tensors import read_weight

    config, stored = open_base(base)
    file, tensors, settings, _ = _read_adapter(Path(adapter), part="policy")
    tied = tied_output(config, stored)
    named = {f"{_layer_of(name)}.weight" for name in tensors}
    weights = {name: read_weight(where, name) for name, where in (stored | tied).items() if name in named}
    layers = {_layer_of(name) for name, weight in weights.items() if weight.dim() == 2}
    sizes = _adapted_layers(file, tensors, settings, layers, weights, f"{base} has no weight of its own for that layer")
    del weights  # their files are mapped: none of them was read, and none must stay
    if tied and "lm_head" in sizes:  # from here on it is no longer the embedding
        stored, config = stored | tied, config | {"tie_word_embeddings": False}

    changes = {f"{layer}.weight": partial(merged_weight, lora_A=tensors[f"{layer}.lora_A"], lora_B=tensors[f"{layer}.lora_B"],
                                          scaling=lora_scaling(*size, settings.get("use_rslora", False)), dtype=torch.float32)
               for layer, size in sizes.items()}
    return len(sizes), rewrite(base, config, stored, out, changes, dtype, progress)


def main(argv: Sequence[str] | None = None) -> int:
    """The program, which needs more than this file. Exit code 0, or 2 with one line for bad input."""
    from formats import adapters

    return adapters.main(merge_checkpoint, argv)


if __name__ == "__main__":
    sys.exit(main())
