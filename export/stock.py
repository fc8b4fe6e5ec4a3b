"""Ultralytics' own exporter, run on the deployed checkpoint in a temporary folder."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_yolo.export.int8 import Int8Report
from kd_yolo.export.job import QUANTIZE, Job
from ultralytics import YOLO
from ultralytics.engine.exporter import Exporter
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER

from kd_yolo.checkpoints import serialize
from kd_yolo.errors import ExportError, KDYoloError
from kd_yolo.images import ImageSet
from kd_yolo.inference import CONFIDENCE, NMS_IOU


@dataclass(frozen=True)
class Work:
    """One export under way.

    Attributes:
        job: Checked arguments.
        source: The unfused float32 training form, its head branch chosen.
        deployed: The merged model of stock classes.
        checkpoint: What the training checkpoint holds.
        folder: Temporary folder; everything in it is deleted.
        canvas: Height and width in pixels.
        own: Our metadata entry.
        images: What the gate looks at.
    """

    job: Job
    source: DetectionModel
    deployed: DetectionModel
    checkpoint: dict[str, Any]
    folder: Path
    canvas: tuple[int, int]
    own: dict[str, Any]
    images: ImageSet


@dataclass(frozen=True)
class Made:
    """What the maker of a format made, not proven yet.

    Attributes:
        path: File or folder in the temporary folder.
        facts: What is known about the graph, by name: numbers and short words.
        proven: What the gate runs: the artifact itself, or the graph it was built from; None where nothing here can.
        checked: What the gate ran, in words.
        int8: Report of the quantization.
        graph: ONNX file that an engine which runs here was built from; its weights are compared.
    """

    path: Path
    facts: dict[str, Any]
    proven: Path | None
    checked: str = "the artifact itself"
    int8: Int8Report | None = None
    graph: Path | None = None


def run_stock_exporter(
    work: Work, format: str, precision: str, exporter: type[Exporter] | None = None, **extra: Any
) -> Path:
    """Export through the stock classes, from the stock checkpoint that ``deploy`` would write.

    Args:
        work: The export.
        format: Ultralytics' name of the format.
        precision: ``fp32``, ``fp16`` or ``int8``.
        exporter: A class of ours that writes the format, instead of Ultralytics'.
        **extra: Keys of this format only.

    Raises:
        ExportError: It failed; one line.
    """
    job = work.job
    checkpoint = work.folder / f"{job.source.stem}.pt"
    arguments = {
        "format": format,
        "imgsz": list(work.canvas),
        "batch": job.batch,
        "dynamic": job.dynamic,
        "nms": True if job.nms_inside else None,
        "quantize": QUANTIZE.get(precision, precision),
        "device": "cpu",
        **extra,
    }
    if job.nms_inside:
        arguments |= {"conf": CONFIDENCE, "iou": NMS_IOU}
    with failures_in_one_line():
        checkpoint.write_bytes(serialize(work.deployed, work.checkpoint, {}))
        with quiet():
            model = YOLO(checkpoint, task="detect")
            if exporter is None:
                made = Path(model.export(**arguments))
            else:
                made = Path(exporter(overrides={"task": "detect", "mode": "export", **arguments})(model=model.model))
        if not made.exists():
            raise ExportError(f"export failed: Ultralytics wrote no {made.name}")
    return made


@contextlib.contextmanager
def failures_in_one_line() -> Iterator[None]:
    """Turn whatever an exporter raises into one line.

    Raises:
        ExportError: Anything else than our own errors was raised.
    """
    try:
        yield
    except KDYoloError:
        raise
    except OSError as error:
        raise ExportError(f"export failed: {error.strerror or error}; is the temporary folder full?") from error
    except Exception as error:  # whatever torch's exporters, onnxslim, OpenVINO or Ultralytics' own assertions raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        line = lines[-1 if lines[0].startswith("Exception from") else 0]  # OpenVINO begins with places in its source
        said = line if " " in line else f"{type(error).__name__} {line}".strip()
        raise ExportError(f"export failed: {said[:300]}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep back what the exporter says: its advice names temporary files, and its errors are raised as well."""
    level = LOGGER.level
    LOGGER.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer, about shapes that a detection head fixes on purpose
            yield
    finally:
        LOGGER.setLevel(level)
