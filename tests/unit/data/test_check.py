from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from data_factory import read_pixels, write_image, yolo_set

from kd_yolo.data.check import check_dataset
from kd_yolo.data.check_report import BoxSizes, DataReport
from kd_yolo.errors import ConfigError


def kinds(report: DataReport) -> dict[str, int]:
    return dict(Counter(f"{problem.severity}: {problem.kind}" for problem in report.problems))


def test_check_dataset__healthy(tmp_path: Path) -> None:
    report = check_dataset(yolo_set(tmp_path, train=6, val=3, test=2), imgsz=160)
    assert report.ok
    assert not report.problems
    assert report.images == {"train": 6, "val": 3, "test": 2}
    assert report.boxes == {"train": [3, 3], "val": [2, 1], "test": [1, 1]}
    assert "0 errors, 0 warnings: fine to train" in report.to_text()


def test_check_dataset__label_faults(tmp_path: Path) -> None:
    yaml = yolo_set(tmp_path, train=12, val=4)
    faults = [
        "0 0.5 0.5 0.2 0.4\n0 0.5 0.5 0.2 0.4\n",
        "0 0.5 0.5 0 0.4\n",
        "0 0.02 0.5 0.3 0.4\n",
        "0 0.5 0.5 0.2\n",
        "9 0.5 0.5 0.2 0.4\n",
        "1.5 0.5 0.5 0.2 0.4\n",
        "0 0.5 0.5 0.02 0.4\n",  # 0.8 of a pixel of 40
    ]
    for index, text in enumerate(faults):
        (tmp_path / f"labels/train/train_{index}.txt").write_text(text)
    assert kinds(check_dataset(yaml)) == {
        "warning: duplicate box": 1,
        "error: degenerate box": 1,
        "warning: box outside": 1,
        "error: wrong columns": 1,
        "error: class id out of range": 1,
        "error: class id not whole": 1,
        "warning: tiny box": 1,
    }


def test_check_dataset__files_without_partner(tmp_path: Path) -> None:
    yaml = yolo_set(tmp_path)
    (tmp_path / "labels/train/train_0.txt").unlink()
    (tmp_path / "images/val/val_0.png").unlink()
    (tmp_path / "labels/train/classes.txt").write_text("a\nb\n")
    report = check_dataset(yaml)
    assert kinds(report) == {"warning: image without label file": 1, "warning: label without image": 1}
    assert report.background == {"train": 1, "val": 0}


def test_check_dataset__bad_images(tmp_path: Path) -> None:
    yaml = yolo_set(tmp_path)
    image = tmp_path / "images/train/train_0.png"
    image.write_bytes(image.read_bytes()[:100])
    (tmp_path / "images/train/train_1.png").write_bytes(b"")
    late = write_image(tmp_path / "images/train/late.jpg", 99)
    late.write_bytes(late.read_bytes() + b"xx")
    (tmp_path / "labels/train/late.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    assert kinds(check_dataset(yaml)) == {"error: bad image": 2, "warning: image will be rewritten": 1}


def test_check_dataset__leakage_by_bytes_by_pixels_and_by_look(tmp_path: Path) -> None:
    yaml = yolo_set(tmp_path)
    train = tmp_path / "images/train"
    shutil.copy(train / "train_0.png", tmp_path / "images/val/bytes.png")
    cv2.imwrite(str(tmp_path / "images/val/pixels.bmp"), read_pixels(train / "train_1.png"))
    darker = read_pixels(train / "train_2.png").astype(np.float32) * 0.7 + 10
    cv2.imwrite(str(tmp_path / "images/val/look.png"), darker.astype(np.uint8))
    shutil.copy(train / "train_3.png", train / "twin.png")
    for name in ("val/bytes", "val/pixels", "val/look", "train/twin"):
        (tmp_path / f"labels/{name}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    report = check_dataset(yaml)
    assert kinds(report) == {
        "error: leakage": 2,
        "warning: near duplicate across splits": 1,
        "warning: duplicate image": 1,
    }
    details = [problem.detail for problem in report.errors]
    assert any("byte for byte" in detail for detail in details)
    assert any("pixel for pixel" in detail for detail in details)
    assert not report.ok


def test_check_dataset__empty_split_no_boxes_and_balance(tmp_path: Path) -> None:
    yaml = yolo_set(tmp_path, train=30, val=2, test=2)
    for file in (tmp_path / "images/test").iterdir():
        file.unlink()
    shutil.rmtree(tmp_path / "labels/test")
    for file in (tmp_path / "labels/val").iterdir():
        file.write_text("")
    for index in range(1, 29, 2):
        (tmp_path / f"labels/train/train_{index}.txt").write_text(f"0 0.5 0.5 0.3{index} 0.3\n")
    report = check_dataset(yaml)
    assert kinds(report) == {"error: empty split": 1, "error: no boxes": 1, "warning: class imbalance": 1}


def test_check_dataset__class_missing_in_a_split(tmp_path: Path) -> None:
    yaml = yolo_set(tmp_path, train=6, val=1)
    report = check_dataset(yaml)
    assert kinds(report) == {"warning: class missing": 1}
    assert "'val' has no box of class 'b'" in report.problems[0].detail


def test_check_dataset__sizes_are_those_on_the_canvas(tmp_path: Path) -> None:
    yaml = yolo_set(tmp_path, train=1, val=1, names=("a",))
    for split in ("train", "val"):
        (tmp_path / f"labels/{split}/{split}_0.txt").write_text("0 0.5 0.5 0.5 0.4\n")
    # images are 40x30: at imgsz 160 the scale is 4, so the box is 0.5 * 40 * 4 = 80 by 0.4 * 30 * 4 = 48 pixels
    sizes = check_dataset(yaml, imgsz=160).sizes
    assert sizes.width_px["p50"] == 80
    assert sizes.height_px["p50"] == 48
    assert (sizes.small, sizes.medium, sizes.large) == (0, 2, 0)
    assert check_dataset(yaml, imgsz=640).sizes.large == 2
    assert check_dataset(yaml, imgsz=64).sizes.small == 2


def test_box_sizes__coco_limits() -> None:
    # area below 32^2 is small, below 96^2 medium: 32x32 itself is medium, 96x96 itself large
    sizes = BoxSizes.of(np.array([[31.9, 32], [32, 32], [95.9, 96], [96, 96]]))
    assert (sizes.small, sizes.medium, sizes.large) == (1, 2, 1)
    assert BoxSizes.of(np.empty((0, 2))) == BoxSizes()


def test_check_dataset__reports_as_json_and_text(tmp_path: Path) -> None:
    yaml = yolo_set(tmp_path, train=12)
    for index in range(9):
        (tmp_path / f"labels/train/train_{index}.txt").write_text("7 0.5 0.5 0.2 0.2\n")
    report = check_dataset(yaml)
    content = json.loads(json.dumps(report.to_dict()))
    assert content["ok"] is False
    assert content["errors"] == len(content["problems"]) == 9
    assert content["boxes"]["train"] == {"a": 1, "b": 2}
    text = report.to_text()
    assert "error: class id out of range: 9" in text
    assert "... and 4 more" in text
    assert text.endswith("9 errors, 0 warnings: not fine")


def test_check_dataset__imgsz_must_be_a_size(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="imgsz=0"):
        check_dataset(yolo_set(tmp_path), imgsz=0)
