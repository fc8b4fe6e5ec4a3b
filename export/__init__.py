"""Export to other runtimes, each artifact proven equal to the unfused float32 model before it exists."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_yolo.export.formats import FORMATS

from kd_yolo.errors import ConfigError, nearest

if TYPE_CHECKING:
    from kd_yolo.export.anomaly_report import AnomalyExportReport
    from kd_yolo.export.classifier import ClassifyExportReport
    from kd_yolo.export.report import ExportReport

__all__ = ["FORMATS", "ExportReport", "export"]


def export(
    model: str | Path,
    format: str = "onnx",
    out: str | Path | None = None,
    imgsz: int | Sequence[int] | None = None,
    batch: int = 1,
    dynamic: bool = False,
    quantize: int | None = None,
    half: bool | None = None,
    int8: bool | None = None,
    **arguments: Any,
) -> ExportReport | AnomalyExportReport | ClassifyExportReport:
    """Deploy a checkpoint, export it, and prove the artifact equal to the unfused float32 model.

    An anomaly checkpoint is exported as ``kd_yolo.export.anomaly.export_anomaly`` says, a classifier as
    ``kd_yolo.export.classifier.export_classifier`` does.

    Args:
        model: A trained or deployed checkpoint.
        format: ``onnx``, ``openvino``, ``engine``, ``torchscript``, ``ncnn``, ``bundle``, or another one that
            Ultralytics knows, which is passed through unproven.
        out: Where to write; default beside the checkpoint. ``<name>.parity.json`` beside it gets the report.
        imgsz: Canvas: a side, or height and width; default the checkpoint's own.
        batch: Images per call; when dynamic the largest.
        dynamic: Leave batch and canvas free.
        quantize: 16 for float16, 8 for int8; default float32.
        half: Old name of ``quantize=16``.
        int8: Old name of ``quantize=8``.
        **arguments: ``target``: GPU that an engine is built for without that GPU. ``nms``: put NMS into the graph.
            ``nms_free``: export the one-to-one head, which needs no NMS; default the head a deployed checkpoint kept.
            ``opset``, ``simplify``: of ONNX graphs. ``data``: data set whose validation images the gate looks at, whose
            training images calibrate int8 and whose ``split`` (default ``val``) judges it; ``max_drop``: points of
            mAP50-95 that int8 may cost (0.5); ``calibration_images``: how many. ``trust``: load foreign classes from
            the checkpoint, which runs code in it. ``category``: of ``data``, for an anomaly model.

    Raises:
        ConfigError: An argument is not acceptable, or means nothing to the format.
        BackendMissingError: A package is missing.
        ExportError: The export failed or did not pass the gate; nothing is left under the final name.
        KDYoloError: As ``kd_yolo.export.pipeline.run_export`` says.
    """
    given = {"out": out, "imgsz": imgsz, "batch": batch, "dynamic": dynamic, **arguments}
    return _export(model, format, _quantize(quantize, half, int8), given)


def _export(
    model: str | Path, format: str, quantize: int | None, arguments: dict[str, Any]
) -> ExportReport | AnomalyExportReport | ClassifyExportReport:
    """Export an anomaly model, a classifier or a detector."""
    from kd_yolo.export.job import make_job

    from kd_yolo.anomaly.checkpoint import is_anomaly
    from kd_yolo.classify.checkpoints import is_classifier

    if is_anomaly(model):
        from kd_yolo.export.anomaly import export_with_keys

        return export_with_keys(model, format, quantize, arguments)
    if is_classifier(model):
        from kd_yolo.export.classifier import export_classifier

        return export_classifier(model, format, quantize, arguments)
    known = inspect.signature(make_job).parameters
    for key in arguments:
        if key not in known:
            raise ConfigError(f"export: unknown key '{key}'{nearest(key, known)}")
    job = make_job(model, format, quantize=quantize, **arguments)
    from kd_yolo.export.pipeline import run_export

    return run_export(job)


def _quantize(quantize: int | None, half: bool | None, int8: bool | None) -> int | None:
    """Return ``quantize`` with its old names taken in."""
    for old, given, value in (("half", half, 16), ("int8", int8, 8)):
        if given:
            if quantize not in {None, value}:
                raise ConfigError(f"{old}=true is quantize={value}, but quantize={quantize} was given; choose one")
            quantize = value
    return quantize


def __getattr__(name: str) -> Any:
    """Import the report class on first use, so that listing formats never waits for torch."""
    if name == "ExportReport":
        from kd_yolo.export.report import ExportReport

        return ExportReport
    raise AttributeError(f"module 'kd_yolo.export' has no attribute '{name}'")
