"""What a run shows while it trains fits where it is shown."""

import re

import pytest

from training.progress import step_line

METRICS = dict(step=7, score_mean=-0.123, shaped_reward=0.045, kl_k1=0.0123, kl_k3=0.0119, true_kl=0.0121, length=17.3,
               clip_fraction=0.012, value_loss=0.4321, grad_norm=1.234, learning_rate=4.9e-4, seconds_generate=0.5,
               seconds_score=0.2, seconds_update=1.1)


def names(line: str) -> list[str]:
    return re.findall(r"(?:^|  )([A-Za-z][A-Za-z0-9-]*) ", line)


def test_a_file_gets_every_column():
    assert names(step_line(METRICS)) == "step reward shaped k1 k3 KL tokens clip v-loss grad lr s".split()


@pytest.mark.parametrize("columns, left", [
    (100, ["step", "reward", "shaped", "KL", "tokens", "clip", "s"]), (80, ["step", "reward", "shaped", "KL", "tokens", "s"]),
    (42, ["step", "reward", "KL"])])
def test_a_narrow_terminal_gets_what_a_glance_needs(columns, left):
    line = step_line(METRICS, columns)
    assert len(line) < columns and names(line) == left


def test_what_stays_is_written_as_in_a_wide_one():
    wide, narrow = step_line(METRICS), step_line(METRICS, 80)
    assert narrow.startswith("step    7  reward -0.123  ") and all(part in wide for part in narrow.split("  "))
