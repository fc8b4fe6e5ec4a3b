"""OpenVINO folders: an .xml file of the graph, a .bin file of its weights, and the metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd_yolo.export.int8_step import quantized_openvino
from kd_yolo.export.sidecar import read_sidecar, write_sidecar
from kd_yolo.export.stock import Made, Work, failures_in_one_line, run_stock_exporter

from kd_yolo.runtimes.telemetry import no_telemetry


def make_openvino(work: Work) -> Made:
    """Make an OpenVINO folder of the wanted precision; float16 compresses the weights, the arithmetic is the device's.

    Raises:
        ExportError: The export failed, or int8 costs more than ``max_drop``.
    """
    job, report = work.job, None
    with no_telemetry():
        made = run_stock_exporter(work, "openvino", "fp32" if job.precision == "int8" else job.precision)
        if job.precision == "int8":
            made, report = quantized_openvino(work, made)
    with failures_in_one_line():
        write_sidecar(made, read_sidecar(made), work.own, job.precision)
        facts = graph_facts(next(made.glob("*.xml")))
    return Made(made, facts, proven=made, int8=report)


def graph_facts(file: Path) -> dict[str, Any]:
    """Return the opset and the number of operations of an OpenVINO graph."""
    import openvino

    graph = openvino.Core().read_model(file)
    kinds = [operation.get_type_name() for operation in graph.get_ordered_ops()]
    return {
        "operations": sum(kind not in {"Constant", "Convert", "Parameter", "Result"} for kind in kinds),
        "convolutions": sum(kind in {"Convolution", "GroupConvolution"} for kind in kinds),
        "fake_quantize": kinds.count("FakeQuantize"),
    }
