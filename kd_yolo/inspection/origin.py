"""What an anomaly model was trained on, as far as its file or its run folder says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_yolo.anomaly.checkpoint import is_anomaly, load_anomaly
from kd_yolo.errors import CheckpointError, KDYoloError
from kd_yolo.resources import load_yaml
from kd_yolo.runtimes.anomaly_session import is_anomaly_file

RESULT, PLAN = "result.json", "run.yaml"
BEST = Path("weights") / "best.pt"


@dataclass(frozen=True)
class Origin:
    """Training data of a model; None where it is not known.

    Attributes:
        data: As the user wrote it: a built-in name, a YAML file or a folder.
        category: Its category.
    """

    data: str | None = None
    category: str | None = None


def origin_of(path: Path) -> Origin:
    """Return what a checkpoint or exported file was trained on: from the file, else from the run folder it lies in.

    Args:
        path: ``RUN/weights/best.pt``, or any other place.
    """
    extra: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    if is_anomaly(path):
        content = load_anomaly(path)[1]
        extra, arguments = content.get("extra") or {}, content.get("train_args") or {}
    data, category = arguments.get("data"), extra.get("category")
    if category is None and path.parent.name == "weights":
        category = _beside(path.parent.parent)
    return Origin(None if data is None else str(data), None if category is None else str(category))


def is_anomaly_model(path: str | Path) -> bool:
    """Return whether a path is an anomaly checkpoint, its export, or the folder of a run that left some; never raises.

    Args:
        path: What the user gave as ``model``.
    """
    place = Path(path).expanduser()
    if is_anomaly_file(place):
        return True
    try:
        return place.is_dir() and any(is_anomaly(file) for file in run_checkpoints(place).values())
    except OSError:
        return False


def run_checkpoints(folder: Path) -> dict[str, Path]:
    """Return the best checkpoints in a run folder: its own under an empty name, else those of its categories."""
    if (folder / BEST).is_file():
        return {"": folder / BEST}
    return {file.parents[1].name: file for file in sorted(folder.glob(f"*/{BEST}"))}


def checkpoint_of(given: str | Path, key: str) -> Path:
    """Return the file that ``model=`` or ``anomaly=`` means: itself, or the best checkpoint of a run's folder.

    Raises:
        CheckpointError: The folder holds a run of several categories.
    """
    place = Path(given).expanduser()
    found = run_checkpoints(place) if place.is_dir() else {}
    if not found:
        return place
    if "" not in found:
        raise CheckpointError(f"{key}={given}: holds models of {', '.join(found)}; give {given}/{min(found)}/{BEST}")
    return found[""]


def _beside(folder: Path) -> Any:
    """Return the category that a run folder names."""
    for name in (RESULT, PLAN):
        try:
            content = load_yaml(folder / name) if (folder / name).is_file() else {}  # JSON is YAML
        except KDYoloError:
            continue
        several = content.get("categories")
        found = content.get("category", several[0] if isinstance(several, list) and len(several) == 1 else None)
        if found is not None:
            return found
    return None
