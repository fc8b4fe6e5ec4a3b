from __future__ import annotations

import math
import time
import tracemalloc

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kd_yolo.anomaly.curves import Curve, pixel_steps
from kd_yolo.anomaly.metrics import (
    KEYS,
    AnomalyMetrics,
    aupro,
    auroc_by_defect,
    best_f1,
    image_auroc,
    pixel_auroc,
)
from kd_yolo.errors import ModelError

Floats = NDArray[np.float32]
Masks = NDArray[np.uint8]


def tied(seed: int, count: int = 4, side: int = 20, levels: int = 12) -> tuple[Floats, Masks]:
    """Maps with many ties and masks with several regions, one of them touching another by a corner only."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, side, side), np.uint8)
    for mask in masks[1:]:
        y, x = rng.integers(0, side - 8, 2)
        mask[y : y + 4, x : x + 3] = 1
        mask[y + 4 : y + 7, x + 3 : x + 7] = 1  # one region when corners join, two when they do not
        mask[side - 1, : int(rng.integers(1, 4))] = 1
    maps = np.round(rng.normal(size=masks.shape) * 2 + masks * rng.uniform(0.5, 3)).clip(-levels, levels)
    return maps.astype(np.float32), masks


def brute_aupro(maps: Floats, masks: Masks, limit: float, connectivity: int = 8, strict_ties: bool = True) -> float:
    """Walk down the sorted pixels one by one, keep the last entry of every tie, integrate up to the limit."""
    weights = np.zeros(maps.shape)
    regions = 0
    for weight, mask in zip(weights, masks, strict=True):
        count, labels = cv2.connectedComponents(mask, connectivity=connectivity)
        for label in range(1, count):
            weight[labels == label] = 1 / (labels == label).sum()
        regions += count - 1
    order = np.argsort(-maps.ravel(), kind="stable")
    scores, inside = maps.ravel()[order], masks.ravel()[order] > 0
    fpr, pro = np.cumsum(~inside) / (~inside).sum(), np.cumsum(weights.ravel()[order]) / regions
    if strict_ties:
        last = np.append(scores[1:] != scores[:-1], True)
        fpr, pro = fpr[last], pro[last]
    area, x0, y0 = 0.0, 0.0, 0.0
    for x1, y1 in zip(fpr, pro, strict=True):
        if x1 > limit:
            end = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            return float(area + (limit - x0) * (y0 + end) / 2) / limit
        area += (x1 - x0) * (y0 + y1) / 2
        x0, y0 = x1, y1
    return float(area) / limit


def pairwise_auroc(scores: Floats, labels: NDArray[np.int64], tie: float = 0.5) -> float:
    """Compare every anomalous with every normal score."""
    high, low = scores[labels == 1][:, None], scores[labels == 0][None, :]
    return float(((high > low) + tie * (high == low)).mean())


def test_image_auroc__hand_cases() -> None:
    assert image_auroc(np.array([0.1, 0.2, 0.8, 0.9]), np.array([0, 0, 1, 1])) == 1.0
    assert image_auroc(np.array([0.9, 0.8, 0.2, 0.1]), np.array([0, 0, 1, 1])) == 0.0
    assert image_auroc(np.ones(6), np.array([0, 1, 0, 1, 1, 0])) == 0.5
    # pairs (1, 0): (2 > 1), (2 = 2), (3 > 1), (3 > 2) -> 3.5 of 4
    assert image_auroc(np.array([1, 2, 2, 3]), np.array([0, 0, 1, 1])) == 3.5 / 4


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=2, max_size=60))
def test_image_auroc__equals_all_pairs_with_ties(rows: list[tuple[int, bool]]) -> None:
    scores = np.array([score for score, _ in rows], np.float32)
    labels = np.array([label for _, label in rows], np.int64)
    found = image_auroc(scores, labels)
    if labels.all() or not labels.any():
        assert math.isnan(found)
        return
    assert found == pytest.approx(pairwise_auroc(scores, labels), abs=1e-12)
    ties_won = pairwise_auroc(scores, labels, tie=1.0)  # the wrong twin: a tie counts as found
    if set(scores[labels == 1].tolist()) & set(scores[labels == 0].tolist()):
        assert abs(found - ties_won) > 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_metrics__agree_with_scikit_learn(seed: int) -> None:
    reference = pytest.importorskip("sklearn.metrics")
    maps, masks = tied(seed)
    assert pixel_auroc(maps, masks) == pytest.approx(reference.roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-12)
    precision, recall, thresholds = reference.precision_recall_curve(masks.ravel(), maps.ravel())
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    found, threshold = best_f1(maps, masks)
    assert found == pytest.approx(f1.max(), abs=1e-12)
    assert threshold == pytest.approx(thresholds[np.argmax(f1[:-1])])


def test_aupro__hand_cases() -> None:
    mask = np.zeros((1, 8, 8), np.uint8)
    mask[0, 2:4, 2:4] = 1
    assert aupro(mask.astype(np.float32), mask) == pytest.approx(1.0)
    # one tie of all pixels: a straight line from (0, 0) to (1, 1), area 0.3 ** 2 / 2 up to 0.3, divided by 0.3
    assert aupro(np.ones((1, 8, 8), np.float32), mask) == pytest.approx(0.15)
    assert aupro(-mask.astype(np.float32), mask) == 0.0
    assert aupro(np.ones((1, 8, 8), np.float32), mask, limit=1.0) == pytest.approx(0.5)


def test_aupro__a_small_region_weighs_as_much_as_a_large_one() -> None:
    mask = np.zeros((1, 20, 20), np.uint8)
    mask[0, :10, :10] = 1
    mask[0, 15, 15] = 1
    only_large = mask.astype(np.float32)
    only_large[0, 15, 15] = -1.0  # below every background pixel
    assert aupro(only_large, mask) == pytest.approx(0.5)
    assert pixel_auroc(only_large, mask) == pytest.approx(100 / 101)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_aupro__equals_walk_over_sorted_pixels(seed: int, limit: float) -> None:
    maps, masks = tied(seed)
    assert aupro(maps, masks, limit) == pytest.approx(brute_aupro(maps, masks, limit), abs=1e-12)


def test_aupro__wrong_twins_are_told_apart() -> None:
    maps, masks = tied(3)
    right = aupro(maps, masks)
    assert abs(right - brute_aupro(maps, masks, 0.3, connectivity=4)) > 1e-3
    assert abs(right - brute_aupro(maps, masks, 0.3, strict_ties=False)) > 1e-3
    shifted = maps + 4 * np.arange(len(maps), dtype=np.float32)[:, None, None]  # each image has its own level
    averaged = np.mean([aupro(shifted[i : i + 1], masks[i : i + 1]) for i in range(1, len(maps))])
    assert abs(aupro(shifted, masks) - averaged) > 0.05


@pytest.mark.parametrize("limit", [0.0, -0.1, 1.1])
def test_aupro__limit_out_of_range(limit: float) -> None:
    with pytest.raises(ValueError, match="limit"):
        aupro(*tied(0), limit=limit)


@pytest.mark.parametrize("change", [np.exp, lambda x: x**3, lambda x: 1000 * x + 7])
def test_metrics__rising_change_of_scores_changes_nothing(change: object) -> None:
    maps, masks = tied(5)
    other = change(maps.astype(np.float64))  # type: ignore[operator]
    assert pixel_auroc(other, masks) == pytest.approx(pixel_auroc(maps, masks), abs=1e-12)
    assert aupro(other, masks) == pytest.approx(aupro(maps, masks), abs=1e-12)


def test_pixel_steps__histogram_is_near_the_exact_result() -> None:
    rng = np.random.default_rng(0)
    masks = np.zeros((6, 128, 128), np.uint8)
    masks[:3, 20:60, 30:50] = 1
    masks[:3, 100:103, 100:110] = 1
    maps = (rng.normal(size=masks.shape) + 1.5 * masks).astype(np.float32)
    maps[0, 0, 0] = 1e9  # bins of equal width would all be empty but two
    exact, binned = pixel_steps(maps, masks), pixel_steps(maps, masks, exact_pixels=1000)
    assert len(binned.scores) < 20_001
    assert binned.roc().area() == pytest.approx(exact.roc().area(), abs=1e-4)
    assert binned.pro().area(0.3) == pytest.approx(exact.pro().area(0.3), abs=1e-4)
    assert binned.best_f1()[0] == pytest.approx(exact.best_f1()[0], abs=2e-3)
    assert binned.best_f1()[1] == pytest.approx(exact.best_f1()[1], abs=0.05)
    assert (binned.negatives, binned.positives) == (exact.negatives, exact.positives)


def test_pixel_steps__histogram_of_few_values_is_exact() -> None:
    maps, masks = tied(2)
    exact, binned = pixel_steps(maps, masks), pixel_steps(maps, masks, exact_pixels=1)
    assert binned.roc().area() == pytest.approx(exact.roc().area(), abs=1e-12)
    assert binned.pro().area(0.3) == pytest.approx(exact.pro().area(0.3), abs=1e-12)
    assert binned.best_f1() == pytest.approx(exact.best_f1())


def test_pixel_steps__maps_of_different_sizes() -> None:
    maps, masks = tied(1)
    cut = [one[: 20 - i] for i, one in enumerate(maps)], [one[: 20 - i] for i, one in enumerate(masks)]
    flat = np.concatenate([m.ravel() for m in cut[0]]), np.concatenate([m.ravel() for m in cut[1]])
    assert pixel_auroc(*cut) == pytest.approx(image_auroc(*flat), abs=1e-12)


def test_pixel_steps__shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        pixel_steps(np.zeros((1, 8, 8), np.float32), np.zeros((1, 8, 9), np.uint8))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_metrics__values_that_are_not_finite(value: float) -> None:
    maps, masks = tied(0)
    maps[0, 3, 3] = value
    with pytest.raises(ModelError, match="1 of 400 anomaly scores are not finite"):
        pixel_auroc(maps, masks)
    with pytest.raises(ModelError, match="1 of 2 anomaly scores are not finite"):
        image_auroc(np.array([0.0, value]), np.array([0, 1]))


def test_best_f1__hand_cases() -> None:
    assert best_f1(np.array([0.1, 0.2, 0.8, 0.9]), np.array([0, 0, 1, 1])) == (1.0, 0.8)
    # at 3: 1 found, none false, 1 missed: 2/3; at 1: 2 found, 1 false: 4/5
    f1, threshold = best_f1(np.array([1.0, 2.0, 3.0, 0.0]), np.array([1, 0, 1, 0]))
    assert f1 == pytest.approx(0.8)
    assert threshold == 1.0
    assert all(math.isnan(value) for value in best_f1(np.ones(3), np.zeros(3)))
    assert best_f1(np.array([0.4, 0.6]), np.ones(2)) == (1.0, 0.4)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=1, max_size=40))
def test_best_f1__no_threshold_is_better(rows: list[tuple[int, bool]]) -> None:
    scores, labels = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    if not labels.any():
        return
    tried = [
        2 * (labels & (scores >= t)).sum() / ((scores >= t).sum() + labels.sum()) for t in np.arange(-5, 6)
    ]  # fmt: skip
    found, threshold = best_f1(scores, labels)
    assert found == pytest.approx(max(tried), abs=1e-12)
    marked = scores >= threshold
    assert 2 * (labels & marked).sum() / (marked.sum() + labels.sum()) == pytest.approx(found, abs=1e-12)


def test_compute__keys_and_values() -> None:
    maps, masks = tied(7)
    scores, labels = maps.max((1, 2)), masks.max((1, 2))
    found = AnomalyMetrics.compute(scores, labels, maps, masks)
    assert found.keys == list(found.results_dict) == list(KEYS)
    assert found.results_dict["metrics/image_auroc"] == image_auroc(scores, labels) == found.fitness
    assert found.results_dict["metrics/pixel_auroc"] == pixel_auroc(maps, masks)
    assert found.results_dict["metrics/aupro"] == aupro(maps, masks)
    assert found.results_dict["metrics/image_f1"] == best_f1(scores, labels)[0]
    assert (found.pixel_f1, found.pixel_f1_threshold) == best_f1(maps, masks)
    assert (found.images, found.anomalies, found.regions_known) == (4, 3, 3)
    assert set(found.curves) == {"image_roc", "pixel_roc", "pro"}


def test_compute__images_without_truth_do_not_count_as_background() -> None:
    maps, masks = tied(4)
    blank = masks.copy()
    blank[2] = 0  # anomalous, but nobody drew where
    scores, labels = maps.max((1, 2)), masks.max((1, 2))
    found = AnomalyMetrics.compute(scores, labels, maps, blank, known=[True, True, False, True])
    rest = [0, 1, 3]
    assert found.pixel_auroc == pixel_auroc(maps[rest], masks[rest])
    assert found.pixel_auroc != pixel_auroc(maps, blank)
    assert found.image_auroc == image_auroc(scores, labels)
    assert found.regions_known == 2


def test_compute__without_masks_only_the_image_level_is_defined() -> None:
    labels, scores = np.array([0, 1, 1]), np.array([0.1, 0.3, 0.2])
    maps = np.zeros((3, 8, 8), np.float32)
    for found in (
        AnomalyMetrics.compute(scores, labels),
        AnomalyMetrics.compute(scores, labels, maps, np.zeros((3, 8, 8), np.uint8), known=[True, False, False]),
    ):
        assert found.image_auroc == 1.0
        assert math.isnan(found.pixel_auroc)
        assert math.isnan(found.aupro)
        assert found.summary()["aupro"] is None
        assert set(found.curves) == {"image_roc"}


def test_compute__normal_images_only() -> None:
    found = AnomalyMetrics.compute(np.array([0.1, 0.2]), np.zeros(2))
    assert all(math.isnan(value) for value in found.mean_results())
    assert found.curves == {}


def test_mean__is_plain_and_keeps_undefined() -> None:
    a = AnomalyMetrics(0.9, 0.8, 0.7, 0.6, 0.5, images=10, anomalies=4)
    b = AnomalyMetrics(0.7, 0.6, math.nan, 0.4, 0.3, images=90, anomalies=6)
    mean = AnomalyMetrics.mean([a, b])
    assert mean.image_auroc == pytest.approx(0.8)  # not weighted by the number of images
    assert math.isnan(mean.aupro)
    assert (mean.images, mean.anomalies) == (100, 10)


def test_auroc_by_defect__against_all_normals() -> None:
    scores, labels = np.array([0.0, 1.0, 2.0, 0.5]), np.array([0, 0, 1, 1])
    assert auroc_by_defect(scores, labels, ["good", "good", "hole", "scratch"]) == {"hole": 1.0, "scratch": 0.5}


def test_thinned__keeps_ends_and_area() -> None:
    x = np.linspace(0, 1, 50_001)
    curve = Curve(x, np.sqrt(x))
    thin = curve.thinned(500)
    assert len(thin.x) <= 500
    assert (thin.x[0], thin.x[-1], thin.y[-1]) == (0.0, 1.0, 1.0)
    assert thin.area() == pytest.approx(2 / 3, abs=1e-4)


def test_compute__101_images_of_256_pixels_in_seconds_and_little_memory() -> None:
    rng = np.random.default_rng(0)
    masks = np.zeros((101, 256, 256), np.uint8)
    masks[:40, 50:80, 60:100] = 1
    maps = rng.standard_normal(masks.shape, dtype=np.float32) + masks
    tracemalloc.start()
    start = time.perf_counter()
    found = AnomalyMetrics.compute(maps.max((1, 2)), masks.max((1, 2)), maps, masks)
    spent_s, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # N(1, 1) against N(0, 1): AUROC = Phi(1 / sqrt 2) = 0.7602
    assert found.pixel_auroc == pytest.approx(0.7602, abs=2e-3)
    assert spent_s < 15  # 0.4 s alone on one core
    assert peak < 5 * maps.nbytes
