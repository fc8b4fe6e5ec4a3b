"""The metadata that Ultralytics and kd-yolo write before a TensorRT engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kd_yolo.errors import ModelError
from kd_yolo.runtimes.base import METADATA_KEY
from kd_yolo.runtimes.reading import check_file

MAX_HEADER_BYTES = 1 << 24


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Read the header that Ultralytics and kd-yolo write before an engine: length (4 bytes, little-endian), JSON.

    Args:
        path: An ``.engine`` file.

    Returns:
        Offset of the engine in bytes, and the metadata; ``kd_yolo`` in it is a mapping where it is there at all.

    Raises:
        ModelError: The file cannot be read, does not begin with such a header, or ends with it.
    """
    check_file(path)
    try:
        with path.open("rb") as stream:
            size = path.stat().st_size
            length = int.from_bytes(stream.read(4), "little")
            if not 2 <= length <= min(size - 4, MAX_HEADER_BYTES):
                raise ValueError("its length is wrong")
            metadata = json.loads(stream.read(length).decode())
        own = metadata.get(METADATA_KEY)
        own = json.loads(own) if isinstance(own, str) else own
        if own is not None and not isinstance(own, dict):
            raise ValueError(f"{METADATA_KEY} is no mapping")
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, AttributeError) as error:  # of the decoding, of JSON, or of what is no mapping
        raise ModelError(
            f"{path}: no metadata stands before the engine ({error}); it is damaged, or neither kd-yolo nor "
            "Ultralytics exported it; export it again"
        ) from error
    if 4 + length == size:
        raise ModelError(f"{path}: ends after its metadata, the engine itself is missing; export it again")
    return 4 + length, metadata if own is None else {**metadata, METADATA_KEY: own}
