"""What watch.py promises: each sign of trouble is said once, with its figure, and a healthy run hears nothing."""

import pytest

from training.watch import Watch

HEALTHY = {"kl_k1": 0.01, "kl_k1_se": 0.002, "true_kl": 0.01, "score_mean": 0.1, "score_std": 1.0, "length": 20.0,
           "finished": 1.0, "clip_fraction": 0.1, "value_loss": 0.2, "empty": 0.0}


def heard(*changes: dict) -> list[str]:
    """What is said over steps that are healthy but for these changes."""
    watch, lines = Watch(), []
    for step, change in enumerate(changes, start=1):
        lines += watch(HEALTHY | {"score_mean": 0.1 * step} | change | {"step": step})
    return lines


def test_a_healthy_run_hears_nothing():
    assert heard(*[{}] * 20) == []


@pytest.mark.parametrize(("trouble", "words"), [
    ({"kl_k1": -0.01}, "k1 is -0.0100 ± 0.0020"), ({"length": 61.0}, "grown from 20 to 61"),
    ({"length": 5.0}, "shrunk from 20 to 5"),
    ({"true_kl": 0.2}, "√KL is 0.45 and the reward still rises"), ({"clip_fraction": 0.6}, "60 % of the tokens were clipped"),
    ({"finished": 0.0}, "100 % of the responses never end"), ({"value_loss": 3.0}, "the value loss is 3, 15 times its least"),
    ({"score_std": 0.0}, "every response got the reward 0.5"), ({"empty": 0.5}, "50 % of the responses are empty")])
def test_each_sign_is_said_once_with_its_figure(trouble, words):
    lines = heard({}, {}, {}, {}, trouble, trouble, {}, trouble)
    assert len(lines) == 1 and lines[0].startswith("warning, step 5: ") and words in lines[0]


def test_chance_and_small_changes_are_no_signs():
    assert heard({}, {}, {}, {"kl_k1": -0.005}, {"length": 45.0}, {"clip_fraction": 0.4}, {"value_loss": 1.0},
                 {"true_kl": 0.15}) == []


def test_far_from_the_reference_without_more_reward_is_not_over_optimisation():
    assert heard({}, {}, {}, {"true_kl": 0.3, "score_mean": 0.05}) == []


def test_a_resumed_run_does_not_hear_again_what_it_heard():
    first = HEALTHY | {"step": 1, "clip_fraction": 0.7}
    assert Watch([first])(first | {"step": 2}) == []


@pytest.mark.parametrize("odd", [5e7, 0.0])
def test_one_odd_batch_neither_blinds_the_watch_for_the_value_loss_nor_alarms_it(odd):
    """As of a rule that gave every answer the same, in the first step or later."""
    trouble = {"value_loss": 3.0}
    for calm in ([{"value_loss": odd}, {}, {}], [{}, {}, {}, *[{"value_loss": odd}, {}, {}] * (odd == 0)]):
        assert heard(*calm) == []
        assert [line for line in heard(*calm, trouble) if "15 times its least" in line]
