"""What statistics.py promises: win rates as AlpacaEval counts them, honest errors, a bend only where there is one."""

import math
import random
from itertools import product

import pytest
import torch

from evaluation.statistics import (bootstrap, bootstrap_crossed, fit_bend, mean_and_error, paired_difference,
                                   paired_mean_difference, paired_ratio_difference, ratio_and_error, win_rate)

# --- statistics ----------------------------------------------------------------------------------------------------


def test_win_rate_by_hand():
    """1 is the reference's, 2 the candidate's, 0 and 1.5 are ties worth half, None is left out: 0 100 50 50 → 50."""
    mean, error = win_rate([1, 2, 0, 1.5, None])
    assert mean == 50
    assert error == pytest.approx(math.sqrt((50**2 + 50**2) / 3 / 4))


def test_a_weighted_judges_preference_counts_by_its_weight():
    mean, error = win_rate([1.25, 1.75, 2])
    assert mean == pytest.approx((25 + 75 + 100) / 3)
    assert error == pytest.approx(math.sqrt(((25 - mean) ** 2 + (75 - mean) ** 2 + (100 - mean) ** 2) / 2 / 3))


def test_unparsable_judgements_change_neither_the_rate_nor_its_error():
    assert win_rate([1, None, 2, 2, None]) == win_rate([1, 2, 2])
    assert win_rate([2, None]) == (100, 0)  # one judgement has no spread to estimate an error from


@pytest.mark.parametrize("bad", [3.0, 0.5, -1.0, 2.01, math.nan])
def test_a_value_that_is_no_preference_is_named(bad):
    with pytest.raises(ValueError, match=f"win_rate: preference {bad} must be 0 .tie. or from 1 .* to 2"):
        win_rate([1, 2, bad])


@pytest.mark.parametrize("nothing", [[], [None, None]])
def test_a_win_rate_of_nothing_is_refused(nothing):
    with pytest.raises(ValueError, match="win_rate: no preference is left"):
        win_rate(nothing)


def test_paired_difference_by_hand():
    """Reference → candidate +100, tie → candidate +50, tie → tie 0 (0 and 1.5 are both ties), unpaired left out."""
    difference, error = paired_difference([1, 0, 1.5, None, 2], [2, 2, 0, 2, None])
    assert difference == 50
    assert error == pytest.approx(math.sqrt((50**2 + 0 + 50**2) / 2 / 3))


def test_the_paired_error_is_smaller_than_two_win_rates_would_have():
    before, after = [1, 2] * 50, [1, 2] * 49 + [2, 2]
    assert paired_difference(before, after)[1] < 0.2 * math.hypot(win_rate(before)[1], win_rate(after)[1])


def test_a_paired_difference_of_ratios_by_hand():
    """Facts true of stated: 2/4 and 0/2 before, 3/4 and 1/4 after: 1/3 → 1/2. Deviations over the mean count (3 and 4):
    (2 − 4/3)/3 and (0 − 2/3)/3 before, (3 − 2)/4 and (1 − 2)/4 after; their differences 1/36 and −1/36."""
    difference, error = paired_ratio_difference([(2, 4), (0, 2)], [(3, 4), (1, 4)])
    assert difference == pytest.approx(1 / 2 - 1 / 3)
    assert error == pytest.approx(math.sqrt(2 * (1 / 36) ** 2 / 1 / 2))
    with pytest.raises(ValueError, match="no ratio"):
        paired_ratio_difference([(0, 0)], [(1, 2)])


def test_a_paired_difference_of_means_by_hand():
    assert paired_mean_difference([1.0, 2.0, 4.0], [2.0, 2.0, 9.0]) == (pytest.approx(2), pytest.approx(math.sqrt(14 / 2 / 3)))


def test_a_paired_difference_without_pairs_is_said():
    with pytest.raises(ValueError, match="no example was judged both before and after"):
        paired_difference([1, None], [None, 2])


def test_the_error_over_runs_and_instructions_is_that_of_simulated_studies():
    """Runs and instructions with effects of their own: the deviation of many whole studies is what the error should be, and
    the bootstrap over runs alone, which the paper reports, is too small by far."""
    draw = torch.Generator().manual_seed(0)

    def study():
        runs, items = torch.randn(3, 1, generator=draw) * 0.3, torch.randn(1, 200, generator=draw) * 1.0
        wins = torch.rand(3, 200, generator=draw) < torch.sigmoid(runs + items)
        return (1.0 + wins.double()).tolist()

    studies = [study() for _ in range(300)]
    means = torch.tensor([bootstrap_crossed(s, n=2)[0] for s in studies])
    crossed = sum(bootstrap_crossed(s, n=200)[1] for s in studies[:60]) / 60
    over_runs = sum(bootstrap([win_rate(run)[0] for run in s])[1] for s in studies[:60]) / 60
    assert crossed == pytest.approx(means.std().item(), rel=0.25)
    assert over_runs < 0.8 * crossed


def test_a_crossed_bootstrap_leaves_out_what_could_not_be_read_and_repeats_itself():
    mean, error = bootstrap_crossed([[1, 2, None, 0], [2, 2, 1.5, None]])
    assert mean == pytest.approx((0 + 100 + 50 + 100 + 100 + 50) / 6)
    assert (mean, error) == bootstrap_crossed([[1, 2, None, 0], [2, 2, 1.5, None]]) and error > 0


def test_pairs_of_unequal_number_are_refused():
    with pytest.raises(ValueError):
        paired_difference([1, 2], [1])


def test_the_bootstrap_error_is_that_of_every_possible_draw():
    """Of three runs there are 27 equally likely draws: their means' deviation is the exact bootstrap error."""
    runs = [40.0, 44.0, 48.5]
    means = [sum(draw) / 3 for draw in product(runs, repeat=3)]
    centre = sum(means) / 27
    exact = math.sqrt(sum((m - centre) ** 2 for m in means) / 27)
    mean, error = bootstrap(runs, n=20_000)
    assert mean == pytest.approx(sum(runs) / 3)
    assert error == pytest.approx(exact, rel=0.02)


def test_the_bootstrap_is_reproducible_and_depends_on_its_seed():
    runs = [40.0, 44.0, 48.5, 41.0]
    assert bootstrap(runs, seed=3) == bootstrap(runs, seed=3) != bootstrap(runs, seed=4)


def test_runs_given_as_lists_count_by_their_mean():
    assert bootstrap([[30, 50], [44], [50, 47]]) == bootstrap([40, 44, 48.5])
    assert bootstrap([[30, 50]]) == (40, 0)


def test_a_bootstrap_of_nothing_is_refused():
    with pytest.raises(ValueError, match="bootstrap: values_per_run is empty"):
        bootstrap([])


def test_a_ratio_weighs_tokens_alike_and_its_error_counts_responses():
    totals, counts = [1.0, 6.0, 2.0], [10, 20, 5]
    ratio, error = ratio_and_error(totals, counts)
    assert ratio == pytest.approx(9 / 35)  # not the mean of 0.1, 0.3 and 0.4
    spread = sum((t - ratio * c) ** 2 for t, c in zip(totals, counts)) / 2  # deviations of whole responses, n − 1
    assert error == pytest.approx(math.sqrt(spread / 3) / (35 / 3))
    assert ratio_and_error([1.0, 2.0], [2, 4]) == (0.5, 0)  # equal ratios have no spread


def test_with_one_token_each_a_ratio_is_a_mean():
    values = [1.0, 4.0, 2.5, 0.0]
    assert ratio_and_error(values, [1] * 4) == pytest.approx(mean_and_error(values))


def test_a_ratio_over_no_facts_at_all_is_not_a_number():
    assert all(math.isnan(x) for x in ratio_and_error([0, 0], [0, 0]))


# --- where the line breaks ---------------------------------------------------------------------------------------------


def noisy(f, xs, seed=0, deviation=0.02):
    rng = random.Random(seed)
    return [f(x) + rng.gauss(0, deviation) for x in xs]


XS = [i / 20 for i in range(21)]


def test_a_straight_line_has_no_bend():
    fit = fit_bend(XS, noisy(lambda x: 0.3 + 2 * x, XS))
    assert fit.corner is None and fit.slope == fit.slope_after == pytest.approx(2, abs=0.05) and fit.p > 0.05
    assert fit.r_squared > 0.99 and fit(0.5) == pytest.approx(1.3, abs=0.03)


@pytest.mark.parametrize("after", [0.0, -1.5])
def test_the_bend_is_found_where_it_is(after):
    fit = fit_bend(XS, noisy(lambda x: 2 * min(x, 0.4) + after * max(0, x - 0.4), XS))
    assert fit.corner == pytest.approx(0.4, abs=0.04) and fit.p <= 0.05
    assert fit.slope == pytest.approx(2, abs=0.2) and fit.slope_after == pytest.approx(after, abs=0.2)
    assert fit(0.9) == pytest.approx(0.8 + after * 0.5, abs=0.05)


@pytest.mark.parametrize("n, starts", [(12, 1), (40, 1), (12, 8)])
def test_a_straight_line_is_called_bent_in_one_case_of_twenty(n, starts):
    """200 lines with noise, with one starting point or with the same one in eight runs: 5 % and three standard errors."""
    xs = [i / n for i in range(n)]
    bent = 0
    for seed in range(200):
        ys = noisy(lambda x: 1 + x, xs, seed, deviation=0.3)
        bent += fit_bend([0.0] * (starts - 1) + xs, [ys[0]] * (starts - 1) + ys).corner is not None
    assert bent / 200 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)


def test_least_squares_by_hand():
    fit = fit_bend([0, 1, 2], [0, 2, 1])
    assert (fit.intercept, fit.slope) == (pytest.approx(0.5), pytest.approx(0.5)) and fit.corner is None and fit.p is None
    assert fit.r_squared == pytest.approx(1 - 1.5 / 2)


@pytest.mark.parametrize("x", [[], [1.0], [1.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
def test_too_few_points_give_no_fit(x):
    assert fit_bend(x, [1.0] * len(x)) is None
