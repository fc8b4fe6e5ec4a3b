"""Exports that several tests look at, made once, and one corrupted weight in each kind of artifact."""

from __future__ import annotations

import re
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detector_factory import save_checkpoint, tiny_detector
from kd_yolo.export import export
from kd_yolo.export.report import ExportReport

PACKAGES = {"openvino": ("openvino",), "ncnn": ("ncnn", "pnnx")}
FOLDER = tempfile.TemporaryDirectory(prefix="kd-yolo-exported-")


def need(format: str) -> None:
    """Skip where the packages of a format are missing."""
    for package in PACKAGES.get(format, ()):
        pytest.importorskip(package)


@cache
def source() -> Path:
    """Return a checkpoint of a tiny detector."""
    return Path(save_checkpoint(tiny_detector(), Path(FOLDER.name) / "best.pt"))


def exported(format: str, quantize: int | None = None) -> ExportReport:
    """Return the report of its export, made once."""
    need(format)
    return _exported(format, quantize)


@cache
def _exported(format: str, quantize: int | None) -> ExportReport:
    return export(source(), format, quantize=quantize)


def corrupt_onnx(path: Path, amount: float) -> None:
    """Add to one element of the first kernel; in an int8 graph, turn its highest bit."""
    import onnx

    graph = onnx.load(path)
    kernels = [item for item in graph.graph.initializer if len(item.dims) == 4]
    kernel = next((item for item in kernels if item.data_type == onnx.TensorProto.INT8), kernels[0])
    values = onnx.numpy_helper.to_array(kernel).copy()
    if values.dtype == np.int8:
        values.flat[0] ^= -128
    else:
        values.flat[0] += np.asarray(amount, values.dtype)
    kernel.CopyFrom(onnx.numpy_helper.from_array(values, kernel.name))
    onnx.save(graph, path)


def corrupt_openvino(folder: Path, amount: float) -> None:
    """Add to the first element of the first kernel in the weight file; if that is int8, turn its highest bit."""
    graph = next(folder.glob("*.xml"))
    form = r'<data element_type="(f32|f16|i8)" shape="\d+, \d+, \d+, \d+" offset="(\d+)"'
    found = [item for item in re.finditer(form, graph.read_text()) if "i8" not in graph.read_text() or item[1] == "i8"]
    weights, offset = graph.with_suffix(".bin"), int(found[0][2])
    if found[0][1] == "i8":
        content = bytearray(weights.read_bytes())
        content[offset] ^= 0x80
        weights.write_bytes(content)
    else:
        change(weights, offset, "<f" if found[0][1] == "f32" else "<e", amount)


def corrupt_ncnn(folder: Path, amount: float) -> None:
    """Add to the first element of the first kernel: it stands behind a tag that says float32 (0) or float16."""
    path = folder / "model.ncnn.bin"
    (tag,) = struct.unpack("<I", path.read_bytes()[:4])
    assert tag in {0, 0x01306B47}
    change(path, 4, "<f" if tag == 0 else "<e", amount)


def corrupt_torchscript(path: Path, amount: float) -> None:
    """Add to the first element of the first kernel."""
    extra: dict[str, Any] = {"config.txt": ""}
    script: Any = torch.jit.load(str(path), _extra_files=extra)  # type: ignore[no-untyped-call]
    kernel = next(value for value in script.parameters() if value.ndim == 4)
    with torch.no_grad():
        kernel.view(-1)[0] += amount
    script.save(str(path), _extra_files=extra)


def change(path: Path, offset: int, form: str, amount: float) -> None:
    """Add to a number in a file."""
    content = bytearray(path.read_bytes())
    (value,) = struct.unpack_from(form, content, offset)
    struct.pack_into(form, content, offset, value + amount)
    path.write_bytes(content)


CORRUPT: dict[str, Callable[[Path, float], None]] = {
    "onnx": corrupt_onnx,
    "openvino": corrupt_openvino,
    "ncnn": corrupt_ncnn,
    "torchscript": corrupt_torchscript,
}
