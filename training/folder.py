# SPDX-License-Identifier: MIT
"""The folder of a run: lines that are only ever appended, checkpoints that are whole or not there. Knows nothing of models.

A checkpoint is written into a hidden folder beside its place, described in manifest.json (size and SHA-256 of every file),
flushed to the disk and renamed. So a run may be killed at any moment: a name means a whole checkpoint, and damage that comes
later (a bad disk, a half-copied folder) is found by its manifest, named and passed over.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from formats.write import write_text

MANIFEST = "manifest.json"


# ---------------------------------------------------------------------------------------------------------------- lines


def append_line(file: Path, record: dict) -> None:
    """Raises OSError naming the file; half a line that a full disk leaves is cut off when the run is resumed."""
    try:
        with open(file, "a", encoding="utf-8") as out:
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise OSError(f"{file}: cannot be written ({error.strerror})") from error


def read_lines(file: Path) -> list[dict]:
    """The records of a JSON-lines file; none when it isn't there. Raises ValueError naming file and line."""
    if not file.is_file():
        return []
    records = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        try:
            records += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError):
            raise ValueError(f"{file}: line {number} is no JSON") from None
        if records and not isinstance(records[-1], dict):
            raise ValueError(f"{file}: line {number} is no object")
    return records


def cut_after(file: Path, step: int) -> None:
    """Drops what the checkpoint of that step has not seen: a resumed run writes it again. So does a line cut off in its
    middle, when the run was killed, and all behind it."""
    if not file.is_file():
        return
    lines = []
    for line in file.read_bytes().split(b"\n")[:-1]:  # behind the last newline stands nothing, or half a line
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line.decode() + "\n")
        except (ValueError, TypeError, KeyError, RecursionError):
            break
    write_text(file, "".join(lines))


def flush(path: Path) -> None:
    """Until the disk has it; of a folder, its names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def save_whole(final: Path, write: Callable[[Path], object]) -> Path:
    """A folder that write(folder) fills, under its name only when it is complete. Raises what write raises, leaving nothing."""
    part = final.with_name(f".{final.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        write(part)
        described = {file.relative_to(part).as_posix(): describe(file) for file in sorted(part.rglob("*")) if file.is_file()}
        (part / MANIFEST).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        for path in [*part.rglob("*"), part]:
            flush(path)
        if final.exists():  # damaged, and passed over when the run went on from before it
            shutil.rmtree(final)
        os.replace(part, final)
        flush(final.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return final


def describe(file: Path) -> dict[str, int | str]:
    with open(file, "rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        described = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in described.items():
            file = checkpoint / name
            if ".." in Path(name).parts or Path(name).is_absolute():
                return f"{MANIFEST} names {name!r}, which is not in the folder"
            if not file.is_file():
                return f"{name} is missing"
            if describe(file) != expected:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"
    return None


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, damaged ones too."""
    steps = {int(p.name.removeprefix("step-")): p for p in out.glob("step-*")
             if p.name.removeprefix("step-").isdecimal() and p.is_dir()}
    return [steps[step] for step in sorted(steps)]


def newest_whole(out: Path, say: Callable[[str], object] = print) -> Path | None:
    """The newest checkpoint that is as it was written; the damaged ones after it are named."""
    for checkpoint in reversed(checkpoints(out)):
        what = damage(checkpoint)
        if what is None:
            return checkpoint
        say(f"{checkpoint} is damaged and is passed over: {what}")
    return None


def prune(out: Path, keep: int) -> None:
    """Leaves the `keep` newest checkpoints (0: all)."""
    for checkpoint in checkpoints(out)[:-keep] if keep else []:
        leaving = checkpoint.with_name(f".{checkpoint.name}.part")  # a name means a whole checkpoint, here too
        os.replace(checkpoint, leaving)
        shutil.rmtree(leaving)


def sweep(out: Path) -> None:
    """Takes away what a killed process left half written."""
    for part in out.glob(".step-*.part"):
        shutil.rmtree(part)


def require_whole(checkpoint: Path) -> Path:
    """The checkpoint; ValueError where it is damaged."""
    if what := damage(checkpoint):
        raise ValueError(f"{checkpoint} is damaged: {what}")
    return checkpoint
