"""Merge trained branches into stock convolutions, and measure in float64 that nothing changed."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.errors import ReparamError
from kd_yolo.nn.blocks import RepBlock

TOLERANCE = 1e-9  # relative, in float64; a correct merge is near 1e-15, a wrong one above 1e-4
YAML_KEY = "kd_yolo"  # of a model dictionary that describes re-parameterized blocks
_LAYER_ATTRIBUTES = ("i", "f", "type", "np")  # what parse_model writes on each top-level layer


@dataclass(frozen=True)
class MergeReport:
    """What a merge did and how exactly.

    Attributes:
        blocks: Number of merged blocks.
        max_abs_error: Largest difference of any raw output of the network, training form against merged, in float64.
        relative_error: The same divided by the largest magnitude of that output; the worst over all outputs.
        tolerance: Bound on ``relative_error`` and ``worst_block_error``.
        worst_block: Name of the block with the largest relative error on its own, empty without blocks.
        worst_block_error: That relative error, in float64.
        checked: False when the check was skipped; the errors are then NaN.
    """

    blocks: int
    max_abs_error: float
    relative_error: float
    tolerance: float
    worst_block: str
    worst_block_error: float
    checked: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)


def merge(model: DetectionModel, check: bool = True) -> tuple[DetectionModel, MergeReport]:
    """Return a copy of the model in which every ``RepBlock`` is one stock ``Conv``; the source stays untouched.

    The copy is in eval mode, holds only stock classes, and its YAML lacks the ``kd_yolo`` key: it fuses, exports,
    trains and loads where kd_yolo is not installed. Kernels are merged, and checked, in float64.

    Args:
        model: A detector with or without blocks, for example the EMA weights of a run.
        check: Compare the whole network and each block with the training form on random input.

    Returns:
        The merged model, in the dtype and on the device of ``model``, and the report.

    Raises:
        ReparamError: A relative error exceeds 1e-9 or is not finite; the message names the worst block.
    """
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    source = copy.deepcopy(model).cpu().double().eval()  # float64 does not exist on every device
    target = copy.deepcopy(source)
    blocks = rep_blocks(source)
    for name, block in rep_blocks(target).items():  # of the target: activations shared in it must stay shared
        replace_module(target, name, block.to_conv())
    target.yaml = {key: value for key, value in target.yaml.items() if key != YAML_KEY}
    report = _measure(source, target, blocks) if check else _unmeasured(len(blocks))
    return target.to(device, dtype).eval(), report


def max_errors(reference: list[Tensor], other: list[Tensor]) -> tuple[float, float]:
    """Return the largest absolute and relative difference of two lists of tensors of pairwise equal shapes.

    Relative means divided by the largest magnitude of the reference tensor. NaN in either list gives NaN.
    """
    absolute = relative = torch.zeros((), dtype=torch.float64)
    for a, b in zip(reference, other, strict=True):
        difference = (a.double() - b.double()).abs().max().cpu()
        scale = a.double().abs().max().cpu().clamp_min(torch.finfo(torch.float64).tiny)
        absolute = torch.maximum(absolute, difference)
        relative = torch.maximum(relative, difference / scale)
    return float(absolute), float(relative)


def raw_outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the head's raw outputs: boxes (B, 4R, A) and scores (B, K, A) of each branch, in a fixed order.

    Args:
        model: A detector in eval or train mode.
        images: Batch (B, C, H, W).
    """
    output = model(images)
    predictions = output[1] if isinstance(output, tuple) else output
    groups = [predictions[key] for key in ("one2many", "one2one") if key in predictions] or [predictions]
    return [group[key] for group in groups for key in ("boxes", "scores") if key in group]


def random_images(model: DetectionModel, batch: int = 2, imgsz: int = 128) -> Tensor:
    """Return uniform images (batch, C, imgsz, imgsz) in [0, 1], float64, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    channels = int(model.yaml.get("channels", 3))
    return torch.rand(batch, channels, imgsz, imgsz, dtype=torch.float64, generator=generator)


def rep_blocks(model: nn.Module) -> dict[str, RepBlock]:
    """Return the re-parameterized blocks of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RepBlock)}


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of a submodule and keep what parse_model wrote on it."""
    parent, _, child = name.rpartition(".")
    old = model.get_submodule(name)
    for attribute in _LAYER_ATTRIBUTES:
        if attribute in vars(old):  # not hasattr: every Module has a method named type
            setattr(new, attribute, getattr(old, attribute))
    setattr(model.get_submodule(parent), child, new)


def _measure(source: DetectionModel, target: DetectionModel, blocks: dict[str, RepBlock]) -> MergeReport:
    """Compare training form and merged form, both float64 on the CPU in eval mode."""
    generator = torch.Generator().manual_seed(1)
    worst_name, worst = "", 0.0
    with torch.no_grad():
        for name, block in blocks.items():
            x = torch.randn(1, block.c1, 7, 9, dtype=torch.float64, generator=generator)
            error = max_errors([block(x)], [target.get_submodule(name)(x)])[1]
            if not error <= worst:  # also true for NaN
                worst_name, worst = name, error
            if error != error:
                break
        images = random_images(source)
        absolute, relative = max_errors(raw_outputs(source, images), raw_outputs(target, images))
    if not (relative <= TOLERANCE and worst <= TOLERANCE):
        raise ReparamError(
            f"the merged network differs from the trained one: relative error {relative:.3g} (bound {TOLERANCE:g}); "
            f"worst block '{worst_name}' with {worst:.3g}; do not deploy this model"
        )
    return MergeReport(len(blocks), absolute, relative, TOLERANCE, worst_name, worst, True)


def _unmeasured(blocks: int) -> MergeReport:
    nan = float("nan")
    return MergeReport(blocks, nan, nan, TOLERANCE, "", nan, False)
