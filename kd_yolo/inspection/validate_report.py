"""What ``kd-yolo val`` reports of an anomaly model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kd_yolo.anomaly.evaluate import table
from kd_yolo.anomaly.metrics import AnomalyMetrics


@dataclass(frozen=True)
class CategoryReport:
    """One category.

    Attributes:
        model: File that was judged.
        metrics: On the judged images.
        flagged_normal: Share of the normal images above the image threshold; None without normal images.
        flagged_anomalous: The same of the anomalous images.
        threshold_image: Image threshold that was used.
        threshold_pixel: Pixel threshold that was used.
        threshold_from: Where the thresholds are from.
    """

    model: Path
    metrics: AnomalyMetrics
    flagged_normal: float | None
    flagged_anomalous: float | None
    threshold_image: float
    threshold_pixel: float
    threshold_from: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        own = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "metrics"}
        return {**own, "model": str(self.model), **self.metrics.summary()}


@dataclass(frozen=True)
class ValReport:
    """What a validation found.

    Attributes:
        split: Which images were judged.
        save_dir: The run folder.
        results: By category.
        out: The checkpoint with new thresholds, if one was written.
    """

    split: str
    save_dir: Path
    results: dict[str, CategoryReport] = field(default_factory=dict)
    out: Path | None = None

    @property
    def metrics(self) -> AnomalyMetrics:
        """Return the metrics of the one category, or the plain mean over several."""
        found = [one.metrics for one in self.results.values()]
        return found[0] if len(found) == 1 else AnomalyMetrics.mean(found)

    @property
    def results_dict(self) -> dict[str, float]:
        """Return ``metrics`` by name."""
        return self.metrics.results_dict

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; a metric that is not defined is None."""
        mean = {key: None if np.isnan(value) else value for key, value in self.results_dict.items()}
        rows = {name: one.to_dict() for name, one in self.results.items()}
        places = {"save_dir": str(self.save_dir), "out": None if self.out is None else str(self.out)}
        return {"task": "anomaly", "split": self.split, **mean, "categories": rows, **places}

    def to_markdown(self) -> str:
        """Return a row for each category and, for several, their mean."""
        return table({name: one.metrics for name, one in self.results.items()})

    def to_text(self) -> str:
        """Return the table, and what the thresholds do."""
        lines = [self.to_markdown(), ""]
        for name, one in self.results.items():
            shares = ((one.flagged_normal, "normal"), (one.flagged_anomalous, "anomalous"))
            parts = [f"{share:.1%} of the {what} images" for share, what in shares if share is not None]
            limit = f"image threshold {one.threshold_image:.4g} ({one.threshold_from})"
            lines.append(f"{name}: above the {limit} are {' and '.join(parts)}")
        lines += [f"thresholds written to {self.out}"] if self.out else []
        return "\n".join([*lines, f"saved in {self.save_dir}"])
