from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_factory import relative
from torch import nn

from kd_yolo.nn.growing_channels import UNREAD, joined, repeated, wide_kernel


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 9), st.integers(1, 5), st.integers(0, 7), st.booleans(), st.integers(0, 99))
def test_wide_kernel__computes_the_same(c: int, more: int, o: int, wider: int, unread: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs, channels = repeated(c, c + more), repeated(o, o + wider)
    if unread:
        inputs = joined([inputs, repeated(2, 3)], [repeated(2, 3), repeated(2, 3).unread()])
    weight = torch.randn(o, inputs.width, 3, 3, generator=generator, dtype=torch.float64)
    image = torch.randn(1, inputs.width, 5, 5, generator=generator, dtype=torch.float64)
    wide = torch.randn(1, len(inputs), 5, 5, generator=generator, dtype=torch.float64)
    read = inputs.source != UNREAD
    wide[:, read] = image[:, inputs.source[read]]
    kernel = wide_kernel(weight, inputs, channels, generator)
    expected = nn.functional.conv2d(image, weight)[:, channels.source]
    assert relative(expected, nn.functional.conv2d(wide, kernel)) < 1e-12
    assert not kernel[:, ~read].any()
    norm = kernel.flatten(1).norm(dim=1)
    assert torch.allclose(norm, weight.flatten(1).norm(dim=1)[channels.source])


def test_wide_kernel__every_repetition_is_read_equally_often() -> None:
    kernel = wide_kernel(torch.ones(6, 4, 1, 1), repeated(4, 12), repeated(6, 9), torch.Generator().manual_seed(0))
    # 9 filters read each of 4 inputs from one of 3 repetitions: 3 filters for each
    assert kernel.sum((0, 2, 3)).tolist() == [3.0] * 12


def test_joined__counts_extra_parts_as_repetitions_of_the_last() -> None:
    half = repeated(2, 3)  # 0 1 0
    assert joined([half, half], [half, half.unread()]).source.tolist() == [0, 1, 0, 2, 3, 2, 2, 3, 2, -1, -1, -1]
    assert joined([half, half], [half]).width == 4
