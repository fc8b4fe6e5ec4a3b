"""Look into an engine of TensorRT for RTX on a machine without a GPU.

The runtime asks for a CUDA device before it looks at an engine: without a driver ``deserialize_cuda_engine`` returns
None and ``get_engine_validity`` says INVALID, both with CUDA's own error, whatever the engine is. So this reads the
serialised engine itself: a header of 64 bytes, and the plain text in which the compiler writes down tensors and
kernels. The layout is not documented; it was read off engines of version 1.7 for all six capabilities, and other
versions are refused rather than guessed at. On a machine with a GPU the runtime is asked instead.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from kd_yolo.errors import ModelError
from kd_yolo.runtimes.base import METADATA_KEY
from kd_yolo.runtimes.tensorrt_header import read_header
from kd_yolo.runtimes.tensorrt_package import deserialize, dtype_name, load_package

HEADER_BYTES = 64
MAGIC = b"vtrt"
KNOWN = (1, 7)
# Bit of the header's word at byte 32 for each compute capability.
CAPABILITY_BITS = {"7.5": 1, "8.0": 2, "8.6": 4, "8.9": 8, "12.0": 16, "12.1": 32}
NEEDED = ("runtime", "tensorrt", "compute_capability", "inputs", "outputs")
TYPES = {
    b"float": "float32",
    b"half": "float16",
    b"int8": "int8",
    b"int32": "int32",
    b"int64": "int64",
    b"bool": "bool",
}


_TENSOR = re.compile(rb"^\s*tensor=\{ ([^\n]*) type=(\w+) \}$", re.MULTILINE)
_KERNEL = re.compile(rb"^\s*(function|runtime_fusion|corrltn|fully_connected|maxpool)=\{ name=", re.MULTILINE)
_NAME = re.compile(rb' name="([^"]*)"')
_DIMS = re.compile(rb"dims=\{ ([^}]*)\}")
_BYTES = re.compile(rb"const_payload_size=(\d+)")


def inspect_engine(path: Path) -> dict[str, Any]:
    """Return what an engine holds: of the runtime itself where it can run, else read from the file.

    Without a GPU this works for TensorRT for RTX 1.7 alone; the text of this module says why and how.

    Args:
        path: An ``.engine`` file of ours.

    Returns:
        ``runtime``, ``tensorrt``, ``compute_capability``, ``precision`` (``fp32``, ``fp16`` or ``int8``), ``inputs``
        and ``outputs`` (name -> ``shape`` with -1 where it is free, ``dtype``), ``weight_bytes`` by type and
        ``kernels`` by kind (both None where the runtime was asked), ``by`` (``runtime`` or ``file``).

    Raises:
        ModelError: It is damaged, cannot be read here, or holds something else than its metadata says.
        BackendMissingError: The package that can read it is missing.
    """
    offset, metadata = read_header(path)
    own = metadata.get(METADATA_KEY) or {}
    missing = [key for key in NEEDED if key not in own]
    if missing:
        raise ModelError(f"{path}: its metadata says nothing about {', '.join(missing)}; kd-yolo did not export it")
    plan = path.read_bytes()[offset:]
    if torch.cuda.is_available() and _capability_here() == own["compute_capability"]:
        found = _asked(path, own, plan)
    elif own["runtime"] == "tensorrt-rtx":
        found = _read(path, own, plan)
    else:
        raise ModelError(f"{path}: only a machine with a GPU of its kind can look into an engine of TensorRT")
    found = _freed(found, own)
    for key, value in found.items():
        if own.get(key, value) != value:
            raise ModelError(f"{path}: its metadata says {key} {own[key]}, the engine in it {value}; export it again")
    return {"runtime": own["runtime"], **found}


def read_plan(plan: bytes, name: str, tensors: list[str]) -> dict[str, Any]:
    """Return what a serialised engine of TensorRT for RTX says about itself.

    Args:
        plan: The engine, without the metadata before it.
        name: What messages call the file.
        tensors: Names of inputs and outputs to look for.

    Returns:
        ``tensorrt`` (version), ``compute_capability`` (joined by commas if there are several), ``tensors`` (name ->
        ``shape``, ``dtype``), ``weight_bytes`` (by type), ``kernels`` (number by kind).

    Raises:
        ModelError: It is damaged, truncated, or of another version than 1.7.
    """
    if len(plan) < HEADER_BYTES or plan[:4] != MAGIC or plan[28:32] != MAGIC:
        raise ModelError(f"{name}: holds no engine of TensorRT for RTX; export it again")
    (length,) = struct.unpack_from("<Q", plan, 16)
    if length != len(plan):
        raise ModelError(
            f"{name}: the engine in it has {len(plan)} bytes of {length}; it is truncated, export it again"
        )
    version = tuple(plan[24:28])
    if version[:2] != KNOWN:
        raise ModelError(
            f"{name}: is of TensorRT for RTX {'.'.join(map(str, version))}; without a GPU only those of "
            f"{'.'.join(map(str, KNOWN))} can be inspected"
        )
    (mask,) = struct.unpack_from("<I", plan, 32)
    found, weights = _scan(plan, tensors)
    return {
        "tensorrt": ".".join(map(str, version)),
        "compute_capability": ",".join(key for key, bit in CAPABILITY_BITS.items() if mask & bit),
        "tensors": found,
        "weight_bytes": weights,
        "kernels": dict(Counter(kind.decode() for kind in _KERNEL.findall(plan))),
    }


def is_readable(version: str) -> bool:
    """Return whether ``read_plan`` knows the layout of a version such as ``1.7.1.116``."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) == KNOWN


def _freed(found: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return what was found with a batch free again that the graph leaves free and the profile holds at one value.

    The builder makes a number of such a length.
    """
    profile = own.get("profile")
    if not profile or profile["min"][0] != profile["max"][0]:
        return found
    result = dict(found)
    for kind in ("inputs", "outputs"):
        result[kind] = {}
        for name, tensor in found[kind].items():
            first, *rest = tensor["shape"]
            free = own[kind].get(name, tensor)["shape"][0] == -1 and first == profile["max"][0]
            result[kind][name] = {**tensor, "shape": [-1 if free else first, *rest]}
    return result


def _scan(plan: bytes, tensors: list[str]) -> tuple[dict[str, Any], dict[str, int]]:
    """Return shape and type of these tensors, and the bytes of the weights by type."""
    found: dict[str, Any] = {}
    weights: Counter[str] = Counter()
    for text, kind in _TENSOR.findall(plan):
        dtype = TYPES.get(kind, kind.decode("ascii", "replace"))
        label = _NAME.search(text)
        # The compiler numbers the tensors of the network: images.1
        key = label[1].decode("utf-8", "replace").rsplit(".", 1)[0] if label else ""
        dims = _DIMS.search(text)
        if key in tensors and dims:
            # A free dimension has a name instead of a number.
            shape = [int(item) if item.isdigit() else -1 for item in dims[1].decode("ascii", "replace").split()]
            found.setdefault(key, {"shape": shape, "dtype": dtype})
        size = _BYTES.search(text)
        if size:
            weights[dtype] += int(size[1])
    return found, dict(weights)


def _read(path: Path, own: dict[str, Any], plan: bytes) -> dict[str, Any]:
    """Return what the file says."""
    names = {kind: list(own[kind]) for kind in ("inputs", "outputs")}
    read = read_plan(plan, str(path), names["inputs"] + names["outputs"])
    absent = [name for kind in names.values() for name in kind if name not in read["tensors"]]
    if absent:
        raise ModelError(f"{path}: the engine in it has no input or output {', '.join(absent)}; export it again")
    return {
        "tensorrt": read["tensorrt"],
        "compute_capability": read["compute_capability"],
        "precision": _precision(read["weight_bytes"]),
        **{kind: {name: read["tensors"][name] for name in found} for kind, found in names.items()},
        "weight_bytes": read["weight_bytes"],
        "kernels": read["kernels"],
        "by": "file",
    }


def _precision(weight_bytes: dict[str, int]) -> str:
    """Return the precision of an engine: int8 if there are such weights, however many layers stay in float."""
    if weight_bytes.get("int8"):
        return "int8"
    return "fp16" if weight_bytes.get("float16", 0) > weight_bytes.get("float32", 0) else "fp32"


def _capability_here() -> str:
    return ".".join(map(str, torch.cuda.get_device_capability()))


def _asked(path: Path, own: dict[str, Any], plan: bytes) -> dict[str, Any]:
    """Return what the runtime says."""
    trt = load_package(str(own["runtime"]), str(path))
    engine, _keep = deserialize(trt, plan, path)
    tensors: dict[str, dict[str, Any]] = {"inputs": {}, "outputs": {}}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = "inputs" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "outputs"
        dtype = dtype_name(engine.get_tensor_dtype(name))
        tensors[kind][name] = {"shape": list(engine.get_tensor_shape(name)), "dtype": dtype}
    return {
        "tensorrt": str(trt.__version__),
        "compute_capability": own["compute_capability"],
        "precision": own.get("precision"),
        **tensors,
        "weight_bytes": None,
        "kernels": None,
        "by": "runtime",
    }
