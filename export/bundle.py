"""Write an edge bundle: a folder that detects on a machine with only numpy, OpenCV and ONNX Runtime."""

from __future__ import annotations

import datetime
import importlib.metadata
import shutil
import string
from importlib.resources import files
from pathlib import Path
from typing import Any

from kd_yolo.errors import ConfigError, ModelError
from kd_yolo.files import sha256, size_mb, write_json, write_text
from kd_yolo.inference import CONFIDENCE, NMS_IOU
from kd_yolo.provenance import versions
from kd_yolo.runtimes import Description, describe

MODEL, METADATA, LABELS = "model.onnx", "metadata.json", "labels.txt"
COPIED = ("detect.py", "detector.py", "requirements.txt")
HEADS = ("nms", "nms-free", "nms inside")
LAYOUT = 1  # of metadata.json; higher when a reader of the old one would misread the new one


def write_bundle(onnx_file: Path, folder: Path) -> list[Path]:
    """Write the edge bundle of an exported ONNX file.

    Args:
        onnx_file: A file that ``export`` wrote; what it says about itself goes into the bundle.
        folder: Where to write; created when it is not there. Made for a folder that is renamed when all is proven: see
            ``kd_yolo.files.folder_aside``.

    Returns:
        The files, sorted: ``README.md``, ``detect.py``, ``detector.py``, ``labels.txt``, ``metadata.json``,
        ``model.onnx``, ``requirements.txt``.

    Raises:
        ModelError: The file is damaged or no detector.
        ConfigError: Its images have neither one nor three channels.
        BackendMissingError: ONNX Runtime is missing.
        OSError: The folder cannot be written to.
    """
    description = describe(onnx_file)
    if description.format != "onnx":
        raise ModelError(f"{onnx_file}: a bundle is made of an ONNX file, not of {description.format}")
    if description.channels not in {1, 3}:
        raise ConfigError(
            f"{onnx_file}: reads {description.channels} channels; a bundle takes color (3) or grey (1) images"
        )
    if description.head not in HEADS:
        raise ModelError(f"{onnx_file}: unknown head '{description.head}' (known: {', '.join(HEADS)}); export it again")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(onnx_file, folder / MODEL)
    metadata = _metadata(folder / MODEL, description)
    write_json(folder / METADATA, metadata)
    write_text(folder / LABELS, "".join(f"{name}\n" for name in _labels(description.names)))
    templates = files("kd_yolo.export") / "bundle_files"
    for name in COPIED:
        write_text(folder / name, (templates / name).read_text(encoding="utf-8"))
    template = string.Template((templates / "README.md").read_text(encoding="utf-8"))
    write_text(folder / "README.md", template.substitute(_words(metadata, folder / MODEL)))
    names = (MODEL, METADATA, LABELS, "README.md", *COPIED)
    return sorted(folder / name for name in names)


def _metadata(model: Path, description: Description) -> dict[str, Any]:
    """Return what ``detector.py`` needs to know, and where the model came from."""
    own = description.own
    return {
        "bundle": LAYOUT,
        "names": {str(key): name for key, name in sorted(description.names.items())},
        "canvas": list(description.canvas),
        "channels": description.channels,
        "stride": description.stride,
        "batch": 1 if description.dynamic else description.batch,
        "dynamic": description.dynamic,
        "precision": description.precision,
        "head": description.head,
        "confidence": CONFIDENCE,
        "iou": NMS_IOU,
        "model_sha256": sha256(model),
        "source_sha256": own.get("source_sha256"),
        "recipe_sha256": own.get("recipe_sha256"),
        "versions": {**versions(), "onnxruntime": importlib.metadata.version("onnxruntime")},
        "created": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _labels(names: dict[int, str]) -> list[str]:
    """Return one line for every class up to the last, so that line numbers are class numbers."""
    return [" ".join(names.get(key, "").split()) for key in range(max(names, default=-1) + 1)]


def _words(metadata: dict[str, Any], model: Path) -> dict[str, str]:
    """Return what the README's template leaves open."""
    height, width = metadata["canvas"]
    fixed = metadata["head"] == "nms inside"
    return {
        "classes": ", ".join(_labels({int(key): name for key, name in metadata["names"].items()})),
        "canvas": f"{height}x{width}",
        "pixels": "grey" if metadata["channels"] == 1 else "color",
        "precision": metadata["precision"],
        "size_mb": f"{size_mb(model):.2f}",
        "confidence": f"{metadata['confidence']:g}"
        + (", built into the model: it can only be raised" if fixed else ""),
        "iou": f"{metadata['iou']:g}" + (", built into the model: it cannot be changed" if fixed else ""),
        "model_sha256": metadata["model_sha256"],
        "created": metadata["created"],
        "kd_yolo": metadata["versions"]["kd_yolo"],
    }
