"""``kd-yolo predict model=DETECTOR anomaly=MODEL``: known defects by class, and anomalies that no class explains.

Each image is decoded once and seen by both models, each on its own canvas.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, field_validator
from ultralytics.utils import LOGGER

from kd_yolo.errors import CheckpointError, ConfigError
from kd_yolo.inspection.fusion_result import FusedResult
from kd_yolo.inspection.origin import checkpoint_of
from kd_yolo.inspection.predict import anomaly_keys, inspect, open_checked
from kd_yolo.inspection.sources import Frame, check_source, read_frames
from kd_yolo.inspection.writing import RunWriter, Saving
from kd_yolo.runtimes.anomaly_session import AnomalySession, is_anomaly_file
from kd_yolo.tables import PairReport

COMMAND = "predict with anomaly="


class FusionKeys(Saving):
    """Keys of ``kd-yolo predict`` with a detector and an anomaly model."""

    save_json: bool = True
    model: str = Field(default="", description="detector: checkpoint or exported file")
    anomaly: str = Field(min_length=1, description="anomaly checkpoint or exported file")
    source: Any = Field(default=None, description="image, folder, video, camera number, array, or a list")
    conf: float = Field(default=0.25, ge=0, le=1, description="lowest confidence of a detection")
    iou: float = Field(default=0.7, ge=0, le=1, description="overlap of the detector's NMS")
    max_det: int = Field(default=300, ge=1)
    imgsz: int | list[int] | None = Field(default=None, description="the detector's canvas; default its own")
    anomaly_imgsz: int | list[int] | None = Field(default=None, description="the anomaly model's canvas")
    anomaly_conf: float = Field(default=0.5, ge=0, le=1, description="lowest confidence of an anomalous region")
    explained: float = Field(default=0.5, gt=0, le=1, description="covered share from which a region is explained")
    min_area: float | None = Field(default=None, ge=0, description="smallest region, pixels of the image")
    batch: int = Field(default=1, ge=1)
    vid_stride: int = Field(default=1, ge=1)
    device: str = "cpu"
    threads: int | None = Field(default=None, ge=1)
    verbose: bool = True
    trust: bool = False

    @field_validator("model", "anomaly", "device", "project", "name", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, (Path, int, float)) and not isinstance(value, bool) else value

    @field_validator("conf", "iou", "anomaly_conf", "explained", "min_area", mode="before")
    @classmethod
    def _as_number(cls, value: Any) -> Any:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


@dataclass
class FusionReport(PairReport):
    """Counts and times of a run so far.

    Attributes:
        images: Images seen.
        known: Detections.
        unknown: Regions that no detection explains.
        images_with_unknown: Images with such a region.
        anomalous: Images whose score is above the threshold.
        save_dir: The run folder, or None when nothing was written.
        detector_ms: Time of the detector for each image, resizing and selection included.
        anomaly_ms: The same of the anomaly model, its regions included.
    """

    images: int = 0
    known: int = 0
    unknown: int = 0
    images_with_unknown: int = 0
    anomalous: int = 0
    save_dir: Path | None = None
    detector_ms: list[float] = field(default_factory=list)
    anomaly_ms: list[float] = field(default_factory=list)

    @property
    def detector_ms_p50(self) -> float:
        """Return the median time of the detector; the first batch, which warms up, counts only when it is alone."""
        return _median(self.detector_ms)

    @property
    def anomaly_ms_p50(self) -> float:
        """Return the median time of the anomaly model, as ``detector_ms_p50``."""
        return _median(self.anomaly_ms)

    def rows(self) -> list[tuple[str, str]]:
        """Return names and values for people."""
        return [
            ("images", str(self.images)),
            ("known defects", str(self.known)),
            ("unknown anomalies", f"{self.unknown} in {self.images_with_unknown} images"),
            ("anomalous images", str(self.anomalous)),
            ("detector, ms an image (median)", f"{self.detector_ms_p50:.1f}"),
            ("anomaly model, ms an image (median)", f"{self.anomaly_ms_p50:.1f}"),
            ("saved in", str(self.save_dir or "-")),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        counts = {key: getattr(self, key) for key in ("images", "known", "unknown", "images_with_unknown", "anomalous")}
        times = {"detector_ms_p50": self.detector_ms_p50, "anomaly_ms_p50": self.anomaly_ms_p50}
        return {**counts, **times, "save_dir": str(self.save_dir) if self.save_dir else None}

    def count(self, result: FusedResult) -> None:
        """Add one result."""
        self.images += 1
        self.known += len(result.detections)
        self.unknown += len(result.unknown)
        self.images_with_unknown += bool(result.unknown)
        self.anomalous += result.anomaly.is_anomaly


class FusionPredictor:
    """An opened detector, an opened anomaly model and a run folder.

    Args:
        keys: What the user gave.
        detector: A ``KDYOLO`` or any other Ultralytics detector. It is handed in because the Python interface, which
            opens every kind of file, is built on top of this package.

    Attributes:
        detector: The detector.
        session: The anomaly model.
        report: Counts and times so far.
        save_dir: The run folder, or None when nothing is written.

    Raises:
        KDYoloError: The source is missing, a file is of the wrong kind, or nothing can be written.
    """

    def __init__(self, keys: FusionKeys, detector: Any) -> None:
        self.keys, self.detector = keys, detector
        check_source(keys.source)
        _check_anomaly(keys.anomaly)
        found = checkpoint_of(keys.anomaly, "anomaly")
        self.session: AnomalySession = open_checked(found, keys.anomaly_imgsz, keys.device, keys.threads)
        self._writer = RunWriter(keys, "fusion")
        self.save_dir = self._writer.save_dir
        self.report = FusionReport(save_dir=self.save_dir)

    def __iter__(self) -> Iterator[FusedResult]:
        """Yield a result for each image, written before it is yielded.

        Raises:
            KDYoloError: The source cannot be read, or a result not be written.
        """
        keys = self.keys
        try:
            for frames in read_frames(keys.source, keys.batch, keys.vid_stride):
                for frame, result in zip(frames, self.fuse(frames), strict=True):
                    self._writer.write(frame, result)
                    self.report.count(result)
                    if keys.verbose:
                        parts = ", ".join(f"{name} {value:.1f} ms" for name, value in result.speed.items())
                        LOGGER.info(f"{frame.path}: {result.verbose()}{parts}")
                    yield result
        finally:
            self._writer.close()

    def fuse(self, frames: Sequence[Frame]) -> list[FusedResult]:
        """Run both models on some images.

        Raises:
            ConfigError: The detector's file cannot take the canvas.
        """
        keys = self.keys
        started = time.perf_counter()
        canvas: dict[str, Any] = {} if keys.imgsz is None else {"imgsz": keys.imgsz}
        detected = self.detector.predict(
            [frame.image for frame in frames],
            conf=keys.conf,
            iou=keys.iou,
            max_det=keys.max_det,
            device=keys.device,
            verbose=False,
            **canvas,
        )
        between = time.perf_counter()
        seen = inspect(self.session, frames, keys.anomaly_conf, keys.min_area)
        fused = [FusedResult(*pair, keys.explained) for pair in zip(detected, seen, strict=True)]
        count = len(frames)
        speed = {
            "detector": (between - started) * 1e3 / count,
            "anomaly": (time.perf_counter() - between) * 1e3 / count,
        }
        for result in fused:
            result.speed = dict(speed)
        self.report.detector_ms.append(speed["detector"])
        self.report.anomaly_ms.append(speed["anomaly"])
        return fused


def predict_fused(
    detector: Any, anomaly: str | Path, source: Any, stream: bool = False, **keys: Any
) -> list[FusedResult] | Iterator[FusedResult]:
    """Find known defects and unknown anomalies.

    Args:
        detector: A ``KDYOLO`` or any other Ultralytics detector.
        anomaly: Anomaly checkpoint or exported file.
        source: As for ``kd_yolo.inspection.predict.predict_anomaly``.
        stream: Return a generator, for videos, cameras and large folders.
        **keys: See ``FusionKeys``.

    Raises:
        KDYoloError: Anything wrong with the input; one line.
    """
    checked = anomaly_keys(FusionKeys, {**keys, "anomaly": anomaly, "source": source}, COMMAND)
    predictor = FusionPredictor(checked, detector)
    return iter(predictor) if stream else list(predictor)


def fusion_keys(values: Mapping[str, Any]) -> FusionKeys:
    """Check the keys of ``predict`` with ``anomaly=`` and of which kind its two files are; nothing is opened to run.

    Raises:
        ConfigError: An unknown key, a stock key without a meaning here, a wrong value, or ``model`` is no detector.
        CheckpointError: A file is missing, or ``anomaly`` is no anomaly model.
    """
    keys = anomaly_keys(FusionKeys, values, COMMAND)
    if not keys.model:
        raise ConfigError(f"{COMMAND}: missing key 'model'; give the detector's file")
    _check_exists("model", keys.model)
    if is_anomaly_file(keys.model):
        raise ConfigError(
            f"model={keys.model}: is an anomaly model; with anomaly= give a detector here, or leave anomaly= out"
        )
    _check_anomaly(keys.anomaly)
    return keys


def _check_exists(name: str, file: str) -> None:
    if not Path(file).expanduser().exists():
        raise CheckpointError(f"{name}={file}: no such file or folder")


def _check_anomaly(file: str) -> None:
    _check_exists("anomaly", file)
    if not is_anomaly_file(checkpoint_of(file, "anomaly")):
        raise CheckpointError(f"anomaly={file}: is no anomaly model; train one with kd-yolo train task=anomaly")


def _median(batches: list[float]) -> float:
    times = batches[1:] or batches
    return float(np.median(times)) if times else float("nan")
