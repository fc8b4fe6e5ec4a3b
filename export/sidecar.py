"""The ``metadata.yaml`` that OpenVINO and ncnn folders carry, with our entry in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from kd_yolo.export.job import QUANTIZE

from kd_yolo.runtimes.base import METADATA_KEY

NAME = "metadata.yaml"


def write_sidecar(folder: Path, metadata: dict[str, Any], own: dict[str, Any], precision: str) -> None:
    """Write the metadata of a folder.

    Args:
        folder: The exported folder.
        metadata: Ultralytics' metadata.
        own: Our entry.
        precision: ``fp32``, ``fp16`` or ``int8``.
    """
    arguments = {**(metadata.get("args") or {}), "quantize": QUANTIZE[precision]}
    content = {**metadata, "args": arguments, METADATA_KEY: own}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    (folder / NAME).write_text(text, encoding="utf-8")


def read_sidecar(folder: Path) -> dict[str, Any]:
    """Return the metadata that Ultralytics' exporter wrote into a folder."""
    content: dict[str, Any] = yaml.safe_load((folder / NAME).read_text(encoding="utf-8"))
    return content
