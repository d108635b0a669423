"""Low-rank adaptation of linear layers (Hu et al. 2021), as in the paper's section 2.2: add, switch off, merge, store.

    h_out = W h_in + (alpha / rank) B A h_in,    W frozen, A and B trained

    add_lora(model)                          # rank 8, alpha 64, dropout 0.1 on q, k, v and o of every layer
    with lora_disabled(model): ...           # the base model, bit for bit: the reference policy for free
    save_lora(model, "run/policy")           # loads in PEFT as it is

It works on any module with nn.Linear layers and imports nothing of this project. Departs from the released code:
adapters are float32 whatever the base's dtype, because at the paper's learning rate of 1e-5 most bf16 updates round
away; and merging is an explicit step, never a side effect of `.eval()`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PEFT_PREFIX = "base_model.model."  # PEFT names tensors base_model.model.<module>.lora_A.weight
RELEASED_VALUE_PREFIX = "base_model."  # the paper's released value adapters: base_model.<module>.lora_A, no .weight
RELEASED_HEAD = ("value_head", "value_head_bias")
RELEASED_RANK, RELEASED_ALPHA, RELEASED_DROPOUT = 8, 64, 0.1  # section 2.2; the released files hold neither


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained low-rank update: base(x) + scaling · B A dropout(x).

    It takes over the base's weight and bias (the same tensors under the same state-dict names) and adds
    lora_A (rank, in) and lora_B (out, rank), both float32. B starts at zero, so a new adapter changes nothing.
    scaling is alpha / rank, or alpha / sqrt(rank) with use_rslora (Kalajdzievski 2023). While merged, the forward uses
    the merged weight alone, without dropout, and A and B get no gradient.
    """

    def __init__(self, base: nn.Linear, rank: int = 8, alpha: float = 64, dropout: float = 0.1,
                 use_rslora: bool = False):
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
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # the start of Hu et al.'s code and of PEFT
        self.rank, self.dropout, self.enabled = rank, dropout, True
        self.set_scaling(alpha, use_rslora)
        self.register_buffer("base_weight", None, persistent=False)  # the base's weight while merged, else None
        self.train(base.training)

    def set_scaling(self, alpha: float, use_rslora: bool = False) -> None:
        """Set the factor of the update from alpha."""
        self.alpha, self.use_rslora = alpha, use_rslora
        self.scaling = alpha / (math.sqrt(self.rank) if use_rslora else self.rank)

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
        low = F.linear(F.dropout(x.float(), self.dropout, self.training), self.lora_A)  # A h_in
        return out + F.linear(low * self.scaling, self.lora_B).to(out.dtype)  # W h_in + (alpha / k) B A h_in, sec. 2.2

    @torch.no_grad()
    def merge(self) -> None:
        """Put W + scaling · B A in place of W, computed in float32 and rounded once; twice is once."""
        if not self.merged:
            update = self.scaling * (self.lora_B @ self.lora_A)
            merged = (self.weight.float() + update).to(self.weight.dtype)
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


# ----------------------------------------------------------------------------------------------- add, switch off, merge


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every adapted layer of the model by its name, relative to the module passed."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """lora_A and lora_B of every adapted layer, for an optimiser."""
    return [parameter for layer in lora_layers(model).values() for parameter in (layer.lora_A, layer.lora_B)]


def _matches(name: str, targets: Sequence[str]) -> bool:
    """PEFT's rule: the whole name, or its last parts."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


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


def _adapt(model: nn.Module, names: Sequence[str], rank: int, alpha: float, dropout: float,
           use_rslora: bool = False) -> None:
    model.requires_grad_(False)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        base = model.get_submodule(name)
        setattr(model.get_submodule(owner), leaf, LoRALinear(base, rank, alpha, dropout, use_rslora))


@contextlib.contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base, bit for bit, merged or not. Nests, and restores after an exception.

    Raises ValueError for a model without adapters: as a reference it would be the policy itself, and every KL zero.
    """
    layers = list(lora_layers(model).values())
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA layers to switch off")
    enabled = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, before in zip(layers, enabled, strict=True):
            layer.enabled = before


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


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters under PEFT's names, base_model.model.<name>.lora_A.weight, <name> relative to the module passed."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA layers to store")
    return {f"{PEFT_PREFIX}{name}.{leaf}.weight": getattr(layer, leaf).detach()
            for name, layer in layers.items() for leaf in ("lora_A", "lora_B")}


def _target_modules(model: nn.Module, layers: dict[str, LoRALinear]) -> list[str]:
    """The short names that select exactly the adapted layers (q_proj, ...), else their full names."""
    short = sorted({name.rpartition(".")[2] for name in layers})
    linear = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, LoRALinear))}
    exact = {name for name in linear if _matches(name, short)} == set(layers)
    return short if exact else sorted(layers)


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
    _write_atomically(directory / "adapter_model.safetensors", lambda file: save_file(tensors, file, {"format": "pt"}))
    _write_atomically(directory / "adapter_config.json", lambda file: file.write_text(text, encoding="utf-8"))


def load_lora(model: nn.Module, path: str | os.PathLike, part: str | None = None) -> dict[str, Tensor]:
    """Read adapters into the model: a PEFT folder, or the paper's released pytorch_model.bin (the file or its folder).

    A model without adapters gets them first, with the stored configuration, everything else frozen (a ValueModel's
    head too). An adapted one keeps its dropout and takes the stored rank's scaling; the released files hold no
    alpha, so there it keeps its own (new: 64). Those files hold a policy and a value model: part is "policy" or
    "value", None takes "value" for a module with a `backbone` and "policy" otherwise, or the only part there.

    Returns what the file holds besides adapters, untouched: the released value_head (1, D) and value_head_bias (1)
    when the value part was read, else nothing. Raises FileNotFoundError, or ValueError naming file and tensor, before
    anything in the model has changed.
    """
    path = Path(path)
    if part not in (None, "policy", "value"):
        raise ValueError(f"part is {part!r}: 'policy', 'value' or None")
    if (path / "adapter_config.json").is_file():
        file, tensors, settings = _read_peft(path)
        rest = {}
    else:
        file, tensors, settings, rest = _read_released(model, path, part)
    names = _check_adapters(model, file, tensors, settings["rank"])
    if not lora_layers(model):
        _adapt(model, names, **({"alpha": RELEASED_ALPHA} | settings))
    for name, layer in lora_layers(model).items():
        if "alpha" in settings:
            layer.set_scaling(settings["alpha"], settings["use_rslora"])
        with torch.no_grad():
            layer.lora_A.copy_(tensors[f"{name}.lora_A"])
            layer.lora_B.copy_(tensors[f"{name}.lora_B"])
    return rest


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors or .bin file, on the CPU; pickled code in a .bin is refused, not run."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle, zip and safetensors each raise their own kinds for a damaged file
        raise ValueError(f"{file}: cannot be read, truncated or damaged ({error})") from error


def _read_peft(directory: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """(file, tensors by bare name, settings of _adapt) of a PEFT folder."""
    config_file = directory / "adapter_config.json"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        settings = {"rank": config["r"], "alpha": config["lora_alpha"], "dropout": config.get("lora_dropout", 0.0),
                    "use_rslora": config.get("use_rslora", False)}
    except (ValueError, KeyError) as error:
        raise ValueError(f"{config_file}: not a LoRA configuration of PEFT ({error!r})") from error
    plain = {"peft_type": ("LORA",), "bias": ("none", None), "use_dora": (False, None), "rank_pattern": ({}, None),
             "alpha_pattern": ({}, None), "modules_to_save": (None, []), "fan_in_fan_out": (False, None)}
    for key, allowed in plain.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{config_file}: {key} {config[key]!r} is not supported: {allowed[0]!r} is")
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        file = directory / name
        if file.is_file():
            stored = _read_tensors(file)
            return file, {_bare_name(file, name): tensor for name, tensor in stored.items()}, settings
    raise FileNotFoundError(f"{directory / 'adapter_model.safetensors'}: not found beside adapter_config.json")


def _bare_name(file: Path, name: str) -> str:
    """base_model.model.X.lora_A.weight → X.lora_A"""
    if not (name.startswith(PEFT_PREFIX) and name.endswith((".lora_A.weight", ".lora_B.weight"))):
        raise ValueError(f"{file}: unexpected tensor {name}: PEFT's are {PEFT_PREFIX}<layer>.lora_A.weight or .lora_B")
    return name.removeprefix(PEFT_PREFIX).removesuffix(".weight")


def _read_released(model: nn.Module, path: Path, part: str | None
                   ) -> tuple[Path, dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """(file, tensors by bare name, settings of _adapt, the value head) of the paper's released pytorch_model.bin."""
    file = path / "pytorch_model.bin" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no adapter_config.json (PEFT) and no pytorch_model.bin (released weights)")
    stored = _read_tensors(file)
    head = {name: stored.pop(name) for name in RELEASED_HEAD if name in stored}
    value = {name.removeprefix(RELEASED_VALUE_PREFIX): tensor for name, tensor in stored.items()
             if name.startswith(RELEASED_VALUE_PREFIX)}
    policy = {name: tensor for name, tensor in stored.items() if not name.startswith(RELEASED_VALUE_PREFIX)}
    if part is None:
        wanted = "value" if hasattr(model, "backbone") else "policy"
        part = wanted if (value and policy) else "value" if value else "policy"
    tensors = value if part == "value" else policy
    if not tensors:
        raise ValueError(f"{file}: holds no adapters of the {part} model")
    if hasattr(model, "backbone"):
        tensors = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    rank = next((len(tensor) for name, tensor in tensors.items() if name.endswith(".lora_A")), RELEASED_RANK)
    return file, tensors, {"rank": rank, "dropout": RELEASED_DROPOUT}, head if part == "value" else {}


def _check_adapters(model: nn.Module, file: Path, tensors: dict[str, Tensor], rank: int) -> list[str]:
    """The layers that tensors adapt; ValueError unless each fits its layer and no adapted layer goes without."""
    modules = dict(model.named_modules())
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    for name, tensor in tensors.items():
        layer, leaf = modules.get(name.rpartition(".")[0]), name.rpartition(".")[2]
        if leaf not in ("lora_A", "lora_B") or not isinstance(layer, (nn.Linear, LoRALinear)):
            raise ValueError(f"{file}: unexpected tensor {name}: {type(model).__name__} has no such linear layer")
        shape = (rank, layer.in_features) if leaf == "lora_A" else (layer.out_features, rank)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{file}: tensor {name} has shape {tuple(tensor.shape)}, not {shape}")
    adapted = lora_layers(model)
    for name in adapted or names:
        for leaf in ("lora_A", "lora_B"):
            if f"{name}.{leaf}" not in tensors:
                raise ValueError(f"{file}: missing tensor {name}.{leaf}")
    for name in names:
        if adapted and name not in adapted:
            raise ValueError(f"{file}: unexpected tensor {name}.lora_A: the model's layer of that name has no adapter")
        if adapted and adapted[name].rank != rank:
            raise ValueError(f"{file}: tensor {name}.lora_A has rank {rank}, the model's adapter {adapted[name].rank}")
        if adapted and adapted[name].merged:
            raise ValueError(f"{file}: the model's adapters are merged: call unmerge_lora before loading")
    return names


def _write_atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Write beside the file and rename: a crash in between leaves the last good file whole."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
