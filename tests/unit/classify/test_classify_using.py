"""``val``, ``predict`` and ``deploy`` of the command line with a classifier's checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from class_factory import class_folder, save_classifier, tiny_classifier
from ultralytics import YOLO

from kd_yolo import commands
from kd_yolo.classify.checkpoints import is_classifier, load_classifier
from kd_yolo.errors import ConfigError, DataError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_classifier(tiny_classifier(seed=1), tmp_path / "best.pt")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return class_folder(tmp_path / "data")


def test_val__is_ultralytics_own(model: Path, data: Path, tmp_path: Path) -> None:
    text, content = commands.val({"model": model, "data": data, "split": "test", "project": tmp_path, "workers": 0})
    stock = YOLO(model).val(data=str(data), split="test", project=str(tmp_path), plots=False, workers=0, verbose=False)
    assert (content["top1"], content["top5"]) == (stock.top1, stock.top5)
    assert text == f"top-1 {stock.top1:.4f}, top-5 {stock.top5:.4f}"


def test_val__refuses_other_classes_and_missing_splits(model: Path, tmp_path: Path) -> None:
    other = class_folder(tmp_path / "other", {"train": 1, "val": 1}, names=("dots", "lines", "waves"))
    with pytest.raises(
        DataError, match=re.escape("its classes are dots, lines, waves; the model's are dots, lines, plain")
    ):
        commands.val({"model": model, "data": other})
    fitting = class_folder(tmp_path / "fitting", {"train": 1, "val": 1})
    with pytest.raises(DataError, match=r"split=test: .* has train, val"):
        commands.val({"model": model, "data": fitting, "split": "test"})
    with pytest.raises(ConfigError, match="missing key 'data'"):
        commands.val({"model": model})


def test_predict__names_the_class_of_every_image(model: Path, data: Path, tmp_path: Path) -> None:
    given = {"model": model, "source": str(data / "test" / "dots"), "project": str(tmp_path / "runs"), "verbose": False}
    text, content = commands.predict(given)
    assert text.startswith("2 images; saved in ")
    for image in content["images"]:
        confidences = [one["confidence"] for one in image["top"]]
        assert confidences == sorted(confidences, reverse=True)
        assert sum(confidences) == pytest.approx(1, abs=1e-4)
        assert image["class"] == image["top"][0]["class"]
    with pytest.raises(ConfigError, match="source=gone: no such file or folder"):
        commands.predict({"model": model, "source": "gone"})
    with pytest.raises(ConfigError, match=r"unknown key 'sourse'.*source"):
        commands.predict({"model": model, "sourse": "x"})


def test_predict__recordings_and_folders_without_pictures(model: Path, tmp_path: Path) -> None:
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    (sounds / "a.wav").write_bytes(b"RIFF")
    for source in (sounds, sounds / "a.wav"):
        with pytest.raises(ConfigError, match=r"recordings are drawn first.*like=DATA/signals\.yaml"):
            commands.predict({"model": model, "source": str(source)})
    with pytest.raises(ConfigError, match="no picture directly in this folder"):
        commands.predict({"model": model, "source": str(tmp_path)})


def test_val__a_wrong_value_is_one_line(model: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match=r"^val: "):
        commands.val({"model": model, "data": data, "imgsz": "abc"})


def test_deploy__writes_the_merged_classifier(model: Path, tmp_path: Path) -> None:
    text, content = commands.deploy({"model": model, "out": tmp_path / "ship.pt"})
    assert "merged blocks" in text
    assert content["convolutions"] < content["convolutions_trained"]
    assert load_classifier(tmp_path / "ship.pt")[0].names == tiny_classifier().names
    with pytest.raises(ConfigError, match="nms=false: a classifier has no NMS"):
        commands.deploy({"model": model, "nms": False})


def test_is_classifier__by_the_index_alone(model: Path, tmp_path: Path) -> None:
    assert is_classifier(model)
    (tmp_path / "text.pt").write_text("no archive")
    (tmp_path / "cut.pt").write_bytes(model.read_bytes()[:2000])
    assert not any(is_classifier(tmp_path / name) for name in ("text.pt", "cut.pt", "gone.pt", ""))
