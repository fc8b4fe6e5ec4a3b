"""Run a finished artifact in its runtime and hold it against the unfused float32 model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from kd_yolo.export.job import Job
from kd_yolo.export.matching import GraphOutput
from kd_yolo.export.parity import ParityReport, Trial, check_parity
from kd_yolo.export.stock import Work, failures_in_one_line
from kd_yolo.export.weights import FORMATS, SHOWN, WeightReport, check_weights

from kd_yolo.errors import BackendMissingError, ExportError, ModelError
from kd_yolo.inference import CONFIDENCE, NMS_IOU, channels_of, max_stride, uses_nms
from kd_yolo.runtimes import Description, artifact_format, describe, open_session


def prove(work: Work, path: Path, precision: str, graph: Path | None = None) -> tuple[ParityReport, str]:
    """Compare an artifact's weights, run it on the images, and return the gate's result and the runtime that ran it.

    Args:
        work: The export.
        path: File or folder.
        precision: ``fp32``, ``fp16`` or ``int8``.
        graph: The ONNX file that an engine was built from, whose weights are compared in its stead.

    Raises:
        ExportError: The artifact cannot be opened, does not say about itself what it is, or is not the model.
        BackendMissingError: Its runtime is missing.
    """
    job = work.job
    format = artifact_format(path)
    device = "cuda" if format in {"engine", "rtx"} else "cpu"
    try:
        trials, runtime = [], ""
        for canvas, batch in job.parity_plan(work.canvas, max_stride(work.source)):
            session = open_session(path, canvas, batch, device)
            runtime = session.runtime
            trials.append(Trial(session.infer, canvas, batch))
    except ModelError as error:
        raise ExportError(f"{job.out.name}: not written, it cannot be opened again ({error})") from error
    weights = _prove_weights(work, path if graph is None else graph, precision)
    parity = check_parity(work.source, trials, output_of(job, uses_nms(work.source)), work.images, precision)
    if not parity.passed:
        reasons = "; ".join(parity.failures)
        raise ExportError(f"{job.out.name}: not written, the graph is not the model: {reasons}")
    return dataclasses.replace(parity, weights=weights), runtime


def output_of(job: Job, needs_nms: bool) -> GraphOutput:
    """Return what the output of an artifact holds.

    Args:
        job: The export.
        needs_nms: Whether the head branch behind it needs NMS.
    """
    if job.nms_inside:
        return GraphOutput("rows", nms=True, confidence=CONFIDENCE, iou=NMS_IOU)
    return GraphOutput("raw" if needs_nms else "rows", nms=needs_nms)


def check_description(work: Work, path: Path) -> None:
    """Read the metadata of an artifact back and compare it with what was to be written.

    Raises:
        ExportError: It says something else, or nothing.
    """
    job = work.job
    try:
        found = describe(path)
    except ModelError as error:
        raise ExportError(f"{job.out.name}: not written, it does not describe itself ({error})") from error
    except BackendMissingError as error:
        raise BackendMissingError(f"{job.out.name}: not written, nothing here can read it back ({error})") from error
    wanted = Description(
        format=found.format,
        names={int(key): str(value) for key, value in work.source.names.items()},
        stride=max_stride(work.source),
        channels=channels_of(work.source),
        canvas=work.canvas,
        batch=job.batch,
        dynamic=job.dynamic,
        precision=job.precision,
        head="nms inside" if job.nms_inside else str(work.own["head"]),
        own={**found.own, **work.own},
    )
    wrong = [
        f"{item.name} is {getattr(found, item.name)!r}, not {getattr(wanted, item.name)!r}"
        for item in dataclasses.fields(Description)
        if getattr(found, item.name) != getattr(wanted, item.name)
    ]
    if wrong:
        raise ExportError(f"{job.out.name}: not written, its metadata is wrong: {'; '.join(wrong)}"[:600])


def _prove_weights(work: Work, path: Path, precision: str) -> WeightReport | None:
    """Compare the weights of an artifact where they can be read: outputs alone may hide a wrong one."""
    format = artifact_format(path)
    if format not in FORMATS:
        return None
    with failures_in_one_line():
        report = check_weights(work.deployed, path, format, precision)
    if report.failures:
        more = len(report.failures) - SHOWN
        reasons = "; ".join(report.failures[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise ExportError(f"{work.job.out.name}: not written, the graph is not the model: {reasons}")
    return report
