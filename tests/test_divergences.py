"""The penalties of Table 1 keep their definitions, their bounds and their biases."""

import math

import pytest
import torch

from divergences import ESTIMATORS, MAX_LOG_RATIO, bregman, get_estimator, jensen_shannon, schulman_check, true_kl


def test_every_estimator_matches_table_1_worked_by_hand():
    """π(y) = 0.6, π_ref(y) = 0.3: the ratio is 2, the mixture 0.45."""
    expected = {
        "clamped_kl": math.log(2),
        "kl": math.log(2),
        "bregman": 0.5 - 1 + math.log(2),
        "squared_error": 0.5 * math.log(2) ** 2,
        "jensen_shannon": 0.5 * math.log(0.6 / 0.45),  # the other half, log(0.3 / 0.45), is negative and clamped
        "none": 0.0,
        "negative_kl": -math.log(2),
    }
    assert set(expected) == set(ESTIMATORS)
    logprobs, ref_logprobs = torch.tensor([math.log(0.6)]), torch.tensor([math.log(0.3)])
    for name, value in expected.items():
        assert get_estimator(name)(logprobs, ref_logprobs).item() == pytest.approx(value, abs=1e-6), name


def test_when_the_reference_likes_the_token_more_clamping_shows():
    """π(y) = 0.3, π_ref(y) = 0.6: the same pair the other way round."""
    logprobs, ref_logprobs = torch.tensor([math.log(0.3)]), torch.tensor([math.log(0.6)])
    value = {name: f(logprobs, ref_logprobs).item() for name, f in ESTIMATORS.items()}
    assert value["clamped_kl"] == 0.0
    assert value["kl"] == pytest.approx(-math.log(2))
    assert value["bregman"] == pytest.approx(2 - 1 - math.log(2), rel=1e-6)
    assert value["jensen_shannon"] == pytest.approx(0.5 * math.log(0.6 / 0.45), rel=1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_equal_models_are_never_penalised(name):
    logprobs = -torch.rand(1000) * 20
    assert (ESTIMATORS[name](logprobs, logprobs.clone()) == 0).all()


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("logprob, ref_logprob", [(-200.0, -1e-6), (-1e-6, -200.0), (-200.0, -200.5)])
def test_vanishing_probabilities_stay_finite_forward_and_backward(name, logprob, ref_logprob):
    logprobs, ref_logprobs = torch.tensor([logprob], requires_grad=True), torch.tensor([ref_logprob])
    penalty = ESTIMATORS[name](logprobs, ref_logprobs)
    assert penalty.isfinite().all() and penalty.dtype == torch.float32
    if penalty.requires_grad:
        penalty.sum().backward()
        assert logprobs.grad.isfinite().all()


def test_bregman_is_exact_up_to_its_cap_and_stays_squarable_beyond():
    gaps = torch.tensor([-30.0, -5.0, -1.0, 0.1, 3.0, 20.0, MAX_LOG_RATIO])
    exact = gaps.double().expm1() - gaps.double()
    torch.testing.assert_close(bregman(torch.zeros(7), gaps), exact.float())
    assert bregman(torch.tensor([-500.0]), torch.tensor([0.0])).square().isfinite()


def test_bregman_and_jensen_shannon_stay_inside_their_bounds_even_for_rounding_errors():
    logprobs = -torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    ref_logprobs = logprobs + torch.randn(200_000, generator=torch.Generator().manual_seed(1)) * 1e-6
    assert (bregman(logprobs, ref_logprobs) >= 0).all()
    wide = jensen_shannon(logprobs * 100, -logprobs)
    assert (wide >= 0).all() and (wide <= 0.5 * math.log(2) + 1e-6).all()


def test_low_precision_log_probabilities_are_compared_in_float32():
    logprobs, ref_logprobs = torch.tensor([-3.0], dtype=torch.bfloat16), torch.tensor([-1.0], dtype=torch.bfloat16)
    assert bregman(logprobs, ref_logprobs).item() == pytest.approx(math.exp(2) - 3, rel=1e-6)  # bf16 would give 4.375


def test_schulmans_names_work_and_an_unknown_name_lists_what_exists():
    assert [get_estimator(k) for k in ("k1", "k2", "k3")] == [ESTIMATORS[n] for n in ("kl", "squared_error", "bregman")]
    with pytest.raises(ValueError, match="'k4' does not exist.*jensen_shannon.*k3 = bregman"):
        get_estimator("k4")


def test_tokens_are_never_broadcast_against_other_tokens():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3,\)"):
        get_estimator("none")(torch.zeros(2, 3), torch.zeros(3))


def test_schulmans_published_table_comes_out():
    """joschu.net/blog/kl-approx.html: bias/KL and std/KL of k1, k2, k3 near (0.1) and far (1) from the reference."""
    near = {"k1": (0, 20), "k2": (0.002, 1.42), "k3": (0, 1.42)}
    far = {"k1": (0, 2), "k2": (0.25, 1.73), "k3": (0, 1.7)}
    for ref_mean, rows in ((0.1, near), (1.0, far)):
        table = schulman_check(ref_mean, n=200_000)
        names = {"k1": "kl", "k2": "squared_error", "k3": "bregman"}
        for short, (bias, deviation) in rows.items():
            assert table[names[short]][0] == pytest.approx(bias, abs=2e-3)
            assert table[names[short]][1] == pytest.approx(deviation, rel=0.01)


def test_true_kl_is_the_sum_over_the_vocabulary():
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, 5, generator=generator)
    result = true_kl(logits, ref_logits)
    assert result.shape == (2, 3)
    for b in range(2):
        for t in range(3):
            p, q = logits[b, t].softmax(0), ref_logits[b, t].softmax(0)
            naive = sum((p[v] * (p[v] / q[v]).log()).item() for v in range(5))
            assert result[b, t].item() == pytest.approx(naive, abs=1e-5)


def test_true_kl_forgives_tokens_that_the_policy_rules_out():
    logits = torch.tensor([0.0, 0.0, -torch.inf])
    assert true_kl(logits, logits).item() == 0.0
    assert true_kl(logits, torch.zeros(3)).item() == pytest.approx(math.log(3 / 2))


def test_unbiased_estimators_average_to_the_true_kl_over_the_vocabulary():
    """Footnote 15: the expectation of kl and bregman under π is KL(π‖π_ref), exactly, for any two distributions."""
    logprobs = torch.randn(7, generator=torch.Generator().manual_seed(0)).log_softmax(0)
    ref_logprobs = torch.randn(7, generator=torch.Generator().manual_seed(1)).log_softmax(0)
    for name in ("kl", "bregman"):
        expectation = (logprobs.exp() * ESTIMATORS[name](logprobs, ref_logprobs)).sum()
        torch.testing.assert_close(expectation, true_kl(logprobs, ref_logprobs))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_doubles_stay_doubles_and_halves_become_floats(name):
    """log π − log π_ref = 1e-9 is nothing to float32 beside log-probabilities near −8, and all there is to see in float64."""
    logprobs, ref_logprobs = torch.tensor([-8.0], dtype=torch.float64), torch.tensor([-8.0 - 1e-9], dtype=torch.float64)
    assert get_estimator(name)(logprobs, ref_logprobs).dtype == torch.float64
    assert get_estimator(name)(logprobs.half(), ref_logprobs.half()).dtype == torch.float32
    gap = get_estimator("kl")(logprobs, ref_logprobs)
    torch.testing.assert_close(gap, torch.tensor([1e-9], dtype=torch.float64), rtol=1e-5, atol=0)
