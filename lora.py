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

import argparse
import contextlib
import json
import math
import os
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ALPHA = 64  # section 2.2; what an adapter is scaled by whose file doesn't say
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
    """(x (..., in), A, B, scaling, dropout) → scaling · B A dropout(x), computed in float32, in x's dtype.

    In plain torch: F.linear(F.linear(F.dropout(x.float(), dropout), A) * scaling, B).to(x.dtype). Autograd would keep
    x.float(), its dropout and a mask for each of the four adapters of a layer; this keeps x, which they share, and one
    byte an element for the mask.
    """

    @staticmethod
    def forward(ctx, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float) -> Tensor:
        keep = keep_mask(x, dropout) if dropout else None
        ctx.scaling = scaling / (1 - round(dropout * 65536) / 65536)  # what is kept stands for what is not
        with torch.autocast(x.device.type, enabled=False):  # it would round what is float32 on purpose, and only forward
            low = F.linear(_kept(x, keep), lora_A).mul_(ctx.scaling)
            ctx.save_for_backward(x, lora_A, lora_B, low, keep)
            return F.linear(low, lora_B).to(x.dtype)

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
                grad_x = grad_x if keep is None else grad_x.mul_(keep.to(x.dtype))
        return grad_x, grad_A, grad_B, None, None


def _kept(x: Tensor, keep: Tensor | None) -> Tensor:
    """x in float32, with zeros for what was dropped. A mask of x's own dtype: torch multiplies mixed types far slower."""
    return x.float() if keep is None else (x * keep.to(x.dtype)).float()


def keep_mask(like: Tensor, dropout: float) -> Tensor:
    """1 where dropout keeps an element and 0 elsewhere, of like's shape, uint8, from torch's global generator.

    Sixteen random bits decide an element, so that the probability is rounded to 1/65536. On a CPU this takes a fifth of
    F.dropout's time, which draws a number for each element and was the largest cost of the adapters.
    """
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
    _adapt(model, names, rank, alpha, dropout)
    return model


def _matches(name: str, targets: Sequence[str]) -> bool:
    """PEFT's rule: the whole name, or its last parts."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _adapt(model: nn.Module, names: Sequence[str], rank: int, alpha: float, dropout: float,
           use_rslora: bool = False, draw: bool = True) -> None:
    model.requires_grad_(False)
    for name in names:
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
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model_name_or_path,
              "r": layer.rank, "lora_alpha": layer.alpha, "lora_dropout": layer.dropout, "use_rslora": layer.use_rslora,
              "target_modules": _target_modules(model, layers), "bias": "none", "fan_in_fan_out": False,
              "inference_mode": True}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2) + "\n"
    _write(directory / "adapter_model.safetensors", lambda file: save_file(tensors, file, {"format": "pt"}))
    _write(directory / "adapter_config.json", lambda file: file.write_text(text, encoding="utf-8"))


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
    linear = adapted or {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = _adapted_names(file, tensors, settings["rank"],
                           {name: (layer.out_features, layer.in_features) for name, layer in linear.items()},
                           f"{type(model).__name__} has no {'adapter there' if adapted else 'such linear layer'}")
    for name, layer in adapted.items():
        if name not in names:
            raise ValueError(f"{file}: missing tensor {name}.lora_A")
        if layer.rank != settings["rank"]:
            raise ValueError(f"{file}: {name}.lora_A has rank {settings['rank']}, the model's adapter {layer.rank}")
        if layer.merged:
            raise ValueError(f"{file}: the model's adapters are merged: call unmerge_lora before loading")
    if not adapted:
        # Nothing is drawn: a run that loads adapters into one more model must not differ from then on.
        _adapt(model, names, **({"alpha": ALPHA} | settings), draw=False)
    for name, layer in lora_layers(model).items():
        if "alpha" in settings:
            layer.set_scaling(settings["alpha"], settings["use_rslora"])
        with torch.no_grad():
            layer.lora_A.copy_(tensors[f"{name}.lora_A"])
            layer.lora_B.copy_(tensors[f"{name}.lora_B"])
    return rest


def _read_adapter(path: Path, part: str | None, value_model: bool = False
                  ) -> tuple[Path, dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """(file, tensors by bare name, settings of _adapt, the value head) of a PEFT folder or a released file."""
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
              **dict.fromkeys(("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out",
                               "lora_bias", "layer_replication", "trainable_token_indices", "target_parameters",
                               "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config"),
                              (None, False, {}, []))}


def _read_peft(directory: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """(file, tensors by bare name, settings of _adapt) of a PEFT folder.

    The tensors tell which layers are adapted: target_modules may be a pattern, and isn't read.
    """
    config_file = directory / "adapter_config.json"
    config = {"lora_dropout": 0.0, "use_rslora": False} | _read_json(config_file)
    kinds = {"r": int, "lora_alpha": (int, float), "lora_dropout": (int, float), "use_rslora": bool}
    for key, kind in kinds.items():
        if not isinstance(config.get(key), kind) or key == "r" and config[key] < 1:
            raise ValueError(f"{config_file}: not a LoRA configuration of PEFT: {key} is {config.get(key)!r}")
    for key, allowed in PEFT_PLAIN.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{config_file}: {key} {config[key]!r} is not supported: {allowed[0]!r} is")
    settings = dict(zip(("rank", "alpha", "dropout", "use_rslora"), (config[key] for key in kinds), strict=True))
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        file = directory / name
        if file.is_file():
            return file, {_bare_name(file, name): tensor for name, tensor in _read_tensors(file).items()}, settings
    raise FileNotFoundError(f"{directory / 'adapter_model.safetensors'}: not found beside adapter_config.json")


def _bare_name(file: Path, name: str) -> str:
    """base_model.model.X.lora_A.weight → X.lora_A"""
    if name.startswith(2 * PEFT_PREFIX):
        raise ValueError(f"{file}: tensor {name} is wrapped twice, as when a PEFT model is made of a PEFT model and "
                         f"stored: take one {PEFT_PREFIX} off every name")
    if not (name.startswith(PEFT_PREFIX) and name.endswith((".lora_A.weight", ".lora_B.weight"))):
        raise ValueError(f"{file}: unexpected tensor {name}: PEFT's are {PEFT_PREFIX}<layer>.lora_A.weight or .lora_B")
    return name.removeprefix(PEFT_PREFIX).removesuffix(".weight")


def _adapted_names(file: Path, tensors: Mapping[str, Tensor], rank: int, shapes: Mapping[str, tuple[int, ...]],
                   lacks: str) -> list[str]:
    """The layers that tensors adapt, each of which must be in shapes, name: (out, in), else `lacks`, and fit it."""
    for name, tensor in tensors.items():
        layer, leaf = _layer_of(name), name.rpartition(".")[2]
        if leaf not in ("lora_A", "lora_B") or layer not in shapes:
            raise ValueError(f"{file}: unexpected tensor {name}: {lacks}")
        shape = (rank, shapes[layer][1]) if leaf == "lora_A" else (shapes[layer][0], rank)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{file}: tensor {name} has shape {tuple(tensor.shape)}, not {shape} as rank {rank} asks")
        twin = f"{layer}.{'lora_B' if leaf == 'lora_A' else 'lora_A'}"
        if twin not in tensors:
            raise ValueError(f"{file}: missing tensor {twin}")
    return list(dict.fromkeys(map(_layer_of, tensors)))


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
        content = json.loads(file.read_text(encoding="utf-8"))
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
    what merge_lora makes of it, all else is unchanged; with dtype every tensor is rounded to it, once. One shard is in
    memory at a time. All names and shapes are checked before anything is written; out appears when it is complete.
    Needs formats/. Raises FileNotFoundError or ValueError naming file and tensor, also when out already holds files.
    """
    from formats.adapters import open_base, rewrite
    from formats.tensors import read_tensor

    config, stored = open_base(base)
    file, tensors, settings, _ = _read_adapter(Path(adapter), part="policy")
    weights = {name: read_tensor(stored[f"{name}.weight"], f"{name}.weight") for name in map(_layer_of, tensors)
               if f"{name}.weight" in stored}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items() if weight.dim() == 2 and weight.is_floating_point()}
    del weights  # their files are mapped: none of them was read, and none must stay
    layers = _adapted_names(file, tensors, settings["rank"], shapes, f"{base} has no weight of its own for that layer")
    scaling = lora_scaling(settings["rank"], settings.get("alpha", ALPHA), settings.get("use_rslora", False))

    def change(name: str, weight: Tensor) -> Tensor:
        layer = name.removesuffix(".weight")
        if layer not in layers:
            return weight
        return merged_weight(weight, tensors[f"{layer}.lora_A"], tensors[f"{layer}.lora_B"], scaling, torch.float32)

    return len(layers), rewrite(base, config, stored, out, change, dtype, progress)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for bad input."""
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
    merge.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of all weights; default: as stored")
    args = parser.parse_args(argv)
    try:
        dtype = getattr(torch, args.dtype) if args.dtype else None
        layers, size = merge_checkpoint(args.base, args.adapter, args.out, dtype, progress=True)
    except (ValueError, OSError) as error:
        print(f"lora.py: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}: {layers} layers merged, {size / 1e6:,.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
