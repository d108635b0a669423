"""What folder.py promises: a name means a whole checkpoint, damage is found and named, a failed write destroys nothing."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from formats.write import write_text
from training import folder
from training.folder import append_line, checkpoints, cut_after, damage, locked, newest_whole, prune, save_whole


def fill(content: str):
    def write(part: Path) -> None:
        (part / "policy").mkdir()
        (part / "policy" / "weights").write_text(content)
        (part / "state").write_text("state of " + content)

    return write


@pytest.fixture
def run(tmp_path) -> Path:
    for step in (1, 2, 3):
        save_whole(tmp_path / f"step-{step:04d}", fill(f"step {step}"))
    return tmp_path


def test_checkpoints_come_in_the_order_of_their_steps(run):
    save_whole(run / "step-12000", fill("late"))
    (run / ".step-0004.part").mkdir()
    (run / "step-x").mkdir()
    assert [p.name for p in checkpoints(run)] == ["step-0001", "step-0002", "step-0003", "step-12000"]
    assert all(damage(p) is None for p in checkpoints(run))


def truncate(file: Path):
    os.truncate(file, file.stat().st_size - 5)


def flip_a_bit(file: Path):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, os.unlink])
@pytest.mark.parametrize("name", ["policy/weights", "state", "manifest.json"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(run, harm, name):
    harm(run / "step-0003" / name)
    said = []
    assert newest_whole(run, said.append) == run / "step-0002"
    assert len(said) == 1 and "step-0003 is damaged" in said[0] and name in said[0]


def test_without_a_whole_checkpoint_there_is_none(run):
    for checkpoint in checkpoints(run):
        truncate(checkpoint / "state")
    assert newest_whole(run, lambda line: None) is None


def test_a_failed_save_leaves_the_others_and_nothing_half_done(run):
    def fail(part: Path) -> None:
        (part / "state").write_text("half")
        raise OSError(28, "No space left on device")

    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(OSError, match="No space left"):
        save_whole(run / "step-0004", fail)
    with pytest.raises(OSError, match="No space left"):
        save_whole(run / "step-0003", fail)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_damaged_checkpoint_is_replaced_when_the_run_comes_to_it_again(run):
    truncate(run / "step-0003" / "state")
    save_whole(run / "step-0003", fill("again"))
    assert damage(run / "step-0003") is None and (run / "step-0003" / "policy" / "weights").read_text() == "again"


def killed_after(calls: int, run: Path) -> int:
    """A child process saves a checkpoint and dies at the given call of the file system; returns its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = calls

    def counted(function):
        def call(*args, **settings):
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(9)
            return function(*args, **settings)

        return call

    for where, name in ((folder.os, "replace"), (folder, "flush"), (folder, "describe"), (folder.shutil, "rmtree")):
        setattr(where, name, counted(getattr(where, name)))

    def write(part: Path) -> None:
        for i in range(3):
            counted((part / f"file{i}").write_text)(str(i) * 1000)

    try:
        save_whole(run / "step-0002", write)
    finally:
        os._exit(0 if sys.exc_info()[0] is None else 1)


def test_a_process_killed_at_any_write_leaves_whole_checkpoints_only(tmp_path):
    """Dies at the 1st, 2nd, ... call of the file system inside save_whole, until one attempt is through."""
    save_whole(tmp_path / "run" / "step-0001", fill("first"))
    for moment in range(40):
        code = killed_after(moment, tmp_path / "run")
        assert code in (0, 9)
        newest = newest_whole(tmp_path / "run", lambda line: pytest.fail(line))
        assert newest.name in ("step-0001", "step-0002")
        if code == 0:
            break
    assert newest.name == "step-0002" and moment > 8


def test_only_the_newest_are_kept(run):
    prune(run, 0)
    assert len(checkpoints(run)) == 3
    prune(run, 2)
    assert [p.name for p in run.iterdir()] and [p.name for p in checkpoints(run)] == ["step-0002", "step-0003"]


def test_lines_after_the_checkpoint_and_half_lines_are_cut(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_line(file, {"step": step, "text": "a\\u2028b"})
    whole = file.read_text(encoding="utf-8")
    file.write_text(whole + '{"step": 4, "te', encoding="utf-8")
    cut_after(file, 2)
    assert [json.loads(line)["step"] for line in file.read_text(encoding="utf-8").split("\n") if line] == [1, 2]
    cut_after(tmp_path / "absent.jsonl", 2)
    assert not (tmp_path / "absent.jsonl").exists()


def test_a_failed_text_leaves_the_last_one(tmp_path, monkeypatch):
    write_text(tmp_path / "config.json", "good")
    monkeypatch.setattr(Path, "write_text", lambda self, *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        write_text(tmp_path / "config.json", "bad")
    assert (tmp_path / "config.json").read_bytes() == b"good" and len(list(tmp_path.iterdir())) == 1


# --- one process at a time ---------------------------------------------------------------------------------------------


def holder(folder: Path, *more: str) -> subprocess.Popen:
    """A second process that holds the lock until it is killed; it is in when this returns."""
    code = ("import sys, time; from pathlib import Path; from training.folder import locked\n"
            "with locked(Path(sys.argv[1]), *sys.argv[2:]):\n    print('in', flush=True)\n    time.sleep(600)")
    child = subprocess.Popen([sys.executable, "-c", code, str(folder), *more], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "in\n"
    return child


def test_a_folder_belongs_to_one_process_and_a_killed_one_has_no_lock(tmp_path):
    child = holder(tmp_path / "run")
    try:
        refusal = rf"--out {tmp_path / 'run'} is in use by another process \(pid {child.pid}\)"
        with pytest.raises(ValueError, match=refusal), locked(tmp_path / "run"):
            pytest.fail("two processes are in the folder")
        with locked(tmp_path / "run", ".evaluating.lock"):  # another kind of work is welcome
            pass
    finally:
        child.kill()
        child.wait()
    assert (tmp_path / "run" / ".lock").exists() and not folder.holds_files(tmp_path / "run")
    with locked(tmp_path / "run") as out:
        write_text(out / "config.json", "{}")
    assert [p.name for p in out.iterdir()] == ["config.json"] and folder.holds_files(out)


def test_a_start_that_wrote_nothing_leaves_no_folder(tmp_path):
    for made in (tmp_path / "a" / "b", tmp_path / "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        with pytest.raises(KeyError), locked(made):
            raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(ValueError, match=f"--out {path}: no such folder can be made"), locked(path):
            pytest.fail("made it")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_taken_away_by_its_last_owner_is_no_lock(tmp_path, monkeypatch):
    """Opened while another process held it, locked when that one had removed it: a third would make a new file."""
    honest, taken = fcntl.flock, []

    def slow(descriptor, how):
        if not taken:
            taken.append((tmp_path / ".lock").unlink())
        honest(descriptor, how)

    monkeypatch.setattr(folder.fcntl, "flock", slow)
    with locked(tmp_path):
        assert (tmp_path / ".lock").is_file()
        with pytest.raises(ValueError, match="is in use"), locked(tmp_path):
            pytest.fail("two are in the folder")


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(folder.fcntl, "flock", none)
    with locked(tmp_path):
        pass
    assert "this file system has no locks (No locks available)" in capsys.readouterr().out
