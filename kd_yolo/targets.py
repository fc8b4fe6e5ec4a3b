"""Processors that engines are built for and latencies are estimated for, one YAML file each, figures with sources."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from kd_yolo.config import Strict, validate
from kd_yolo.resources import builtin_names, find, load_yaml

Precision = Literal["fp32", "fp16", "int8"]


class Throughput(Strict):
    """Peak arithmetic in 10^12 operations a second, dense (no structured sparsity), two operations per multiply-add.

    Attributes:
        fp32: Single precision outside tensor cores.
        fp16: Half precision, in tensor cores where there are any.
        int8: Eight-bit integers, in tensor cores where there are any.
    """

    fp32: float = Field(gt=0)
    fp16: float = Field(gt=0)
    int8: float = Field(gt=0)


class Target(Strict):
    """One GPU, or one core of a CPU.

    Attributes:
        name: The file's name, for example ``rtx3070ti``.
        title: What reports call it.
        compute_capability: CUDA compute capability such as ``8.6``; None for a CPU, whose figures are for one core.
        tflops: Peak arithmetic by precision.
        bandwidth_gb_s: Memory bandwidth in 10^9 bytes a second.
        launch_us: Smallest cost of starting one more kernel or operator, in microseconds.
        memory_gb: Memory in 10^9 bytes; None where it is the host's.
        device: Pattern of the name that the driver or the system gives the processor, so that a measurement on it can
            stand beside an estimate for it.
        sources: Where each figure comes from.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    title: str = Field(min_length=1)
    compute_capability: str | None = Field(pattern=r"^[1-9]\d*\.\d$")
    tflops: Throughput
    bandwidth_gb_s: float = Field(gt=0)
    launch_us: float = Field(ge=0)
    memory_gb: float | None = Field(gt=0)
    device: str | None = None
    sources: list[str] = Field(min_length=1)


def load_target(name_or_file: str | Path) -> Target:
    """Read a target.

    Args:
        name_or_file: A built-in name such as ``rtx3070ti``, or a YAML file.

    Raises:
        ConfigError: There is none of that name (the nearest is named), or the file is not valid.
    """
    path = find("targets", str(name_or_file))
    return validate(Target, load_yaml(path), where=str(name_or_file))


def target_names() -> list[str]:
    """Return the names of the built-in targets, sorted."""
    return builtin_names("targets")
