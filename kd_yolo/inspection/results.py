"""What an anomaly model says of one image, as a result that Ultralytics' own code can draw and write."""

from __future__ import annotations

from copy import copy
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from ultralytics.engine.results import Results
from ultralytics.utils.plotting import Annotator

from kd_yolo.anomaly.calibration import Calibration
from kd_yolo.anomaly.plots import FOUND_RGB, heated, outlined
from kd_yolo.inspection.regions import find_regions

Image = NDArray[np.uint8]
ANOMALY_CLASS = 1
COLD_QUANTILE = 0.02
IMG_POSITION = 5
"""Place of ``img`` among the arguments of ``Results.plot``."""
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


class AnomalyResult(Results):
    """Score, map and regions of one image. ``boxes`` are the regions, of class 1 (``anomaly``).

    So ``plot``, ``save``, ``save_txt``, ``save_crop``, ``summary`` and ``to_json`` of Ultralytics work.

    Args:
        orig_img: BGR, uint8 of shape (H, W, 3).
        path: Where it is from.
        names: ``{0: "normal", 1: "anomaly"}``.
        canvas_map: The model's map, float32 of shape (h, w).
        score: The image score, of the map on the canvas.
        calibration: Thresholds and range of scores.
        conf: Lowest confidence of a region.
        min_area: Smallest area of a region, pixels of the image; None: a cell of 4x4 pixels of the canvas.
        speed: Milliseconds for ``preprocess``, ``inference`` and ``postprocess``.

    Attributes:
        score: The image score.
        threshold: Scores above it are anomalous.
        threshold_pixel: Values of the map above it are anomalous.
        normalised_score: The score in 0..1, where 0.5 is the threshold.
        is_anomaly: Whether the score is above the threshold.
        regions: Regions, the highest peak first, as ``boxes``; a part of this result keeps all of them.
        labels: Their label image on the canvas, int32 of shape (h, w).
    """

    def __init__(
        self,
        orig_img: Image,
        path: str,
        names: dict[int, str],
        canvas_map: NDArray[np.float32],
        score: float,
        calibration: Calibration,
        conf: float = 0.5,
        min_area: float | None = None,
        speed: dict[str, float] | None = None,
    ) -> None:
        self.canvas_map, self.score, self.calibration = canvas_map, float(score), calibration
        shape = (orig_img.shape[0], orig_img.shape[1])
        self.regions, self.labels = find_regions(canvas_map, calibration, shape, conf, min_area)
        rows = [[*region.box, region.confidence, float(ANOMALY_CLASS)] for region in self.regions]
        super().__init__(orig_img, path, names, boxes=torch.tensor(rows).reshape(-1, 6), speed=speed)

    @property
    def threshold(self) -> float:
        """Return the image threshold."""
        return self.calibration.threshold_image

    @property
    def threshold_pixel(self) -> float:
        """Return the pixel threshold."""
        return self.calibration.threshold_pixel

    @property
    def normalised_score(self) -> float:
        """Return the score in 0..1, where 0.5 is the threshold."""
        return self.calibration.normalised(self.score)

    @property
    def is_anomaly(self) -> bool:
        """Return whether the score is above the threshold."""
        return self.score > self.threshold

    @cached_property
    def anomaly_map(self) -> NDArray[np.float32]:
        """Return the map at the size of the image, float32 of shape (H, W)."""
        return enlarged(self.canvas_map, self.orig_shape)

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Return where the map is above the pixel threshold, at the size of the image, shape (H, W)."""
        return np.asarray(self.anomaly_map > self.threshold_pixel)

    @property
    def region_mask(self) -> NDArray[np.bool_]:
        """Return the part of ``mask`` that belongs to ``regions``, shape (H, W)."""
        return region_mask(self.labels, self.orig_shape)

    def new(self) -> AnomalyResult:
        """Return a result without boxes of the same image, map and score; Ultralytics fills in the boxes."""
        made = copy(self)
        made.boxes = None
        return made

    def plot(self, *args: Any, heat: bool = True, **kwargs: Any) -> Any:
        """Draw the heat map, the outlines of the regions, the score and what Ultralytics draws.

        Args:
            *args: As ``ultralytics.engine.results.Results.plot``.
            heat: Lay the map over the image; the middle of the colours (green) is the pixel threshold. A picture given
                as ``img`` is taken as it is.
            **kwargs: As ``*args``.

        Returns:
            BGR, uint8 of shape (H, W, 3), or with ``pil=True`` a Pillow image.
        """
        if heat and len(args) <= IMG_POSITION and kwargs.get("img") is None:
            kwargs["img"] = self._heated()
        return super().plot(*args, **kwargs)

    def verbose(self) -> str:
        """Return the score and the number of regions for a log line."""
        sign, word = (">", "anomaly") if self.is_anomaly else ("<=", "normal")
        count = len(self.regions)
        return f"{word} (score {self.score:.4g} {sign} {self.threshold:.4g}), {count} region{'s' * (count != 1)}, "

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "image": str(self.path),
            "score": self.score,
            "threshold": self.threshold,
            "normalised_score": self.normalised_score,
            "is_anomaly": self.is_anomaly,
            "regions": [
                {
                    "confidence": region.confidence,
                    "peak": region.peak,
                    "box_xyxy_px": list(region.box),
                    "area_px": region.area,
                }
                for region in self.regions
            ],
        }

    def _heated(self) -> Image:
        picture = heat_picture(self.orig_img, self.canvas_map, self.threshold_pixel)
        marked = outlined(picture, self.region_mask, FOUND_RGB[::-1])
        word = "anomaly" if self.is_anomaly else "normal"
        return captioned(marked, f"{word} {self.normalised_score:.2f}")


def heat_picture(bgr: Image, canvas_map: NDArray[np.float32], threshold_pixel: float) -> Image:
    """Lay a map over an image so that the pixel threshold has the middle of the colours, in every image.

    Args:
        bgr: uint8 of shape (H, W, 3).
        canvas_map: Of any size.
        threshold_pixel: Pixel threshold.

    Returns:
        BGR, uint8 of shape (H, W, 3).
    """
    cold = min(float(np.quantile(canvas_map, COLD_QUANTILE)), threshold_pixel)
    hot = 2 * threshold_pixel - cold
    picture = heated(np.ascontiguousarray(bgr[..., ::-1]), enlarged(canvas_map, bgr.shape[:2]), cold, hot)
    return np.ascontiguousarray(picture[..., ::-1])


def enlarged(canvas_map: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Resize a map, bilinear, corners not aligned.

    Args:
        canvas_map: Shape (h, w).
        shape: Height and width, pixels.
    """
    return np.asarray(cv2.resize(canvas_map, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR), dtype=np.float32)


def region_mask(labels: NDArray[np.int32], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return where a label image is above 0, at another size.

    Args:
        labels: Shape (h, w).
        shape: Height and width, pixels.
    """
    small = (labels > 0).astype(np.uint8)
    return np.asarray(cv2.resize(small, (shape[1], shape[0]), interpolation=cv2.INTER_NEAREST_EXACT), dtype=np.bool_)


def captioned(bgr: Image, text: str) -> Image:
    """Write a line into the upper left corner of a copy, as large as the image allows.

    Args:
        bgr: uint8 of shape (H, W, 3).
        text: ASCII.
    """
    annotator = Annotator(np.ascontiguousarray(bgr).copy(), example=text)
    scale, thickness = annotator.sf, annotator.tf
    (width, height), base = cv2.getTextSize(text, 0, scale, thickness)
    scale *= min(1.0, bgr.shape[1] / max(width, 1))
    (width, height), base = cv2.getTextSize(text, 0, scale, thickness)
    picture = annotator.im
    cv2.rectangle(picture, (0, 0), (width, height + base), BLACK, -1)
    cv2.putText(picture, text, (0, height + base // 2), 0, scale, WHITE, thickness, cv2.LINE_AA)
    return np.asarray(picture, dtype=np.uint8)
