"""PKD against the Pearson correlation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from taps_factory import Shape, make, random_taps
from torch import Tensor

from kd_yolo.distill.methods.pkd import correlation_distance

SHAPE = Shape()


def random_map(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_correlation_distance__golden_values() -> None:
    # Four cells. (1, 2, 3, 4) against itself doubled: r = 1, distance 0; against its reverse: r = -1, distance 2;
    # against (1, -1, -1, 1): covariance 0, r = 0, distance 1. Mean of the three channels: 1.
    student = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 3, dtype=torch.float64).view(1, 3, 2, 2)
    other = [[2.0, 4.0, 6.0, 8.0], [4.0, 3.0, 2.0, 1.0], [1.0, -1.0, -1.0, 1.0]]
    teacher = torch.tensor(other, dtype=torch.float64).view(1, 3, 2, 2)
    assert correlation_distance(student, teacher).item() == pytest.approx(1.0, abs=1e-5)
    for channel, expected in enumerate((0.0, 2.0, 1.0)):
        distance = correlation_distance(student[:, channel : channel + 1], teacher[:, channel : channel + 1])
        assert distance.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_correlation_distance__is_one_minus_the_mean_correlation_over_batch_and_cells(seed: int) -> None:
    student, teacher = random_map(seed, 3, 4, 2, 5), random_map(seed + 10, 3, 4, 2, 5)
    mine, theirs = (x.transpose(0, 1).flatten(1).numpy() for x in (student, teacher))
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(mine, theirs, strict=True)]
    assert correlation_distance(student, teacher).item() == pytest.approx(1 - np.mean(r), abs=1e-4)
    per_image = [np.corrcoef(student[b].flatten(), teacher[b].flatten())[0, 1] for b in range(3)]
    assert correlation_distance(student, teacher).item() != pytest.approx(1 - np.mean(per_image), abs=1e-3)


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(0.1, 100.0), shift=st.floats(-10.0, 10.0), seed=st.integers(0, 1000))
def test_correlation_distance__magnitude_does_not_matter(scale: float, shift: float, seed: int) -> None:
    student, teacher = random_map(seed, 2, 3, 3, 3), random_map(seed + 1, 2, 3, 3, 3)
    value = correlation_distance(student, teacher)
    torch.testing.assert_close(correlation_distance(student * scale + shift, teacher), value, rtol=1e-3, atol=1e-4)
    assert 0 <= value.item() <= 2


def test_correlation_distance__a_flat_teacher_channel_teaches_nothing() -> None:
    student, teacher = random_map(0, 2, 1, 3, 3).requires_grad_(), torch.full((2, 1, 3, 3), 3.0, dtype=torch.float64)
    torch.autograd.backward(correlation_distance(student, teacher))
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-5


def test_pkd__mean_over_levels() -> None:
    student, teacher = random_taps(SHAPE, 0), random_taps(SHAPE, 1)
    levels = [correlation_distance(s, t) for s, t in zip(student.neck, teacher.neck, strict=True)]
    torch.testing.assert_close(
        make("pkd", SHAPE, weight=2.0)(student, teacher, {})["kd_pkd"], 2 * torch.stack(levels).mean()
    )


def test_pkd__adapters_only_at_other_widths_unless_always() -> None:
    assert not list(make("pkd", SHAPE).parameters())
    assert len(list(make("pkd", SHAPE, adapter="always").parameters())) == 4
    assert len(list(make("pkd", SHAPE, Shape(channels=(4, 9))).parameters())) == 2
