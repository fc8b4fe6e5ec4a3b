from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_yolo.anomaly.calibration import (
    Calibration,
    channel_statistics,
    largest,
    level_quantiles,
    score_range,
    threshold,
)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_threshold__of_the_largest_values_equals_numpy(seed: int, sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(1, 1, size, 7, generator=generator) for size in sizes]
    total = sum(batch.numel() for batch in maps)
    kept = largest(maps, total, 0.9)
    assert len(kept) <= total * 0.1 + 3
    expected = float(np.quantile(np.concatenate([batch.numpy().ravel() for batch in maps]), 0.9))
    assert threshold(kept, 0.9, 0.0, total) == pytest.approx(expected, abs=1e-6)


def test_threshold__margin_moves_up_also_below_zero() -> None:
    assert threshold(torch.tensor([2.0]), 0.995, 0.05) == pytest.approx(2.1)
    assert threshold(torch.tensor([-2.0]), 0.995, 0.05) == pytest.approx(-1.9)


def test_level_quantiles__over_all_images() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [
        [torch.rand(2, 1, 8, 8, generator=generator), torch.rand(2, 1, 4, 4, generator=generator)] for _ in range(3)
    ]
    low, high = level_quantiles(batches)
    for level in range(2):
        values = np.concatenate([batch[level].numpy().ravel() for batch in batches])
        assert (low[level], high[level]) == pytest.approx(tuple(np.quantile(values, (0.9, 0.995))))


def test_channel_statistics__equal_those_of_all_positions_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [{8: torch.randn(n, 5, 4, 6, generator=generator) * 3 + 1} for n in (2, 3, 1)]
    mean, std = channel_statistics(batches)[8]
    values = torch.cat([batch[8] for batch in batches]).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, values.mean(1))
    torch.testing.assert_close(std, values.std(1, correction=0))
    assert channel_statistics([]) == {}


def test_channel_statistics__a_dead_channel_cannot_outweigh_the_others() -> None:
    values = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    values[:, 1] = 0.25
    _, std = channel_statistics([{16: values}])[16]
    assert float(std[1]) == pytest.approx(1e-3 * float(torch.stack((std[0], torch.zeros(()).double(), std[2])).mean()))


def test_score_range__contains_the_threshold() -> None:
    assert score_range(torch.tensor([0.25, 0.5]), 0.75) == (0.25, 0.75)
    assert score_range(torch.tensor([0.25, 1.0]), 0.75) == (0.25, 1.0)


def test_calibration__half_is_always_the_threshold() -> None:
    calibration = Calibration([0.0], [1.0], 0.6, 0.5, 0.1, 0.9)
    found = [calibration.normalised(score) for score in (0.6, 0.2, 1.0, -5.0, 5.0)]
    assert found == pytest.approx([0.5, 0.0, 1.0, 0.0, 1.0])
