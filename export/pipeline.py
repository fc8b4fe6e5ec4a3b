"""The one way to an artifact: deploy, make, describe, prove, publish."""

from __future__ import annotations

import datetime
import hashlib
import importlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kd_yolo.export.gate import check_description, prove
from kd_yolo.export.int8_step import check_drop
from kd_yolo.export.job import Job
from kd_yolo.export.parity import MIN_IMAGES, ParityReport
from kd_yolo.export.publish import publish
from kd_yolo.export.report import ExportReport
from kd_yolo.export.stock import Made, Work, failures_in_one_line
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER

import kd_yolo
from kd_yolo.checkpoints import load_model
from kd_yolo.errors import ConfigError
from kd_yolo.files import sha256, size_mb
from kd_yolo.images import image_set
from kd_yolo.inference import (
    MAX_DETECTIONS,
    check_canvas,
    deployed_form,
    head_of,
    max_stride,
    use_head,
    uses_nms,
)
from kd_yolo.provenance import find_recipe, head_name, versions

# format -> module and function (Work) -> Made; every other format is passed through
MAKERS = {
    "onnx": ("onnx_file", "make_onnx"),
    "openvino": ("openvino_model", "make_openvino"),
    "engine": ("engine_file", "make_engine"),
    "torchscript": ("torchscript_file", "make_torchscript"),
    "ncnn": ("ncnn_model", "make_ncnn"),
    "bundle": ("bundle_folder", "make_bundle"),
}


def run_export(job: Job) -> ExportReport:
    """Deploy a checkpoint, export it, prove the artifact, and only then give it its name.

    Args:
        job: Checked arguments.

    Raises:
        ExportError: The export failed or did not pass the gate; nothing is left under the final name.
        BackendMissingError: A package is missing.
        KDYoloError: As ``load_model``, ``deployed_form``, ``image_set``, ``written_aside`` and ``folder_aside`` say.
    """
    source, checkpoint = load_model(job.source, trust=job.trust)
    canvas = check_canvas(source.args["imgsz"] if job.imgsz is None else job.imgsz, max_stride(source))
    _choose_head(source, job)
    _check_canvas(source, job, canvas)
    images = image_set(job.data, MIN_IMAGES)
    deployed, _ = deployed_form(source, uses_nms(source), str(job.source))
    recipe = find_recipe(job.source, checkpoint)
    own = _own_entry(job, source, recipe)
    with tempfile.TemporaryDirectory(prefix="kd-yolo-export-", ignore_cleanup_errors=True) as folder:
        work = Work(job, source, deployed, checkpoint, Path(folder), canvas, own, images)
        made = _make(work)
        parity, runtime = _check(work, made)
        report = _report(work, made, parity, runtime, recipe)
        publish(made.path, job.out, job.parity_path, report.to_dict())
    return report


def _make(work: Work) -> Made:
    """Call the maker of the format."""
    module, name = MAKERS.get(work.job.format.name, ("passthrough", "make_passthrough"))
    maker: Callable[[Work], Made] = getattr(importlib.import_module(f"kd_yolo.export.{module}"), name)
    return maker(work)


def _check(work: Work, made: Made) -> tuple[ParityReport | None, str | None]:
    """Run the gate, which is never optional; what cannot be run is said loudly."""
    if made.proven is None:
        LOGGER.warning(f"{work.job.out.name}: {made.checked}")
        return None, None
    check_description(work, made.proven)
    if work.job.format.name == "engine" and made.proven != made.path:
        check_description(work, made.path)
    parity, runtime = prove(work, made.proven, work.job.precision, made.graph)
    if made.int8 is not None:
        check_drop(work, made.proven, made.int8)
    return parity, runtime


def _report(
    work: Work, made: Made, parity: ParityReport | None, runtime: str | None, recipe: dict[str, Any] | None
) -> ExportReport:
    job = work.job
    with failures_in_one_line():
        packages = {name: str(importlib.import_module(name).__version__) for name in job.format.packages}
        return ExportReport(
            path=job.out,
            parity_path=job.parity_path,
            format=job.format.name,
            precision=job.precision,
            source=job.source,
            source_sha256=work.own["source_sha256"],
            sha256=sha256(made.path),
            head=work.own["head"],
            nms_inside=job.nms_inside,
            canvas=work.canvas,
            batch=job.batch,
            dynamic=job.dynamic,
            target=job.target.name if job.target else None,
            facts=made.facts,
            size_mb=size_mb(made.path),
            names={int(key): str(value) for key, value in work.source.names.items()},
            stride=max_stride(work.source),
            recipe=recipe,
            recipe_sha256=work.own["recipe_sha256"],
            checked=made.checked,
            runtime=runtime,
            parity=parity,
            int8=made.int8,
            versions=versions() | packages,
            created=work.own["created"],
        )


def _own_entry(job: Job, source: DetectionModel, recipe: dict[str, Any] | None) -> dict[str, Any]:
    """Return our metadata entry."""
    canonical = None if recipe is None else json.dumps(recipe, sort_keys=True, separators=(",", ":"), default=str)
    return {
        "version": kd_yolo.__version__,
        "source_sha256": sha256(job.source),
        "recipe_sha256": None if canonical is None else hashlib.sha256(canonical.encode()).hexdigest(),
        "precision": job.precision,
        "head": head_name(uses_nms(source)),
        "created": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _choose_head(source: DetectionModel, job: Job) -> None:
    """Choose the head branch to export, in place."""
    kept_free = head_of(source).cv2 is None
    use_head(source, not (kept_free if job.nms_free is None else job.nms_free), str(job.source))
    if uses_nms(source):
        return
    if job.nms_inside:
        raise ConfigError(f"{job.source}: keeps only its NMS-free head; nms=true has nothing to do there")
    if "nms_free" not in job.format.keys:
        raise ConfigError(
            f"{job.source}: keeps only its NMS-free head, which format={job.format.name} cannot hold; give the trained "
            "checkpoint, or deploy it with nms=true"
        )


def _check_canvas(source: DetectionModel, job: Job, canvas: tuple[int, int]) -> None:
    """Refuse what a canvas cannot do: be judged when it is free and not square, or hold fewer anchors than are kept."""
    height, width = canvas
    if job.precision == "int8" and job.format.checked and job.dynamic and height != width:
        raise ConfigError(f"quantize=8 with dynamic=true is judged by mAP on a square canvas, not {height}x{width}")
    strides: Any = source.stride
    anchors = sum((height // stride) * (width // stride) for stride in map(int, strides))
    if job.dynamic and not uses_nms(source) and anchors < MAX_DETECTIONS:
        raise ConfigError(
            f"imgsz={height}x{width}: has {anchors} anchors, and a dynamic NMS-free graph keeps {MAX_DETECTIONS} "
            "detections on every canvas; use a larger canvas, or dynamic=false"
        )
