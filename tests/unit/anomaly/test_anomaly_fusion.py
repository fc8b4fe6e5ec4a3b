from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anomaly_factory import write_pixels
from anomaly_files import LIMITS, NAMES, StandIn, checkpoint, painted, write_video
from numpy.typing import NDArray
from ultralytics.engine.results import Results

from kd_yolo.errors import CheckpointError, ConfigError, KDYoloError
from kd_yolo.inspection import fusion, predict
from kd_yolo.inspection.fusion import FusionKeys, FusionPredictor, FusionReport, fusion_keys, predict_fused
from kd_yolo.inspection.fusion_result import UNKNOWN_BGR, FusedResult
from kd_yolo.inspection.results import AnomalyResult

KNOWN, STRANGE = (4, 4, 20, 20), (36, 36, 56, 56)
CLASSES = {0: "scratch", 1: "dent"}
Row = tuple[float, float, float, float, float, int]


class Detector:
    """Finds the same boxes in every image, and notes what it was asked."""

    def __init__(self, *rows: Row) -> None:
        self.rows = rows
        self.calls: list[dict[str, Any]] = []

    def predict(self, source: list[NDArray[np.uint8]], **keys: Any) -> list[Results]:
        self.calls.append({"images": len(source), **keys})
        boxes = torch.tensor(self.rows).reshape(-1, 6)
        return [Results(image, "image0.jpg", CLASSES, boxes=boxes.clone()) for image in source]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    session = StandIn()
    monkeypatch.setattr(predict, "open_anomaly", lambda *_, **__: session)
    monkeypatch.setattr(fusion, "_check_anomaly", lambda file: None)
    return session


def fused(image: NDArray[np.uint8], *rows: Row, explained: float = 0.5) -> FusedResult:
    session = StandIn()
    maps = session.maps(predict.canvas_images([image], session.canvas))
    seen = AnomalyResult(image, "part.png", NAMES, maps[0, 0], float(maps.max()), LIMITS)
    (found,) = Detector(*rows).predict([image])
    return FusedResult(found, seen, explained)


BOTH = painted({KNOWN: 0.8, STRANGE: 0.6})


# ---- what is explained ---------------------------------------------------------------------------------------------


def test_fused_result__a_region_under_a_detection_is_known_the_other_is_not() -> None:
    result = fused(BOTH, (4, 4, 20, 20, 0.9, 1))
    (known,), (strange,) = result.detections, result.unknown
    assert (known.name, known.class_index) == ("dent", 1)
    assert known.confidence == pytest.approx(0.9)
    assert strange.box == tuple(float(value) for value in STRANGE)
    assert strange.confidence == pytest.approx(LIMITS.normalised(0.6), abs=0.01)
    assert (strange.area, strange.covered) == (400, 0.0)
    assert result.is_defective
    without = fused(BOTH)
    assert [one.box[0] for one in without.unknown] == [4.0, 36.0]  # the highest peak first


@pytest.mark.parametrize(
    ("width", "explained", "unknown"),
    [(16, 0.5, 0), (8, 0.5, 0), (5, 0.5, 1), (5, 0.4, 0), (8, 0.7, 1), (14, 1.0, 0)],
)
def test_fused_result__share_of_the_region_under_boxes_enlarged_by_two_pixels(
    width: int, explained: float, unknown: int
) -> None:
    # The region has 16 columns; a box over the left `width` ones reaches 1/32 of 64 pixels, 2 columns, further.
    result = fused(painted({KNOWN: 0.8}), (4, 4, 4 + width, 20, 0.9, 0), explained=explained)
    assert len(result.unknown) == unknown
    if unknown:
        assert result.unknown[0].covered == pytest.approx((width + 2) / 16)


def test_fused_result__several_detections_explain_together() -> None:
    halves: tuple[Row, Row] = ((4, 4, 10, 20, 0.9, 0), (14, 4, 20, 20, 0.9, 1))
    image = painted({KNOWN: 0.8})
    assert fused(image, *halves, explained=0.9).unknown == []
    assert len(fused(image, halves[0], explained=0.9).unknown) == 1


def test_fused_result__normal_image() -> None:
    result = fused(painted({STRANGE: 0.45}))
    assert (result.detections, result.unknown, result.is_defective) == ([], [], False)
    assert result.plot().shape == (64, 64, 3)


def test_fused_result__detection_where_the_anomaly_model_sees_nothing() -> None:
    result = fused(painted({KNOWN: 0.8}), (40, 40, 60, 60, 0.7, 0), (4, 4, 36, 20, 0.6, 0))
    nothing, half = result.detections
    assert (nothing.anomaly_mean, nothing.anomaly_peak) == (0.0, 0.0)
    # Half of the box has the value 0.8, normalised 1, the other half 0.
    assert half.anomaly_mean == pytest.approx(0.5)
    assert half.anomaly_peak == 1.0


def test_fused_result__regions_are_found_at_any_image_size() -> None:
    big = np.kron(BOTH, np.ones((3, 5, 1), np.uint8))
    result = fused(big, (20, 12, 100, 60, 0.9, 1))
    (strange,) = result.unknown
    assert np.allclose(strange.box, [36 * 5, 36 * 3, 56 * 5, 56 * 3], atol=10)


# ---- as Ultralytics writes and draws -------------------------------------------------------------------------------


def test_save_txt__unknown_regions_have_the_class_after_the_last(tmp_path: Path) -> None:
    result = fused(BOTH, (4, 4, 20, 20, 0.9, 1))
    assert result.unknown_class == 2
    assert result.names == {0: "scratch", 1: "dent", 2: "unknown anomaly"}
    result.save_txt(tmp_path / "a.txt")
    lines = [[float(word) for word in line.split()] for line in (tmp_path / "a.txt").read_text().splitlines()]
    assert np.allclose(lines, [[1, 12 / 64, 12 / 64, 0.25, 0.25], [2, 46 / 64, 46 / 64, 20 / 64, 20 / 64]])
    result.save_crop(tmp_path, "a.jpg")
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"dent", "unknown anomaly"}
    assert [row["name"] for row in result.summary()] == ["dent", "unknown anomaly"]
    assert type(result[0]) is Results


def test_plot__known_and_unknown_in_different_colours() -> None:
    large = np.kron(BOTH, np.ones((8, 8, 1), np.uint8))
    result = fused(large, (32, 32, 160, 160, 0.9, 1))
    drawn = result.plot(labels=False, conf=False)
    assert (drawn == np.array(UNKNOWN_BGR)).all(2).any()
    known = Results(large, "", CLASSES, boxes=torch.tensor([[32.0, 32, 160, 160, 0.9, 1]])).plot(labels=False)
    edge = (slice(100, 110), slice(30, 35))
    assert np.array_equal(drawn[edge], known[edge])
    outside = (slice(280, 300), slice(200, 260))
    assert np.array_equal(drawn[outside], large[outside])
    assert np.array_equal(result.orig_img, large)


def test_plot__options_of_ultralytics(tmp_path: Path) -> None:
    result = fused(BOTH, (4, 4, 20, 20, 0.9, 1))
    assert result.plot(pil=True).size == (64, 64)
    assert np.array_equal(result.plot(True, None, None, "Arial.ttf", False, BOTH.copy()), result.plot(img=BOTH.copy()))
    result.save(str(tmp_path / "p.png"))
    assert (tmp_path / "p.png").is_file()


def test_to_dict__plain_data() -> None:
    content = json.loads(json.dumps(fused(BOTH, (4, 4, 20, 20, 0.9, 1)).to_dict()))
    assert content["threshold"] == 0.5
    assert content["detections"][0]["class"] == "dent"
    assert content["detections"][0]["box_xyxy_px"] == [4, 4, 20, 20]
    assert content["detections"][0]["anomaly_peak"] == 1.0
    assert content["unknown"][0]["area_px"] == 400
    assert "regions" not in content


# ---- a whole run ---------------------------------------------------------------------------------------------------


def test_fusion_predictor__one_pass_and_what_is_written(stand_in: StandIn, tmp_path: Path) -> None:
    for name, image in (("a", BOTH), ("b", painted({})), ("c", painted({STRANGE: 0.9}))):
        write_pixels(tmp_path / "in" / f"{name}.png", image)
    detector = Detector((4, 4, 20, 20, 0.9, 1))
    keys = FusionKeys(
        anomaly="hkt.pt", source=tmp_path / "in", save_txt=True, project=str(tmp_path / "runs"), batch=2, imgsz=96
    )
    predictor = FusionPredictor(keys, detector)
    results = list(predictor)
    assert [call["images"] for call in detector.calls] == stand_in.calls == [2, 1]
    assert detector.calls[0]["imgsz"] == 96
    assert [len(result.unknown) for result in results] == [1, 0, 1]
    folder = tmp_path / "runs" / "fusion"
    assert sorted(path.name for path in folder.glob("*.jpg")) == ["a.jpg", "b.jpg", "c.jpg"]
    assert (folder / "labels/b.txt").read_text().split()[0] == "1"
    said = json.loads((folder / "json/c.json").read_text())
    assert len(said["unknown"]) == 1
    assert set(said["speed_ms"]) == {"detector", "anomaly"}
    report = predictor.report
    assert (report.images, report.known, report.unknown) == (3, 3, 2)
    assert (report.images_with_unknown, report.anomalous) == (2, 2)
    assert report.detector_ms_p50 > 0
    assert "2 in 2 images" in report.to_text()
    assert report.to_dict()["save_dir"] == str(folder)


def test_fusion_predictor__video(stand_in: StandIn, tmp_path: Path) -> None:
    video = write_video(tmp_path / "belt.avi", [BOTH] * 3)
    predict_fused(Detector(), "hkt.pt", video, project=str(tmp_path / "runs"), verbose=False)
    assert len(list((tmp_path / "runs/fusion/json").glob("belt_*.json"))) == 3
    assert (tmp_path / "runs/fusion/belt.avi").is_file()


def test_fusion_report__the_first_batch_warms_up() -> None:
    report = FusionReport(detector_ms=[900.0, 10.0, 12.0, 11.0], anomaly_ms=[5.0])
    assert report.detector_ms_p50 == 11.0
    assert report.anomaly_ms_p50 == 5.0
    assert np.isnan(FusionReport().detector_ms_p50)


def test_predict_fused__with_a_real_detector_and_model(tmp_path: Path) -> None:
    from ultralytics import YOLO

    weights = checkpoint(tmp_path / "hkt.pt")
    found = predict_fused(
        YOLO("yolo26n.yaml"), weights, [BOTH, BOTH], imgsz=64, conf=0.0001, save=False, save_json=False
    )
    assert len(list(found)) == 2
    for result in found:
        assert len(result.boxes) == len(result.detections) + len(result.unknown)
        assert 0 <= result.anomaly.normalised_score <= 1


# ---- faults, one line each -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("files")
    hkt = checkpoint(folder / "hkt.pt")
    torch.save({"model": "a detector, as far as its name says"}, folder / "det.pt")
    return SimpleNamespace(hkt=hkt, det=folder / "det.pt", gone=folder / "gone.pt")


@pytest.mark.parametrize(
    ("model", "anomaly", "kind", "text"),
    [
        ("hkt", "hkt", ConfigError, r"model=.*hkt\.pt: is an anomaly model; with anomaly= give a detector"),
        ("det", "det", CheckpointError, r"anomaly=.*det\.pt: is no anomaly model"),
        ("gone", "hkt", CheckpointError, r"model=.*gone\.pt: no such file"),
        ("det", "gone", CheckpointError, r"anomaly=.*gone\.pt: no such file"),
    ],
)
def test_fusion_keys__files_of_the_wrong_kind(
    model: str, anomaly: str, kind: type[KDYoloError], text: str, files: SimpleNamespace
) -> None:
    with pytest.raises(kind, match=text) as caught:
        fusion_keys({"model": getattr(files, model), "anomaly": getattr(files, anomaly), "source": "x"})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("explained", 0, "explained"),
        ("explaned", 0.5, "did you mean 'explained'"),
        ("augment", True, "'augment' has no meaning"),
        ("model", "", "missing key 'model'"),
    ],
)
def test_fusion_keys__refused(key: str, value: Any, text: str, files: SimpleNamespace) -> None:
    given = {"model": files.det, "anomaly": files.hkt, "source": "x", key: value}
    with pytest.raises(ConfigError, match=text) as caught:
        fusion_keys(given)
    assert "\n" not in str(caught.value)
    assert fusion_keys({"model": files.det, "anomaly": files.hkt, "source": "x"}).explained == 0.5


def test_predict_fused__missing_source(stand_in: StandIn, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        predict_fused(Detector(), "hkt.pt", tmp_path / "gone", project=str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_predict_fused__uncalibrated(tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "last.pt", calibrated=False)
    with pytest.raises(CheckpointError, match="is not calibrated"):
        predict_fused(Detector(), file, BOTH, save=False, save_json=False)
