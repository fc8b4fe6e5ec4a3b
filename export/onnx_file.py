"""Export to ONNX with Ultralytics' own exporter, then prove the file before it gets its name."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_yolo.export.matching import GraphOutput
from kd_yolo.export.onnx_graph import backend_versions, finish_graph, open_session, require_packages
from kd_yolo.export.parity import MIN_IMAGES, check_parity
from kd_yolo.export.report import ExportReport
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.checkpoints import load_model, serialize
from kd_yolo.errors import ConfigError, ExportError
from kd_yolo.files import sha256, write_json, written_aside
from kd_yolo.images import image_set
from kd_yolo.inference import (
    CONFIDENCE,
    NMS_IOU,
    check_canvas,
    deployed_form,
    max_stride,
    use_head,
    uses_nms,
)
from kd_yolo.provenance import find_recipe, head_name, versions


@dataclass(frozen=True)
class _Job:
    """Checked arguments of one export."""

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
        nms_free: Export the one-to-one head, which needs no NMS; default: what a deployed checkpoint kept, otherwise
            the one-to-many head.
        half: Store and compute in float16; inputs and outputs stay float32.
        data: Data set whose validation images the gate looks at; default synthetic images.
        trust: Load foreign classes from the checkpoint, which runs code in it.

    Raises:
        CheckpointError: The checkpoint cannot be loaded.
        ConfigError: An argument is not acceptable.
        DataError: ``data`` cannot be read.
        BackendMissingError: A package is missing.
        ReparamError: The merged model is not equal to the trained one.
        ExportError: The export failed or did not pass the gate; nothing is left under the final name.
        OutputError: The file cannot be written.
    """
    require_packages()
    path = Path(model_path).expanduser().absolute()
    source, checkpoint = load_model(path, trust=trust)
    stride = max_stride(source)
    canvas = check_canvas(source.args["imgsz"] if imgsz is None else imgsz, stride)
    job = _Job(canvas, _check_batch(batch), dynamic, _check_opset(opset), simplify, nms, half)
    needs_nms = _choose_head(source, nms, nms_free, str(path))
    target = _target(path, out)
    images = image_set(data, MIN_IMAGES)
    recipe = find_recipe(path, checkpoint)
    source_hash = sha256(path)
    deployed, _ = deployed_form(source, needs_nms, str(path))
    provenance = {"source_sha256": source_hash, "head": head_name(needs_nms), "recipe": recipe}
    with tempfile.TemporaryDirectory(prefix="kd-yolo-export-") as folder:
        made = _run_exporter(deployed, checkpoint, job, Path(folder) / f"{path.stem}.pt")
        facts = finish_graph(made, provenance)
        output = _output_of(job, needs_nms)
        parity = check_parity(source, open_session(made), output, images, job.parity_plan(stride), job.precision)
        if not parity.passed:
            raise ExportError(f"{target.name}: not written, the graph is not the model: {'; '.join(parity.failures)}")
        report = ExportReport(
            path=target,
            parity_path=target.with_suffix(".parity.json"),
            format="onnx",
            precision=job.precision,
            source=path,
            source_sha256=source_hash,
            sha256=sha256(made),
            head=head_name(needs_nms),
            nms_inside=nms,
            canvas=canvas,
            batch=job.batch,
            dynamic=dynamic,
            **facts,
            size_mb=made.stat().st_size / 1e6,
            names={int(key): str(value) for key, value in source.names.items()},
            stride=stride,
            recipe=recipe,
            parity=parity,
            versions=versions() | backend_versions(),
            created=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        )
        _publish(made, report)
    return report


def _publish(made: Path, report: ExportReport) -> None:
    """Give a proven file its name; a file under its final name always has its proof beside it."""
    with written_aside(report.path) as aside, written_aside(report.parity_path) as parity_aside:
        aside.write_bytes(made.read_bytes())
        write_json(parity_aside, report.to_dict())


def _check_batch(batch: int) -> int:
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ConfigError(f"batch={batch}: must be a whole number of at least 1")
    return batch


def _check_opset(opset: int | None) -> int | None:
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not 11 <= opset <= newest:
        raise ConfigError(f"opset={opset}: must be between 11 and {newest}, which the installed onnx knows")
    return opset


def _choose_head(source: DetectionModel, nms: bool, nms_free: bool | None, name: str) -> bool:
    """Choose the head branch in place; return whether it needs NMS."""
    if nms and nms_free:
        raise ConfigError("nms=true puts NMS into the graph and nms_free=true needs none; choose one")
    kept_free = source.model[-1].cv2 is None
    use_head(source, not (kept_free if nms_free is None else nms_free), name)
    if nms and not uses_nms(source):
        raise ConfigError(f"{name}: keeps only its NMS-free head; nms=true has nothing to do there")
    return uses_nms(source)


def _target(path: Path, out: str | Path | None) -> Path:
    target = path.with_suffix(".onnx") if out is None else Path(out).expanduser().absolute()
    if target.suffix != ".onnx":
        raise ConfigError(f"out={out}: an ONNX file ends in .onnx")
    return target


def _run_exporter(deployed: DetectionModel, checkpoint: dict[str, Any], job: _Job, path: Path) -> Path:
    """Export through the stock classes, from the stock checkpoint that ``deploy`` would write."""
    path.write_bytes(serialize(deployed, checkpoint, {}))
    try:
        made = YOLO(path, task="detect").export(
            format="onnx",
            imgsz=list(job.canvas),
            batch=job.batch,
            dynamic=job.dynamic,
            opset=job.opset,
            simplify=job.simplify,
            nms=True if job.nms_inside else None,
            quantize=16 if job.half else None,
            device="cpu",
        )
    except OSError as error:
        raise ExportError(f"export failed: {error.strerror or error}; is the temporary folder full?") from error
    except Exception as error:  # whatever torch's exporter, onnxslim or Ultralytics' own assertions raise
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(f"export failed: {line[:300]}") from error
    return Path(made)


def _output_of(job: _Job, needs_nms: bool) -> GraphOutput:
    if job.nms_inside:
        return GraphOutput("rows", nms=True, confidence=CONFIDENCE, iou=NMS_IOU)
    return GraphOutput("raw" if needs_nms else "rows", nms=needs_nms)
