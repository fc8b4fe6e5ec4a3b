"""Pictures of a validation: heat maps over images, the scores with the threshold, ROC and PRO curves.

Colours are safe for colour-blind readers (M. Okabe, K. Ito): truth is sky blue, what the model marks is orange.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from kd_yolo.anomaly.metrics import PRO_LIMIT, AnomalyMetrics
from kd_yolo.files import written_aside

Image = NDArray[np.uint8]
NORMAL_COLOR, ANOMALY_COLOR = "#0072b2", "#d55e00"
TRUTH_RGB, FOUND_RGB = (86, 180, 233), (230, 159, 0)
HEAT = 0.45
"""Weight of the heat map over the image."""


def plot_overlays(
    path: Path,
    images: NDArray[np.uint8] | Sequence[Image],
    maps: NDArray[np.floating] | Sequence[NDArray[np.floating]],
    masks: NDArray[np.generic] | Sequence[NDArray[np.generic] | None],
    titles: Sequence[str],
    threshold: float | None = None,
    span: tuple[float, float] | None = None,
) -> Path:
    """Draw one row an image: the image, the truth, the heat map and what lies above the threshold.

    Args:
        path: PNG file to write.
        images: RGB, uint8 of shape (N, 3, H, W), or N images (3, H_i, W_i).
        maps: Anomaly maps of the same sizes.
        masks: Truth of the same sizes, above 0 where anomalous; None for an image whose truth is not known.
        titles: A text for each row.
        threshold: Pixels from this value on are outlined; None leaves the last column out.
        span: Map values drawn in the coldest and the hottest colour; default: lowest and highest of all maps.

    Returns:
        ``path``.

    Raises:
        OutputError: The file cannot be written.
    """
    low, high = span or (min(float(one.min()) for one in maps), max(float(one.max()) for one in maps))
    heads = ["image", "truth", "anomaly map", *([] if threshold is None else [f"map ≥ {threshold:.3g}"])]
    figure = Figure(figsize=(2.2 * len(heads) + 0.2, 2.35 * len(titles) + 0.3), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(titles), len(heads), squeeze=False)
    for row, (image, one, mask, title) in enumerate(zip(images, maps, masks, titles, strict=True)):
        rgb = np.ascontiguousarray(np.asarray(image).transpose(1, 2, 0))
        truth = "truth not known" if mask is None else ""
        tiles = [
            rgb,
            rgb if mask is None else outlined(rgb, np.asarray(mask) > 0, TRUTH_RGB),
            heated(rgb, one, low, high),
        ]
        if threshold is not None:
            tiles.append(outlined(rgb, one >= threshold, FOUND_RGB))
        for column, (axes, tile) in enumerate(zip(grid[row], tiles, strict=True)):
            axes.imshow(tile)
            axes.set_axis_off()
            if row == 0:
                axes.set_title(heads[column], fontsize=9)
        grid[row][0].text(0, -0.03, title, transform=grid[row][0].transAxes, fontsize=7, va="top")
        grid[row][1].text(0, -0.03, truth, transform=grid[row][1].transAxes, fontsize=7, va="top")
    return _saved(figure, path)


def plot_histogram(
    path: Path,
    scores: NDArray[np.floating],
    labels: NDArray[np.generic],
    threshold: float | None = None,
    title: str = "",
) -> Path:
    """Draw how image scores of normal and anomalous images are distributed, with the threshold and what it misses.

    Args:
        path: PNG file to write.
        scores: Image scores, shape (N,).
        labels: 0 normal or 1 anomalous, shape (N,).
        threshold: Scores from here on are called anomalous.
        title: Text above.

    Raises:
        OutputError: The file cannot be written.
    """
    values, positive = np.asarray(scores, dtype=np.float64), np.asarray(labels).astype(bool)
    edges = np.histogram_bin_edges(values, bins=min(60, max(10, len(values) // 4)))
    figure, axes = _figure(title)
    for chosen, name, color in ((~positive, "normal", NORMAL_COLOR), (positive, "anomalous", ANOMALY_COLOR)):
        if chosen.any():
            label = f"{name} ({chosen.sum()})"
            axes.hist(values[chosen], edges, color=color, alpha=0.6, label=label, edgecolor="white", linewidth=0.4)
    if threshold is not None:
        missed = int((values[positive] < threshold).sum())
        alarms = int((values[~positive] >= threshold).sum())
        text = f"threshold {threshold:.3g}: {missed} of {positive.sum()} missed, "
        text += f"{alarms} of {(~positive).sum()} false alarms"
        axes.axvline(threshold, color="black", linewidth=1, linestyle="--", label=text)
    axes.set_xlabel("image score")
    axes.set_ylabel("images")
    axes.legend(fontsize=8)
    return _saved(figure, path)


def plot_curves(path: Path, metrics: AnomalyMetrics, title: str = "") -> Path | None:
    """Draw the ROC curves of images and pixels, and the PRO curve with the area that counts.

    Args:
        path: PNG file to write.
        metrics: What was measured.
        title: Text above.

    Returns:
        ``path``, or None, and nothing is written, when no curve is defined.

    Raises:
        OutputError: The file cannot be written.
    """
    if not metrics.curves:
        return None
    figure = Figure(figsize=(10, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    roc, pro = figure.subplots(1, 2)
    for key, name, area, color in (
        ("image_roc", "image", metrics.image_auroc, ANOMALY_COLOR),
        ("pixel_roc", "pixel", metrics.pixel_auroc, NORMAL_COLOR),
    ):
        if key in metrics.curves:
            curve = metrics.curves[key]
            roc.plot(curve.x, curve.y, color=color, label=f"{name}: AUROC {_shown(area)}")
    roc.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    roc.set_ylabel("true-positive rate")
    if "pro" in metrics.curves:
        curve = metrics.curves["pro"]
        pro.plot(curve.x, curve.y, color=NORMAL_COLOR, label=f"AUPRO@{PRO_LIMIT:g} {_shown(metrics.aupro)}")
        pro.fill_between(curve.x, curve.y, where=(curve.x <= PRO_LIMIT).tolist(), color=NORMAL_COLOR, alpha=0.2)
        pro.axvline(PRO_LIMIT, color="grey", linewidth=0.8, linestyle=":")
    else:
        pro.text(0.5, 0.5, "no pixel truth", ha="center", va="center", color="grey")
    pro.set_ylabel("per-region overlap")
    for axes in (roc, pro):
        axes.set_xlabel("false-positive rate")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, loc="lower right")
    if title:
        figure.suptitle(title, fontsize=10)
    return _saved(figure, path)


def pick_examples(
    scores: NDArray[np.floating], labels: NDArray[np.generic], defects: Sequence[str], count: int = 12
) -> list[int]:
    """Choose the images that say most: of each kind of defect the hardest, then the normal images of highest score.

    Args:
        scores: Image scores, shape (N,).
        labels: 0 normal or 1 anomalous, shape (N,).
        defects: Kind of defect of each image.
        count: Most images to choose; a quarter of them normal where there are any.

    Returns:
        Row numbers: anomalous ones by kind, the lowest score first, then normal ones, the highest score first.
    """
    values, positive = np.asarray(scores), np.asarray(labels).astype(bool)
    normal = [int(row) for row in np.argsort(-values, kind="stable") if not positive[row]]
    by_kind: dict[str, list[int]] = {}
    for row in np.argsort(values, kind="stable"):
        if positive[row]:
            by_kind.setdefault(defects[int(row)], []).append(int(row))
    wanted = count if not normal else max(count - max(1, count // 4), count - len(normal))
    depth = max((len(rows) for rows in by_kind.values()), default=0)
    turns = [(kind, rows[turn]) for turn in range(depth) for kind, rows in sorted(by_kind.items()) if turn < len(rows)]
    chosen = [row for _, row in sorted(turns[:wanted], key=lambda pair: pair[0])]
    return chosen + normal[: count - len(chosen)]


def heated(rgb: Image, anomaly_map: NDArray[np.floating], low: float, high: float) -> Image:
    """Lay a heat map over an image.

    Args:
        rgb: uint8 of shape (H, W, 3).
        anomaly_map: Shape (H, W).
        low: Value drawn in the coldest colour.
        high: Value drawn in the hottest colour.

    Returns:
        RGB, uint8 of shape (H, W, 3).
    """
    share = (np.asarray(anomaly_map, dtype=np.float32) - low) / max(high - low, 1e-12)
    levels = np.round(np.clip(share, 0, 1) * 255).astype(np.uint8)
    colors = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB)
    return np.asarray(cv2.addWeighted(colors, HEAT, rgb, 1 - HEAT, 0), dtype=np.uint8)


def outlined(rgb: Image, mask: NDArray[np.bool_], color: tuple[int, int, int]) -> Image:
    """Draw the outline of a mask on a copy of an image.

    Args:
        rgb: uint8 of shape (H, W, 3).
        mask: Shape (H, W).
        color: RGB.
    """
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    drawn = np.ascontiguousarray(rgb).copy()
    return np.asarray(cv2.drawContours(drawn, found, -1, color, max(1, round(min(mask.shape) / 160))), dtype=np.uint8)


def _figure(title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if title:
        axes.set_title(title, fontsize=10)
    return figure, axes


def _shown(area: float) -> str:
    return "-" if math.isnan(area) else f"{area:.4f}"


def _saved(figure: Figure, path: Path) -> Path:
    with written_aside(path) as aside:
        figure.savefig(aside)
    return path
