from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grow_factory import tiny_model
from nn_factory import randomise_bn, relative
from torch import Tensor, nn
from ultralytics.nn.modules import Attention, Conv
from ultralytics.nn.modules.block import PSABlock
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.errors import ModelError
from kd_yolo.nn import block_walk, growing_blocks
from kd_yolo.nn.grow import grow
from kd_yolo.nn.growing_channels import Channels, joined, repeated, wide_kernel


@pytest.fixture(scope="module")
def tiny() -> DetectionModel:
    return tiny_model("yolo26n.yaml")


def test_grow__inherited_share_counts_what_is_copied() -> None:
    # 3x3 over 3 -> 2 channels, then 1x1 over 2 -> 2, each to 4: by hand 4*3*9 + 8 and 4*2 + 8 of 4*3*9 + 8 and 4*4 + 8
    growth = growing_blocks.Growth("s", 0)
    small, large = (nn.Sequential(Conv(3, width, 3), Conv(width, width)) for width in (2, 4))
    channels = growth._module(small, large, repeated(3, 3))
    assert len(channels) == 4
    assert growth.inherited == 108 + 8 + 8 + 8


def test_repeated__keeps_heads_whole() -> None:
    # 2 heads of 64 channels to 3: the third repeats the first, with its queries, keys and values
    torch.manual_seed(0)
    small, large = (Attention(dim, heads).double().eval() for dim, heads in ((128, 2), (192, 3)))
    randomise_bn(small)
    channels = repeated(128, 192)
    growing_blocks.Growth("s", 0)._module(small, large, channels)
    image = torch.randn(1, 128, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        assert relative(small(image)[:, channels.source], large(image[:, channels.source])) < 1e-12


# Deliberately wrong twins: each must be found by the check that grow() makes on itself.


@pytest.mark.parametrize("call", [0, 7, 30, 60, 100])
def test_grow__check_finds_one_lost_slice(call: int, tiny: DetectionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()

    def wrong(weight: Tensor, *rest: Any) -> Tensor:
        kernel = wide_kernel(weight, *rest)
        if next(calls) == call:
            kernel[0, kernel[0].abs().sum((1, 2)).argmax()] = 0
        return kernel

    monkeypatch.setattr(growing_blocks, "wide_kernel", wrong)
    with pytest.raises(ModelError, match="does not compute what this model does"):
        grow(tiny, "n")
    assert next(calls) > 100


def heads_by_channel(width: int, size: int) -> Channels:
    """Repeat each channel beside itself, which tears the heads of an attention apart."""
    return Channels(torch.arange(size) * width // size, width)


def forgotten(small: nn.BatchNorm2d, large: nn.BatchNorm2d, channels: Channels) -> int:
    """Copy all of a BatchNorm but its running mean."""
    for name in ("weight", "bias", "running_var"):
        getattr(large, name).data.copy_(getattr(small, name)[channels.source])
    nn.init.zeros_(large.get_buffer("running_mean"))
    return 0


def summed(weight: Tensor, inputs: Channels, channels: Channels, generator: torch.Generator) -> Tensor:
    """Read every repetition with the whole weight instead of one of them."""
    return weight[channels.source][:, inputs.source]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("repeated", heads_by_channel),
        ("copy_batchnorm", forgotten),
        ("wide_kernel", summed),
        ("joined", lambda parts, extra=(): joined(parts[::-1], extra)),
    ],
)
def test_grow__check_finds_a_wrong_rule(
    name: str, wrong: Callable[..., Any], tiny: DetectionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (growing_blocks, block_walk):
        monkeypatch.setattr(module, name, wrong, raising=False)
    with pytest.raises(ModelError, match="does not compute what this model does"):
        grow(tiny, "n")


def test_grow__check_finds_a_forgotten_layer(tiny: DetectionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(block_walk.RULES, PSABlock, lambda growth, small, large, inputs: inputs)
    with pytest.raises(ModelError, match="differ by nan"):
        grow(tiny, "n")


def test_grow__check_finds_layers_that_are_not_those_of_the_yaml(tiny: DetectionModel) -> None:
    other: Any = copy.deepcopy(tiny)
    other.model[0].act = nn.ReLU()
    with pytest.raises(ModelError, match=r"row 0 \(Conv\) has the activation"):
        grow(other, "n")
    other = copy.deepcopy(tiny)
    other.model[9].n = 1  # pools once
    with pytest.raises(ModelError, match=r"row 9 \(SPPF\) pools in another way"):
        grow(other, "n")
    other = copy.deepcopy(tiny)
    other.model[11] = nn.Upsample(scale_factor=2, mode="bilinear")
    other.model[11].i, other.model[11].f = 11, -1
    with pytest.raises(ModelError, match="layers are not those of its YAML"):
        grow(other, "n")
