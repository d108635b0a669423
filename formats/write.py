# SPDX-License-Identifier: MIT
"""Files and folders that are whole or not there: written beside their place and renamed. And what any console can show."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from formats.tensors import first_line


def any_console() -> None:
    """For the head of every program: a console or pipe whose encoding lacks a character gets ? for it, and the work goes on."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if not sys.stderr.isatty():
        plain_bars()


def plain_bars(every: float = 30.0, after: float = 2.0) -> None:
    """tqdm's bars, all of this process, for a file or a pipe: instead of being redrawn each is a line every half minute and one
    at its end, with what is done and left and the rate; one that is shorter than two seconds is none."""
    from tqdm import tqdm

    if getattr(tqdm, "plain", False):
        return
    tqdm.plain = True
    line = "{desc}: {n_fmt} of {total_fmt} {unit}, {percentage:.0f} %, {elapsed} gone, {remaining} left, {rate_fmt}"

    def display(bar: tqdm, *_: Any) -> None:
        given = bar.format_dict
        changes = {"bar_format": line, "prefix": (given["prefix"] or "").removesuffix(": ")}
        print(tqdm.format_meter(**given | changes).strip(), file=bar.fp, flush=True)

    def refresh(bar: tqdm, *_: Any, **__: Any) -> None:  # asked for by whoever sets a description, too
        if not bar.disable and bar._time() - bar.last_print_t >= every:
            display(bar)

    def close(bar: tqdm) -> None:
        if not bar.disable:
            if bar._time() - bar.start_t >= after:
                display(bar)
            bar.disable = True
            bar._decr_instances(bar)

    @contextlib.contextmanager
    def no_bar_is_in_the_way(file: Any = None, nolock: bool = False) -> Iterator[None]:
        yield

    tqdm.__init__ = functools.partialmethod(tqdm.__init__, delay=after, mininterval=every, maxinterval=every)
    tqdm.display, tqdm.refresh, tqdm.close, tqdm.clear = display, refresh, close, lambda *_, **__: None
    tqdm.external_write_mode = no_bar_is_in_the_way


def write_atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Write beside the file and rename: a crash in between leaves the last good file whole."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes files that only their owner may read
        os.replace(temporary, file)
    except SafetensorError as error:  # its own kind for a full disk
        raise OSError(f"{file}: cannot be written ({first_line(error)})") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """A text file, whole or not at all."""
    write_atomically(file, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(file: Path, content: Any, indent: int | None = 2) -> None:
    """A JSON file, whole or not at all."""
    write_text(file, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, whole or not at all."""
    write_atomically(file, lambda part: save_file(tensors, part, {"format": "pt"}))


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `out` when all went well and is deleted otherwise.

    To be opened before the work that fills it: ValueError for an `out` that holds files or cannot be made.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: already holds files; name a new folder")
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"--out {out}: no such folder can be made ({error.strerror})") from error
    try:
        yield part
        if out.is_dir():
            out.rmdir()
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


class ShardWriter:
    """Writes tensors as they come into a folder of safetensors, in shards of at most `limit` bytes, and their index."""

    def __init__(self, directory: Path, limit: int = 2 * 2**30):
        self.directory, self.limit = directory, limit
        self.waiting: dict[str, Tensor] = {}
        self.shards: list[list[str]] = []
        self.size = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self.waiting and sum(t.nbytes for t in self.waiting.values()) + tensor.nbytes > self.limit:
            self.flush()
        self.waiting[name] = tensor.contiguous()
        self.size += tensor.nbytes

    def flush(self) -> None:
        self.shards.append(list(self.waiting))
        tensors, self.waiting = self.waiting, {}
        write_tensors(self.directory / f"part-{len(self.shards)}", tensors)

    def close(self) -> None:
        """Writes the rest and gives the files the names by which loaders look for them."""
        self.flush()
        n, weight_map = len(self.shards), {}
        for k, names in enumerate(self.shards, start=1):
            file = "model.safetensors" if n == 1 else f"model-{k:05d}-of-{n:05d}.safetensors"
            (self.directory / f"part-{k}").rename(self.directory / file)
            weight_map |= dict.fromkeys(names, file)
        if n > 1:
            index = {"metadata": {"total_size": self.size}, "weight_map": weight_map}
            write_json(self.directory / "model.safetensors.index.json", index)
