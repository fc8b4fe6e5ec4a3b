from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from anomaly_files import LIMITS, NAMES
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from ultralytics.engine.results import Results

from kd_yolo.anomaly.calibration import Calibration
from kd_yolo.inspection.regions import canvas_rectangle, covered_shares, find_regions, normalised_map
from kd_yolo.inspection.results import AnomalyResult, captioned, heat_picture


def map_with(blobs: dict[tuple[int, int, int, int], float], size: tuple[int, int] = (32, 32)) -> NDArray[np.float32]:
    """Return zeros with rectangles (x1, y1, x2, y2) of a value."""
    values = np.zeros(size, np.float32)
    for (left, top, right, bottom), value in blobs.items():
        values[top:bottom, left:right] = value
    return values


def result_of(values: NDArray[np.float32], height: int = 64, width: int = 128, conf: float = 0.5) -> AnomalyResult:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return AnomalyResult(image, "part.png", NAMES, values, float(values.max()), LIMITS, conf)


# ---- regions ---------------------------------------------------------------------------------------------------------


def test_find_regions__extent_peak_area_and_box_of_the_image() -> None:
    values = map_with({(4, 8, 12, 16): 0.4, (6, 10, 8, 12): 0.6})
    (region,), labels = find_regions(values, LIMITS, (64, 128))
    # The canvas of 32x32 covers 64x128 pixels: a cell is 2 high and 4 wide.
    assert region.box == (16.0, 16.0, 48.0, 32.0)
    assert region.area == 8 * 8 * 2 * 4
    assert region.peak == pytest.approx(0.6)
    assert region.confidence == pytest.approx((0.6 - 0.5) / (0.5 - 0.1) + 0.5)
    assert np.array_equal(labels == region.number, values > 0.3)


def test_find_regions__corners_connect() -> None:
    values = map_with({(4, 4, 8, 8): 0.6, (8, 8, 12, 12): 0.6})
    assert len(find_regions(values, LIMITS, (32, 32))[0]) == 1
    four, _ = cv2.connectedComponents((values > 0.3).astype(np.uint8), connectivity=4)
    assert four - 1 == 2  # what the test would miss otherwise


@pytest.mark.parametrize(("min_area", "count"), [(None, 2), (0.0, 3), (16.0, 2), (17.0, 1), (65.0, 0)])
def test_find_regions__smallest_area_in_pixels_of_the_image(min_area: float | None, count: int) -> None:
    values = map_with({(0, 0, 8, 8): 0.9, (16, 16, 20, 20): 0.8, (28, 28, 30, 30): 0.7})
    assert len(find_regions(values, LIMITS, (32, 32), 0.5, min_area)[0]) == count


def test_find_regions__default_area_is_a_cell_whatever_the_image_size() -> None:
    values = map_with({(0, 0, 4, 4): 0.9, (10, 10, 13, 15): 0.9})
    for shape in ((16, 16), (32, 32), (500, 900)):
        (region,), _ = find_regions(values, LIMITS, shape)
        assert region.box[:2] == (0.0, 0.0)


def test_find_regions__weak_ones_only_with_a_lower_conf_and_not_in_the_labels() -> None:
    values = map_with({(0, 0, 8, 8): 0.45, (16, 16, 24, 24): 0.9})
    (only,), labels = find_regions(values, LIMITS, (32, 32))
    assert only.peak == pytest.approx(0.9)
    assert labels[4, 4] == 0
    both, labels = find_regions(values, LIMITS, (32, 32), conf=0.0)
    assert [round(region.peak, 2) for region in both] == [0.9, 0.45]
    assert labels[4, 4] == both[1].number


@given(st.integers(0, 10_000), st.floats(0.2, 1.0))
@settings(max_examples=40, deadline=None)
def test_find_regions__image_is_anomalous_exactly_when_there_is_a_region(seed: int, highest: float) -> None:
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, highest, (6, 6)).astype(np.float32)
    values = np.asarray(cv2.resize(coarse, (48, 48), interpolation=cv2.INTER_NEAREST), dtype=np.float32)
    found, _ = find_regions(values, LIMITS, (100, 70))
    assert bool(found) == (values.max() >= LIMITS.threshold_image)
    assert [one.peak for one in found] == sorted((one.peak for one in found), reverse=True)


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_covered_shares__as_counted_pixel_by_pixel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.asarray(cv2.resize(rng.random((5, 5), np.float32), (30, 30)), dtype=np.float32)
    shape = (90, 60)
    found, labels = find_regions(values, LIMITS, shape, conf=0.0, min_area=0)
    corners = rng.uniform(-5, 95, (3, 4))
    boxes = [[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in corners.tolist()]
    shares = covered_shares(found, labels, boxes, shape, margin=0.0)
    for region, share in zip(found, shares, strict=True):
        inside = 0
        for y, x in np.argwhere(labels == region.number).tolist():
            # A cell of the canvas is 3 rows and 2 columns of the image; it counts when a box touches it.
            touched = [b[0] < 2 * x + 2 and b[2] > 2 * x and b[1] < 3 * y + 3 and b[3] > 3 * y for b in boxes]
            edge = [b[2] <= 0 or b[3] <= 0 or b[0] >= shape[1] or b[1] >= shape[0] for b in boxes]
            inside += any(t and not e for t, e in zip(touched, edge, strict=True))
        if not any(b[2] <= 0 or b[3] <= 0 or b[0] >= shape[1] or b[1] >= shape[0] for b in boxes):
            assert share == pytest.approx(inside / int((labels == region.number).sum()))


def test_covered_shares__margin_reaches_around_a_box() -> None:
    values = map_with({(8, 8, 24, 24): 0.9}, (64, 64))
    found, labels = find_regions(values, LIMITS, (64, 64))
    box = [10.0, 10.0, 22.0, 22.0]
    assert covered_shares(found, labels, [box], (64, 64), margin=0.0) == [pytest.approx(144 / 256)]
    assert covered_shares(found, labels, [box], (64, 64), margin=2 / 64) == [1.0]
    assert covered_shares(found, labels, [], (64, 64)) == [0.0]


def test_covered_shares__overlapping_boxes_count_once() -> None:
    values = map_with({(0, 0, 16, 16): 0.9}, (64, 64))
    found, labels = find_regions(values, LIMITS, (64, 64))
    half = [0.0, 0.0, 8.0, 16.0]
    assert covered_shares(found, labels, [half, half], (64, 64), margin=0.0) == [0.5]


@pytest.mark.parametrize("box", [(5.2, 5.2, 5.3, 5.3), (63.99, 0, 64, 64), (200, 200, 300, 300), (-9, -9, -1, -1)])
def test_canvas_rectangle__never_empty(box: tuple[float, float, float, float]) -> None:
    rows, columns = canvas_rectangle(box, (32, 32), (64, 64))
    assert rows.stop - rows.start == columns.stop - columns.start or box[0] == 63.99
    assert np.zeros((32, 32))[rows, columns].size >= 1


def test_normalised_map__as_the_calibration_says() -> None:
    values = np.linspace(-1, 2, 50, dtype=np.float32).reshape(5, 10)
    expected = [LIMITS.normalised(float(value)) for value in values.ravel()]
    assert np.allclose(normalised_map(values, LIMITS).ravel(), expected, atol=1e-6)
    flat = Calibration([0.0], [1.0], 0.5, 0.3, 0.5, 0.5)  # all normal images alike: a step, not a division by zero
    assert normalised_map(np.array([[0.4, 0.6]], np.float32), flat).tolist() == [[0.0, 1.0]]


# ---- AnomalyResult ---------------------------------------------------------------------------------------------------


def test_anomaly_result__score_map_mask_and_boxes() -> None:
    result = result_of(map_with({(4, 8, 12, 16): 0.6}))
    assert (result.threshold, result.threshold_pixel) == (0.5, 0.3)
    assert result.score == pytest.approx(0.6)
    assert result.is_anomaly
    assert result.normalised_score == pytest.approx(0.75)
    assert result.anomaly_map.shape == result.mask.shape == (64, 128)
    assert result.anomaly_map.dtype == np.float32
    assert result.mask.dtype == np.bool_
    assert abs(int(result.mask.sum()) - result.regions[0].area) < 0.2 * result.regions[0].area
    assert np.allclose(result.boxes.data.tolist(), [[16, 16, 48, 32, 0.75, 1]])


def test_anomaly_result__at_the_threshold_is_normal() -> None:
    result = result_of(map_with({(4, 8, 12, 16): 0.5}))
    assert not result.is_anomaly
    assert result.normalised_score == 0.5


def test_anomaly_result__nothing_found() -> None:
    result = result_of(map_with({}))
    assert len(result) == len(result.boxes) == 0
    assert result.summary() == []
    assert "normal" in result.verbose()
    assert result.plot().shape == (64, 128, 3)


def test_save_txt__class_one_and_the_box_relative_to_the_image(tmp_path: Path) -> None:
    result = result_of(map_with({(4, 8, 12, 16): 0.6}))
    result.save_txt(tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "1 0.25 0.375 0.25 0.25\n"
    result.save_txt(tmp_path / "b.txt", save_conf=True)
    assert (tmp_path / "b.txt").read_text() == "1 0.25 0.375 0.25 0.25 0.75\n"


def test_save_crop__a_file_for_each_region(tmp_path: Path) -> None:
    result_of(map_with({(4, 8, 12, 16): 0.6, (20, 20, 28, 28): 0.9})).save_crop(tmp_path, "part.jpg")
    assert len(list((tmp_path / "anomaly").glob("*.jpg"))) == 2


def test_summary_and_json__as_of_a_detector() -> None:
    result = result_of(map_with({(4, 8, 12, 16): 0.6}))
    (row,) = result.summary()
    assert (row["name"], row["class"], row["confidence"]) == ("anomaly", 1, pytest.approx(0.75))
    assert row["box"] == {"x1": 16.0, "y1": 16.0, "x2": 48.0, "y2": 32.0}


def test_plot__without_heat_is_what_ultralytics_draws() -> None:
    result = result_of(map_with({(4, 8, 12, 16): 0.6}))
    stock = Results(result.orig_img, "part.png", NAMES, boxes=result.boxes.data)
    assert np.array_equal(result.plot(heat=False), stock.plot())
    heat = result.plot()
    assert heat.dtype == np.uint8
    assert not np.array_equal(heat, stock.plot())
    assert np.array_equal(result.plot(img=result.orig_img.copy()), stock.plot())
    assert np.array_equal(result.plot(True, None, None, "Arial.ttf", False, result.orig_img.copy()), stock.plot())


def test_plot__leaves_the_image_alone_and_saves(tmp_path: Path) -> None:
    result = result_of(map_with({(4, 8, 12, 16): 0.6}))
    before = result.orig_img.copy()
    result.save(str(tmp_path / "p.png"))
    assert np.array_equal(result.orig_img, before)
    read = cv2.imread(str(tmp_path / "p.png"))
    assert read is not None
    assert np.array_equal(read, result.plot())


def test_part_and_moved_results__keep_score_and_map() -> None:
    result = result_of(map_with({(4, 8, 12, 16): 0.6, (20, 20, 28, 28): 0.9}))
    for part, count in ((result[0], 1), (result.cpu(), 2), (result.numpy(), 2), (result[:1], 1)):
        assert isinstance(part, AnomalyResult)
        assert len(part.boxes) == count
        assert part.score == result.score
        assert part.plot().shape == (64, 128, 3)
    assert len(result.boxes) == 2


def test_heat_picture__threshold_has_the_same_colour_in_every_image() -> None:
    grey = np.full((16, 16, 3), 128, np.uint8)
    colors = []
    for scale in (0.5, 3.0):
        values = np.full((16, 16), 0.0, np.float32)
        values[8:, :] = scale
        values[0, 0] = LIMITS.threshold_pixel
        colors.append(heat_picture(grey, values, LIMITS.threshold_pixel)[0, 0].astype(int))
    assert np.abs(colors[0] - colors[1]).max() <= 2


@pytest.mark.parametrize("size", [(10, 10), (20, 400), (400, 20), (1000, 1000)])
def test_captioned__any_size(size: tuple[int, int]) -> None:
    image = np.full((*size, 3), 128, np.uint8)
    written = captioned(image, "anomaly 0.93")
    assert written.shape == image.shape
    assert (written != image).any()


def test_to_dict__plain_data() -> None:
    content = result_of(map_with({(4, 8, 12, 16): 0.6})).to_dict()
    assert content["is_anomaly"] is True
    assert content["regions"][0]["box_xyxy_px"] == [16.0, 16.0, 48.0, 32.0]
    assert content["regions"][0]["area_px"] == 512
