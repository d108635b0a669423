# SPDX-License-Identifier: MIT
"""Tensors on disk: a Hugging Face folder's weights by name, read one at a time, and everything about a file that can be wrong.

    stored = stored_tensors(Path("llama-7b"))                      # names and where they lie; nothing is read yet
    stored = check_names("llama-7b", stored, dict(model.named_parameters()))
    for file, name, tensor in load_tensors(stored, torch.bfloat16, "cuda:0", like=model): ...

safetensors and torch.save's .bin, whole or in shards. Code that hides in a pickle is refused, never run. Whatever is wrong
becomes a ValueError or FileNotFoundError of one line that names the file and the tensor.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What GPTQ, AWQ, bitsandbytes, FP8, compressed-tensors, AQLM, HQQ and quanto store beside or instead of a weight.
QUANTISED = re.compile(r"\.(qweight|qzeros|g_idx|scales|(nested_)?(absmax|quant_map)|quant_state\..*|SCB|weight_format|codes|"
                       r"codebooks|W_q|_data|_scale|(weight|input)_(packed|scale|scale_inv|scales|global_scale|zero_point))$")
UNQUANTISED = "the model is quantised: name the unquantised one that it was made of (only GGUF is dequantised)"


class Stored(NamedTuple):
    """A tensor on disk: the file that holds it, and a function that reads it to the CPU.

    copied: whether what it reads surely shares no memory with the file or another tensor.
    """

    file: Path
    read: Callable[[], Tensor]
    copied: bool = False


def stored_tensors(directory: Path, difference: bool = False) -> dict[str, Stored]:
    """The tensors of a Hugging Face folder. One of AlpacaFarm's weight differences is refused unless asked for."""
    if not difference and (directory / "model_sum.txt").is_file():
        raise ValueError(_difference_message(directory))
    stored: dict[str, Stored] = {}
    for file in weight_files(directory):
        tensors = bin_tensors(file) if file.suffix == ".bin" else _safetensors(file)
        for name in tensors:
            if name in stored:
                raise ValueError(f"{file}: tensor {name} is in {stored[name].file.name} too")
        stored |= tensors
    return stored


def check_names(path: str | Path, stored: dict[str, Stored], expected: Mapping[str, Tensor]) -> dict[str, Stored]:
    """The tensors that fill a model of the names `expected`; one that is missing or has no place raises ValueError.

    Left out: RoPE's frequencies, which old files hold and the model computes, and an output layer that it doesn't have or
    ties to the embedding.
    """
    judge_names(stored)
    wanted = {name: tensor for name, tensor in stored.items() if not name.endswith("rotary_emb.inv_freq")
              and not (name == "lm_head.weight" and name not in expected)}
    for name, tensor in wanted.items():
        if name not in expected:
            hint = ", a reward model's: this is no language model" if name.startswith(("score.", "reward_head.")) else ""
            raise ValueError(f"{tensor.file}: unexpected tensor {name}{hint}")
    missing = [name for name in expected if name not in wanted]
    if missing:
        files = {tensor.file for tensor in wanted.values()}
        raise ValueError(f"{files.pop() if len(files) == 1 else path}: missing tensor {missing[0]}"
                         + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""))
    return wanted


def load_tensors(stored: dict[str, Stored], dtype: torch.dtype | None = None, device: torch.device | str | None = None,
                 progress: bool = False, like: nn.Module | None = None, part: Callable[[Tensor], Tensor] | None = None
                 ) -> Iterator[tuple[Path, str, Tensor]]:
    """(file, name, tensor) for each, converted and moved, one in memory at a time. Shapes must be those of `like`.

    part(tensor), if given, is what is kept of each as it is stored, in memory, dtype and device of its own.
    """
    # A model's final norm is near 1, a difference's near 0: read first, it spares reading the rest.
    names = sorted(stored, key=lambda name: not name.endswith("model.norm.weight"))
    for name in with_bar(names, "load", progress):
        file, tensor = stored[name].file, read_weight(stored[name], name)
        if like is not None and tensor.shape != (shape := like.get_parameter(name).shape):
            raise ValueError(f"{file}: tensor {name} has shape {tuple(tensor.shape)}, its configuration asks for "
                             f"{tuple(shape)}")
        if name.endswith("model.norm.weight"):
            refuse_difference(file.parent, tensor)
        moved = tensor.to(device=device, dtype=dtype) if part is None else part(tensor)
        if part is None and moved.data_ptr() == tensor.data_ptr() and not stored[name].copied:
            moved = moved.clone()  # a view of the file would change when the file does
        del tensor  # or it would still be there while the next one is read
        yield file, name, moved


def read_tensor(stored: Stored, name: str) -> Tensor:
    """The tensor, on the CPU, maybe still lying in its file; a damaged file is named together with the tensor."""
    try:
        return stored.read()
    except Exception as error:  # torch, pickle, zip, safetensors and numpy each raise their own kinds
        raise ValueError(f"{stored.file}: tensor {name} cannot be read, truncated or damaged "
                         f"({first_line(error)})") from error


def read_weight(stored: Stored, name: str) -> Tensor:
    """read_tensor, and ValueError for the integers or 8-bit numbers of a quantised model."""
    tensor = read_tensor(stored, name)
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{stored.file}: tensor {name} is of {tensor.dtype}: {UNQUANTISED}")
    return tensor


def judge_names(stored: Mapping[str, Stored]) -> None:
    """Raises ValueError for names that are damaged, or that only a quantised model's tensors have."""
    for name, tensor in stored.items():
        if not name.isprintable():  # a line break in it would forge a second line of a message
            raise ValueError(f"{tensor.file}: holds a tensor with the name {name!r}: damaged")
        if QUANTISED.search(name):
            raise ValueError(f"{tensor.file}: tensor {name}: {UNQUANTISED}")


def refuse_difference(path: Path, norm: Tensor) -> None:
    """Raises ValueError where a LLaMA's final norm is near 0, as a difference's: its own is near 1. (Gemma's is near 0, too.)"""
    if norm.float().abs().mean() < 0.02:
        raise ValueError(_difference_message(path))


def _difference_message(path: Path) -> str:
    return (f"{path}: holds the difference to another model's weights, not a model: recover the model first, "
            f"python model.py recover --base LLAMA_DIR --diff {path} --out DIR")


# ---------------------------------------------------------------------------------------------------------------- files


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a folder's weights: safetensors before .bin, one file before shards."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (directory / name).is_file():
            return [directory / name]
        index = directory / f"{name}.index.json"
        if index.is_file():
            shards = parse_json(index, lambda values: sorted(map(_own_folder, set(values["weight_map"].values()))))
            for shard in shards:
                if not (directory / shard).is_file():
                    raise FileNotFoundError(f"{directory / shard}: not found, but {index.name} names it")
            return [directory / shard for shard in shards]
    raise FileNotFoundError(f"{directory}: no model.safetensors or pytorch_model.bin, whole or with .index.json")


def _own_folder(shard: str) -> str:
    if not isinstance(shard, str) or Path(shard).name != shard:
        raise ValueError(f"names the file {shard!r}, which is not in its own folder")
    return shard


def _safetensors(file: Path) -> dict[str, Stored]:
    def read(name: str) -> Tensor:
        # Opened anew for each: the pages read through one mapping all stay resident until it is closed.
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)

    try:
        with safe_open(file, framework="pt") as opened:
            return {name: Stored(file, partial(read, name)) for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: cannot be read, truncated or damaged ({first_line(error)})") from error


def bin_tensors(file: Path) -> dict[str, Stored]:
    """The tensors of a file that torch.save wrote. weights_only: a pickle that would run code is refused, not run."""
    # A file from before torch 1.6 is no zip archive and can only be read as a whole.
    with open(file, "rb") as opened:
        zipped = opened.read(4) == b"PK\x03\x04"
    load = partial(torch.load, file, map_location="cpu", weights_only=True, mmap=zipped)
    try:
        tensors = load()
    except pickle.UnpicklingError as error:
        # Not torch's message, which advises to load it without weights_only.
        code = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(f"{file}: refused, and none of it was run: it is damaged, or holds code beside tensors"
                         + (f" ({code[1]})" if code else "")) from error
    except Exception as error:  # torch and zip each raise their own kinds
        raise ValueError(f"{file}: cannot be read, truncated or damaged ({first_line(error)})") from error
    if not (isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
            and all(isinstance(tensor, Tensor) for tensor in tensors.values())):
        raise ValueError(f"{file}: holds something else than tensors by name")
    if not zipped:
        return {name: Stored(file, lambda tensor=tensor: tensor) for name, tensor in tensors.items()}
    read = _renewing(load, {name: tensor.nbytes for name, tensor in tensors.items()})
    return {name: Stored(file, partial(read, name)) for name in tensors}


def _renewing(load: Callable[[], dict[str, Tensor]], sizes: dict[str, int]) -> Callable[[str], Tensor]:
    """A function that reads a tensor by name from the file that `load` maps.

    What was read through a mapping stays resident until it is closed: a new one takes its place before that comes to more
    than the largest tensor or a twentieth of the file, and none is left after the last tensor. A new one for each tensor
    would be quadratic, since opening a file takes time for every tensor in it.
    """
    mapped: dict[str, Tensor] = {}
    unread, resident, limit = set(sizes), 0, max([*sizes.values(), sum(sizes.values()) // 20])

    def read(name: str) -> Tensor:
        nonlocal mapped, resident
        if not mapped or resident + sizes[name] > limit:
            mapped, resident = {}, 0  # first, so that there are never two
            mapped = load()
        tensor = mapped[name]
        resident += sizes[name]
        unread.discard(name)
        if not unread:
            mapped = {}
        return tensor

    return read


# --------------------------------------------------------------------------------- small things that every format needs


def parse_json(file: Path, build: Callable[[dict[str, Any]], Any]) -> Any:
    """build(the JSON object in file); whatever is wrong with it becomes a ValueError that names the file."""
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(values, dict):
            raise ValueError(f"holds a {type(values).__name__}, not an object")
        return build(values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: {'lacks ' if isinstance(error, KeyError) else ''}{error}") from error


def first_line(error: Exception) -> str:
    """The libraries' messages run over many lines."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def with_bar(items: Any, label: str, progress: bool) -> Any:
    """The items, with a progress bar where it takes longer than two seconds."""
    if not progress:
        return items
    from tqdm import tqdm

    return tqdm(items, desc=label, unit="tensor", delay=2, leave=False)
