"""Scales: nothing worse than the plain extremes, zero stays zero, and the function behind a tensor counts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kd_yolo.export.int8_ranges import (
    Array,
    Scale,
    asymmetric_scale,
    collect,
    quantize_weight,
    silu,
    symmetric_scale,
    weight_scales,
)
from numpy.typing import NDArray


def statistics_of(values: NDArray[Any]) -> Any:
    batch = values.astype(np.float32)
    return collect(lambda array: [array], ["x"], lambda: [batch])["x"]


def error(scale: Scale, values: NDArray[Any]) -> float:
    return float(((scale.apply(values) - values) ** 2).mean())


def test_collect__extremes_and_counts_over_all_batches() -> None:
    rng = np.random.default_rng(0)
    batches = [rng.normal(index, 1, (2, 3, 8, 8)).astype(np.float32) for index in range(3)]

    def images() -> Iterable[Array]:
        return iter(batches)

    found = collect(lambda batch: [batch, batch * 2], ["x", "y"], images)
    every = np.concatenate([batch.ravel() for batch in batches])
    assert (found["x"].low, found["x"].high) == (every.min(), every.max())
    assert found["y"].high == pytest.approx(2 * every.max())
    assert found["x"].counts.sum() == every.size
    mean = (found["x"].centers * found["x"].counts).sum() / every.size
    assert mean == pytest.approx(every.mean(), abs=1e-3)


def test_collect__constant_tensor() -> None:
    found = statistics_of(np.zeros((1, 1, 4, 4)))
    assert asymmetric_scale(found).apply(np.zeros(3)).tolist() == [0, 0, 0]
    assert symmetric_scale(found).apply(np.zeros(3)).tolist() == [0, 0, 0]


@given(st.integers(0, 10_000), st.floats(0.01, 100), st.floats(-2, 2))
def test_scales__zero_is_exact_and_error_small(seed: int, spread: float, shift: float) -> None:
    values = np.random.default_rng(seed).normal(shift * spread, spread, 4000)
    for scale in (asymmetric_scale(statistics_of(values)), symmetric_scale(statistics_of(values))):
        assert scale.apply(np.zeros(1))[0] == 0
        assert error(scale, values) <= 1e-3 * float((values**2).mean())


def test_symmetric_scale__has_no_zero_point() -> None:
    scale = symmetric_scale(statistics_of(np.linspace(-1, 7, 999)))
    assert (scale.zero, scale.signed) == (0, True)


def test_asymmetric_scale__one_sided_values_get_all_codes() -> None:
    values = np.linspace(0, 8, 4000)
    scale = asymmetric_scale(statistics_of(values))
    assert scale.zero == 0
    # Evenly spread values have nothing to clip, so that the step is the range over 255.
    assert scale.step == pytest.approx(8 / 255, rel=0.05)
    assert symmetric_scale(statistics_of(values)).step == pytest.approx(8 / 127, rel=0.05)


def test_scales__outliers_are_clipped_where_that_helps() -> None:
    rng = np.random.default_rng(0)
    batches = [rng.normal(0, 1, 16_000).astype(np.float32) for _ in range(40)]
    batches[7][123] = 60.0
    values, plain = np.concatenate(batches), Scale(60 / 127, 0, True)
    scale = symmetric_scale(collect(lambda array: [array], ["x"], lambda: batches)["x"])
    # One outlier o among n costs (1 - p)^2 o^2 / n when the range is cut to p o; the steps cost p^2 (o / 127)^2 / 12.
    # With n = 640000 the sum is smallest at p = 0.23, where it is a fourth of that at p = 1, and flat around it.
    assert scale.step == pytest.approx(0.23 * plain.step, rel=0.2)
    assert error(scale, values) < 0.3 * error(plain, values)


def test_asymmetric_scale__before_silu_large_negative_values_do_not_matter() -> None:
    values = np.random.default_rng(0).normal(-6, 5, 50_000)
    blind, aware = (asymmetric_scale(statistics_of(values), after) for after in (None, silu))

    def behind(scale: Scale) -> float:
        return float(((silu(scale.apply(values)) - silu(values)) ** 2).mean())

    assert behind(aware) < 0.5 * behind(blind)


def test_quantize_weight__within_half_a_step_of_every_channel() -> None:
    weight = np.random.default_rng(0).normal(0, 1, (5, 3, 3, 3)).astype(np.float32)
    weight *= np.array([1e-4, 1e-2, 1, 10, 0], np.float32).reshape(5, 1, 1, 1)
    steps = weight_scales(weight)
    back = quantize_weight(weight, steps) * steps.reshape(5, 1, 1, 1)
    assert (np.abs(back - weight).reshape(5, -1).max(1) <= steps * 0.5001).all()
    one_for_all = np.full(5, steps.max(), np.float32)
    assert (quantize_weight(weight, one_for_all)[:2] == 0).all()  # why there is one step per channel


def test_weight_scales__floor() -> None:
    weight = np.ones((2, 1, 1, 1), np.float32)
    assert weight_scales(weight, np.array([0, 1], np.float32)).tolist() == pytest.approx([1 / 127, 1])
