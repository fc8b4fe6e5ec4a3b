"""Detections and what no detection explains, as one result of one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ultralytics.engine.results import Results
from ultralytics.utils.plotting import Annotator

from kd_yolo.anomaly.plots import FOUND_RGB, outlined
from kd_yolo.inspection.regions import Region, canvas_rectangle, covered_shares, normalised_map
from kd_yolo.inspection.results import IMG_POSITION, AnomalyResult, captioned, region_mask

UNKNOWN = "unknown anomaly"
UNKNOWN_BGR = FOUND_RGB[::-1]


@dataclass(frozen=True)
class Detection:
    """A defect of a known class.

    Attributes:
        name: Class name.
        class_index: Class number of the detector.
        confidence: The detector's, 0..1.
        box: Left, top, right, bottom, pixels of the image.
        anomaly_mean: Mean of the anomaly map under the box, 0..1, where 0.5 is the image threshold.
        anomaly_peak: The largest value; below 0.5 the anomaly model sees nothing unusual where the detector fires.
    """

    name: str
    class_index: int
    confidence: float
    box: tuple[float, float, float, float]
    anomaly_mean: float
    anomaly_peak: float


@dataclass(frozen=True)
class Unknown:
    """An anomalous region that no detection explains.

    Attributes:
        confidence: Its peak on the scale of the image score, 0..1, where 0.5 is the image threshold.
        box: Left, top, right, bottom, pixels of the image.
        area: Pixels of the image.
        covered: Share of it that lies under detections.
    """

    confidence: float
    box: tuple[float, float, float, float]
    area: int
    covered: float


class FusedResult(Results):
    """One image seen by a detector and an anomaly model.

    ``boxes`` are the detections, then the unknown regions with the class after the detector's last, named ``unknown
    anomaly``; so ``save_txt``, ``save_crop``, ``summary`` and ``to_json`` of Ultralytics hold both.

    Args:
        detected: The detector's result.
        anomaly: The anomaly model's.
        explained: Regions of which at least this share lies under detections are no unknown ones.

    Attributes:
        anomaly: The anomaly model's result.
        detections: Known defects, the most confident first as the detector gives them.
        unknown: Regions that no detection explains, the highest peak first.
        unknown_class: Their class number.
    """

    def __init__(self, detected: Results, anomaly: AnomalyResult, explained: float = 0.5) -> None:
        rows = detected.boxes.data.cpu().float()[:, :6]
        self.anomaly, self._known = anomaly, rows
        self.unknown_class = max((int(key) for key in detected.names), default=-1) + 1
        found, shares = unexplained(anomaly, [row[:4] for row in rows.tolist()], explained)
        self._regions = found
        self.detections = _described(rows, detected.names, anomaly)
        self.unknown = [
            Unknown(one.confidence, one.box, one.area, share) for one, share in zip(found, shares, strict=True)
        ]
        extra = [[*one.box, one.confidence, float(self.unknown_class)] for one in self.unknown]
        boxes = torch.cat((rows, torch.tensor(extra).reshape(-1, 6)))
        names = {**{int(key): name for key, name in detected.names.items()}, self.unknown_class: UNKNOWN}
        super().__init__(anomaly.orig_img, anomaly.path, names, boxes=boxes)

    @property
    def is_defective(self) -> bool:
        """Return whether there is a known defect, an unknown one, or an anomalous score."""
        return bool(self.detections) or bool(self.unknown) or self.anomaly.is_anomaly

    def new(self) -> Results:
        """Return a plain result of the same image and names; Ultralytics fills in the boxes."""
        made = Results(self.orig_img, self.path, self.names, speed=self.speed)
        made.save_dir = self.save_dir
        return made

    def plot(self, *args: Any, **kwargs: Any) -> Any:
        """Draw detections as Ultralytics does and unknown regions with their outline in orange.

        Args:
            *args: As ``ultralytics.engine.results.Results.plot``.
            **kwargs: As ``*args``.

        Returns:
            BGR, uint8 of shape (H, W, 3), or with ``pil=True`` a Pillow image.
        """
        given = args[IMG_POSITION] if len(args) > IMG_POSITION else kwargs.pop("img", None)
        picture = self._with_unknown(np.ascontiguousarray(self.orig_img if given is None else given), kwargs)
        known = Results(self.orig_img, self.path, self.names, boxes=self._known)
        args = (*args[:IMG_POSITION], picture, *args[IMG_POSITION + 1 :]) if len(args) > IMG_POSITION else args
        if len(args) <= IMG_POSITION:
            kwargs["img"] = picture
        return known.plot(*args, **kwargs)

    def verbose(self) -> str:
        """Return the counts for a log line."""
        known, unknown = len(self.detections), len(self.unknown)
        return f"{known} known, {unknown} unknown (score {self.anomaly.normalised_score:.2f}), "

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        seen = self.anomaly.to_dict()
        del seen["regions"]
        parts = {"detections": _plain(self.detections), "unknown": _plain(self.unknown)}
        return {**seen, "is_defective": self.is_defective, **parts, "speed_ms": self.speed}

    def _with_unknown(self, picture: NDArray[np.uint8], options: dict[str, Any]) -> NDArray[np.uint8]:
        numbers = [region.number for region in self._regions]
        labels = np.where(np.isin(self.anomaly.labels, numbers), self.anomaly.labels, 0).astype(np.int32)
        marked = outlined(picture, region_mask(labels, self.orig_shape), UNKNOWN_BGR)
        if options.get("boxes", True):
            annotator = Annotator(marked, options.get("line_width"), options.get("font_size"), example=UNKNOWN)
            for one in reversed(self.unknown):
                text = f"{UNKNOWN} {one.confidence:.2f}" if options.get("conf", True) else UNKNOWN
                annotator.box_label(one.box, text if options.get("labels", True) else "", color=UNKNOWN_BGR)
            marked = np.asarray(annotator.result(), dtype=np.uint8)
        return captioned(marked, f"score {self.anomaly.normalised_score:.2f}")


def unexplained(
    anomaly: AnomalyResult, boxes: Sequence[Sequence[float]], explained: float
) -> tuple[list[Region], list[float]]:
    """Return the regions that boxes do not explain, and which share of each they cover.

    Args:
        anomaly: Result of the anomaly model.
        boxes: Left, top, right, bottom of each detection, pixels of the image.
        explained: A region is explained from this covered share on, 0..1.
    """
    shares = covered_shares(anomaly.regions, anomaly.labels, boxes, anomaly.orig_shape)
    kept = [(region, share) for region, share in zip(anomaly.regions, shares, strict=True) if share < explained]
    return [region for region, _ in kept], [share for _, share in kept]


def _described(rows: torch.Tensor, names: dict[int, str], anomaly: AnomalyResult) -> list[Detection]:
    """Return the detections with what the anomaly map says under each."""
    height, width = anomaly.canvas_map.shape
    values = normalised_map(anomaly.canvas_map, anomaly.calibration)
    found = []
    for left, top, right, bottom, confidence, number in rows.tolist():
        box = (left, top, right, bottom)
        under = values[canvas_rectangle(box, (height, width), anomaly.orig_shape)]
        mean, peak = float(under.mean()), float(under.max())
        found.append(Detection(str(names[int(number)]), int(number), confidence, box, mean, peak))
    return found


def _plain(found: Sequence[Detection] | Sequence[Unknown]) -> list[dict[str, Any]]:
    names = {"name": "class", "box": "box_xyxy_px", "area": "area_px"}
    rows = [{**asdict(one), "box": list(one.box)} for one in found]
    return [{names.get(key, key): value for key, value in row.items()} for row in rows]
