"""Where a cache keeps its records: memory or a folder, each within a size limit. A record is a few named tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from ultralytics.utils import LOGGER

from kd_yolo.errors import OutputError, TeacherError
from kd_yolo.files import write_json, written_aside
from kd_yolo.resources import load_yaml

Record = dict[str, Tensor]
HEADER = "teacher-cache.json"
SUFFIX = ".taps"
DIGEST_BYTES = 16
LENGTH_BYTES = 4
# Largest difference between a stored value and the live one: beyond it a tensor is stored in float32.
TOLERANCE = 1e-3


class Store(Protocol):
    """What a cache needs of a place to keep records."""

    def get(self, key: str) -> Record | None:
        """Return a record, or None."""

    def put(self, key: str, record: Record) -> None:
        """Keep a record, unless the store is full."""


class RamStore:
    """Records in the memory of this process."""

    def __init__(self, limit_gb: float) -> None:
        """Start empty; ``limit_gb`` is in 10^9 bytes."""
        self.budget = _Budget(limit_gb, "teacher cache in memory")
        self.records: dict[str, Record] = {}

    def get(self, key: str) -> Record | None:
        """Return a record, or None."""
        return self.records.get(key)

    def put(self, key: str, record: Record) -> None:
        """Keep a record, unless the store is full."""
        if self.budget.take(sum(x.numel() * x.element_size() for x in record.values())):
            self.records[key] = record


class DiskStore:
    """Records as files of one folder, each with a checksum; safe to share between processes and to stop at any time."""

    def __init__(self, folder: Path, limit_gb: float, identity: Mapping[str, Any], share: int = 1) -> None:
        """Open a folder of the same teacher, or start one.

        Args:
            folder: The cache's own folder.
            limit_gb: Size limit of the folder, 10^9 bytes.
            identity: Plain data: what the records depend on.
            share: Processes that fill the folder at the same time; each takes its part of what is left.

        Raises:
            TeacherError: The folder belongs to another teacher, or is no cache.
            OutputError: It cannot be written.
        """
        self.folder = folder
        _check_identity(folder, identity)
        used = sum(file.stat().st_size for file in folder.rglob(f"*{SUFFIX}"))
        self.budget = _Budget((limit_gb - used / 1e9) / share, f"teacher cache {folder}")

    def get(self, key: str) -> Record | None:
        """Return a record, or None; a damaged file counts as none, with a warning."""
        file = self._file(key)
        try:
            return decode(file.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            LOGGER.warning(f"{file}: damaged ({error}); the teacher is asked again")
            return None

    def put(self, key: str, record: Record) -> None:
        """Write a record, unless the store is full; a disk that takes no more ends the filling, not the training."""
        content = encode(record)
        if not self.budget.take(len(content)):
            return
        try:
            with written_aside(self._file(key)) as aside:
                aside.write_bytes(content)
        except OutputError as error:
            LOGGER.warning(f"teacher cache: {error}; nothing more is added")
            self.budget.full = True

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{SUFFIX}"


def encode(record: Record) -> bytes:
    """Return a record as bytes: checksum, length of the table of contents, table, values."""
    table = [[name, str(x.dtype).removeprefix("torch."), list(x.shape)] for name, x in record.items()]
    head = json.dumps(table).encode()
    body = b"".join(x.contiguous().numpy().tobytes() for x in record.values())
    payload = len(head).to_bytes(LENGTH_BYTES, "little") + head + body
    return _digest(payload) + payload


def decode(content: bytes) -> Record:
    """Return the record that ``encode`` wrote.

    Raises:
        ValueError: The checksum is wrong.
    """
    digest, payload = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if _digest(payload) != digest:
        raise ValueError("its checksum is wrong")
    start = LENGTH_BYTES + int.from_bytes(payload[:LENGTH_BYTES], "little")
    record = {}
    for name, kind, shape in json.loads(payload[LENGTH_BYTES:start]):
        values = np.frombuffer(payload, np.dtype(kind), int(np.prod(shape)), start)
        record[name] = torch.from_numpy(values.reshape(shape).copy())
        start += values.nbytes
    return record


def compact(values: Tensor) -> Tensor:
    """Return a copy on the CPU in float16 when that is within ``TOLERANCE`` everywhere, otherwise in float32."""
    single = values.detach().float().cpu()
    half = single.half()
    close = bool(((half.float() - single).abs() <= TOLERANCE).all())
    return half.clone() if close else single.clone()


class _Budget:
    """Bytes that may still be added; says once that there are none left."""

    def __init__(self, limit_gb: float, name: str) -> None:
        self.left = limit_gb * 1e9
        self.limit_gb, self.name, self.full = limit_gb, name, False

    def take(self, count: int) -> bool:
        if self.full:
            return False
        if count > self.left:
            self.full = True
            LOGGER.info(f"{self.name}: full; images that are not in it are answered live (raise cache_gb for more)")
            return False
        self.left -= count
        return True


def _check_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    """Compare a folder's header with who wants to use it; write one into a new folder.

    Raises:
        TeacherError: As ``DiskStore``.
    """
    header = folder / HEADER
    remedy = "delete the folder, or give another with cache_dir=FOLDER"
    if header.is_file():
        found = load_yaml(header)  # JSON is YAML
        different = [key for key, value in identity.items() if found.get(key) != value]
        if different:
            raise TeacherError(f"{folder}: a cache from another teacher ({', '.join(different)} differ); {remedy}")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TeacherError(f"{folder}: is in use and no teacher cache; {remedy}")
    else:
        write_json(header, dict(identity))


def _digest(payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=DIGEST_BYTES).digest()
