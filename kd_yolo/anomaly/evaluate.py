"""Judge an anomaly model on labelled images: metrics, plots, a table over categories."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from ultralytics.utils import TQDM

from kd_yolo.anomaly.calibration import Calibration
from kd_yolo.anomaly.dataset import AnomalyDataset, collate
from kd_yolo.anomaly.metrics import AnomalyMetrics
from kd_yolo.anomaly.plots import pick_examples, plot_curves, plot_histogram, plot_overlays
from kd_yolo.tables import markdown_table

COLUMNS = {
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO@0.3",
    "image_f1": "best F1",
    "pixel_f1": "best pixel F1",
}
SHOWN = 12


@dataclass(frozen=True)
class Judged:
    """What a model says of every image of a data set.

    Attributes:
        metrics: Over all images.
        scores: Image scores, shape (N,).
        flagged: Share of normal and of anomalous images above the model's own threshold, None where there are none.
    """

    metrics: AnomalyMetrics
    scores: NDArray[np.float32]
    flagged: tuple[float | None, float | None]


def judge(
    run: Callable[[Tensor], tuple[Tensor, Tensor]],
    dataset: AnomalyDataset,
    calibration: Calibration,
    batch: int = 16,
    plots: Path | None = None,
    title: str = "",
) -> Judged:
    """Run a model over labelled images.

    Args:
        run: Takes images (B, 3, H, W) in [0, 1]; returns maps (B, 1, H, W) and scores (B,), on the CPU.
        dataset: The images.
        calibration: Thresholds of the model.
        batch: Images per call.
        plots: Folder for pictures, or None.
        title: Text above the pictures.
    """
    maps, scores = [], []
    with torch.inference_mode():
        for part in TQDM(DataLoader(dataset, batch_size=batch, collate_fn=collate), desc=title or "judging"):
            map_, score = run(part["img"].float() / 255)
            maps.append(map_[:, 0].numpy())
            scores.append(score.numpy())
    all_maps, all_scores = np.concatenate(maps), np.concatenate(scores)
    labels, masks = dataset.labels(), dataset.masks()
    metrics = AnomalyMetrics.compute(all_scores, labels, all_maps, masks, dataset.has_mask())
    if plots is not None:
        _draw(plots, dataset, all_maps, masks, all_scores, metrics, calibration, title)
    above = all_scores > calibration.threshold_image
    shares = [float(above[labels == label].mean()) if (labels == label).any() else None for label in (0, 1)]
    return Judged(metrics, all_scores, (shares[0], shares[1]))


def table(results: Mapping[str, AnomalyMetrics]) -> str:
    """Return a Markdown table: a row for each category and, for several, their plain mean."""
    rows = dict(results)
    if len(rows) > 1:
        rows["mean"] = AnomalyMetrics.mean(list(results.values()))
    body: list[Sequence[str]] = []
    for name, metrics in rows.items():
        values = [getattr(metrics, key) for key in COLUMNS]
        counts = [str(metrics.images - metrics.anomalies), str(metrics.anomalies)]
        body.append([name, *counts, *("-" if np.isnan(value) else f"{value:.4f}" for value in values)])
    return markdown_table(["category", "normal", "anomalous", *COLUMNS.values()], body)


def _draw(
    folder: Path,
    dataset: AnomalyDataset,
    maps: NDArray[np.float32],
    masks: NDArray[np.uint8],
    scores: NDArray[np.float32],
    metrics: AnomalyMetrics,
    calibration: Calibration,
    title: str,
) -> None:
    labels = dataset.labels()
    rows = pick_examples(scores, labels, [sample.defect for sample in dataset.samples], SHOWN)
    images = [dataset[row]["img"].numpy() for row in rows]
    known = dataset.has_mask()
    texts = [f"{dataset.samples[row].defect} {scores[row]:.2f}" for row in rows]
    truth = [masks[row] if known[row] else None for row in rows]
    chosen = maps[rows]
    span = (float(np.quantile(chosen, 0.02)), float(max(chosen.max(), calibration.threshold_pixel)))
    plot_overlays(folder / "overlays.png", images, chosen, truth, texts, calibration.threshold_pixel, span)
    plot_histogram(folder / "scores.png", scores, labels, calibration.threshold_image, title)
    plot_curves(folder / "curves.png", metrics, title)
