"""Folders of images without labels: what is refused in one line, and what is left out with a count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import pytest
from ultralytics.utils import LOGGER

from kd_yolo.config import TrainConfig
from kd_yolo.errors import ConfigError, DataError
from kd_yolo.images import dataset_files, textured_images
from kd_yolo.tasks.unlabeled import check_unlabeled, image_files, readable_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 13 textured images, some nested."""
    root = tmp_path_factory.mktemp("unlabeled")
    for number, image in enumerate(textured_images(13, (64, 80))):
        place = root / "line 2" / "cam" if number % 3 == 0 else root
        place.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(place / f"{number}.png"), image)
    return root


def config_of(**given: Any) -> TrainConfig:
    return TrainConfig(data="neu", **given)


def test_check_unlabeled__accepts_a_nested_folder(folder: Path) -> None:
    assert check_unlabeled(config_of()) is None
    assert check_unlabeled(config_of(unlabeled=str(folder))) == folder.resolve()
    assert len(image_files(folder)) == 13


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher": "none"}, r"unlabeled=.*: only a teacher can use it; drop it or teacher=none"),
        ({"method": "none"}, r"only a teacher can use it; drop it or method=none"),
    ],
)
def test_check_unlabeled__needs_a_teacher(folder: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_unlabeled(config_of(unlabeled=str(folder), **given))


@pytest.mark.parametrize("key", ["unlabeled_ratio", "pseudo", "pseudo_conf", "pseudo_weight"])
def test_check_unlabeled__keys_without_a_folder(key: str) -> None:
    value = True if key == "pseudo" else 0.5
    with pytest.raises(ConfigError, match=f"{key} has no effect without unlabeled=FOLDER"):
        check_unlabeled(config_of(**{key: value}))


def test_check_unlabeled__rectangular_training(folder: Path) -> None:
    with pytest.raises(ConfigError, match="rect=true"):
        check_unlabeled(config_of(unlabeled=str(folder)), {"rect": True})


def test_check_unlabeled__bad_folders(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "no", "no such folder"), (tmp_path / "file.png", "is a file")):
        (tmp_path / "file.png").write_bytes(b"x")
        with pytest.raises(DataError, match=message):
            check_unlabeled(config_of(unlabeled=str(path)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image in it"):
        check_unlabeled(config_of(unlabeled=str(tmp_path / "empty")))
    (tmp_path / "empty" / "a.jpg").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"no usable image among 1: .*a\.jpg"):
        check_unlabeled(config_of(unlabeled=str(tmp_path / "empty")))


def test_readable_images__leaves_broken_and_evaluation_images_out(
    folder: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(LOGGER, "warning", said.append)  # whatever an earlier test did to levels and handlers
    good = image_files(folder)[:3]
    held_out = dataset_files(tiny_data, "val")[:2]
    for file in (*good, *held_out):
        (tmp_path / f"copy-{file.name}").write_bytes(file.read_bytes())
    (tmp_path / "torn.png").write_bytes(good[0].read_bytes()[:60])
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    kept = readable_images(image_files(tmp_path), tmp_path, dataset_files(tiny_data, "val"))
    assert {file.name for file in kept} == {f"copy-{file.name}" for file in good}
    assert "2 of 7 images cannot be read and are left out, first: " in said[0]
    assert "2 images are of the validation or test split and are left out" in said[1]
    only = [tmp_path / f"copy-{held_out[0].name}"]
    with pytest.raises(DataError, match="all of them are of the validation or test split"):
        readable_images(only, tmp_path, held_out)
