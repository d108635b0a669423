"""The one command for the first GPU works before there is one: all of bench/gpu.py, at toy sizes, on a CPU."""

import json
import subprocess
import sys

from conftest import ROOT


def test_every_part_of_the_first_contact_runs_and_leaves_its_figures(tmp_path):
    file = tmp_path / "gpu.json"
    words = ["bench/gpu.py", "--rehearse", "--minutes", "9", "--out", str(file)]
    run = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(file.read_text(encoding="utf-8"))
    assert sorted(found) == ["compiled", "miniature", "profile", "sampling", "small", "step", "tests"]
    assert {name: part["ended"] for name, part in found.items() if "ended" in part} == {}
    assert "failed" not in found["tests"]["tests"]["summary"] and found["tests"]["tests"]["failed"] == []
    assert found["miniature"]["miniature"]["steps"] == 1
    table = file.with_suffix(".md").read_text(encoding="utf-8")
    assert all(f"## {name}" in table for name in found) and "a rehearsal at toy sizes" in table


def test_a_part_that_takes_too_long_is_ended_and_what_it_found_stays(tmp_path):
    file = tmp_path / "gpu.json"
    words = ["bench/gpu.py", "--rehearse", "--minutes", "0.1", "--parts", "miniature", "--out", str(file)]
    subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=True, timeout=60)
    part = json.loads(file.read_text(encoding="utf-8"))["miniature"]
    assert part["part_seconds"] < 9  # six and what it takes to end
    assert part.get("ended") == ["its time was up"] or part["miniature"]["steps"] == 1  # unless the machine is that fast
