"""Roofline estimates: how fast a network could at best run on a processor that may not be at hand.

Williams, Waterman, Patterson, "Roofline: an insightful visual performance model for multicore architectures",
Communications of the ACM 52(4), 2009: a kernel cannot take less than its operations at peak arithmetic, nor less than
its bytes at peak bandwidth. Here every layer takes the larger of the two and the cost of one launch. Caches are left
out: a processor whose cache holds the activations can be faster than its memory bandwidth allows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from kd_yolo.bench.layers import Layer
from kd_yolo.targets import Precision, Target

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
BYTES: dict[Precision, int] = {"fp32": 4, "fp16": 2, "int8": 1}


@dataclass(frozen=True)
class LayerBound:
    """Lower bound of one layer, in milliseconds a call.

    Attributes:
        name: See ``Layer``.
        operators: See ``Layer``.
        precision: What it is computed in.
        flops: Operations.
        bytes: Bytes read and written.
        compute_ms: Operations at peak arithmetic.
        memory_ms: Bytes at peak bandwidth.
        bound_ms: The larger of the two and one launch.
    """

    name: str
    operators: str
    precision: str
    flops: int
    bytes: int
    compute_ms: float
    memory_ms: float
    bound_ms: float


@dataclass(frozen=True)
class Estimate:
    """Lower bound of a whole network on a target: an estimate, never a measurement.

    Attributes:
        artifact: Where the network was read.
        target: Name of the target.
        title: What reports call the target.
        precision: What the network is computed in; layers that a quantized graph keeps in float count as fp16.
        batch: Images a call.
        cores: Cores of a CPU; 1 for a GPU.
        bound_ms: Sum of the layers' bounds.
        compute_bound: Share of ``bound_ms`` in layers that arithmetic limits.
        launch_ms: What of it is launches.
        flops: Operations of all layers.
        bytes: Bytes of all layers.
        layers: Every layer.
        measured_ms: p50 of the inference where this run measured that network at that precision on that processor.
        measured_by: What ran it there.
    """

    artifact: str
    target: str
    title: str
    precision: str
    batch: int
    cores: int
    bound_ms: float
    compute_bound: float
    launch_ms: float
    flops: int
    bytes: int
    layers: list[LayerBound]
    measured_ms: float | None = None
    measured_by: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, marked as an estimate."""
        return {"kind": "estimate", **asdict(self)}


def bound(layer: Layer, target: Target, precision: Precision, cores: int = 1) -> LayerBound:
    """Return the lower bound of one layer.

    Args:
        layer: Its counts for a whole batch.
        target: The processor.
        precision: What the network is computed in.
        cores: Cores at work, for a CPU whose figures are for one.
    """
    own: Precision = "fp16" if precision == "int8" and layer.quantized is False else precision
    size = BYTES[own] * (layer.weights + layer.activations)
    compute = layer.flops / (getattr(target.tflops, own) * 1e12 * cores) * 1e3
    memory = size / (target.bandwidth_gb_s * 1e9 * cores) * 1e3
    whole = max(compute, memory) + target.launch_us / 1e3
    return LayerBound(layer.name, layer.operators, own, layer.flops, size, compute, memory, whole)


def estimate(
    layers: Sequence[Layer], target: Target, precision: Precision, artifact: str = "", batch: int = 1, threads: int = 1
) -> Estimate:
    """Return the lower bound of a network on a target.

    Args:
        layers: Of ``onnx_layers`` or ``torch_layers``, counted at ``batch``.
        target: The processor.
        precision: What the network is computed in.
        artifact: Where the network was read.
        batch: Images a call.
        threads: Cores at work if the target is a CPU.
    """
    cores = threads if target.compute_capability is None else 1
    bounds = [bound(layer, target, precision, cores) for layer in layers]
    total = sum(one.bound_ms for one in bounds)
    limited = sum(one.bound_ms for one in bounds if one.compute_ms >= one.memory_ms)
    return Estimate(
        artifact=artifact,
        target=target.name,
        title=target.title,
        precision=precision,
        batch=batch,
        cores=cores,
        bound_ms=total,
        compute_bound=limited / total if total else 0.0,
        launch_ms=len(bounds) * target.launch_us / 1e3,
        flops=sum(one.flops for one in bounds),
        bytes=sum(one.bytes for one in bounds),
        layers=bounds,
    )


def is_device(target: Target, name: str | None) -> bool:
    """Return whether a device of that name is the target."""
    return bool(name and target.device and re.search(target.device, name))
