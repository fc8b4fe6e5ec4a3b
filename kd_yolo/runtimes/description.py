"""What every exported file says about itself, and the checks of it."""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kd_yolo
from kd_yolo.errors import ConfigError, DataError, ModelError
from kd_yolo.images import dataset_names
from kd_yolo.inference import check_canvas
from kd_yolo.provenance import head_name

METADATA_KEY = "kd_yolo"
"""Key of our entry (JSON text) beside Ultralytics' own metadata in every format."""

NEEDED = {"detect": "a detector", "anomaly": "an anomaly model"}
"""What messages call the model of a task that can be run here."""
OUTPUT_AXES = {"detect": 3, "anomaly": 4}


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
        head: ``nms``, ``nms-free`` or ``nms inside``: what a detector's output needs; ``map`` of an anomaly model.
        own: Our entry: ``version`` of kd-yolo, ``source_sha256``, ``recipe_sha256``, and what a format adds (for an
            engine ``compute_capability`` and ``tensorrt``); empty when plain Ultralytics wrote the file.
        task: ``detect`` or ``anomaly``.
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
    task: str = "detect"

    @property
    def any_batch(self) -> bool:
        """Whether a call may hold any number of images; an NMS inside is unrolled over the exported batch."""
        return self.dynamic and self.head != "nms inside"

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
            if not self.any_batch and batch is not None and batch > self.batch:
                raise ConfigError(
                    f"{name}: its NMS takes at most {self.batch} images; use batch={self.batch} or export it again"
                )
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


def check_same_classes(ours: Mapping[int, str], data: str | Path, name: str | Path) -> None:
    """Refuse to judge a detector on a data set of other classes.

    Args:
        ours: The detector's class names by index, for example ``Description.names``.
        data: Resolved data YAML.
        name: What messages call the detector, usually its file.

    Raises:
        DataError: The names differ in more than case and surrounding space, or stand in another order.
    """
    mine = [str(ours[key]).strip() for key in sorted(ours)]
    theirs = [theirs.strip() for theirs in dataset_names(data)]
    if [one.lower() for one in mine] != [one.lower() for one in theirs]:
        raise DataError(
            f"{name}: its {len(mine)} classes ({_some(mine)}) are not the {len(theirs)} of {data} ({_some(theirs)}); "
            "give the data set it was trained on"
        )


def check_signature(
    description: Description,
    inputs: Sequence[Sequence[int | None]],
    outputs: Sequence[Sequence[int | None]],
    name: str | Path,
) -> None:
    """Compare the shapes that a graph declares with what its file says about itself.

    Args:
        description: What the file says.
        inputs: Shape of every input, None for a free length.
        outputs: Shape of every output.
        name: What messages call the file.

    Raises:
        ModelError: It is no model with one image input and one output of its task, or its metadata is that of another
            graph.
    """
    axes = OUTPUT_AXES[description.task]
    if len(inputs) != 1 or len(inputs[0]) != 4 or len(outputs) != 1 or len(outputs[0]) != axes:
        found = f"inputs {[list(shape) for shape in inputs]}, outputs {[list(shape) for shape in outputs]}"
        raise ModelError(f"{name}: is not {NEEDED[description.task]} with one image input and one output ({found})")
    told = [description.batch, description.channels, *description.canvas]
    for length, said, what in zip(inputs[0], told, ("batch", "channels", "height", "width"), strict=True):
        free = description.dynamic and what != "channels"
        if length is not None and length != said and not free:
            raise ModelError(f"{name}: says {what} {said}, but its graph takes {length}; export it again")


def description_of(
    format: str, metadata: Mapping[str, Any], name: str | Path, task: str | None = "detect"
) -> Description:
    """Return the description that Ultralytics' metadata and our entry in it make.

    Args:
        format: See ``Description``.
        metadata: As stored: values may be Python literals in text, ``kd_yolo`` is JSON text or a mapping.
        name: What messages call the file.
        task: ``detect``, ``anomaly``, or None for both.

    Raises:
        ModelError: It is for another task, its metadata is missing or damaged, or a newer kd-yolo wrote it.
    """
    values = {str(key): _literal(value) for key, value in metadata.items() if key != METADATA_KEY}
    missing = [key for key in ("stride", "names", "imgsz", "batch") if key not in values]
    if missing:
        raise ModelError(
            f"{name}: says nothing about its {', '.join(missing)}; it is damaged, or neither kd-yolo nor Ultralytics "
            "exported it; export it again"
        )
    found = str(values.get("task", "detect"))
    wanted = tuple(NEEDED) if task is None else (task,)
    if found not in wanted:
        needed = " or ".join(NEEDED[one] for one in wanted)
        raise ModelError(f"{name}: is a model for the task '{found}'; {needed} is needed")
    own = metadata.get(METADATA_KEY) or {}
    try:
        own = dict(json.loads(own) if isinstance(own, str) else own)
        height, width = (values["imgsz"],) * 2 if isinstance(values["imgsz"], int) else values["imgsz"]
        arguments = dict(values.get("args") or {})
        free = values.get("end2end") is True
        description = Description(
            format=format,
            names={int(key): str(value) for key, value in dict(values["names"]).items()},
            stride=int(values["stride"]),
            channels=int(values.get("channels", 3)),
            canvas=(int(height), int(width)),
            batch=int(values["batch"]),
            dynamic=bool(values.get("dynamic", arguments.get("dynamic", False))),
            precision=str(own.get("precision") or _precision(arguments)),
            head=_head(found, arguments, free),
            own=_known_version(own, name),
            task=found,
        )
        _check_ranges(description)
        return description
    except (TypeError, ValueError, KeyError) as error:
        raise ModelError(f"{name}: its metadata is damaged ({error}); export it again") from error


def _check_ranges(told: Description) -> None:
    """Refuse numbers that no detector has.

    Raises:
        ValueError: Names one of them.
    """
    numbers = {"stride": told.stride, "channels": told.channels, "batch": told.batch, "imgsz": min(told.canvas)}
    for key, value in numbers.items():
        if value < 1:
            raise ValueError(f"{key} is {value}")
    if sorted(told.names) != list(range(len(told.names))) or not told.names:
        raise ValueError(f"names has the numbers {sorted(told.names)}, not 0 to n - 1")


def _head(task: str, arguments: Mapping[str, Any], free: bool) -> str:
    """Return what the output needs, by Ultralytics' export arguments."""
    if task == "anomaly":
        return "map"
    return "nms inside" if arguments.get("nms") else head_name(not free)


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


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
