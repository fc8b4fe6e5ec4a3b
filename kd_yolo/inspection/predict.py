"""``kd-yolo predict`` with an anomaly model: score, map, regions of every image of a source."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor
from ultralytics.utils import LOGGER

from kd_yolo.anomaly.dataset import stretched
from kd_yolo.config import Strict, stock_keys, validate
from kd_yolo.errors import ConfigError, nearest
from kd_yolo.inspection.origin import checkpoint_of
from kd_yolo.inspection.results import AnomalyResult
from kd_yolo.inspection.sources import Frame, check_source, read_frames
from kd_yolo.inspection.writing import RunWriter, Saving
from kd_yolo.runtimes.anomaly_session import AnomalySession, open_anomaly

Keys = TypeVar("Keys", bound=Strict)
IGNORED_KEYS = ("task", "mode")


class PredictKeys(Saving):
    """Keys of ``kd-yolo predict`` with an anomaly model."""

    model: str = Field(min_length=1, description="anomaly checkpoint or exported file")
    source: Any = Field(default=None, description="image, folder, video, camera number, array, or a list")
    imgsz: int | list[int] | None = Field(default=None, description="canvas, pixels; default the model's")
    conf: float = Field(default=0.5, ge=0, le=1, description="lowest confidence of a box; 0.5 is the image threshold")
    min_area: float | None = Field(default=None, ge=0, description="smallest box region, pixels of the image")
    batch: int = Field(default=1, ge=1)
    vid_stride: int = Field(default=1, ge=1)
    device: str = "cpu"
    threads: int | None = Field(default=None, ge=1)
    verbose: bool = True
    trust: bool = False

    @field_validator("model", "device", "project", "name", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, (Path, int, float)) and not isinstance(value, bool) else value

    @field_validator("conf", "min_area", mode="before")
    @classmethod
    def _as_number(cls, value: Any) -> Any:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


class AnomalyPredictor:
    """An opened anomaly model and a run folder.

    Args:
        keys: What the user gave.

    Attributes:
        session: The model.
        save_dir: The run folder, or None when nothing is written.
        images: Images seen so far.
        anomalies: Images above the threshold so far.

    Raises:
        KDYoloError: The source is missing, the file is no calibrated anomaly model, or nothing can be written.
    """

    def __init__(self, keys: PredictKeys) -> None:
        self.keys = keys
        check_source(keys.source)
        self.session = open_checked(keys.model, keys.imgsz, keys.device, keys.threads)
        self._writer = RunWriter(keys)
        self.save_dir = self._writer.save_dir
        self.images = self.anomalies = 0

    def __iter__(self) -> Iterator[AnomalyResult]:
        """Yield a result for each image, written before it is yielded.

        Raises:
            KDYoloError: The source cannot be read, or a result not be written.
        """
        keys = self.keys
        try:
            for frames in read_frames(keys.source, keys.batch, keys.vid_stride):
                for frame, result in zip(frames, inspect(self.session, frames, keys.conf, keys.min_area), strict=True):
                    self._writer.write(frame, result)
                    self.images += 1
                    self.anomalies += int(result.is_anomaly)
                    if keys.verbose:
                        LOGGER.info(f"{frame.path}: {result.verbose()}{sum((result.speed or {}).values()):.1f} ms")
                    yield result
        finally:
            self._writer.close()

    def summary(self) -> str:
        """Return one line about the images seen so far."""
        where = f"; saved in {self.save_dir}" if self.save_dir else ""
        return f"{self.anomalies} of {self.images} images are anomalous{where}"


def predict_anomaly(
    model: str | Path, source: Any, stream: bool = False, **keys: Any
) -> list[AnomalyResult] | Iterator[AnomalyResult]:
    """Inspect images.

    Args:
        model: Anomaly checkpoint or exported file.
        source: Image, folder, pattern, video, camera number, array (BGR), Pillow image, tensor, or a list of them.
        stream: Return a generator, for videos, cameras and large folders.
        **keys: See ``PredictKeys``.

    Raises:
        KDYoloError: Anything wrong with the input; one line.
    """
    checked = anomaly_keys(PredictKeys, {**keys, "model": model, "source": source}, "predict")
    predictor = AnomalyPredictor(checked)
    return iter(predictor) if stream else list(predictor)


def inspect(
    session: AnomalySession, frames: Sequence[Frame], conf: float = 0.5, min_area: float | None = None
) -> list[AnomalyResult]:
    """Run a model on some images.

    Args:
        session: The model.
        frames: One or more images.
        conf: Lowest confidence of a region.
        min_area: Smallest area of a region, pixels of the image; None: a cell of 4x4 pixels of the canvas.
    """
    started = time.perf_counter()
    pixels = canvas_images([frame.image for frame in frames], session.canvas)
    prepared = time.perf_counter()
    maps = session.maps(pixels)
    scores = session.scores(maps)
    inferred = time.perf_counter()
    names, limits = session.description.names, session.thresholds
    results = [
        AnomalyResult(frame.image, frame.path, names, maps[index, 0], float(scores[index]), limits, conf, min_area)
        for index, frame in enumerate(frames)
    ]
    marks = (started, prepared, inferred, time.perf_counter())
    spent = [(after - before) * 1e3 / len(frames) for before, after in itertools.pairwise(marks)]
    for result in results:
        result.speed = dict(zip(("preprocess", "inference", "postprocess"), spent, strict=True))
    return results


def canvas_images(images: Sequence[NDArray[np.uint8]], canvas: tuple[int, int]) -> Tensor:
    """Stretch BGR images to the canvas exactly as in training.

    Args:
        images: uint8 of shape (H, W, 3).
        canvas: Height and width, pixels.

    Returns:
        (B, 3, h, w), RGB, float32 in [0, 1].
    """
    resized = [stretched(image, canvas)[..., ::-1].transpose(2, 0, 1) for image in images]
    return torch.from_numpy(np.stack(resized)).float() / 255


def open_checked(
    model: str | Path, imgsz: Any = None, device: str = "cpu", threads: int | None = None
) -> AnomalySession:
    """Open an anomaly model, and say so when its canvas is not the one that its thresholds are for.

    Raises:
        KDYoloError: See ``kd_yolo.runtimes.anomaly_session.open_anomaly``.
    """
    session = open_anomaly(checkpoint_of(model, "model"), imgsz, device=device, threads=threads)
    trained = session.description.canvas
    if tuple(session.canvas) != tuple(trained):
        wide, usual = ("x".join(map(str, size)) for size in (session.canvas, trained))
        LOGGER.warning(f"imgsz: scores at {wide} are compared with thresholds that were calibrated at {usual} pixels")
    return session


def anomaly_keys(schema: type[Keys], values: Mapping[str, Any], command: str) -> Keys:
    """Check a command's keys.

    Args:
        schema: Their model.
        values: What the user gave; ``task`` and ``mode`` are dropped.
        command: For messages.

    Raises:
        ConfigError: An unknown key (the nearest is named), a stock key without a meaning here, or a wrong value.
    """
    given = {key: value for key, value in values.items() if key not in IGNORED_KEYS}
    for key in given:
        if key not in schema.model_fields and key in stock_keys():
            raise ConfigError(f"{command}: '{key}' has no meaning with an anomaly model; leave it out")
        if key not in schema.model_fields:
            raise ConfigError(f"{command}: unknown key '{key}'{nearest(key, schema.model_fields)}")
    return validate(schema, given, where=command)
