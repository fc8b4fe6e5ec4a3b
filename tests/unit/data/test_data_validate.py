from __future__ import annotations

from pathlib import Path

import pytest
from data_factory import yolo_set

from kd_yolo.data.validate import validate_for_training
from kd_yolo.errors import ConfigError, DataError


def test_validate_for_training__healthy(tmp_path: Path) -> None:
    validate_for_training(yolo_set(tmp_path, train=6, val=3, test=2))


def test_validate_for_training__class_id_names_file_line_count_and_command(tmp_path: Path) -> None:
    yaml = yolo_set(tmp_path)
    for index in (1, 4):
        file = tmp_path / f"labels/train/train_{index}.txt"
        file.write_text(file.read_text() + "6 0.5 0.5 0.1 0.1\n")
    with pytest.raises(DataError) as caught:
        validate_for_training(yaml)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path}/labels/train/train_1.txt line 2: class id 6 is out of range")
    assert "2 classes (0 to 1)" in text
    assert "2 such problems in all" in text
    assert f"kd-yolo data check data={yaml}" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.2", "4 columns, but a box has 5"),
        ("0 0.5 0.5 0.2 x", "text where numbers belong"),
        ("0.4 0.5 0.5 0.2 0.2", "not a whole number"),
        ("0 120 80 20 20", "not within 0..1"),
    ],
)
def test_validate_for_training__bad_labels(tmp_path: Path, line: str, message: str) -> None:
    yaml = yolo_set(tmp_path)
    (tmp_path / "labels/val/val_0.txt").write_text(line)
    with pytest.raises(DataError, match=message):
        validate_for_training(yaml)


@pytest.mark.parametrize(
    "harmless", ["0 0.5 0.5 0.2 0.2\n0 0.5 0.5 0.2 0.2\n", "0 0.05 0.5 0.2 0.2\n", "0 0.5 0.5 0 0.2\n", ""]
)
def test_validate_for_training__what_stock_training_forgives(tmp_path: Path, harmless: str) -> None:
    yaml = yolo_set(tmp_path)
    (tmp_path / "labels/train/train_0.txt").write_text(harmless)
    validate_for_training(yaml)


def test_validate_for_training__missing_label_is_background(tmp_path: Path) -> None:
    yaml = yolo_set(tmp_path)
    (tmp_path / "labels/train/train_0.txt").unlink()
    validate_for_training(yaml)


@pytest.mark.parametrize("spoil", ["truncate", "empty", "text"])
def test_validate_for_training__corrupt_image(tmp_path: Path, spoil: str) -> None:
    yaml = yolo_set(tmp_path)
    image = tmp_path / "images/val/val_1.png"
    code = image.read_bytes()
    image.write_bytes({"truncate": code[: len(code) // 2], "empty": b"", "text": b"not an image"}[spoil])
    with pytest.raises(DataError, match=r"val_1\.png: .*replace the image.*the only problem"):
        validate_for_training(yaml)


def test_validate_for_training__empty_split(tmp_path: Path) -> None:
    yaml = yolo_set(tmp_path)
    for image in (tmp_path / "images/val").iterdir():
        image.unlink()
    with pytest.raises(DataError, match="no image in the 'val' split"):
        validate_for_training(yaml)


def test_validate_for_training__labels_in_the_wrong_place(tmp_path: Path) -> None:
    yaml = yolo_set(tmp_path)
    (tmp_path / "labels").rename(tmp_path / "annotations")
    with pytest.raises(
        DataError, match=r"nothing to learn in 'train'.*was not found \(first: .*labels/train/train_0\.txt"
    ):
        validate_for_training(yaml)


def test_validate_for_training__bad_yaml(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        validate_for_training(tmp_path / "a.yaml")
