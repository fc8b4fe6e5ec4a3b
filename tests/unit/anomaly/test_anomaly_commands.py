"""``val``, ``predict``, ``deploy`` of the command line and ``KDYOLO`` with anomaly models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from anomaly_factory import write_pixels
from anomaly_files import checkpoint, photo, widgets
from detector_factory import save_checkpoint, tiny_detector

from kd_yolo import KDYOLO, commands
from kd_yolo.anomaly.layouts import same_category
from kd_yolo.cli import main
from kd_yolo.config import parse_pairs
from kd_yolo.errors import CheckpointError, ConfigError


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "hkt.pt", category="bolt")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for index in range(2):
        write_pixels(tmp_path / "photos" / f"{index}.png", photo(index, defect=index == 1))
    return tmp_path / "photos"


def test_predict__an_anomaly_model_alone(weights: Path, photos: Path, tmp_path: Path) -> None:
    given = {"model": weights, "source": str(photos), "project": tmp_path / "runs", "verbose": False}
    text, content = commands.predict(given)
    assert text.endswith(f"of 2 images are anomalous; saved in {tmp_path / 'runs' / 'predict'}")
    assert [Path(image["image"]).name for image in content["images"]] == ["0.png", "1.png"]
    normal, defective = content["images"]
    assert defective["score"] > normal["score"]
    json.dumps(content, allow_nan=False)


def test_predict__beside_a_detector(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tiny_detector(), tmp_path / "det.pt")
    words = [f"model={tmp_path / 'det.pt'}", f"anomaly={weights}", f"source={photos}", "imgsz=64", "conf=0.9"]
    assert main(["predict", *words, "verbose=false", "json=true"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["images"] != content
    assert len(content["images"]) == 2
    assert {"detections", "unknown", "score"} <= set(content["images"][0])
    assert sorted(path.name for path in Path(content["save_dir"]).glob("*.jpg")) == ["0.jpg", "1.jpg"]


def test_predict__a_misspelt_key_is_named(weights: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", f"model={weights}", f"source={photos}", "min_aera=3"]) == 2
    assert "unknown key 'min_aera'; did you mean 'min_area'" in capsys.readouterr().err


def test_val__needs_data_and_judges(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="val: missing key 'data'"):
        commands.val({"model": weights})
    data = widgets(tmp_path / "widgets")
    text, content = commands.val({"model": weights, "data": data, "project": tmp_path / "runs", "plots": False})
    assert "| bolt | 3 | 3 |" in text
    assert content["task"] == "anomaly"


def test_predict_and_val__take_the_folder_of_a_run(weights: Path, photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run" / "weights"
    run.mkdir(parents=True)
    (run / "best.pt").write_bytes(weights.read_bytes())
    given = {"source": str(photos), "project": tmp_path / "runs", "save": False, "verbose": False}
    assert len(commands.predict({"model": tmp_path / "run", **given})[1]["images"]) == 2
    several = tmp_path / "all"
    for name in ("bolt", "nut"):
        (several / name / "weights").mkdir(parents=True)
        (several / name / "weights" / "best.pt").write_bytes(weights.read_bytes())
    with pytest.raises(CheckpointError, match=r"holds models of bolt, nut; give .*bolt.weights.best\.pt"):
        commands.predict({"model": several, **given})


def test_val__thresholds_for_another_canvas_are_not_written(weights: Path, tmp_path: Path) -> None:
    data = widgets(tmp_path / "widgets", val=True)
    given = {"model": weights, "data": data, "threshold": "f1", "out": str(tmp_path / "new.pt"), "imgsz": 128}
    with pytest.raises(ConfigError, match="its thresholds belong to the model's own canvas"):
        commands.val(given)


def test_categories__are_names_even_where_they_look_like_numbers() -> None:
    assert parse_pairs(["category=08", "name=0123", "imgsz=64"]) == {"category": "08", "name": "0123", "imgsz": 64}
    assert parse_pairs(["category=none"]) == {"category": "none"}
    assert same_category("01", "1")
    assert same_category("Bolt", "bolt")
    assert not same_category("0815", "815x")


def test_deploy_and_python__say_what_an_anomaly_model_wants(weights: Path) -> None:
    with pytest.raises(ConfigError, match="use kd-yolo export"):
        commands.deploy({"model": weights})
    with pytest.raises(CheckpointError, match=r"is an anomaly model; use kd_yolo\.inspection"):
        KDYOLO(weights)
