from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from kd_yolo.anomaly.metrics import AnomalyMetrics
from kd_yolo.anomaly.plots import heated, outlined, pick_examples, plot_curves, plot_histogram, plot_overlays
from kd_yolo.errors import OutputError


def pixels(path: Path) -> NDArray[np.uint8]:
    found = cv2.imread(str(path))
    assert found is not None
    return np.asarray(found, np.uint8)


def example() -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    masks = np.zeros((3, 32, 32), np.uint8)
    masks[1:, 8:20, 10:18] = 1
    maps = (rng.normal(size=masks.shape) * 0.1 + masks).astype(np.float32)
    return np.full((3, 3, 32, 32), 128, np.uint8), maps, masks


def has(picture: NDArray[np.uint8], rgb: tuple[int, int, int]) -> bool:
    return bool((np.abs(picture.astype(int) - np.array(rgb[::-1])).max(axis=2) < 12).any())


def test_plot_overlays__draws_truth_and_found(tmp_path: Path) -> None:
    images, maps, masks = example()
    path = plot_overlays(tmp_path / "o.png", images, maps, masks, ["a", "b", "c"], threshold=0.5)
    picture = pixels(path)
    assert has(picture, (86, 180, 233))
    assert has(picture, (230, 159, 0))
    plain = pixels(plot_overlays(tmp_path / "p.png", images[:1], maps[:1], [None], ["a"]))
    assert not has(plain, (86, 180, 233))
    assert not has(plain, (230, 159, 0))
    assert plain.shape[1] < picture.shape[1]  # no column of the threshold


def test_plot_histogram__shows_both_and_the_threshold(tmp_path: Path) -> None:
    scores, labels = np.array([0.1, 0.2, 0.15, 0.9, 0.8]), np.array([0, 0, 0, 1, 1])
    with_line = pixels(plot_histogram(tmp_path / "h.png", scores, labels, 0.5, "parts"))
    without = pixels(plot_histogram(tmp_path / "g.png", scores, labels))
    assert not np.array_equal(with_line, without)
    assert pixels(plot_histogram(tmp_path / "n.png", scores[:3], labels[:3], 0.5)).shape == with_line.shape
    assert plot_histogram(tmp_path / "s.png", np.ones(4), np.array([0, 0, 1, 1]), 1.0).is_file()


def test_plot_curves__with_and_without_pixel_truth(tmp_path: Path) -> None:
    _, maps, masks = example()
    scores, labels = maps.max((1, 2)), masks.max((1, 2))
    full = plot_curves(tmp_path / "c.png", AnomalyMetrics.compute(scores, labels, maps, masks), "parts")
    image_only = plot_curves(tmp_path / "i.png", AnomalyMetrics.compute(scores, labels))
    assert full is not None
    assert image_only is not None
    assert not np.array_equal(pixels(full), pixels(image_only))


def test_plot_curves__nothing_to_draw(tmp_path: Path) -> None:
    assert plot_curves(tmp_path / "c.png", AnomalyMetrics.compute(np.ones(2), np.zeros(2))) is None
    assert not (tmp_path / "c.png").exists()


def test_plots__folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot create this folder"):
        plot_histogram(tmp_path / "file" / "h.png", np.ones(2), np.zeros(2))


def test_pick_examples__hardest_of_each_kind_then_loudest_normals() -> None:
    #                  0    1    2    3    4    5    6    7
    scores = np.array([0.1, 0.9, 0.3, 0.5, 0.2, 0.8, 0.7, 0.4])
    labels = np.array([0, 0, 1, 1, 1, 1, 1, 0])
    defects = ["good", "good", "hole", "hole", "dent", "dent", "dent", "good"]
    assert pick_examples(scores, labels, defects, 4) == [
        4,
        6,
        2,
        1,
    ]  # two of three dents: one kind after the other in turn
    assert pick_examples(scores, labels, defects, 100) == [4, 6, 5, 2, 3, 1, 7, 0]
    assert pick_examples(scores[:2], labels[:2], defects[:2], 4) == [1, 0]
    assert pick_examples(scores[2:4], labels[2:4], defects[2:4], 4) == [0, 1]


def test_heated__cold_and_hot_ends() -> None:
    rgb = np.zeros((4, 4, 3), np.uint8)
    values = np.linspace(-1, 2, 16).reshape(4, 4)
    found = heated(rgb, values, 0.0, 1.0)
    assert np.array_equal(found[0, 0], found[1, 0])  # below the span: all the coldest colour
    assert found[3, 3, 0] > found[3, 3, 2]  # the hottest colour is red
    assert heated(rgb, np.ones((4, 4)), 1.0, 1.0).shape == (4, 4, 3)  # a flat map


def test_outlined__leaves_the_image_and_the_inside_alone() -> None:
    rgb = np.zeros((40, 40, 3), np.uint8)
    mask = np.zeros((40, 40), bool)
    mask[10:30, 10:30] = True
    found = outlined(rgb, mask, (86, 180, 233))
    assert tuple(found[10, 20].tolist()) == (86, 180, 233)
    assert found[20, 20].sum() == 0
    assert rgb.sum() == 0
