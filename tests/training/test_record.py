"""What --log-to promises: the same numbers as in metrics.jsonl, a resumed run's but once, and nothing imported unasked."""

import subprocess
import sys
import types

import pytest
from conftest import ROOT
from runs import records, settings, start

from training.record import require_log


def curves(out) -> dict:
    """{name: [(step, value), ...]} of a run's event files."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="an extra")
    found = accumulator.EventAccumulator(str(out / "tensorboard"))
    found.Reload()
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_tensorboard_holds_the_metrics_and_a_resumed_runs_once(world, tmp_path):
    pytest.importorskip("tensorboard", reason="an extra")
    start(settings(world, tmp_path / "run", steps=2, log_to="tensorboard"))
    start({"out": str(tmp_path / "run"), "steps": 3}, resume=True)
    metrics, found = records(tmp_path / "run" / "metrics.jsonl"), curves(tmp_path / "run")
    assert found["train/score_mean"] == [(m["step"], pytest.approx(m["score_mean"])) for m in metrics]
    assert [step for step, _ in found["evaluation/true_kl"]] == [e["step"] for e in records(
        tmp_path / "run" / "evaluations.jsonl")]


def test_wandb_gets_every_step_under_the_folders_name(world, tmp_path, monkeypatch):
    said, begun = [], []
    fake = types.SimpleNamespace(init=lambda **given: begun.append(given), log=lambda numbers, step: said.append((step, numbers)),
                                 __spec__=object())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    start(settings(world, tmp_path / "run", steps=2, log_to="wandb", evaluation=None))
    assert [(step, numbers["train/score_mean"]) for step, numbers in said] == [
        (m["step"], m["score_mean"]) for m in records(tmp_path / "run" / "metrics.jsonl")]
    [run] = begun
    assert run["name"] == run["id"] == "run" and run["resume"] == "allow" and run["config"]["estimator"]


def test_a_missing_package_is_one_line_before_anything_slow(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--log-to wandb: the package is missing: pip install wandb"):
        require_log(types.SimpleNamespace(log_to="wandb"))
    require_log(types.SimpleNamespace(log_to=None))


def test_neither_is_imported_unasked():
    code = "import sys, train; print({'wandb', 'tensorboard', 'torch.utils.tensorboard'} & sys.modules.keys() or 'none')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "none"
