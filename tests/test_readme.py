"""The README stays true: its commands are the ones CI runs, its files exist, its flags are real."""

import re
from pathlib import Path

import train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_runs_the_readmes_test_command():
    [command] = re.findall(r"^    (python3 -m venv .*-m pytest)$", README, re.MULTILINE)
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_file_that_the_readme_names_exists():
    for name in set(re.findall(r"`((?:[a-z_0-9]+/)*[a-z_0-9]+\.(?:py|txt|md|json|png))`", README)):
        in_a_run = name in ("config.json", "curves.png", "evaluation.json", "annotations.json", "outputs/reference_outputs.json")
        assert in_a_run or name.startswith("runs/") or (ROOT / name).exists() or (ROOT / "tiny" / name).exists(), name


def test_every_flag_of_train_that_the_readme_shows_exists():
    known = {option for action in train.build_parser()._actions for option in action.option_strings}
    for line in re.findall(r"python train\.py([^`\n]*)", README):
        for flag in re.findall(r"--[a-z-]+", line):
            assert flag in known, flag


def test_no_figure_of_the_readme_is_left_open():
    assert "@@" not in README and "TODO" not in README
