"""Write an edge bundle of an anomaly model: it finds anomalies with only numpy, OpenCV and ONNX Runtime."""

from __future__ import annotations

import datetime
import importlib.metadata
import shutil
import string
from importlib.resources import files
from pathlib import Path
from typing import Any

from kd_yolo.errors import ModelError
from kd_yolo.files import sha256, size_mb, write_json, write_text
from kd_yolo.provenance import versions
from kd_yolo.runtimes import Description, describe
from kd_yolo.runtimes.anomaly_session import Thresholds, thresholds_in

MODEL, METADATA = "model.onnx", "metadata.json"
SOURCES = {"detect.py": "anomaly_detect.py", "README.md": "anomaly_README.md", "requirements.txt": "requirements.txt"}
"""Files of a bundle, and what they are made of."""
LAYOUT = 1  # of metadata.json; higher when a reader of the old one would misread the new one


def write_anomaly_bundle(onnx_file: Path, folder: Path) -> list[Path]:
    """Write the edge bundle of an exported anomaly model.

    Args:
        onnx_file: A file that ``export_anomaly`` wrote; what it says about itself goes into the bundle.
        folder: Where to write; created when it is not there.

    Returns:
        The files, sorted: ``README.md``, ``detect.py``, ``metadata.json``, ``model.onnx``, ``requirements.txt``.

    Raises:
        ModelError: The file is damaged, no ONNX file, or no anomaly model.
        OSError: The folder cannot be written to.
    """
    description = describe(onnx_file, task="anomaly")
    if description.format != "onnx":
        raise ModelError(f"{onnx_file}: a bundle is made of an ONNX file, not of {description.format}")
    told = thresholds_in(description, onnx_file)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(onnx_file, folder / MODEL)
    metadata = _metadata(folder / MODEL, description, told)
    write_json(folder / METADATA, metadata)
    templates = files("kd_yolo.export") / "bundle_files"
    words = _words(metadata, folder / MODEL)
    for name, source in SOURCES.items():
        text = (templates / source).read_text(encoding="utf-8")
        write_text(folder / name, string.Template(text).substitute(words) if name.endswith(".md") else text)
    return sorted(folder / name for name in (MODEL, METADATA, *SOURCES))


def _metadata(model: Path, description: Description, told: Thresholds) -> dict[str, Any]:
    """Return what ``detect.py`` needs to know, and where the model came from."""
    return {
        "bundle": LAYOUT,
        "task": description.task,
        "names": {str(key): name for key, name in sorted(description.names.items())},
        "canvas": list(description.canvas),
        "stride": description.stride,
        "batch": 1 if description.dynamic else description.batch,
        "dynamic": description.dynamic,
        "precision": description.precision,
        "anomaly": told.to_dict(),
        "model_sha256": sha256(model),
        "source_sha256": description.own.get("source_sha256"),
        "versions": {**versions(), "onnxruntime": importlib.metadata.version("onnxruntime")},
        "created": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _words(metadata: dict[str, Any], model: Path) -> dict[str, str]:
    """Return what the README's template leaves open."""
    height, width = metadata["canvas"]
    told = metadata["anomaly"]
    kinds = {"max": "the largest value", "topk": f"the mean of the largest {told['top_fraction']:.3%} of the values"}
    return {
        "canvas": f"{height}x{width}",
        "precision": metadata["precision"],
        "size_mb": f"{size_mb(model):.2f}",
        "threshold_image": f"{told['threshold_image']:.6g}",
        "threshold_pixel": f"{told['threshold_pixel']:.6g}",
        "score": kinds[told["score"]],
        "model_sha256": metadata["model_sha256"],
        "created": metadata["created"],
        "kd_yolo": metadata["versions"]["kd_yolo"],
    }
