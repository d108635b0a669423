# SPDX-License-Identifier: MIT
"""Which devices there are, and what becomes of a name that is asked for: the paper's two GPUs, or what a machine has.

--compile is here too: GPUs are what it is for.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model import Llama


def available_devices() -> list[str]:
    """What there is, the best first."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [*gpus, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def is_there(name: str) -> bool:
    """cpu:0 is the CPU by a second name: to torch another device, on which all four models are built as on two GPUs."""
    return full_name(name) in (*available_devices(), "cpu:0")


def require_device(flag: str, name: str | None) -> None:
    """A device that was asked for and isn't there is an error: only a default falls back."""
    if name is not None and not is_there(name):
        raise ValueError(f"{flag} {name} is not there: choose from {', '.join(available_devices())}")


def resolve_devices(policy_device: str | None, reference_device: str | None) -> tuple[str, str, str]:
    """(policy's device, reference's device, a line that says what happened); a name that isn't there falls to what there is."""
    best = available_devices()[0]
    asked = [full_name(name or best) for name in (policy_device, reference_device)]
    policy, reference = (name if is_there(name) else best for name in asked)
    missing = [name for name in asked if not is_there(name)]
    note = f" ({' and '.join(missing)} not there)" if missing else ""
    return policy, reference, f"placement: policy, value → {policy}; reference, reward → {reference}{note}"


def same_kernels(first: str, second: str) -> bool:
    """Whether equal inputs give equal numbers on both: two names of one device, or two GPUs of one model."""
    a, b = torch.device(first), torch.device(second)
    return a.type == b.type and (a.type != "cuda" or torch.cuda.get_device_name(a) == torch.cuda.get_device_name(b))


def full_name(device: str) -> str:
    """torch's "cuda" is the first of them."""
    return "cuda:0" if device == "cuda" else device


def compile_layers(model: Llama, backend: str = "inductor") -> None:
    """From here on torch.compile fuses what each layer does beside its products, which on a GPU is a third of an update's time.

    The first pass of each kind (with gradients or without, with adapters or without) takes a while to compile; all layers share
    what it makes, and so do all lengths. Sampling has a fast path of its own (training/decode.py), and with a cache layers stay
    plain. In bf16 what is compiled rounds where the plain layers do: as the compiler would have it, log-probabilities of the
    miniature world's SFT model differ by 0.009 on average, and so by 0.0001.
    """
    options = {"emulate_precision_casts": True} if backend == "inductor" else None
    torch._dynamo.config.recompile_limit = 64  # kinds of passes; with more of them layers would go back to being plain
    for layer in model.model.layers:
        compiled = torch.compile(layer.forward, dynamic=True, backend=backend, options=options)
        layer.forward = partial(_pass, layer.forward, compiled)


def _pass(plain: Callable, compiled: Callable, x: Tensor, rope: Any, bias: Tensor | None, extend: Any = None) -> Tensor:
    """A layer's forward; extend comes with a cache."""
    return plain(x, rope, bias, extend) if extend else compiled(x, rope, bias)


def gradient_gap(model: Llama, loss: Callable[[], Tensor]) -> float:
    """How far the gradient of loss() lies from that of plain layers, over its length, in what is trained of the first layer: it
    has come through all the others. (torch 2.11 compiled gradients of zero where the loss was right to the last digit:
    github.com/pytorch/pytorch/issues/180642.)
    """
    trained = [p for p in model.model.layers[0].parameters() if p.requires_grad]

    def gradient(stance: str) -> Tensor:
        with torch.compiler.set_stance(stance):
            return torch.cat([grad.float().flatten() for grad in torch.autograd.grad(loss(), trained)])

    plain, compiled = gradient("force_eager"), gradient("default")
    return ((compiled - plain).norm() / plain.norm().clamp(min=1e-30)).item()  # both are 0 where advantages are
