"""Small exported files, as Ultralytics' own exporter writes them, and what breaks them."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import onnx
import pytest
from detector_factory import save_checkpoint, tiny_detector
from torch import Tensor
from ultralytics import YOLO

from kd_yolo.images import textured_images, to_canvas


def export_tiny(folder: Path, format: str, **keys: Any) -> Path:
    """Export a plain tiny detector of three classes at 64 pixels; return the file or folder."""
    checkpoint = save_checkpoint(tiny_detector(form=None), folder / "best.pt")
    return Path(YOLO(checkpoint).export(**{"imgsz": 64, "format": format, "verbose": False, **keys}))


@functools.cache
def exported(format: str) -> Path:
    """Return the tiny detector in a format, made once for all tests, not to be changed; or skip."""
    for package in {"ncnn": ("ncnn", "pnnx"), "openvino": ("openvino",), "onnx": ("onnxruntime",)}.get(format, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return export_tiny(Path(_folder().name) / format, format)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="kd-yolo-exported-")


def reference(pixels: Tensor, nms: bool = True) -> Tensor:
    """Return what the detector of ``export_tiny`` says."""
    model: Any = tiny_detector(form=None)
    model.end2end = not nms
    output: Tensor = model(pixels)[0].detach()
    return output


def photographs(count: int, canvas: tuple[int, int] = (64, 64)) -> Tensor:
    """Return (count, 3, H, W) images that differ from each other."""
    return to_canvas(textured_images(count, canvas, seed=7), canvas)


def copied(path: Path, folder: Path) -> Path:
    """Copy an exported file or folder, to be damaged."""
    target = folder / path.name
    if path.is_dir():
        shutil.copytree(path, target)
    else:
        shutil.copy(path, target)
    return target


def with_metadata(path: Path, target: Path, **entries: Any) -> Path:
    """Copy an ONNX file with other metadata entries; None takes one away."""
    model = onnx.load(path)
    kept = {entry.key: entry.value for entry in model.metadata_props}
    kept |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in entries.items()}
    del model.metadata_props[:]
    for key, value in kept.items():
        if entries.get(key, "") is not None:
            model.metadata_props.add(key=key, value=value)
    onnx.save(model, target)
    return target
