"""Blocks and networks with BatchNorm statistics as after training: merge tests on fresh ones prove nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.nn.blocks import RepBlock


@torch.no_grad()
def randomise_bn(module: nn.Module, seed: int = 0, signs: bool = False) -> None:
    """Give every BatchNorm random statistics, scale and shift.

    Args:
        module: Changed in place.
        seed: Of the random numbers.
        signs: Make a third of the scales negative and a tenth exactly zero.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        values = torch.rand(like.shape, generator=generator, dtype=torch.float64)
        return (low + (high - low) * values).to(like)

    for bn in module.modules():
        if isinstance(bn, nn.BatchNorm2d):
            assert bn.running_mean is not None
            assert bn.running_var is not None
            bn.running_mean.copy_(uniform(bn.running_mean, -0.5, 0.5))
            bn.running_var.copy_(uniform(bn.running_var, 0.2, 2.0))
            bn.weight.copy_(uniform(bn.weight, 0.5, 1.5))
            bn.bias.copy_(uniform(bn.bias, -0.5, 0.5))
            if signs:
                draw = uniform(bn.weight, 0.0, 1.0)
                bn.weight.mul_(torch.where(draw < 0.33, -1.0, 1.0).to(bn.weight))
                bn.weight[draw > 0.9] = 0.0


def make_block(*args: Any, seed: int = 0, signs: bool = True, **keys: Any) -> RepBlock:
    """Return a float64 block in eval mode with random statistics."""
    torch.manual_seed(seed)
    block = RepBlock(*args, **keys)
    block.double().eval()
    randomise_bn(block, seed, signs)
    return block


def stock_model(name: str, nc: int = 6, seed: int = 0) -> DetectionModel:
    """Return a stock detector with random weights and random BatchNorm statistics, in eval mode."""
    torch.manual_seed(seed)
    model = DetectionModel(name, nc=nc, verbose=False)
    randomise_bn(model, seed)
    return model.eval()


def module_types(model: nn.Module) -> list[tuple[str, type]]:
    """Return every submodule's name and class, in order."""
    return [(name, type(module)) for name, module in model.named_modules()]


def relative(expected: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference over the largest magnitude of ``expected``."""
    return float(((expected - other).abs().max() / expected.abs().max()).detach())
