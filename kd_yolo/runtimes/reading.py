"""Read what exported files say about themselves, without their runtimes and without loading their weights."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from kd_yolo.errors import ConfigError, ModelError
from kd_yolo.resources import load_yaml

METADATA_FILE = "metadata.yaml"
# Field numbers of onnx.proto: ModelProto.graph and .metadata_props, StringStringEntryProto.key and .value.
GRAPH, METADATA_PROPS, KEY, VALUE = 7, 14, 1, 2
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
METADATA_MB = 16  # far above any real entry: a damaged length must not fill the memory


def check_file(path: Path, part_of: Path | None = None) -> Path:
    """Return a file that is there, readable and not empty.

    Args:
        path: The file.
        part_of: The folder that messages name first, when the file is one of its parts.

    Raises:
        ModelError: It is not.
    """
    name = path if part_of is None else f"{part_of}: its {path.name}"
    if not path.is_file():
        if part_of is not None:
            raise ModelError(f"{part_of}: its file {path.name} is missing; copy the whole folder, or export it again")
        raise ModelError(f"{path}: no such file")
    try:
        size = path.stat().st_size
        with path.open("rb"):
            pass
    except OSError as error:
        raise ModelError(f"{name} cannot be read ({error.strerror}); check its permissions") from error
    if size == 0:
        raise ModelError(f"{name} is empty; copy it again, or export it again")
    return path


def folder_file(path: Path, pattern: str) -> Path:
    """Return the one file of a model folder, or ``path`` itself when it is that file.

    Args:
        path: The folder, or the file in it.
        pattern: Of the file's name, for example ``*.xml``.

    Raises:
        ModelError: The folder holds no such file, or several.
    """
    if path.is_file():
        return check_file(path)
    found = sorted(path.glob(pattern))
    if len(found) != 1:
        what = f"{len(found)} files {pattern}" if found else f"no file {pattern}"
        raise ModelError(f"{path}: holds {what}, exactly one is needed; export it again into a folder of its own")
    return check_file(found[0], path)


def yaml_metadata(folder: Path) -> dict[str, Any]:
    """Read the ``metadata.yaml`` of a model folder.

    Raises:
        ModelError: It is missing, empty or damaged.
    """
    file = check_file(folder / METADATA_FILE, folder)
    try:
        return load_yaml(file)
    except ConfigError as error:
        raise ModelError(f"{error} (it is part of an exported model: export it again)") from error


def torchscript_metadata(path: Path) -> dict[str, Any]:
    """Read the ``config.txt`` that Ultralytics stores beside the graph of a TorchScript file.

    Raises:
        ModelError: The file is no TorchScript archive, is truncated or damaged, or has no such entry.
    """
    check_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # PyTorch does not look at the checksums
            if broken is not None:
                raise zipfile.BadZipFile(f"the checksum of {broken} is wrong")
            entry = next((name for name in archive.namelist() if name.endswith("extra/config.txt")), None)
            content = json.loads(archive.read(entry)) if entry else {}
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise ModelError(f"{path}: truncated, or not a TorchScript file ({error}); export it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: its metadata is damaged (a {type(content).__name__}); export it again")
    return content


def onnx_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of an ONNX file by walking over its outermost fields; the graph is skipped, not read.

    The encoding is that of Protocol Buffers (developers, "Encoding"): a sequence of (field number << 3 | wire type),
    then the value; field numbers are those of onnx.proto.

    Raises:
        ModelError: The file is empty, truncated, or no ONNX file.
    """
    check_file(path)
    size = path.stat().st_size
    metadata: dict[str, str] = {}
    has_graph = False
    try:
        with path.open("rb") as stream:
            while stream.tell() < size:
                field, length = _field(stream, size)
                has_graph = has_graph or (field == GRAPH and length > 0)
                if field == METADATA_PROPS and length < METADATA_MB * 2**20:
                    key, value = _entry(stream, length)
                    metadata[key] = value
                else:
                    stream.seek(length, 1)
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: truncated, or not an ONNX file ({error}); export it again") from error
    if not has_graph:
        raise ModelError(f"{path}: is not an ONNX file (it has no graph); export it again")
    return metadata


def _field(stream: BinaryIO, end: int) -> tuple[int, int]:
    """Return the number of the field that starts here and how many bytes its value has left."""
    tag = _varint(stream)
    number, wire = tag >> 3, tag & 7
    if number == 0 or wire not in {VARINT, FIXED64, BYTES, FIXED32}:
        raise ValueError(f"byte {stream.tell()} is no field of it")
    if wire == VARINT:
        _varint(stream)
        return number, 0
    length = {FIXED64: 8, FIXED32: 4}.get(wire) or (_varint(stream) if wire == BYTES else 0)
    if stream.tell() + length > end:
        raise ValueError(f"{stream.tell() + length - end} bytes are missing at its end")
    return number, length


def _entry(stream: BinaryIO, length: int) -> tuple[str, str]:
    """Read a key and its value."""
    end = stream.tell() + length
    parts = {KEY: "", VALUE: ""}
    while stream.tell() < end:
        number, size = _field(stream, end)
        content = stream.read(size)
        if number in parts:
            parts[number] = content.decode()
    return parts[KEY], parts[VALUE]


def _varint(stream: BinaryIO) -> int:
    """Read a number of seven bits a byte, least significant first, the top bit set on all but the last."""
    value = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            raise ValueError("it ends in the middle of a number")
        value |= (byte[0] & 0x7F) << shift
        if not byte[0] & 0x80:
            return value
    raise ValueError(f"byte {stream.tell()} is no number")
