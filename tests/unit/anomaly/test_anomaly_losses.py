from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kd_yolo.anomaly.losses import discrepancy, level_distance, reduce_positions, scaled_discrepancy


def without_eps(a: Tensor, b: Tensor) -> Tensor:
    """Wrong on purpose: divides by the norms as they are."""
    lengths = a.square().sum(1, keepdim=True).sqrt() * b.square().sum(1, keepdim=True).sqrt()
    return 1 - (a * b).sum(1, keepdim=True) / lengths


def unscaled(a: Tensor, b: Tensor) -> Tensor:
    """Wrong on purpose: squares raw features, whose sums leave the range of float16."""
    norms = a.square().sum(1, keepdim=True) * b.square().sum(1, keepdim=True)
    return 1 - (a * b).sum(1, keepdim=True) / (norms + 1e-6).sqrt()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), channels=st.integers(2, 160))
def test_discrepancy__equal_opposite_and_scaled(seed: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(2, channels, 4, 3, generator=generator)
    a = a / a.square().mean(1, keepdim=True).sqrt()  # as large as standardised features are
    b = torch.randn(2, channels, 4, 3, generator=generator)
    b = b / b.square().mean(1, keepdim=True).sqrt()
    assert float(discrepancy(a, a).abs().max()) < 1e-5
    assert float((discrepancy(a, -a) - 2).abs().max()) < 1e-5
    reference = discrepancy(a, b)
    for changed in (discrepancy(10 * a, b), discrepancy(a, 10 * b)):
        assert float((changed - reference).abs().max()) < 1e-4


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), channels=st.integers(2, 160))
def test_discrepancy__is_half_the_squared_distance_of_unit_vectors(seed: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(1, channels, 5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    units = [nn.functional.normalize(value, dim=1) for value in (a, b)]
    expected = 0.5 * (units[0] - units[1]).square().sum(1, keepdim=True)
    assert float((discrepancy(a, b, eps=0.0) - expected).abs().max()) < 1e-12
    scaled = [unit * channels**0.5 for unit in units]  # mean square 1
    assert float((discrepancy(*scaled) - expected).abs().max()) < 1e-6


def test_discrepancy__of_nothing_is_finite_and_has_a_gradient() -> None:
    a = torch.zeros(1, 8, 2, 2, requires_grad=True)
    b = torch.randn(1, 8, 2, 2)
    distance = discrepancy(a, b)
    distance.sum().backward()  # type: ignore[no-untyped-call]
    assert a.grad is not None
    assert bool(torch.isfinite(distance).all())
    assert bool(torch.isfinite(a.grad).all())
    assert not bool(torch.isfinite(without_eps(torch.zeros(1, 8, 2, 2), b)).all())  # the wrong twin is caught


def test_discrepancy__stays_in_the_range_of_float16() -> None:
    a = torch.full((1, 256, 2, 2), 12.0, dtype=torch.float16)  # a mean square that raw ResNet features reach
    assert float(discrepancy(a, a, eps=1e-4).abs().max()) < 5e-3
    assert not float(unscaled(a, a).abs().max()) < 5e-3  # 256 * 144 squared is above 65504


def test_discrepancy__gradient() -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(2, 5, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(discrepancy, (a, b))


def test_level_distance__enlarges_the_target_before_the_norm() -> None:
    torch.manual_seed(0)
    own, target = torch.randn(1, 6, 8, 8) * 6**-0.5, torch.randn(1, 6, 2, 2) * 6**-0.5
    large = nn.functional.interpolate(target, size=(8, 8), mode="bilinear", align_corners=False)
    expected = 1 - nn.functional.cosine_similarity(own, large, dim=1)[:, None]
    torch.testing.assert_close(level_distance(own, target, 4), expected, atol=1e-4, rtol=1e-3)


def test_scaled_discrepancy__large_floor_is_the_squared_difference() -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(2, 6, 3, 4, dtype=torch.float64) * 6**-0.5 for _ in range(2))
    found = scaled_discrepancy(a, b, floor=1e4)
    torch.testing.assert_close(2e4 * found, (a - b).square().sum(1, keepdim=True), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(scaled_discrepancy(a, a, floor=0.1), torch.zeros(2, 1, 3, 4).double(), atol=1e-5, rtol=0)


def test_level_distance__a_plain_background_is_noise_only_without_a_floor() -> None:
    """A standardised target is near zero over the commonest thing in the image; a student that is right but for a
    little noise is far off in angle there."""
    torch.manual_seed(0)
    target = torch.randn(1, 64, 8, 8) * 64**-0.5
    target[..., :4] *= 0.02  # the background
    own = target + 0.05 * torch.randn(1, 64, 8, 8) * 64**-0.5
    bare, floored = (level_distance(own, target, 1, floor)[0, 0] for floor in (0.0, 0.1))
    assert float(bare[:, :4].mean()) > 0.3 > 100 * float(bare[:, 4:].mean())
    assert float(floored[:, :4].mean()) < 0.02


def test_level_distance__is_float32_under_autocast() -> None:
    a, b = torch.randn(1, 8, 4, 4).bfloat16(), torch.randn(1, 8, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert level_distance(a, b, 1).dtype == torch.float32


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.999])
def test_reduce_positions__hard_mining(quantile: float) -> None:
    torch.manual_seed(0)
    values = torch.rand(4, 1, 10, 10)
    kept = math.ceil((1 - quantile) * 400 - 1e-9)
    expected = values.flatten().sort(descending=True).values[:kept].mean()
    assert float(reduce_positions(values, quantile)) == pytest.approx(float(expected), abs=2e-3)
    assert float(reduce_positions(values, quantile)) > float(reduce_positions(values))
    assert float(reduce_positions(values)) == pytest.approx(float(values.mean()))
