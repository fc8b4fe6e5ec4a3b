"""Quantize a proven float32 graph to int8, and judge what it costs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kd_yolo.export.gate import prove
from kd_yolo.export.sidecar import NAME
from kd_yolo.export.stock import Work, failures_in_one_line, quiet

from kd_yolo.errors import ExportError
from kd_yolo.inference import channels_of

if TYPE_CHECKING:
    from kd_yolo.export.int8 import Int8Report


def quantized_onnx(work: Work, source: Path) -> tuple[Path, Int8Report]:
    """Quantize the ONNX file of an export, once it is proven itself.

    Args:
        work: The export; for an engine the quantizers are placed as TensorRT wants them.
        source: The float32 file.

    Returns:
        The int8 file and the report of the quantization.

    Raises:
        ExportError: The float32 graph is not the model, or int8 costs more than ``max_drop``.
        DataError: The calibration or validation images cannot be read.
    """
    from kd_yolo.export.int8_onnx import CPU, TENSORRT, quantize_onnx

    out = work.folder / "int8" / source.name
    scheme = TENSORRT if work.job.format.name == "engine" else CPU
    prove(work, source, "fp32")
    judge = _judge(work)
    calibration = _calibration(work)
    with failures_in_one_line(), quiet():
        report = quantize_onnx(
            source,
            out,
            calibration,
            judge,
            judge(source),
            work.job.max_drop,
            work.canvas,
            channels_of(work.source),
            scheme,
        )
    return out, report


def quantized_openvino(work: Work, source: Path) -> tuple[Path, Int8Report]:
    """Quantize the OpenVINO folder of an export, once it is proven itself.

    Args:
        work: The export.
        source: The float32 folder.

    Returns:
        A folder with the int8 model and the metadata of ``source``, and the report of the quantization.

    Raises:
        BackendMissingError: NNCF is missing.
        ExportError: The float32 model is not the model, or int8 costs more than ``max_drop``.
        DataError: The calibration or validation images cannot be read.
    """
    from kd_yolo.export.int8_openvino import quantize_openvino

    graph = next(source.glob("*.xml"))
    out = work.folder / "int8_openvino_model" / graph.name
    prove(work, source, "fp32")
    judge = _judge(work)
    calibration = _calibration(work)

    def judge_openvino(path: Path) -> float:
        """Judge a graph in a folder as Ultralytics wants it: of that name, and with the metadata."""
        folder = work.folder / "judged_openvino_model"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        file = path if path.suffix == ".xml" else next(path.glob("*.xml"))
        for part in (file, file.with_suffix(".bin"), source / NAME):
            shutil.copy(part, folder)
        return judge(folder)

    with failures_in_one_line(), quiet():
        out.parent.mkdir()
        report = quantize_openvino(
            graph,
            out,
            calibration,
            judge_openvino,
            judge_openvino(graph),
            work.job.max_drop,
            work.canvas,
            channels_of(work.source),
        )
        shutil.copy(source / NAME, out.parent)
    return out.parent, report


def check_drop(work: Work, path: Path, report: Int8Report) -> None:
    """Judge the finished artifact once more: what gets the name is what holds the bound.

    Args:
        work: The export.
        path: The artifact, or the graph that an engine was built from.
        report: What the quantization promised.

    Raises:
        ExportError: It loses more than ``max_drop``.
    """
    device = "0" if path.suffix == ".engine" else "cpu"
    with failures_in_one_line(), quiet():
        found = _judge(work, device)(path)
    drop = (report.map_float - found) * 100
    if not drop <= work.job.max_drop + 1e-9:
        raise ExportError(
            f"{work.job.out.name}: not written, it loses {drop:.2f} points of mAP50-95 ({report.map_float:.4f} in "
            f"float), and max_drop={work.job.max_drop:g} are allowed"
        )


def _judge(work: Work, device: str = "cpu") -> Callable[[Path], float]:
    """Return what measures the mAP50-95 of an artifact, 0 to 1."""
    from kd_yolo.bench.accuracy import judge

    job = work.job

    def measure(path: Path) -> float:
        return judge(path, str(job.data), job.split, work.canvas, device, str(job.source)).map50_95

    return measure


def _calibration(work: Work) -> Sequence[Path]:
    """Return the training images that the ranges are measured on."""
    from kd_yolo.export.calibration import CALIBRATION_IMAGES, calibration_files

    count = work.job.calibration_images
    return calibration_files(str(work.job.data), CALIBRATION_IMAGES if count is None else count)
