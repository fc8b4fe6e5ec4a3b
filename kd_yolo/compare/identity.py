"""The content address of a run: one hash over everything that determines what it learns.

Two runs with one address are the same run: a comparison finds it done wherever it was trained. File names, folders,
devices' numbers and what only decides how a run is watched do not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kd_yolo
from kd_yolo.config import TrainConfig, stock_keys
from kd_yolo.data.datayaml import label_path, load_data_yaml
from kd_yolo.data.layout import IMAGE_SUFFIXES, files_under
from kd_yolo.files import sha256
from kd_yolo.nn.student import StudentSpec

VERSION = 1
SHOWN = 10
# Stock arguments that decide where and how a run is watched, not what it learns.
UNIMPORTANT = {"project", "name", "exist_ok", "verbose", "plots", "save_period", "mode", "task", "model", "data"}
UNIMPORTANT |= {"pretrained", "resume", "save_dir", "device", "val", "save", "profile", "distill_model"}
OPTIONS = (
    "teacher_merge",
    "teacher_imgsz",
    "teacher_levels",
    "teacher_views",
    "unlabeled_ratio",
    "pseudo",
    "pseudo_conf",
    "pseudo_weight",
    "cache_teacher",
)


def address_of(
    student: StudentSpec,
    method: Mapping[str, Any],
    stock: Mapping[str, Any],
    data: str,
    teacher: Any = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """Return the content address of a run, 64 hexadecimal digits.

    Args:
        student: Structure and warm start.
        method: The method with all its arguments, as ``resolve_method`` returns it.
        stock: Stock training arguments, with ``seed`` and ``imgsz``.
        data: Fingerprint of the data set.
        teacher: Hashes of the teachers' files, or the address of the run that trains it, or None.
        options: Further keys of ``kd-yolo train``.
    """
    defaults = stock_keys()
    given = {k: v for k, v in stock.items() if k not in UNIMPORTANT and not (k in defaults and defaults[k] == v)}
    given |= {"imgsz": stock.get("imgsz"), "seed": stock.get("seed"), "device": device_kind(stock.get("device"))}
    distilled = method["name"] != "none"
    content = {
        "address": VERSION,
        "versions": {"kd_yolo": kd_yolo.__version__, "ultralytics": version("ultralytics")},
        "structure": {key: value for key, value in student.cfg.items() if key not in {"yaml_file", "nc", "ch"}},
        "warm_start": sha256(student.weights) if student.weights else None,
        "method": method,
        "teacher": teacher if distilled else None,
        "options": _options(options or {}) if distilled else {},
        "stock": given,
        "data": data,
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def data_fingerprint(yaml: Path) -> str:
    """Return a digest of what a data set trains and validates on, wherever it lies.

    Class names, names and sizes of the images of train and val, and the content of their labels.

    Raises:
        ConfigError: The YAML is malformed.
        DataError: Its images are not there.
    """
    data = load_data_yaml(yaml)
    digest = hashlib.sha256(json.dumps([data.names, _plain(data.extra)], sort_keys=True, default=str).encode())
    for split in ("train", "val"):
        digest.update(f"\n{split}\n".encode())
        for image in data.images(split):
            labels = label_path(image)
            name = image.relative_to(data.path) if image.is_relative_to(data.path) else Path(image.name)
            content = hashlib.sha256(labels.read_bytes()).hexdigest() if labels.is_file() else "-"
            digest.update(f"{name.as_posix()}\t{image.stat().st_size}\t{content}\n".encode())
    return digest.hexdigest()


def folder_fingerprint(folder: Path) -> str:
    """Return a digest of the names and sizes of the images in a folder."""
    digest = hashlib.sha256()
    for image in sorted(files_under(folder, IMAGE_SUFFIXES)):
        digest.update(f"{image.relative_to(folder).as_posix()}\t{image.stat().st_size}\n".encode())
    return digest.hexdigest()


def device_kind(device: Any) -> str:
    """Return ``cpu``, ``mps`` or ``cuda``: which of several equal GPUs it is does not matter."""
    name = "cpu" if device is None else str(device).strip().lower()
    return name if name in {"cpu", "mps"} else "cuda"


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that differ from what they are when left out, folders by what is in them."""
    fields = TrainConfig.model_fields
    chosen = {key: options[key] for key in OPTIONS if key in options and options[key] != fields[key].default}
    if options.get("unlabeled"):
        chosen["unlabeled"] = folder_fingerprint(Path(str(options["unlabeled"])))
    return chosen


def _plain(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the user's own keys without what a converter writes about itself."""
    return {key: value for key, value in extra.items() if key in {"channels", "kpt_shape", "imgsz"}}
