"""Export to ONNX with Ultralytics' own exporter, then prove the file before it gets its name."""

from __future__ import annotations

import contextlib
import datetime
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_yolo.export.matching import GraphOutput
from kd_yolo.export.onnx_graph import backend_versions, finish_graph, open_session, require_packages
from kd_yolo.export.parity import MIN_IMAGES, check_parity
from kd_yolo.export.report import ExportReport
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER

from kd_yolo.checkpoints import load_model, serialize
from kd_yolo.errors import ConfigError, ExportError
from kd_yolo.files import sha256, write_json, written_aside
from kd_yolo.images import ImageSet, image_set
from kd_yolo.inference import (
    CONFIDENCE,
    NMS_IOU,
    check_canvas,
    deployed_form,
    head_of,
    max_stride,
    use_head,
    uses_nms,
)
from kd_yolo.provenance import find_recipe, head_name, versions


@dataclass(frozen=True)
class _Job:
    """Checked arguments of one export."""

    path: Path
    target: Path
    canvas: tuple[int, int]
    batch: int
    dynamic: bool
    opset: int | None
    simplify: bool
    nms_inside: bool
    half: bool

    @property
    def precision(self) -> str:
        return "fp16" if self.half else "fp32"

    def parity_plan(self, stride: int) -> list[tuple[tuple[int, int], int]]:
        """Return the canvases and batch sizes that the gate runs: a dynamic graph must hold at more than one."""
        if not self.dynamic:
            return [(self.canvas, self.batch)]
        height, width = self.canvas
        # An NMS inside is unrolled over the batch, so that ``batch`` is its largest.
        other = min(2, self.batch) if self.nms_inside else self.batch + 2
        return [(self.canvas, self.batch), ((height, width + stride), other)]


def export_onnx(
    model_path: str | Path,
    out: str | Path | None = None,
    imgsz: int | Sequence[int] | None = None,
    batch: int = 1,
    dynamic: bool = False,
    opset: int | None = None,
    simplify: bool = True,
    nms: bool = False,
    nms_free: bool | None = None,
    half: bool = False,
    data: str | Path | None = None,
    trust: bool = False,
) -> ExportReport:
    """Deploy a checkpoint, export it to ONNX and prove the file equal to the unfused float32 model.

    Args:
        model_path: A trained or deployed checkpoint.
        out: Where to write; default ``<stem>.onnx`` beside the checkpoint. ``<stem>.parity.json`` gets the report.
        imgsz: Canvas: a side, or height and width; default the checkpoint's own.
        batch: Images per call.
        dynamic: Leave batch and canvas free.
        opset: ONNX operator set; default Ultralytics' choice.
        simplify: Simplify the graph with onnxslim.
        nms: Put NMS into the graph.
        nms_free: Export the one-to-one head, which needs no NMS; default: the head a deployed checkpoint kept.
        half: Store and compute in float16; inputs and outputs stay float32.
        data: Data set whose validation images the gate looks at; default synthetic images.
        trust: Load foreign classes from the checkpoint, which runs code in it.

    Raises:
        ConfigError: An argument is not acceptable.
        BackendMissingError: A package is missing.
        ExportError: The export failed or did not pass the gate; nothing is left under the final name.
        KDYoloError: As ``load_model``, ``deployed_form``, ``image_set`` and ``written_aside`` say.
    """
    require_packages()
    path = Path(model_path).expanduser().absolute()
    source, checkpoint = load_model(path, trust=trust)
    canvas = check_canvas(source.args["imgsz"] if imgsz is None else imgsz, max_stride(source))
    job = _Job(path, _target(path, out), canvas, check_batch(batch), dynamic, check_opset(opset), simplify, nms, half)
    _choose_head(source, nms, nms_free, str(path))
    return _export(job, source, checkpoint, image_set(data, MIN_IMAGES))


def check_batch(batch: int) -> int:
    """Return a batch size.

    Raises:
        ConfigError: Not a whole number of at least 1.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ConfigError(f"batch={batch}: must be a whole number of at least 1")
    return batch


def check_opset(opset: int | None) -> int | None:
    """Return an ONNX operator set, or None for the default.

    Raises:
        ConfigError: Too old for a detector, or newer than the installed onnx.
    """
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not 11 <= opset <= newest:
        raise ConfigError(f"opset={opset}: must be between 11 and {newest}, which the installed onnx knows")
    return opset


def _export(job: _Job, source: DetectionModel, checkpoint: dict[str, Any], images: ImageSet) -> ExportReport:
    """Export into a temporary folder, prove the file, and only then give it its name."""
    needs_nms = uses_nms(source)
    deployed, _ = deployed_form(source, needs_nms, str(job.path))
    about = {
        "source_sha256": sha256(job.path),
        "head": head_name(needs_nms),
        "recipe": find_recipe(job.path, checkpoint),
    }
    with tempfile.TemporaryDirectory(prefix="kd-yolo-export-") as folder:
        made = _run_exporter(deployed, checkpoint, job, Path(folder) / f"{job.path.stem}.pt")
        facts = finish_graph(made, about)
        plan = job.parity_plan(max_stride(source))
        parity = check_parity(source, open_session(made), _output_of(job, needs_nms), images, plan, job.precision)
        if not parity.passed:
            reasons = "; ".join(parity.failures)
            raise ExportError(f"{job.target.name}: not written, the graph is not the model: {reasons}")
        report = ExportReport(
            path=job.target,
            parity_path=job.target.with_suffix(".parity.json"),
            format="onnx",
            precision=job.precision,
            source=job.path,
            sha256=sha256(made),
            nms_inside=job.nms_inside,
            canvas=job.canvas,
            batch=job.batch,
            dynamic=job.dynamic,
            **about,
            **facts,
            size_mb=made.stat().st_size / 1e6,
            names={int(key): str(value) for key, value in source.names.items()},
            stride=max_stride(source),
            parity=parity,
            versions=versions() | backend_versions(),
            created=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        )
        _publish(made, report)
    return report


def _publish(made: Path, report: ExportReport) -> None:
    """Give a proven file its name; a file under its final name always has its proof beside it."""
    with written_aside(report.path) as aside:
        aside.write_bytes(made.read_bytes())
        write_json(report.parity_path, report.to_dict())


def _choose_head(source: DetectionModel, nms: bool, nms_free: bool | None, name: str) -> None:
    """Choose the head branch to export, in place."""
    if nms and nms_free:
        raise ConfigError("nms=true puts NMS into the graph and nms_free=true needs none; choose one")
    kept_free = head_of(source).cv2 is None
    use_head(source, not (kept_free if nms_free is None else nms_free), name)
    if nms and not uses_nms(source):
        raise ConfigError(f"{name}: keeps only its NMS-free head; nms=true has nothing to do there")


def _target(path: Path, out: str | Path | None) -> Path:
    target = path.with_suffix(".onnx") if out is None else Path(out).expanduser().absolute()
    if target.suffix != ".onnx":
        raise ConfigError(f"out={out}: an ONNX file ends in .onnx")
    return target


def _run_exporter(deployed: DetectionModel, checkpoint: dict[str, Any], job: _Job, path: Path) -> Path:
    """Export through the stock classes, from the stock checkpoint that ``deploy`` would write."""
    path.write_bytes(serialize(deployed, checkpoint, {}))
    arguments = {
        "format": "onnx",
        "imgsz": list(job.canvas),
        "batch": job.batch,
        "dynamic": job.dynamic,
        "opset": job.opset,
        "simplify": job.simplify,
        "nms": True if job.nms_inside else None,
        "quantize": 16 if job.half else None,
        "device": "cpu",
    }
    try:
        with _quiet():
            made = YOLO(path, task="detect").export(**arguments)
    except OSError as error:
        raise ExportError(f"export failed: {error.strerror or error}; is the temporary folder full?") from error
    except Exception as error:  # whatever torch's exporter, onnxslim or Ultralytics' own assertions raise
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(f"export failed: {line[:300]}") from error
    return Path(made)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the exporter says: its advice names temporary files, and its errors are raised as well."""
    level = LOGGER.level
    LOGGER.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer, about shapes that a detection head fixes on purpose
            yield
    finally:
        LOGGER.setLevel(level)


def _output_of(job: _Job, needs_nms: bool) -> GraphOutput:
    if job.nms_inside:
        return GraphOutput("rows", nms=True, confidence=CONFIDENCE, iou=NMS_IOU)
    return GraphOutput("raw" if needs_nms else "rows", nms=needs_nms)
