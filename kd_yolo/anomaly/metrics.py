"""Metrics of ``task=anomaly``: image and pixel AUROC, AUPRO@0.3 and best F1.

AUROC is the rank statistic with average ranks for ties. AUPRO is P. Bergmann et al., "The MVTec Anomaly Detection
Dataset", IJCV 2021, section 6.1: the mean share of each region that is found, against the false-positive rate over all
background pixels, area up to 0.3, divided by 0.3, the end point interpolated. Regions are 8-connected components of the
masks at the size that is evaluated. Others rescale the curve or average over images: their numbers differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from kd_yolo.anomaly.curves import Curve, Maps, Masks, Steps, pixel_steps, steps_of

PRO_LIMIT = 0.3
KEYS = (
    "metrics/image_auroc",
    "metrics/pixel_auroc",
    "metrics/aupro",
    "metrics/image_f1",
    "metrics/pixel_f1",
)


@dataclass(frozen=True)
class AnomalyMetrics:
    """Metrics of one category, or the mean of several; not a number where they are not defined.

    Attributes:
        image_auroc: Area under the ROC curve of the image scores.
        pixel_auroc: The same of all pixels of all images whose truth is known.
        aupro: Area under the per-region-overlap curve up to a false-positive rate of 0.3, divided by 0.3.
        image_f1: Highest F1 over all thresholds of the image score.
        pixel_f1: The same of the pixels.
        image_f1_threshold: Score from which ``image_f1`` is reached. It is taken from the data that it is measured on:
            for a report, not for a model.
        pixel_f1_threshold: The same of the pixels.
        images: Number of images.
        anomalies: Number of anomalous images.
        regions_known: Anomalous images whose masks were counted in the pixel metrics.
        curves: ``image_roc``, ``pixel_roc`` and ``pro``, thinned for drawing, where they are defined.
    """

    image_auroc: float
    pixel_auroc: float
    aupro: float
    image_f1: float
    pixel_f1: float
    image_f1_threshold: float = math.nan
    pixel_f1_threshold: float = math.nan
    images: int = 0
    anomalies: int = 0
    regions_known: int = 0
    curves: dict[str, Curve] = field(default_factory=dict, repr=False)

    @classmethod
    def compute(
        cls,
        scores: NDArray[np.floating],
        labels: NDArray[np.generic],
        maps: Maps | None = None,
        masks: Masks | None = None,
        known: Sequence[bool] | NDArray[np.bool_] | None = None,
    ) -> AnomalyMetrics:
        """Measure one category.

        Args:
            scores: Image scores, shape (N,).
            labels: 0 normal or 1 anomalous, shape (N,).
            maps: Anomaly maps, (N, H, W) or N maps of any sizes; None for image-level metrics only.
            masks: Truth of the same shapes, above 0 where anomalous.
            known: Which images have known truth (``AnomalyDataset.has_mask``); the others are left out of the pixel
                metrics. None: all.

        Raises:
            ModelError: A score is not a finite number.
        """
        image = steps_of(scores, labels)
        rows = list(range(len(labels))) if known is None else np.flatnonzero(np.asarray(known)).tolist()
        marked = int(np.asarray(labels).astype(bool)[rows].sum())
        pixel = None
        if maps is not None and masks is not None and marked:
            pixel = pixel_steps([maps[row] for row in rows], [masks[row] for row in rows])
        curves = {"image_roc": image.roc().thinned()} if image.defined else {}
        if pixel is not None and pixel.defined:
            curves |= {"pixel_roc": pixel.roc().thinned(), "pro": pixel.pro().thinned()}
        image_f1, image_threshold = _f1(image)
        pixel_f1, pixel_threshold = _f1(pixel)
        return cls(
            image_auroc=_auroc(image),
            pixel_auroc=_auroc(pixel),
            aupro=_aupro(pixel, PRO_LIMIT),
            image_f1=image_f1,
            pixel_f1=pixel_f1,
            image_f1_threshold=image_threshold,
            pixel_f1_threshold=pixel_threshold,
            images=len(labels),
            anomalies=int(np.asarray(labels).astype(bool).sum()),
            regions_known=marked if pixel is not None else 0,
            curves=curves,
        )

    @classmethod
    def mean(cls, categories: Sequence[AnomalyMetrics]) -> AnomalyMetrics:
        """Return the plain mean over categories; a metric that one of them lacks is not a number in the mean either."""
        averaged = {key: float(np.mean([getattr(one, key) for one in categories])) for key in _names()}
        counted = {
            key: sum(getattr(one, key) for one in categories) for key in ("images", "anomalies", "regions_known")
        }
        return cls(**averaged, **counted)  # type: ignore[arg-type]

    @property
    def keys(self) -> list[str]:
        """Return the names of the metrics as they stand in ``results.csv``."""
        return list(KEYS)

    @property
    def results_dict(self) -> dict[str, float]:
        """Return the metrics by name."""
        return dict(zip(KEYS, self.mean_results(), strict=True))

    @property
    def fitness(self) -> float:
        """Return the image AUROC."""
        return self.image_auroc

    def mean_results(self) -> list[float]:
        """Return the metrics in the order of ``keys``."""
        return [getattr(self, name) for name in _names()]

    def summary(self) -> dict[str, float | int | None]:
        """Return all numbers by attribute, None where not defined; ready for JSON."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "curves"}
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()
        }


def image_auroc(scores: NDArray[np.floating], labels: NDArray[np.generic]) -> float:
    """Return the area under the ROC curve of image scores; not a number when one of the labels is missing.

    Args:
        scores: Shape (N,), higher is more anomalous.
        labels: 0 normal or 1 anomalous, shape (N,).

    Raises:
        ModelError: A score is not a finite number.
    """
    return _auroc(steps_of(scores, labels))


def pixel_auroc(maps: Maps, masks: Masks) -> float:
    """Return the area under the ROC curve of all pixels of all images.

    Args:
        maps: Anomaly maps, (N, H, W) or N maps of any sizes.
        masks: Truth of the same shapes, above 0 where anomalous.

    Raises:
        ModelError: A map holds a value that is not finite.
    """
    return _auroc(pixel_steps(maps, masks))


def aupro(maps: Maps, masks: Masks, limit: float = PRO_LIMIT) -> float:
    """Return the area under the per-region-overlap curve up to a false-positive rate of ``limit``, divided by it.

    Args:
        maps: Anomaly maps, (N, H, W) or N maps of any sizes.
        masks: Truth of the same shapes, above 0 where anomalous.
        limit: Highest false-positive rate, above 0 and up to 1.

    Raises:
        ModelError: A map holds a value that is not finite.
        ValueError: ``limit`` is out of range.
    """
    if not 0 < limit <= 1:
        raise ValueError(f"limit={limit}: must be above 0 and at most 1")
    return _aupro(pixel_steps(maps, masks), limit)


def best_f1(scores: NDArray[np.floating], labels: NDArray[np.generic]) -> tuple[float, float]:
    """Return the highest F1 over all thresholds and that threshold (``score >= threshold`` is an anomaly).

    Args:
        scores: Any shape; image scores or pixels.
        labels: 0 normal or 1 anomalous, same shape.

    Returns:
        F1 and threshold; both not a number when there is no anomaly.

    Raises:
        ModelError: A score is not a finite number.
    """
    return _f1(steps_of(scores, labels))


def auroc_by_defect(
    scores: NDArray[np.floating], labels: NDArray[np.generic], defects: Sequence[str]
) -> dict[str, float]:
    """Return for each kind of defect the image AUROC of its images against all normal ones.

    Args:
        scores: Shape (N,).
        labels: 0 normal or 1 anomalous, shape (N,).
        defects: Kind of defect of each image (``AnomalySample.defect``).
    """
    positive = np.asarray(labels).astype(bool)
    kinds = np.asarray(defects)
    found = {}
    for kind in sorted(set(kinds[positive].tolist())):
        rows = ~positive | (kinds == kind)
        found[kind] = image_auroc(np.asarray(scores)[rows], positive[rows])
    return found


def _names() -> list[str]:
    return [key.removeprefix("metrics/") for key in KEYS]


def _auroc(steps: Steps | None) -> float:
    return steps.roc().area() if steps is not None and steps.defined else math.nan


def _aupro(steps: Steps | None, limit: float) -> float:
    return steps.pro().area(limit) / limit if steps is not None and steps.defined else math.nan


def _f1(steps: Steps | None) -> tuple[float, float]:
    return steps.best_f1() if steps is not None and steps.positives else (math.nan, math.nan)
