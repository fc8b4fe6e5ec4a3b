"""Paired statistics against textbook values, published examples and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_yolo.compare.statistics import (
    Paired,
    bootstrap_interval,
    compare_pairs,
    holm,
    judge_all,
    pairs_needed,
    t_power,
    t_quantile,
    t_upper,
)

numbers = st.floats(-50, 50, allow_nan=False).map(lambda value: round(value, 3))
p_values = st.lists(st.floats(0, 1, allow_nan=False), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("share", "degrees", "expected"),
    [  # any printed table of Student's t
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 4, 2.776),
        (0.95, 9, 1.833),
        (0.995, 10, 3.169),
        (0.9, 30, 1.310),
        (0.975, 120, 1.980),
    ],
)
def test_t_quantile__printed_table(share: float, degrees: int, expected: float) -> None:
    assert t_quantile(share, degrees) == pytest.approx(expected, abs=6e-4)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 0.99), st.integers(1, 60))
def test_t_upper__inverts_the_quantile(share: float, degrees: int) -> None:
    assert t_upper(t_quantile(share, degrees), degrees) == pytest.approx(1 - share, abs=1e-9)


def test_t_upper__against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for degrees, t in itertools.product((1, 2, 3, 7, 8, 31, 400), (-3.0, 0.0, 0.4, 2.2, 9.0)):
        assert t_upper(t, degrees) == pytest.approx(float(stats.t.sf(t, degrees)), abs=1e-11)


def test_compare_pairs__sleep_example() -> None:
    """Student 1908, ten patients, two drugs: t = 4.0621, p = 0.00283, interval 0.70 to 2.46."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = compare_pairs(second, first, 0.95, 0.5)
    assert found.mean == pytest.approx(1.58)
    assert found.mean / (found.sd / math.sqrt(10)) == pytest.approx(4.0621, abs=1e-4)
    assert found.p == pytest.approx(0.002833, abs=1e-6)
    assert [found.t_low, found.t_high] == pytest.approx([0.7001, 2.4599], abs=1e-4)


def test_compare_pairs__unpaired_twin_differs() -> None:
    """Seeds vary by 5 points, the method adds 1 +- 0.1 to each: pairing sees it, two separate means do not."""
    baseline = [10.0, 15.0, 20.0, 12.0]
    values = [11.1, 15.9, 21.0, 13.0]
    paired = compare_pairs(values, baseline, 0.95, 0.5)
    pooled = math.sqrt((np.var(values, ddof=1) + np.var(baseline, ddof=1)) / 4)
    unpaired_half = t_quantile(0.975, 6) * pooled
    assert paired.t_low > 0
    assert paired.mean - unpaired_half < 0
    shuffled = compare_pairs(values, [baseline[i] for i in (1, 2, 3, 0)], 0.95, 0.5)
    assert shuffled.mean == pytest.approx(paired.mean)
    assert shuffled.t_low < 0


@settings(max_examples=30, deadline=None)
@given(st.lists(numbers, min_size=2, max_size=8), numbers)
def test_compare_pairs__what_is_common_to_a_pair_does_not_matter(differences: list[float], shift: float) -> None:
    zeros, common = [0.0] * len(differences), [shift * i for i in range(len(differences))]
    plain = compare_pairs(differences, zeros, 0.95, 0.5)
    moved = compare_pairs([d + c for d, c in zip(differences, common, strict=True)], common, 0.95, 0.5)
    mirrored = compare_pairs(zeros, differences, 0.95, 0.5)
    assert moved.mean == pytest.approx(plain.mean, abs=1e-6)
    assert moved.t_high == pytest.approx(plain.t_high, abs=1e-4)
    assert [mirrored.t_low, mirrored.t_high] == pytest.approx([-plain.t_high, -plain.t_low])


def test_compare_pairs__overlapping_folds_widen_the_interval() -> None:
    """Nadeau and Bengio: the variance of the mean is sd^2 (1/n + n_test/n_train), for 5 folds sd^2 (1/5 + 1/4)."""
    values, zeros = [1.0, 2.0, 3.0, 2.5, 1.5], [0.0] * 5
    plain, corrected = (compare_pairs(values, zeros, 0.95, 0.5, overlap) for overlap in (0.0, 0.25))
    ratio = (corrected.t_high - corrected.mean) / (plain.t_high - plain.mean)
    assert ratio == pytest.approx(math.sqrt((1 / 5 + 1 / 4) / (1 / 5)))
    assert corrected.p > plain.p


def test_compare_pairs__rows_of_unequal_length() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        compare_pairs([1.0], [1.0, 2.0], 0.95, 0.5)


def test_compare_pairs__interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    found = [compare_pairs(list(row), [0.0] * 4, 0.9, 0.5) for row in rng.normal(1.0, 2.0, (200, 4))]
    share = np.mean([one.t_low <= 1.0 <= one.t_high for one in found])
    assert share == pytest.approx(0.9, abs=0.064)  # three standard errors of 200 draws


def test_holm__worked_example() -> None:
    """p = 0.01, 0.04, 0.03, 0.005: sorted 0.005*4, 0.01*3, 0.03*2, 0.04*1 = 0.02, 0.03, 0.06, 0.04; made monotone."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(p_values)
def test_holm__between_nothing_and_bonferroni(values: list[float]) -> None:
    corrected = holm(values)
    for raw, one in zip(values, corrected, strict=True):
        assert raw <= one <= min(1.0, raw * len(values)) + 1e-12
    order = sorted(range(len(values)), key=lambda i: values[i])
    assert all(corrected[a] <= corrected[b] for a, b in itertools.pairwise(order))


def test_bootstrap_interval__covers_a_skewed_mean() -> None:
    """200 samples of 20 from a gamma distribution with mean 2: BCa at 95 % covers it in 88 to 98 % of them."""
    rows = np.random.default_rng(1).gamma(2.0, 1.0, (200, 20))
    inside = [low <= 2.0 <= high for low, high in (bootstrap_interval(row, 0.95, samples=800) for row in rows)]
    assert 0.88 <= np.mean(inside) <= 0.98


def test_bootstrap_interval__repeats_and_stays_inside_the_data() -> None:
    data = [0.1, 1.3, 2.0, 0.4, 5.0]
    low, high = bootstrap_interval(data, 0.95)
    assert (low, high) == bootstrap_interval(data, 0.95)
    assert min(data) <= low < np.mean(data) < high <= max(data)
    assert high - np.mean(data) > np.mean(data) - low  # skewed to the right, as the data
    assert bootstrap_interval([2.0, 2.0], 0.95) == (2.0, 2.0)


@pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_pairs_needed__printed_table(effect: float, pairs: int) -> None:
    """Cohen's table for the paired t test, two-sided 0.05, power 0.8, effect in units of the sd of differences."""
    assert pairs_needed(effect, 1.0, 0.05) == pairs


def test_pairs_needed__limits() -> None:
    assert pairs_needed(1.0, 0.0, 0.05) == 2
    assert pairs_needed(0.0, 1.0, 0.05) is None
    assert pairs_needed(0.001, 1.0, 0.05) is None
    assert pairs_needed(0.5, 1.0, 0.05, overlap=0.25) is None  # more folds never beat what they share


def test_t_power__against_simulation() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(1.0, 1.0, (4000, 6))
    t = rows.mean(1) / (rows.std(1, ddof=1) / math.sqrt(6))
    assert t_power(math.sqrt(6), 5, 0.05) == pytest.approx(np.mean(t > t_quantile(0.975, 5)), abs=0.025)


def verdicts(*rows: list[float], min_gain: float = 0.5) -> list[Paired]:
    pairs = [compare_pairs(row, [0.0] * len(row), 0.95, min_gain) for row in rows]
    return judge_all(pairs, 0.95, min_gain)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([1.0, 1.2, 0.9, 1.1], "helped"),
        ([-1.0, -1.2, -0.9, -1.1], "did not help"),
        ([0.01, -0.02, 0.0, 0.01], "did not help"),  # no gain of 0.5 is possible any more
        ([0.0, 0.0, 0.0], "did not help"),
        ([2.0, -1.0, 0.5], "cannot tell"),
        ([3.0], "cannot tell (one seed)"),
    ],
)
def test_judge_all__verdicts(differences: list[float], verdict: str) -> None:
    assert verdicts(differences)[0].verdict == verdict


def test_judge_all__many_comparisons_need_more() -> None:
    promising = [1.0, 1.6, 0.7, 1.3]
    noise = [[2.0, -1.0, 0.5, -1.0 - i] for i in range(9)]
    alone, among = verdicts(promising)[0], verdicts(promising, *noise)[0]
    assert alone.verdict == "helped"
    assert alone.p < 0.05 < among.p_holm
    assert among.verdict == "cannot tell"
    assert (among.pairs_needed or 0) > (alone.pairs_needed or 0)


def test_judge_all__one_seed_takes_no_share_of_the_correction() -> None:
    row = [1.0, 1.2, 0.9, 1.1]
    with_single = verdicts(row, [3.0])
    assert with_single[0].p_holm == pytest.approx(verdicts(row)[0].p_holm)
    assert math.isnan(with_single[1].p_holm)


def test_holm__false_alarms_are_as_rare_as_promised() -> None:
    """Five useless methods a report: in at most about 5 % of reports any of them is said to help or to harm."""
    rows = np.random.default_rng(2).normal(0.0, 1.0, (400, 5, 3))
    t = np.abs(rows.mean(2) / (rows.std(2, ddof=1) / math.sqrt(3)))
    reports = [[2 * t_upper(float(one), 2) for one in report] for report in t]
    assert np.mean([min(holm(report)) <= 0.05 for report in reports]) <= 0.05 + 0.033  # three standard errors
    assert np.mean([min(report) <= 0.05 for report in reports]) > 0.15  # what happens without the correction
