"""Where a file came from: versions, the recipe of its run, and the classes it refers to."""

from __future__ import annotations

import pickletools
import platform
import zipfile
from pathlib import Path
from typing import Any

import torch
import ultralytics

import kd_yolo
from kd_yolo.resources import load_yaml

STOCK_PACKAGES = ("ultralytics", "torch", "collections", "builtins", "__builtin__", "pathlib")


def versions() -> dict[str, str]:
    """Return the versions of what computes a detector."""
    return {
        "kd_yolo": kd_yolo.__version__,
        "ultralytics": ultralytics.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def head_name(nms: bool) -> str:
    """Return what reports call a head branch."""
    return "nms" if nms else "nms-free"


def find_recipe(model_path: Path, checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """Return the distillation recipe of the run that a checkpoint belongs to, or None.

    Looked for in the run folder, then where the run recorded it.

    Raises:
        ConfigError: The file is there but is not a YAML mapping.
    """
    run = model_path.parent.parent if model_path.parent.name == "weights" else model_path.parent
    recorded = (checkpoint.get("train_args") or {}).get("distill_model")
    for candidate in (run / "recipe.yaml", Path(str(recorded)) if recorded else None):
        if candidate is not None and candidate.suffix in {".yaml", ".yml"} and candidate.is_file():
            content = load_yaml(candidate)
            if "kd_yolo" in content:
                return content
    return None


def foreign_to_stock(path: Path) -> list[str]:
    """Return the classes and functions that a checkpoint refers to beyond Ultralytics, PyTorch and Python's own.

    Reads the opcodes of a file that ``torch.save`` wrote (pickle protocol 2); nothing is loaded.
    """
    with zipfile.ZipFile(path) as archive:
        pickles = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    names = {
        str(argument).replace(" ", ".")
        for content in pickles
        for opcode, argument, _ in pickletools.genops(content)
        if opcode.name == "GLOBAL"
    }
    return sorted(name for name in names if name.split(".")[0] not in STOCK_PACKAGES)
