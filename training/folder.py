# SPDX-License-Identifier: MIT
"""The folder of a run: one process at a time, lines that are only ever appended, checkpoints that are whole or not there. Knows
nothing of models.

A checkpoint is written into a hidden folder beside its place, described in manifest.json (size and SHA-256 of every file),
flushed to the disk and renamed. So a run may be killed at any moment: a name means a whole checkpoint, and damage that comes
later (a bad disk, a half-copied folder) is found by its manifest, named and passed over.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from formats.write import write_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

MANIFEST = "manifest.json"


# ----------------------------------------------------------------------------------------------------------------- lock


@contextlib.contextmanager
def locked(folder: Path, name: str = ".lock", flag: str = "--out") -> Iterator[Path]:
    """The folder, made where it isn't there, and no other process in it under that name until this one leaves or dies.

    The lock is the operating system's, on a hidden file: a killed process has none, though its file stays. A folder that was made
    here and is left empty goes again. Raises ValueError where another process is in it, or it cannot be made or written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open_locked(folder / name)
    except OSError as error:
        leave(made)
        raise ValueError(f"{flag} {folder}: no such folder can be made or written ({error.strerror})") from error
    if isinstance(lock, str):
        raise ValueError(f"{flag} {folder} is in use by another process{lock}: wait until it has ended, or name another folder")
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            os.unlink(folder / name)  # while it is ours: behind the lock another process may have it open already
        os.close(lock)
        leave(made)


def open_locked(file: Path) -> int | str:
    """A descriptor that holds the lock, or " (pid 123)" of the process that has it."""
    for attempt in range(9):
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                os.lseek(lock, 1 << 20, os.SEEK_SET)  # behind the pid, as Windows lets nobody read what is locked
                msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                owner = os.pread(lock, 20, 0).strip() if fcntl else b""
                os.close(lock)
                return f" (pid {owner.decode()})" if owner.isdigit() else ""
            print(f"{file}: this file system has no locks ({error.strerror}); nothing keeps a second process out")
            return lock
        if attempt == 8 or file.exists() and os.path.samestat(os.fstat(lock), os.stat(file)):
            break
        os.close(lock)  # its last owner took the file away in between
    with contextlib.suppress(OSError):  # a full disk: the name of the owner is a courtesy
        os.ftruncate(lock, 0)
        os.lseek(lock, 0, os.SEEK_SET)
        os.write(lock, b"%d\n" % os.getpid())
    return lock


def leave(made: list[Path]) -> None:
    """Takes the empty ones of the folders away, the inner ones first."""
    for path in made:
        with contextlib.suppress(OSError):
            path.rmdir()


def holds_files(folder: Path) -> bool:
    """Hidden ones are nobody's results: a lock, what a killed process left half written."""
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


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


def checkpoints_line(out: Path) -> str:
    """What there is to go on from."""
    newest = newest_whole(out)
    return f"the last checkpoint is {newest}" if newest else "there is no checkpoint yet"


def own_folder(out: str, restarted: bool) -> str:
    """A run's folder that nobody named: `out`, or where that holds a run already the next of its name, runs/bregman-s0-2. A
    restarted run (torchrun --max-restarts) goes on in the last of them."""
    taken: list[str] = []
    while holds_files(Path(free := f"{out}-{len(taken) + 1}" if taken else out)):
        taken.append(free)
    if taken and restarted:
        return taken[-1]
    if taken:
        print(f"{taken[-1]} holds a run already (--resume --out {taken[-1]} goes on with it): this one goes to {free}")
    return free


def check_run_folder(out: Path, resume: bool) -> Path | None:
    """The checkpoint to resume from, or None to begin at the beginning; an error when the folder holds another run's results."""
    if resume:
        sweep(out)
        newest = newest_whole(out)
        if newest is None and checkpoints(out):
            raise ValueError(f"--resume: no checkpoint in {out} is whole: delete the folder to start anew")
        if newest is None:
            print(f"{out} holds no checkpoint yet: the run begins again")
        return newest
    if holds_files(out):
        raise ValueError(f"--out {out} already holds files: --resume goes on with that run, another --out starts a new one")
    sweep(out)
    return None


def move_in(out: Path, write: Callable[[Path], object], last: str) -> None:
    """Everything that write(folder) makes, moved into `out`, the file named `last` behind all others: with it, all is there."""
    part = out / ".model.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        write(part)
        for path in part.rglob("*"):
            flush(path)
        for path in sorted(part.iterdir(), key=lambda path: path.name == last):
            if path.name == last:
                flush(out)
            if (out / path.name).is_dir():  # moved by a process that was killed before it came to the last
                shutil.rmtree(out / path.name)
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    flush(out)
