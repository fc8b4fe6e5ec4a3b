"""ONNX files: made by Ultralytics' exporter from the deployed checkpoint, checked, described."""

from __future__ import annotations

from pathlib import Path

from kd_yolo.export.int8_step import quantized_onnx
from kd_yolo.export.onnx_graph import finish_graph
from kd_yolo.export.stock import Made, Work, failures_in_one_line, run_stock_exporter


def make_onnx(work: Work) -> Made:
    """Make an ONNX file of the wanted precision.

    Raises:
        ExportError: The export failed, the graph is not valid, or int8 costs more than ``max_drop``.
    """
    job = work.job
    precision = "fp32" if job.precision == "int8" else job.precision
    made = run_stock_exporter(work, "onnx", precision, opset=job.opset, simplify=job.simplify)
    report = None
    if job.precision == "int8":
        made, report = quantized_onnx(work, made)
    facts = finish(made, work)
    return Made(made, facts, proven=made, int8=report)


def finish(path: Path, work: Work) -> dict[str, int]:
    """Check a graph, add our metadata to it, and return facts about it."""
    with failures_in_one_line():
        return finish_graph(path, work.own, work.job.precision)
