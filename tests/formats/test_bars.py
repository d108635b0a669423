"""What a log promises: where stderr is no terminal, progress is plain lines and nothing is redrawn."""

import subprocess
import sys

from conftest import ROOT
from runs import settings, to_flags

BARS = """
import time
from formats.write import any_console
any_console()
any_console()
from tqdm import tqdm
for _ in tqdm(range(3), desc="short", unit="row"):
    pass
for i in tqdm(range(3), desc="read", unit="row", leave=False):
    time.sleep(0.8)
    tqdm.write(f"line {i}")
with tqdm(total=4, unit="step") as bar:
    for i in range(4):
        time.sleep(0.6)
        bar.set_description(f"phase {i}")
        bar.update()
"""


def test_a_bar_of_seconds_is_one_line_with_what_is_done_and_its_rate():
    done = subprocess.run([sys.executable, "-c", BARS], cwd=ROOT, capture_output=True, text=True, check=True)
    read, phase = done.stderr.splitlines()
    assert read.startswith("read: 3 of 3 row, 100 %, 00:02 gone, 00:00 left, ") and read.endswith("row/s")
    assert phase.startswith("phase 3: 4 of 4 step, 100 %") and done.stdout == "line 0\nline 1\nline 2\n"


def test_the_log_of_a_run_holds_no_redraws(world, tmp_path):
    done = subprocess.run([sys.executable, "train.py", *to_flags(settings(world, tmp_path / "run", steps=2))], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    assert "\r" not in done.stdout + done.stderr and "\x1b" not in done.stdout + done.stderr
    assert all(" gone, " in line for line in done.stderr.splitlines())
