from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from kd_yolo.anomaly.maps import GaussianBlur, fuse, grid_sigma, image_scores, upsample


def test_gaussian_blur__keeps_constants_and_the_kernel_is_a_gaussian() -> None:
    blur = GaussianBlur(1.0)
    assert blur.kernel.shape[-1] == 9  # 2 * round(4 * sigma) + 1
    constant = torch.full((2, 1, 7, 12), 0.3)
    torch.testing.assert_close(blur(constant), constant)  # also at the borders, unlike plain zero padding
    impulse = torch.zeros(1, 1, 31, 31)
    impulse[0, 0, 15, 15] = 1
    found = blur(impulse)[0, 0]
    assert float(found[15, 16] / found[15, 15]) == pytest.approx(math.exp(-0.5), rel=1e-5)
    assert float(found[14, 16] / found[15, 15]) == pytest.approx(math.exp(-1.0), rel=1e-5)
    assert float(found.sum()) == pytest.approx(1.0, rel=1e-5)


def test_gaussian_blur__equals_the_weighted_mean_of_the_cells_that_exist() -> None:
    torch.manual_seed(0)
    x, blur = torch.randn(1, 1, 6, 5), GaussianBlur(1.5)
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(5.0), indexing="ij")
    for row, column in ((0, 0), (3, 2), (5, 4)):
        weights = torch.exp(-0.5 * ((rows - row) ** 2 + (columns - column) ** 2) / 1.5**2)
        expected = (weights * x[0, 0]).sum() / weights.sum()
        assert float(blur(x)[0, 0, row, column]) == pytest.approx(float(expected), abs=1e-5)


def test_gaussian_blur__of_nothing_is_the_identity() -> None:
    x = torch.randn(1, 1, 4, 4)
    assert GaussianBlur(0.0)(x) is x


def test_grid_sigma__scales_with_the_canvas() -> None:
    assert grid_sigma(4, 256, 4) == 1.0
    assert grid_sigma(4, 512, 4) == 2.0
    assert grid_sigma(4, 256, 8) == 0.5


def test_upsample__factor_equals_size() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 3, 5)
    expected = nn.functional.interpolate(x, size=(12, 20), mode="bilinear", align_corners=False)
    assert torch.equal(upsample(x, 4), expected)


def test_fuse__mean_of_calibrated_levels() -> None:
    torch.manual_seed(0)
    levels = [torch.rand(2, 1, 8 // k, 12 // k, dtype=torch.float64) for k in (1, 2, 4)]
    low, high = torch.tensor([0.1, 0.2, 0.3]).double(), torch.tensor([0.5, 0.4, 0.9]).double()
    expected = torch.stack(
        [
            upsample(0.1 * (level - a) / (b - a), factor)
            for level, a, b, factor in zip(levels, low, high, (1, 2, 4), strict=True)
        ]
    ).mean(0)
    found = fuse(levels, [4, 8, 16], low, high, "mean")
    torch.testing.assert_close(found, expected)
    # what equals the lower quantile everywhere becomes 0, what equals the upper becomes 0.1
    flat = [torch.full((1, 1, 8 // k, 8 // k), float(value)).double() for k, value in zip((1, 2, 4), high, strict=True)]
    torch.testing.assert_close(fuse(flat, [4, 8, 16], low, high, "mean"), torch.full((1, 1, 8, 8), 0.1).double())


def test_fuse__two_kinds_share_a_grid() -> None:
    torch.manual_seed(0)
    levels = [torch.rand(1, 1, 8, 8), torch.rand(1, 1, 4, 4), torch.rand(1, 1, 8, 8), torch.rand(1, 1, 4, 4)]
    low, high = torch.zeros(4), torch.full((4,), 0.1)
    halves = [fuse(levels[k : k + 2], [4, 8], low[:2], high[:2], "mean") for k in (0, 2)]
    torch.testing.assert_close(fuse(levels, [4, 8, 4, 8], low, high, "mean"), (halves[0] + halves[1]) / 2)


def test_fuse__product_is_the_geometric_mean_and_does_not_vanish() -> None:
    levels = [torch.full((1, 1, 4, 4), value) for value in (1e-3, 4e-3, 2e-3)]
    found = fuse(levels, [4, 4, 4], torch.zeros(3), torch.ones(3), "product")
    assert float(found.mean()) == pytest.approx(2e-3, rel=2e-3)  # (1e-3 * 4e-3 * 2e-3) ** (1 / 3)
    zero = fuse([torch.full((1, 1, 2, 2), -1e-7)], [4], torch.zeros(1), torch.ones(1), "product")
    assert bool(torch.isfinite(zero).all())  # rounding may make a distance slightly negative


def test_fuse__equal_quantiles_stay_finite() -> None:
    found = fuse([torch.rand(1, 1, 4, 4)], [4], torch.full((1,), 0.5), torch.full((1,), 0.5), "mean")
    assert bool(torch.isfinite(found).all())


def test_image_scores__max_and_top() -> None:
    values = np.random.default_rng(0).random((3, 1, 50, 40)).astype(np.float32)
    maps = torch.from_numpy(values)
    ordered = np.sort(values.reshape(3, -1), 1)[:, ::-1]
    np.testing.assert_array_equal(image_scores(maps, "max", 0.001).numpy(), ordered[:, 0])
    np.testing.assert_allclose(image_scores(maps, "topk", 0.001).numpy(), ordered[:, :2].mean(1), rtol=1e-6)
    np.testing.assert_allclose(image_scores(maps, "topk", 1.0).numpy(), values.mean((1, 2, 3)), rtol=1e-5)
