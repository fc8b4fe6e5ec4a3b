"""One corrupted weight in each kind of artifact."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


def corrupt_onnx(path: Path, amount: float) -> None:
    """Add to one element of the first kernel; in an int8 graph, to its scale as a share of it."""
    import onnx

    graph = onnx.load(path)
    kernel = next(item for item in graph.graph.initializer if len(item.dims) == 4)
    values = onnx.numpy_helper.to_array(kernel).copy()
    values.flat[0] += np.asarray(amount, values.dtype)
    kernel.CopyFrom(onnx.numpy_helper.from_array(values, kernel.name))
    onnx.save(graph, path)


def corrupt_openvino(folder: Path, amount: float) -> None:
    """Add to the first element of the first kernel in the weight file."""
    graph = next(folder.glob("*.xml"))
    found = re.search(r'<data element_type="(f32|f16)" shape="\d+, \d+, \d+, \d+" offset="(\d+)"', graph.read_text())
    assert found is not None
    change(graph.with_suffix(".bin"), int(found[2]), "<f" if found[1] == "f32" else "<e", amount)


def corrupt_ncnn(folder: Path, amount: float) -> None:
    """Add to the first element of the first kernel: it stands behind a tag that says float32 (0) or float16."""
    path = folder / "model.ncnn.bin"
    (tag,) = struct.unpack("<I", path.read_bytes()[:4])
    assert tag in {0, 0x01306B47}
    change(path, 4, "<f" if tag == 0 else "<e", amount)


def corrupt_torchscript(path: Path, amount: float) -> None:
    """Add to the first element of the first kernel."""
    extra: dict[str, Any] = {"config.txt": ""}
    script: Any = torch.jit.load(str(path), _extra_files=extra)
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
