"""Weights of an artifact against those of the deployed model: one wrong number is found, however little it does.

The bounds on outputs are as loose as float16 and int8 make them, so that one corrupted weight can hide in them. A
weight itself may differ by the rounding of the type that it is stored in, and by nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kd_yolo.export.matching import worse
from kd_yolo.export.weight_values import Array, NotConstantError, Stored, Values
from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import fuse_conv_and_bn

from kd_yolo.inference import channels_of, max_stride

FORMATS = ("onnx", "openvino")
"""Formats whose weights can be read."""
KINDS = {"fp32": ("float32",), "fp16": ("float16", "float32"), "int8": ("int8", "float32")}
"""Types that an artifact of a precision may store a kernel in; the sensitive layers of float16 and int8 stay wider."""
ARITHMETIC = 1e-6
"""Of a kernel's largest: float32 operations that fold a BatchNorm."""
SHOWN = 3


@dataclass(frozen=True)
class WeightReport:
    """Result of comparing the weights.

    Attributes:
        kernels: Kernels compared, each with its bias.
        largest_error: Largest difference of a weight, in units of what rounding allows there.
        unit: That unit in words.
        failures: What is wrong, in words.
    """

    kernels: int
    largest_error: float
    unit: str
    failures: list[str]


@dataclass(frozen=True)
class Wanted:
    """A convolution of the deployed model.

    Attributes:
        name: Of the layer in the model.
        weight: float32 numbers (O, I / groups, H, W), of a transposed one (I, O / groups, H, W).
        bias: (O,), zeros where there is none.
    """

    name: str
    weight: Array
    bias: Array


UNITS = {
    "fp32": "1e-6 of the kernel's largest weight",
    "fp16": "half a unit in the last place of float16",
    "int8": "half a step of the channel's int8 scale",
}


def check_weights(deployed: DetectionModel, path: Path, format: str, precision: str) -> WeightReport:
    """Compare every kernel and bias of an artifact with the deployed model's, BatchNorms folded.

    A weight may differ by 1e-6 of its kernel's largest, and where it is stored as float16 by 2^-11 of itself or 2^-24
    (ONNX Runtime's converter moves what is smaller than the smallest float16 up to that), as an integer by 0.501 of its
    step. Integers need no allowance at the ends of their range: both quantizers take the largest magnitude of a channel
    as the end. They leave biases as they are (bias correction of NNCF is off), or store them as int32 with a step.

    Args:
        deployed: The merged model of stock classes, its head branch chosen; left as it is.
        path: ONNX file or OpenVINO folder.
        format: ``onnx`` or ``openvino``.
        precision: ``fp32``, ``fp16`` or ``int8``.

    Returns:
        The report; its failures are empty when every convolution that the model runs was found and none is left over.
    """
    unit = UNITS[precision]
    try:
        stored = _reader(format)(path)
    except NotConstantError as error:
        return WeightReport(0, float("inf"), unit, [f"a convolution has no constant weights ({error})"])
    wanted = wanted_convolutions(deployed)
    pairs, failures = match_kernels(wanted, stored)
    largest = 0.0
    for one, other in pairs:
        if other.weight.kind not in KINDS[precision]:
            failures.append(f"{one.name}: its kernel is stored as {other.weight.kind} in an {precision} artifact")
        for what, right, values in (("a weight", one.weight, other.weight), ("a bias", one.bias, other.bias)):
            units, apart = rounding_error(right, values)
            largest = worse(largest, units)
            if not units <= 1:
                kind = "float32" if values is None else values.kind
                failures.append(
                    f"{one.name}: {what} differs by {apart:.3g}, {units:.3g} times what {kind} rounds (bound 1)"
                )
    return WeightReport(len(pairs), largest, unit, failures)


def wanted_convolutions(deployed: DetectionModel) -> list[Wanted]:
    """Return the convolutions that a model runs, in that order, each with the BatchNorm that reads it alone folded in.

    Args:
        deployed: The merged model, its head branch chosen; left as it is.
    """
    model = copy.deepcopy(deployed).float().eval()
    model.fuse(verbose=False)
    ran: dict[str, nn.Module] = {}
    made: dict[int, tuple[str, Tensor]] = {}  # the tensors are kept, so that no other gets the same id

    def note(name: str) -> Callable[..., None]:
        def after(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                ran[name] = module
                made[id(output)] = (name, output)
            elif isinstance(module, nn.BatchNorm2d):
                source, _ = made.get(id(given[0]), ("", None))
                if isinstance(ran.get(source), nn.Conv2d):
                    folded: Any = fuse_conv_and_bn(ran[source], module)
                    ran[source] = folded
            else:
                made.pop(id(output), None)  # an activation that works in place: what it made is no convolution's

        return after

    for name, module in model.named_modules():
        if not any(module.children()) and not isinstance(module, nn.Identity):
            module.register_forward_hook(note(name))
    side = 4 * max_stride(model)
    with torch.no_grad():
        model(torch.zeros(1, channels_of(model), side, side))
    return [_wanted(name, module) for name, module in ran.items()]


def match_kernels(wanted: Iterable[Wanted], stored: Iterable[Stored]) -> tuple[list[tuple[Wanted, Stored]], list[str]]:
    """Return pairs of the same shape with the nearest values, and in words what has no partner.

    The nearest pair of all goes first, so that a kernel with one wrong weight still finds its own.
    """
    left, right = list(wanted), list(stored)
    costs = []
    for i, one in enumerate(left):
        for j, other in enumerate(right):
            if one.weight.shape == other.weight.data.shape:
                bias = np.zeros_like(one.bias) if other.bias is None else other.bias.data
                near = bias.shape == one.bias.shape
                costs.append((_distance(one.weight, other.weight.data), _distance(one.bias, bias) if near else 0, i, j))
    pairs: dict[int, int] = {}
    taken: set[int] = set()
    for _, _, i, j in sorted(costs):
        if i not in pairs and j not in taken:
            pairs[i] = j
            taken.add(j)
    failures = [
        f"{one.name}: no convolution in the artifact has its shape {one.weight.shape}"
        for i, one in enumerate(left)
        if i not in pairs
    ]
    failures += [
        f"the artifact's convolution '{other.name}' {other.weight.data.shape} is none of the model's"
        for j, other in enumerate(right)
        if j not in taken
    ]
    return [(left[i], right[j]) for i, j in sorted(pairs.items())], failures


def rounding_error(wanted: Array, found: Values | None) -> tuple[float, float]:
    """Return the largest difference of two arrays of numbers, in units of what rounding allows there, and itself.

    Args:
        wanted: float32 numbers.
        found: What is stored for them; None stands for zeros.
    """
    found = Values.of(np.zeros(wanted.shape, np.float32)) if found is None else found
    if found.data.shape != wanted.shape:
        return float("inf"), float("inf")
    apart = np.abs(found.data - wanted)
    units = apart / np.maximum(_allowed(wanted, found), np.finfo(np.float64).tiny)
    worst = int(np.argmax(units))  # a NaN counts as the largest
    return float(units.flat[worst]), float(apart.flat[worst])


def _allowed(wanted: Array, found: Values) -> Array:
    """Return by how much each number may differ."""
    same = np.full(wanted.shape, ARITHMETIC * np.abs(wanted).max(initial=0.0))
    if found.step is not None:
        return same + 0.501 * found.step
    if found.kind == "float16":
        return same + np.maximum(2.0**-11 * np.abs(wanted), 2.0**-24)
    return same


def _wanted(name: str, module: Any) -> Wanted:
    """Return the numbers of a convolution."""
    bias = torch.zeros(module.out_channels) if module.bias is None else module.bias
    weight, shift = (tensor.detach().numpy().astype(np.float64) for tensor in (module.weight, bias))
    return Wanted(name, weight, shift)


def _distance(one: Array, other: Array) -> float:
    """Return the mean difference; what is no number is far from everything."""
    return float(np.nan_to_num(np.abs(one - other).mean(), nan=np.inf))


def _reader(format: str) -> Callable[[Path], list[Stored]]:
    if format == "onnx":
        from kd_yolo.export.weights_onnx import read_onnx

        return read_onnx
    from kd_yolo.export.weights_openvino import read_openvino

    return read_openvino
