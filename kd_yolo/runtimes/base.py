"""What every runtime offers, and what every exported file says about itself."""

from __future__ import annotations

import ast
import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

import kd_yolo
from kd_yolo.errors import ConfigError, ModelError
from kd_yolo.inference import check_canvas
from kd_yolo.provenance import head_name

METADATA_KEY = "kd_yolo"
"""Key of our entry (JSON text) beside Ultralytics' own metadata in every format."""


@dataclass(frozen=True)
class Description:
    """What an exported file says about itself: Ultralytics' metadata and our own entry.

    Attributes:
        format: ``onnx``, ``openvino``, ``torchscript``, ``ncnn``, ``engine`` (TensorRT) or ``rtx`` (TensorRT for RTX).
        names: Class names by index.
        stride: Largest stride in pixels.
        channels: Channels of an image, 3 or 1.
        canvas: Height and width it was exported at.
        batch: Images per call it was exported with.
        dynamic: Whether batch and canvas are free.
        precision: ``fp32``, ``fp16`` or ``int8``.
        head: ``nms``, ``nms-free`` or ``nms inside``: what its output needs.
        own: Our entry: ``version`` of kd-yolo, ``source_sha256``, ``recipe_sha256``, and what a format adds (for an
            engine ``compute_capability`` and ``tensorrt``); empty when plain Ultralytics wrote the file.
    """

    format: str
    names: dict[int, str]
    stride: int
    channels: int
    canvas: tuple[int, int]
    batch: int
    dynamic: bool
    precision: str
    head: str
    own: dict[str, Any] = field(default_factory=dict)

    def check(self, name: str | Path, imgsz: Any = None, batch: int | None = None) -> tuple[int, int]:
        """Return the canvas that a call will use.

        Args:
            name: What messages call the file.
            imgsz: Wanted canvas (a side, or height and width), or None for the file's own.
            batch: Wanted images per call, or None for the file's own.

        Raises:
            ConfigError: The file cannot take that canvas or batch.
        """
        canvas = self.canvas if imgsz is None else check_canvas(imgsz, self.stride)
        if self.dynamic:
            return canvas
        if canvas != self.canvas:
            height, width = self.canvas
            hint = str(height) if height == width else f"[{height},{width}]"
            raise ConfigError(
                f"{name}: its canvas is fixed at {height}x{width}; use imgsz={hint}, or export it again at "
                f"{canvas[0]}x{canvas[1]} or with dynamic=true"
            )
        if batch is not None and batch != self.batch:
            raise ConfigError(f"{name}: its batch is fixed at {self.batch}; use batch={self.batch} or export it again")
        return canvas


class Session(ABC):
    """One exported file, opened and ready.

    Attributes:
        runtime: For example ``onnxruntime CPUExecutionProvider`` or ``openvino CPU``.
        description: What the file says about itself.
        canvas: Height and width of the calls to come, in pixels.
    """

    runtime: str
    description: Description
    canvas: tuple[int, int]

    @abstractmethod
    def infer(self, pixels: Tensor) -> Tensor:
        """Run the graph.

        Args:
            pixels: (B, C, H, W), float32 in 0..1, on the CPU or on the session's device.

        Returns:
            The graph's one output in float32: (B, 4 + K, A) of all anchors with centre-size boxes in pixels, or
            (B, n, 6) of selected rows x1, y1, x2, y2, score, class.
        """

    def sync(self) -> None:
        """Wait until the device is idle."""
        return

    def peak_device_memory_mb(self) -> float | None:
        """Return the device memory used at most, in 10^6 bytes, or None without a device of its own."""
        return None


def description_of(format: str, metadata: Mapping[str, Any], name: str | Path) -> Description:
    """Return the description that Ultralytics' metadata and our entry in it make.

    Args:
        format: See ``Description``.
        metadata: As stored: values may be Python literals in text, ``kd_yolo`` is JSON text or a mapping.
        name: What messages call the file.

    Raises:
        ModelError: It is no detector, its metadata is missing or damaged, or a newer kd-yolo wrote it.
    """
    values = {str(key): _literal(value) for key, value in metadata.items() if key != METADATA_KEY}
    missing = [key for key in ("stride", "names", "imgsz", "batch") if key not in values]
    if missing:
        raise ModelError(
            f"{name}: says nothing about its {', '.join(missing)}; it is damaged, or neither kd-yolo nor Ultralytics "
            "exported it; export it again"
        )
    if values.get("task", "detect") != "detect":
        raise ModelError(f"{name}: is a model for the task '{values['task']}'; a detector is needed")
    own = metadata.get(METADATA_KEY) or {}
    try:
        own = json.loads(own) if isinstance(own, str) else dict(own)
        height, width = (values["imgsz"],) * 2 if isinstance(values["imgsz"], int) else values["imgsz"]
        arguments = values.get("args") or {}
        free = values.get("end2end") is True
        return Description(
            format=format,
            names={int(key): str(value) for key, value in dict(values["names"]).items()},
            stride=int(values["stride"]),
            channels=int(values.get("channels", 3)),
            canvas=(int(height), int(width)),
            batch=int(values["batch"]),
            dynamic=bool(values.get("dynamic", arguments.get("dynamic", False))),
            precision=str(own.get("precision") or _precision(arguments)),
            head="nms inside" if arguments.get("nms") else head_name(not free),
            own=_known_version(own, name),
        )
    except (TypeError, ValueError, KeyError) as error:
        raise ModelError(f"{name}: its metadata is damaged ({error}); export it again") from error


def _known_version(own: dict[str, Any], name: str | Path) -> dict[str, Any]:
    """Refuse what a newer kd-yolo wrote: nobody here knows what has changed in it."""
    wrote, ours = str(own.get("version", "0")), kd_yolo.__version__
    if _numbers(wrote)[:2] > _numbers(ours)[:2]:
        raise ModelError(f"{name}: was written by kd-yolo {wrote}, this is {ours}; update kd-yolo, or export it again")
    return own


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdigit())


def _precision(arguments: Mapping[str, Any]) -> str:
    """Return the precision that Ultralytics' export arguments ask for."""
    quantize = arguments.get("quantize")
    if quantize == 8 or arguments.get("int8"):
        return "int8"
    return "fp16" if quantize == 16 or arguments.get("half") else "fp32"


def _literal(value: Any) -> Any:
    """Read a metadata value as Ultralytics wrote it."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, SyntaxError):
            return ast.literal_eval(value)
    return value
