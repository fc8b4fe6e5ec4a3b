"""Engine files with whatever metadata and content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kd_yolo

VERSION = "10.13.3.9"
METADATA: dict[str, Any] = {
    "names": {0: "scratch", 1: "dent", 2: "stain"},
    "stride": 32,
    "imgsz": [64, 64],
    "batch": 1,
    "channels": 3,
    "task": "detect",
    "end2end": False,
    "args": {"dynamic": False},
    "kd_yolo": {
        "version": kd_yolo.__version__,
        "source_sha256": "0" * 64,
        "precision": "fp32",
        "runtime": "tensorrt",
        "tensorrt": VERSION,
        "compute_capability": "8.6",
    },
}


def write(path: Path, metadata: Any, plan: bytes = b"engine") -> Path:
    header = json.dumps(metadata).encode()
    path.write_bytes(len(header).to_bytes(4, "little") + header + plan)
    return path


def changed(own: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    return METADATA | keys | {"kd_yolo": METADATA["kd_yolo"] | (own or {})}
