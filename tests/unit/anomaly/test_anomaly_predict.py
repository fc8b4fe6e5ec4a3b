from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from anomaly_factory import write_pixels
from anomaly_files import StandIn, checkpoint, painted, photo, write_video
from PIL import Image as PillowImage
from ultralytics.utils import LOGGER

from kd_yolo.anomaly.dataset import load_image
from kd_yolo.errors import CheckpointError, ConfigError, DataError, KDYoloError, OutputError
from kd_yolo.inspection import predict as predicting
from kd_yolo.inspection.predict import AnomalyPredictor, PredictKeys, anomaly_keys, canvas_images, predict_anomaly
from kd_yolo.inspection.sources import read_frames
from kd_yolo.runtimes.anomaly_session import open_anomaly

QUIET = {"save": False, "verbose": False}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model") / "best.pt")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for index in range(3):
        write_pixels(folder / f"p{index}.png", photo(index, defect=index == 2))
    return folder


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    session = StandIn()
    monkeypatch.setattr(predicting, "open_anomaly", lambda *_, **__: session)
    return session


def scores(found: Any) -> list[float]:
    return [result.score for result in found]


# ---- the same numbers whatever the source and the file -------------------------------------------------------------


def test_canvas_images__are_those_of_training(photos: Path) -> None:
    files = sorted(photos.iterdir())
    images = [np.asarray(cv2.imread(str(file)), dtype=np.uint8) for file in files]
    found = canvas_images(images, (64, 64))
    expected = torch.stack([torch.from_numpy(load_image(file, (64, 64))) for file in files]).float() / 255
    assert torch.equal(found, expected)
    twin = torch.from_numpy(np.stack([cv2.resize(i, (64, 64))[..., ::-1].transpose(2, 0, 1) for i in images])) / 255
    assert float((twin - expected).abs().max()) > 0.01  # OpenCV's resize does not smooth


def test_predict_anomaly__same_scores_from_every_kind_of_source(
    weights: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_anomaly(weights)  # once
    monkeypatch.setattr(predicting, "open_anomaly", lambda *_, **__: session)
    files = sorted(photos.iterdir())
    arrays = [np.asarray(cv2.imread(str(file)), dtype=np.uint8) for file in files]
    first = scores(predict_anomaly(weights, photos, **QUIET))
    assert len(set(first)) == 3
    sources: list[Any] = [
        str(photos / "*.png"),
        files,
        [str(file) for file in files],
        arrays,
        [PillowImage.fromarray(array[..., ::-1].copy()) for array in arrays],
        torch.from_numpy(np.stack(arrays)[..., ::-1].copy()).permute(0, 3, 1, 2).float() / 255,
    ]
    for source in sources:
        assert scores(predict_anomaly(weights, source, batch=2, **QUIET)) == pytest.approx(first, abs=1e-5)
    assert scores(predict_anomaly(weights, arrays[2], **QUIET)) == pytest.approx(first[2:], abs=1e-5)


def test_predict_anomaly__order_of_a_list_is_kept(weights: Path, photos: Path) -> None:
    files = sorted(photos.iterdir(), reverse=True)
    assert [Path(result.path) for result in predict_anomaly(weights, files, **QUIET)] == files


def test_predict_anomaly__onnx_gives_the_scores_of_the_checkpoint(weights: Path, photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from kd_yolo.export.anomaly import export_anomaly

    export_anomaly(weights, out=tmp_path / "model.onnx")
    expected = list(predict_anomaly(weights, photos, **QUIET))
    found = list(predict_anomaly(tmp_path / "model.onnx", photos, batch=2, **QUIET))
    assert scores(found) == pytest.approx(scores(expected), abs=1e-4)
    for one, other in zip(found, expected, strict=True):
        assert one.threshold == pytest.approx(other.threshold)
        assert one.is_anomaly == other.is_anomaly
        assert np.abs(one.anomaly_map - other.anomaly_map).max() < 1e-4


# ---- what is written -----------------------------------------------------------------------------------------------


def test_predictor__writes_pictures_labels_crops_and_json(stand_in: StandIn, tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_pixels(source / "a.png", painted({(8, 8, 24, 24): 0.8}))
    write_pixels(source / "a.bmp", painted({}))
    keys = PredictKeys(
        model="m.pt",
        source=source,
        save_txt=True,
        save_conf=True,
        save_crop=True,
        save_json=True,
        project=str(tmp_path / "runs"),
    )
    predictor = AnomalyPredictor(keys)
    results = list(predictor)
    folder = tmp_path / "runs" / "predict"
    assert predictor.save_dir == folder
    assert sorted(path.name for path in folder.glob("*.jpg")) == ["a-2.jpg", "a.jpg"]
    texts = {path.name: path.read_text() for path in (folder / "labels").iterdir()}
    assert sorted(texts.values()) == ["", "1 0.25 0.25 0.25 0.25 1\n"]
    assert len(list((folder / "crops" / "anomaly").iterdir())) == 1
    said = [json.loads(path.read_text()) for path in sorted((folder / "json").iterdir())]
    assert sorted(one["is_anomaly"] for one in said) == [False, True]
    assert (predictor.images, predictor.anomalies) == (2, 1)
    assert "1 of 2 images are anomalous" in predictor.summary()
    assert all(result.save_dir == str(folder) for result in results)
    assert AnomalyPredictor(keys).save_dir == tmp_path / "runs" / "predict2"


def test_predictor__labels_are_replaced_not_appended(stand_in: StandIn, tmp_path: Path) -> None:
    image = write_pixels(tmp_path / "in" / "a.png", painted({(8, 8, 24, 24): 0.8}))
    for _ in range(2):
        predict_anomaly(
            "m.pt", image, save=False, save_txt=True, project=str(tmp_path), name="x", exist_ok=True, verbose=False
        )
    assert (tmp_path / "x/labels/a.txt").read_text().count("\n") == 1


def test_predictor__nothing_is_written_when_nothing_is_asked_for(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    predict_anomaly("m.pt", painted({}), **QUIET)
    assert list(tmp_path.iterdir()) == []


def test_predictor__video_in_video_out(stand_in: StandIn, tmp_path: Path) -> None:
    frames = [painted({(8, 8, 24, 24): 0.9 if index == 2 else 0.1}) for index in range(5)]
    video = write_video(tmp_path / "belt.avi", frames)
    found = list(
        predict_anomaly("m.pt", video, stream=True, save_txt=True, project=str(tmp_path / "runs"), verbose=False)
    )
    assert [result.is_anomaly for result in found] == [False, False, True, False, False]
    folder = tmp_path / "runs" / "predict"
    assert [path.name for path in folder.glob("*.avi")] == ["belt.avi"]
    capture = cv2.VideoCapture(str(folder / "belt.avi"))
    assert int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) == 5
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(10)
    assert len(list((folder / "labels").glob("belt_*.txt"))) == 5
    assert list(folder.glob(".*")) == []


def test_predictor__a_video_left_early_is_still_whole(stand_in: StandIn, tmp_path: Path) -> None:
    video = write_video(tmp_path / "belt.avi", [painted({})] * 6)
    stream = iter(AnomalyPredictor(PredictKeys(model="m.pt", source=video, project=str(tmp_path / "runs"))))
    next(stream), next(stream)
    stream.close()  # type: ignore[attr-defined]
    capture = cv2.VideoCapture(str(tmp_path / "runs/predict/belt.avi"))
    assert int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) == 2


def test_predictor__batches(stand_in: StandIn, tmp_path: Path) -> None:
    for index in range(5):
        write_pixels(tmp_path / f"{index}.png", painted({}))
    results = list(predict_anomaly("m.pt", tmp_path, batch=2, **QUIET))
    assert stand_in.calls == [2, 2, 1]
    assert set(results[0].speed) == {"preprocess", "inference", "postprocess"}


def test_read_frames__vid_stride_names_and_rate(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.avi", [painted({})] * 6)
    frames = [frame for group in read_frames(str(video), 2, vid_stride=2) for frame in group]
    assert [frame.number for frame in frames] == [1, 2, 3]
    assert frames[0].fps == pytest.approx(5)
    images = [frame for group in read_frames([painted({}), video, painted({})], 3) for frame in group]
    assert [Path(frame.path).name for frame in images] == ["image0.jpg", *["v.avi"] * 6, "image2.jpg"]


# ---- faults, one line each -----------------------------------------------------------------------------------------


def faults(tmp_path: Path) -> dict[str, tuple[Any, type[KDYoloError], str]]:
    (tmp_path / "notes.txt").write_text("no image\n")
    (tmp_path / "readme.md").write_text("no image\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_bytes(b"\x89PNG no more")
    return {
        "missing": (tmp_path / "gone.png", ConfigError, "gone.png: no such file or folder"),
        "none": (None, ConfigError, "source"),
        "no images": (tmp_path / "empty", DataError, "empty: No images"),
        "no image": (tmp_path / "readme.md", DataError, "readme.md: No images"),
        "pattern": (str(tmp_path / "*.jpg"), DataError, "jpg: No images"),
        "list file": (tmp_path / "notes.txt", DataError, "notes.txt: no image does not exist"),
        "unreadable": (tmp_path / "bad.png", DataError, "no image in it can be read"),
        "floats": (np.zeros((8, 8, 3), np.float32), ConfigError, "uint8"),
        "empty list": ([], ConfigError, "empty"),
        "list with a gap": ([tmp_path / "gone.png"], ConfigError, "gone.png"),
        "type": ({"a": 1}, ConfigError, "dict is no image"),
        "tensor": (torch.zeros(1, 1, 8, 8), ConfigError, r"\(B, 3, H, W\)"),
    }


FAULTS = ["missing", "none", "no images", "no image", "pattern", "list file", "unreadable", "floats", "empty list"]
FAULTS += ["list with a gap", "type", "tensor"]


@pytest.mark.parametrize("name", FAULTS)
def test_predict_anomaly__bad_source(name: str, stand_in: StandIn, tmp_path: Path) -> None:
    source, kind, text = faults(tmp_path)[name]
    with pytest.raises(kind, match=text) as caught:
        predict_anomaly("m.pt", source, **QUIET)
    assert "\n" not in str(caught.value)


def test_predict_anomaly__a_missing_source_leaves_no_run_folder(stand_in: StandIn, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        predict_anomaly("m.pt", tmp_path / "gone", project=str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_predict_anomaly__uncalibrated(tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "last.pt", calibrated=False)
    with pytest.raises(CheckpointError, match=r"last\.pt: is not calibrated"):
        predict_anomaly(file, painted({}), **QUIET)


def test_predict_anomaly__no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.pt: no such file"):
        predict_anomaly(tmp_path / "gone.pt", painted({}), **QUIET)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("iou", 0.5, "'iou' has no meaning with an anomaly model"),
        ("min_aera", 5, "did you mean 'min_area'"),
        ("conf", 2, "conf"),
        ("batch", 0, "batch"),
        ("min_area", "big", "min_area"),
    ],
)
def test_anomaly_keys__refused(key: str, value: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        anomaly_keys(PredictKeys, {"model": "m.pt", "source": "x", key: value}, "predict")
    assert "\n" not in str(caught.value)


def test_anomaly_keys__numbers_and_paths_as_the_command_line_gives_them() -> None:
    given = {"model": Path("m.pt"), "source": 0, "conf": 1, "min_area": 9, "device": 0, "task": "anomaly", "name": 7}
    keys = anomaly_keys(PredictKeys, given, "predict")
    assert (keys.conf, keys.min_area, keys.device, keys.name) == (1.0, 9.0, "0", "7")


def test_predictor__folder_that_cannot_be_written(stand_in: StandIn, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(OutputError, match="runs"):
        predict_anomaly("m.pt", painted({}), project=str(tmp_path / "runs"))


def test_open_checked__says_that_the_thresholds_are_for_another_canvas(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(LOGGER, "warning", warned.append)
    predicting.open_checked(weights)
    assert warned == []
    predicting.open_checked(weights, imgsz=96)
    assert len(warned) == 1
    assert "96x96" in warned[0]
    assert "64x64" in warned[0]
