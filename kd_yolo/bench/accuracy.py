"""mAP of an artifact, on the canvas it is timed on."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultralytics import YOLO

from kd_yolo.bench.runners import Runner, TorchRunner
from kd_yolo.checkpoints import serialize
from kd_yolo.errors import ConfigError, DataError
from kd_yolo.images import dataset_files, dataset_names

BATCH = 16  # does not change the result; an exported file with a fixed batch is fed in portions


@dataclass(frozen=True)
class Accuracy:
    """Detection accuracy over a split.

    Attributes:
        map50: Mean average precision at IoU 0.5.
        map50_95: Mean over IoU 0.5 to 0.95.
        images: Number of images.
        split: Which split.
    """

    map50: float
    map50_95: float
    images: int
    split: str


def evaluate(path: Path, runner: Runner, data: str, split: str, device: str) -> Accuracy:
    """Validate an artifact with Ultralytics' validator, square canvas and no rectangular batches.

    Args:
        path: The artifact.
        runner: The same, opened; a checkpoint is judged in exactly the form that was timed.
        data: Resolved data YAML.
        split: Split to judge on.
        device: As for ``open_runner``.

    Raises:
        ConfigError: The canvas is not square.
        DataError: The artifact's classes are not the data set's.
    """
    height, width = runner.canvas
    if height != width:
        raise ConfigError(
            f"{path}: mAP needs a square canvas, not {height}x{width}; leave data= out or use a square one"
        )
    if not isinstance(runner, TorchRunner):
        return judge(path, data, split, height, device)
    with tempfile.TemporaryDirectory(prefix="kd-yolo-val-") as folder:
        judged = Path(folder) / f"{path.stem}.pt"
        judged.write_bytes(serialize(runner.deployed, {}, {}))
        return judge(judged, data, split, height, device, name=str(path))


def judge(path: Path, data: str, split: str, side: int, device: str = "cpu", name: str | None = None) -> Accuracy:
    """Validate a checkpoint or exported file with Ultralytics' validator on the square canvas.

    Args:
        path: The file.
        data: Resolved data YAML.
        split: Split to judge on.
        side: Side of the canvas in pixels.
        device: As for ``open_runner``.
        name: What messages call the file.

    Raises:
        DataError: The file's classes are not the data set's.
    """
    with tempfile.TemporaryDirectory(prefix="kd-yolo-val-") as folder:
        model = YOLO(path, task="detect")
        _check_names(Path(name or path), model, data)
        metrics: Any = model.val(
            data=data,
            split=split,
            imgsz=side,
            batch=BATCH,
            rect=False,
            workers=0,
            plots=False,
            verbose=False,
            device=device,
            project=folder,
            name="val",
        )
    return Accuracy(float(metrics.box.map50), float(metrics.box.map), len(dataset_files(data, split)), split)


def _check_names(path: Path, model: YOLO, data: str) -> None:
    """Refuse to judge classes by the numbers of other classes."""
    names: Any = model.names
    ours = [str(names[key]).strip().lower() for key in sorted(names)]
    theirs = [name.strip().lower() for name in dataset_names(data)]
    if ours != theirs:
        raise DataError(
            f"{path}: its classes ({', '.join(ours[:6])}) are not those of {data} ({', '.join(theirs[:6])}); "
            "give the data set it was trained on"
        )
