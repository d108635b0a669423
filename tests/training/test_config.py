"""What the settings of a run promise: files of them, flags over them, a folder of its own for each run, help that can be read."""

import json
import sys
from pathlib import Path

import pytest
from runs import records, settings, start, to_flags

import train
from training.config import build_config, build_parser, settings_in
from training.folder import own_folder


def told(monkeypatch, capsys, *argv) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    return train.main(), *capsys.readouterr()


# ------------------------------------------------------------------------------------------------------------- --config


def test_another_runs_settings_are_taken_but_for_its_folder_and_the_flags(world, tmp_path, monkeypatch, capsys):
    start(settings(world, tmp_path / "first", evaluation=None, estimator="kl", steps=1))
    code, _, _ = told(monkeypatch, capsys, "--config", tmp_path / "first" / "config.json", "--beta", "0.3", "--out",
                      tmp_path / "second")
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second"))
    assert code == 0 and second == first | {"beta": 0.3, "out": str(tmp_path / "second")}


def test_yaml_is_read_with_dashes_and_powers_of_ten(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("estimator: bregman\nlearning-rate: 1e-5\nsteps: 20\nkl_target: null\nout: runs/mine\n")
    given = settings_in(file)
    assert given == {"estimator": "bregman", "learning_rate": 1e-5, "steps": 20, "kl_target": None, "out": "runs/mine"}
    assert build_config(given).ppo.learning_rate == 1e-5


@pytest.mark.parametrize(("text", "says"), [
    ("learning_rat: 1", "'learning_rat' is no setting; learning_rate is"), ("steps: many", "steps is 'many': must be int"),
    ("tuning: ful", "tuning is 'ful': must be one of lora, full"), ("- a\n- b", "holds a list, not names with values"),
    ("a: [", "no settings of a run"), ("steps: true", "steps is True: must be int")])
def test_what_is_no_setting_is_one_line(tmp_path, monkeypatch, capsys, text, says):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    code, _, err = told(monkeypatch, capsys, "--config", file)
    assert code == 2 and says in err and f"--config {file}" in err and err.strip().count("\n") == 0


def test_a_resumed_run_has_its_own_settings(tmp_path, monkeypatch, capsys):
    code, _, err = told(monkeypatch, capsys, "--config", tmp_path / "x.yaml", "--resume")
    assert code == 2 and "with --resume" in err
    code, _, err = told(monkeypatch, capsys, "--config", tmp_path / "x.yaml")
    assert code == 2 and "there is no such file" in err


# ------------------------------------------------------------------------------------------------------ a run's folder


def test_the_same_command_again_gets_a_folder_of_its_own(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = to_flags(settings(world, Path("x"), evaluation=None, steps=1, estimator="bregman"))
    flags = flags[:flags.index("--out")] + flags[flags.index("--out") + 2:]
    assert told(monkeypatch, capsys, *flags)[0] == 0
    code, out, _ = told(monkeypatch, capsys, *flags)
    assert code == 0 and "runs/bregman-s0 holds a run already" in out and "this one goes to runs/bregman-s0-2" in out
    assert records(Path("runs/bregman-s0/metrics.jsonl"))[0]["score_mean"] == records(
        Path("runs/bregman-s0-2/metrics.jsonl"))[0]["score_mean"]
    code, _, err = told(monkeypatch, capsys, *flags, "--out", "runs/bregman-s0")  # a folder that was named is that folder
    assert code == 2 and "already holds files" in err


def test_a_restarted_run_goes_on_in_the_last_folder_of_its_name(tmp_path):
    out = str(tmp_path / "run")
    assert own_folder(out, restarted=False) == own_folder(out, restarted=True) == out
    for name in ("run", "run-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert own_folder(out, restarted=False) == f"{out}-3" and own_folder(out, restarted=True) == f"{out}-2"


# ----------------------------------------------------------------------------------------------------------------- help


def test_help_has_examples_and_says_no_default_of_none():
    text = build_parser("").format_help()
    assert text.count("  python train.py") == 3 and "default None" not in text
    for example in [line.strip() for line in text.splitlines() if line.startswith("  python train.py")]:
        words = example.split("  ")[0].split()[2:]
        assert build_parser("").parse_args(words)
