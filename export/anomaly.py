"""Export an anomaly model: deploy, make, prove, publish. One graph, one output, thresholds in the metadata."""

from __future__ import annotations

import datetime
import importlib
import inspect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_yolo.export import anomaly_graph as making
from kd_yolo.export.anomaly_gate import GateImages, check_anomaly_parity, gate_images, trials_of
from kd_yolo.export.anomaly_graph import LEAST_OPSET, AnomalyWork
from kd_yolo.export.anomaly_report import AnomalyExportReport
from kd_yolo.export.formats import CHECKED, find_format
from kd_yolo.export.job import Job, make_job, require_packages
from kd_yolo.export.publish import publish
from kd_yolo.export.stock import Made, failures_in_one_line
from ultralytics.utils import LOGGER

import kd_yolo
from kd_yolo.anomaly.checkpoint import load_anomaly
from kd_yolo.anomaly.merging import deployed
from kd_yolo.anomaly.model import AnomalyModel
from kd_yolo.errors import BackendMissingError, ConfigError, ExportError, ModelError, nearest
from kd_yolo.files import sha256, size_mb
from kd_yolo.inference import check_canvas
from kd_yolo.provenance import versions
from kd_yolo.runtimes import describe
from kd_yolo.runtimes.anomaly_session import ENTRY, Thresholds, canvas_of, thresholds_of

MAKERS: dict[str, Callable[[AnomalyWork], Made]] = {
    "onnx": making.make_anomaly_onnx,
    "openvino": making.make_anomaly_openvino,
    "engine": making.make_anomaly_engine,
    "bundle": making.make_anomaly_bundle,
}
MEANINGLESS = ("nms", "nms_free", "max_drop", "calibration_images", "split")
"""Keys of a detector's export that say nothing to a map."""


def export_anomaly(
    model: str | Path,
    format: str = "onnx",
    out: str | Path | None = None,
    imgsz: int | Sequence[int] | None = None,
    batch: int = 1,
    dynamic: bool = False,
    quantize: int | None = None,
    target: str | None = None,
    opset: int | None = None,
    simplify: bool = True,
    data: str | Path | None = None,
    category: str | None = None,
    trust: bool = False,
) -> AnomalyExportReport:
    """Deploy an anomaly checkpoint, export it, and prove that the artifact gives its maps and scores to 1e-4.

    The graph has the input ``images`` (B, 3, H, W) in [0, 1] and the output ``output0`` (B, 1, H, W), the final map in
    float32. Its thresholds, and how a map becomes a score, are in the metadata.

    Args:
        model: A calibrated anomaly checkpoint.
        format: ``onnx``, ``openvino``, ``engine`` or ``bundle``.
        out: Where to write; default beside the checkpoint. ``<name>.parity.json`` beside it gets the report.
        imgsz: Canvas: a side, or height and width; default the checkpoint's own, which its thresholds belong to.
        batch: Images per call; of a dynamic engine the largest.
        dynamic: Leave batch and canvas free.
        quantize: 32 or None; other precisions are refused.
        target: GPU that an engine is built for without that GPU.
        opset: ONNX operator set; default Ultralytics' choice.
        simplify: Simplify the graph with onnxslim.
        data: Data set whose test images the gate looks at; default images made from a seed.
        category: Category of ``data``; default the one that the checkpoint was trained on.
        trust: Of no effect: an anomaly checkpoint holds no classes.

    Raises:
        CheckpointError: The checkpoint is damaged, of another task, or not calibrated.
        ConfigError: An argument is not acceptable, or means nothing to an anomaly model or to the format.
        DataError: The data or its category cannot be used.
        BackendMissingError: A package is missing.
        ExportError: The export failed or did not pass the gate; nothing is left under the final name.
        OutputError: The result cannot be written.
    """
    shape = {"imgsz": imgsz, "batch": batch, "dynamic": dynamic, "opset": opset, "simplify": simplify}
    job = _job(model, format, quantize, {**shape, "out": out, "target": target, "data": data, "trust": trust})
    return _run(job, category)


def export_with_keys(
    model: str | Path, format: str, quantize: int | None, arguments: Mapping[str, Any]
) -> AnomalyExportReport:
    """Export an anomaly checkpoint with the keys that ``kd_yolo.export.export`` was given.

    Raises:
        ConfigError: A key means nothing to an anomaly model, or is unknown; otherwise as ``export_anomaly``.
    """
    known = inspect.signature(export_anomaly).parameters
    defaults = inspect.signature(make_job).parameters
    rest: dict[str, Any] = {}
    for key, value in arguments.items():
        if key in MEANINGLESS:
            if value not in {None, defaults[key].default}:
                raise ConfigError(f"{key}=: means nothing to an anomaly model ({Path(model).name}); leave it out")
        elif key not in known:
            raise ConfigError(f"export: unknown key '{key}'{nearest(key, known)}")
        else:
            rest[key] = value
    return export_anomaly(model, format, quantize=quantize, **rest)


def _job(model: str | Path, format: str, quantize: int | None, arguments: dict[str, Any]) -> Job:
    """Return a checked job; what only detectors have is refused."""
    chosen = find_format(format)
    if chosen.name not in MAKERS:
        raise ConfigError(f"format={format}: an anomaly model is exported to {', '.join(MAKERS)}")
    if quantize not in {None, 32}:
        raise ConfigError(
            f"quantize={quantize}: anomaly models are exported in float32 alone, since float16 and int8 cannot resolve "
            "their distances; leave quantize= out"
        )
    require_packages(CHECKED["onnx"])  # every format is made from the ONNX graph
    job = make_job(model, format, **arguments)
    if job.opset is not None and job.opset < LEAST_OPSET:
        raise ConfigError(f"opset={job.opset}: must be at least {LEAST_OPSET}")
    return job


def _run(job: Job, category: str | None) -> AnomalyExportReport:
    if category is not None and job.data is None:
        raise ConfigError("category=: says which part of data= to look at; give data= as well, or leave it out")
    source, content = load_anomaly(job.source, trust=job.trust)
    thresholds = thresholds_of(source, job.source)
    canvas = check_canvas(canvas_of(source, content) if job.imgsz is None else job.imgsz, source.stride)
    trained = canvas_of(source, content)
    if canvas != trained:
        LOGGER.warning(
            f"imgsz: the thresholds were calibrated on {trained[0]}x{trained[1]}, not {canvas[0]}x{canvas[1]}, where "
            "scores are others; train with this imgsz for thresholds that hold"
        )
    images = gate_images(job.data, category, content.get("extra", {}).get("category"))
    own = {
        "version": kd_yolo.__version__,
        "source_sha256": sha256(job.source),
        "precision": job.precision,
        "head": "map",
        ENTRY: thresholds.to_dict(),
        "created": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    with tempfile.TemporaryDirectory(prefix="kd-yolo-export-", ignore_cleanup_errors=True) as folder:
        work = AnomalyWork(job, deployed(source), Path(folder), canvas, own)
        made = MAKERS[job.format.name](work)
        report = _proven(work, made, source, thresholds, images)
        publish(made.path, job.out, job.parity_path, report.to_dict())
    return report


def _proven(
    work: AnomalyWork, made: Made, source: AnomalyModel, thresholds: Thresholds, images: GateImages
) -> AnomalyExportReport:
    """Run the gate, which is never optional, and return the report.

    Raises:
        ExportError: The artifact is not the model.
    """
    job = work.job
    trials = trials_of(work.canvas, job.batch, job.dynamic, source.stride)
    try:
        parity, runtime = check_anomaly_parity(source, thresholds, made.proven or made.path, trials, images)
        if job.format.name == "engine":
            _check_engine(made.path, work.own)
    except ModelError as error:
        raise ExportError(f"{job.out.name}: not written, it cannot be opened again ({error})") from error
    except BackendMissingError as error:
        raise BackendMissingError(f"{job.out.name}: not written, nothing here can run it ({error})") from error
    if not parity.passed:
        raise ExportError(f"{job.out.name}: not written, the graph is not the model: {'; '.join(parity.failures)}")
    with failures_in_one_line():
        packages = {name: str(importlib.import_module(name).__version__) for name in job.format.packages}
    return AnomalyExportReport(
        path=job.out,
        parity_path=job.parity_path,
        format=job.format.name,
        task=source.task,
        precision=job.precision,
        source=job.source,
        source_sha256=work.own["source_sha256"],
        sha256=sha256(made.path),
        canvas=work.canvas,
        batch=job.batch,
        dynamic=job.dynamic,
        target=job.target.name if job.target else None,
        facts=made.facts,
        size_mb=size_mb(made.path),
        thresholds=work.own[ENTRY],
        names=dict(source.names),
        stride=source.stride,
        checked=made.checked,
        runtime=runtime,
        parity=parity,
        versions=versions() | packages,
        created=work.own["created"],
    )


def _check_engine(path: Path, own: Mapping[str, Any]) -> None:
    """Read the header of an engine back, which may not run here.

    Raises:
        ModelError: It is no anomaly model.
        ExportError: Its thresholds are not the checkpoint's.
    """
    found = describe(path, task="anomaly").own
    if any(found.get(key) != value for key, value in own.items()):
        raise ExportError(f"{path.name}: not written, its header does not hold what was to be written")
