"""Paired differences over seeds: t and bootstrap intervals, Holm's correction, a verdict, and how many seeds it takes.

All gains are in points of mAP, distilled minus baseline, one pair per seed (and fold). Everything is computed from the
definitions; nothing beyond NumPy is needed.

Sources: Student's t for whole degrees of freedom, Abramowitz & Stegun 26.7.3 and 26.7.4; S. Holm, "A simple
sequentially rejective multiple test procedure", Scand. J. Statist. 6, 1979; B. Efron, "Better bootstrap confidence
intervals", JASA 82, 1987 (BCa); C. Nadeau and Y. Bengio, "Inference for the generalization error", Machine Learning 52,
2003, for folds, whose training sets overlap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["helped", "did not help", "cannot tell", "cannot tell (one seed)"]
SAMPLES = 10_000
BOOTSTRAP_SEED = 0
POWER = 0.8
MOST_PAIRS = 10_000
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Paired:
    """Differences of one method from the baseline.

    Attributes:
        pairs: Number of pairs.
        mean: Mean difference.
        sd: Standard deviation of the differences (n - 1); NaN for one pair.
        t_low: Lower end of the t interval at the confidence asked for.
        t_high: Upper end.
        boot_low: Lower end of the bootstrap interval over pairs.
        boot_high: Upper end.
        p: Two-sided p value of "no difference".
        p_gain: One-sided p value of "a gain of at least min_gain": small when such a gain is excluded.
        p_holm: ``p`` corrected for all comparisons of the report.
        p_gain_holm: ``p_gain`` corrected in the same way.
        verdict: See ``judge_all``.
        pairs_needed: Pairs that would tell, see ``pairs_needed``; None when no number would.
    """

    pairs: int
    mean: float
    sd: float
    t_low: float
    t_high: float
    boot_low: float
    boot_high: float
    p: float
    p_gain: float
    p_holm: float = math.nan
    p_gain_holm: float = math.nan
    verdict: Verdict = "cannot tell"
    pairs_needed: int | None = None


def compare_pairs(
    values: Sequence[float], baseline: Sequence[float], confidence: float, min_gain: float, overlap: float = 0.0
) -> Paired:
    """Compare two rows pair by pair.

    Args:
        values: A method's results, one a seed (and fold).
        baseline: The baseline's, in the same order.
        confidence: Of the intervals.
        min_gain: Smallest gain that matters.
        overlap: What the variance of the mean has on top of 1/n because pairs share data: n_test / n_train for folds
            (Nadeau and Bengio's correction), 0 for seeds on one split.

    Raises:
        ValueError: The rows are empty or of different lengths.
    """
    if len(values) != len(baseline) or not values:
        raise ValueError(f"{len(values)} values and {len(baseline)} of the baseline are no pairs")
    differences = np.asarray(values, np.float64) - np.asarray(baseline, np.float64)
    n, mean = len(differences), float(np.mean(differences))
    if n == 1:
        return Paired(1, mean, math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, math.nan)
    sd = float(np.std(differences, ddof=1))
    error = sd * math.sqrt(1 / n + overlap)
    half = t_quantile(0.5 + confidence / 2, n - 1) * error
    low, high = bootstrap_interval(differences, confidence)
    p = 2 * t_upper(abs(_ratio(mean, error)), n - 1)
    p_gain = t_upper(_ratio(min_gain - mean, error), n - 1)
    return Paired(n, mean, sd, mean - half, mean + half, low, high, p, p_gain)


def judge_all(rows: Sequence[Paired], confidence: float, min_gain: float, overlap: float = 0.0) -> list[Paired]:
    """Correct all comparisons of a report for their number and give each its verdict.

    With alpha = 1 - confidence:

    - *helped*: the difference is positive and its p value, after Holm, is at most alpha.
    - *did not help*: the difference is negative and its p value, after Holm, is at most alpha; or a gain of
      ``min_gain`` or more is excluded: its one-sided p value, after Holm, is at most alpha / 2.
    - *cannot tell*: neither. With one pair there is no spread, so nothing can be told.
    """
    alpha = 1 - confidence
    counted = [row for row in rows if row.pairs > 1]
    both = dict(zip(map(id, counted), holm([row.p for row in counted]), strict=True))
    gains = dict(zip(map(id, counted), holm([row.p_gain for row in counted]), strict=True))
    judged = []
    for row in rows:
        if row.pairs < 2:
            judged.append(replace(row, verdict="cannot tell (one seed)"))
            continue
        p, p_gain = both[id(row)], gains[id(row)]
        verdict: Verdict = "cannot tell"
        if p <= alpha and row.mean > 0:
            verdict = "helped"
        elif (p <= alpha and row.mean < 0) or p_gain <= alpha / 2:
            verdict = "did not help"
        effect = max(abs(row.mean), min_gain)
        needed = pairs_needed(effect, row.sd, alpha / len(counted), overlap)
        judged.append(replace(row, p_holm=p, p_gain_holm=p_gain, verdict=verdict, pairs_needed=needed))
    return judged


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected by Holm's step-down procedure, in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def bootstrap_interval(
    differences: Sequence[float] | NDArray[np.float64], confidence: float, samples: int = SAMPLES
) -> tuple[float, float]:
    """Return the bias-corrected and accelerated bootstrap interval of the mean, over pairs, from a fixed seed.

    With a handful of pairs it is too narrow, as every bootstrap: the verdict rests on the t interval.
    """
    data = np.asarray(differences, np.float64)
    n, mean = len(data), float(np.mean(data))
    if n < 2 or np.ptp(data) == 0:
        return mean, mean
    drawn = np.random.default_rng(BOOTSTRAP_SEED).integers(0, n, (samples, n))
    means = np.mean(data[drawn], axis=1)
    below = float(np.mean(means < mean) + np.mean(means == mean) / 2)
    bias = _NORMAL.inv_cdf(min(max(below, 1 / samples), 1 - 1 / samples))
    left_out = (np.sum(data) - data) / (n - 1)
    spread = np.mean(left_out) - left_out
    acceleration = float(np.sum(spread**3) / (6 * np.sum(spread**2) ** 1.5))
    ends = []
    for share in ((1 - confidence) / 2, (1 + confidence) / 2):
        shifted = bias + _NORMAL.inv_cdf(share)
        ends.append(_NORMAL.cdf(bias + shifted / (1 - acceleration * shifted)))
    low, high = (float(value) for value in np.quantile(means, ends))
    return low, high


def t_upper(t: float, degrees: int) -> float:
    """Return P(T >= t) of Student's t with whole degrees of freedom."""
    if math.isinf(t):
        return 0.0 if t > 0 else 1.0
    upper = (1 - _t_inside(abs(t), degrees)) / 2
    return upper if t >= 0 else 1 - upper


def t_quantile(share: float, degrees: int) -> float:
    """Return the t below which ``share`` of Student's t lies, by bisection.

    Raises:
        ValueError: ``share`` is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"a share between 0 and 1 is needed, not {share}")
    if share < 0.5:
        return -t_quantile(1 - share, degrees)
    low, high = 0.0, 1.0
    while t_upper(high, degrees) > 1 - share:
        high *= 2
    while high - low > 1e-12 * max(high, 1.0):
        middle = (low + high) / 2
        low, high = (middle, high) if t_upper(middle, degrees) > 1 - share else (low, middle)
    return (low + high) / 2


def pairs_needed(effect: float, sd: float, alpha: float, overlap: float = 0.0, power: float = POWER) -> int | None:
    """Return the smallest number of pairs at which a two-sided paired t test finds a true gain.

    Args:
        effect: The gain, points.
        sd: Standard deviation of the differences.
        alpha: Level of the test; for several comparisons already divided by their number.
        overlap: As in ``compare_pairs``.
        power: Wished probability of finding it.

    Returns:
        At least 2; None when even 10 000 pairs would not do.
    """
    if effect <= 0:
        return None
    if sd <= 0:
        return 2

    def enough(n: int) -> bool:
        return t_power(effect / (sd * math.sqrt(1 / n + overlap)), n - 1, alpha) >= power

    low, high = 1, 2
    while not enough(high):
        if high >= MOST_PAIRS:
            return None
        low, high = high, min(2 * high, MOST_PAIRS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def t_power(shift: float, degrees: int, alpha: float) -> float:
    """Return P(T' > t critical), T' noncentral t with ``shift``: the power of a two-sided test in the right direction.

    T' = (Z + shift) / S with S^2 chi-square over its degrees of freedom, so the power is the mean of
    Phi(shift - t S) over S, here by the trapezoidal rule.
    """
    critical = t_quantile(1 - alpha / 2, degrees)
    middle, width = 1.0, 1 / math.sqrt(2 * degrees)
    s = np.linspace(max(1e-9, middle - 9 * width), middle + 9 * width, 2001)
    # density of S: 2 (v/2)^(v/2) / Gamma(v/2) s^(v-1) exp(-v s^2 / 2)
    half = degrees / 2
    log_density = math.log(2) + half * math.log(half) - math.lgamma(half) + (degrees - 1) * np.log(s) - half * s**2
    found = np.array([_NORMAL.cdf(shift - critical * one) for one in s])
    heights = found * np.exp(log_density)
    return float(np.sum(heights[1:] + heights[:-1]) / 2 * (s[1] - s[0]))


def _t_inside(t: float, degrees: int) -> float:
    """Return P(|T| <= t), Abramowitz & Stegun 26.7.3 (odd) and 26.7.4 (even degrees of freedom)."""
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2 == 1
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _ratio(value: float, error: float) -> float:
    """Return value / error; without any spread a difference is certain, and no difference is none."""
    if error > 0:
        return value / error
    return math.copysign(math.inf, value) if value else 0.0
