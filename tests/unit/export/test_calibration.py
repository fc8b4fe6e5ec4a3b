"""Which images calibrate: evenly by class, the same every time, and never silently too few."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from kd_yolo.export.calibration import calibration_files, calibration_pixels, calibration_record

from kd_yolo.errors import ConfigError, DataError

NAMES = ["crack", "dent", "stain"]


def dataset(folder: Path, labels: list[list[int]]) -> Path:
    """Write one image for each list of classes it shows; return the data YAML."""
    for kind in ("images", "labels"):
        (folder / kind / "train").mkdir(parents=True)
    for index, classes in enumerate(labels):
        pixels = np.full((32, 48, 3), index, np.uint8)
        cv2.imwrite(str(folder / "images" / "train" / f"{index:03d}.png"), pixels)
        text = "".join(f"{label} 0.5 0.5 0.{2 + place} 0.2\n" for place, label in enumerate(classes))
        (folder / "labels" / "train" / f"{index:03d}.txt").write_text(text)
    path = folder / "data.yaml"
    split = "images/train"
    path.write_text(yaml.safe_dump({"path": str(folder), "train": split, "val": split, "names": NAMES}))
    return path


def test_calibration_files__rare_class_is_as_frequent_as_the_others(tmp_path: Path) -> None:
    data = dataset(tmp_path, [[0]] * 60 + [[1]] * 30 + [[2]] * 6)
    chosen = calibration_files(data, 18)
    assert chosen.per_class == {"crack": 6, "dent": 6, "stain": 6}
    assert (len(chosen), chosen.available, chosen.background) == (18, 96, 0)
    assert list(chosen) == sorted(set(chosen))


def test_calibration_files__a_class_gives_all_it_has_and_others_fill_up(tmp_path: Path) -> None:
    data = dataset(tmp_path, [[0]] * 40 + [[1]] * 40 + [[2]] * 2)
    assert calibration_files(data, 20).per_class == {"crack": 9, "dent": 9, "stain": 2}


def test_calibration_files__images_without_boxes_have_their_share(tmp_path: Path) -> None:
    data = dataset(tmp_path, [[]] * 30 + [[0, 1]] * 50 + [[2]] * 20)
    chosen = calibration_files(data, 20)
    assert chosen.background == 6
    assert chosen.per_class == {"crack": 7, "dent": 7, "stain": 7}


def test_calibration_files__only_backgrounds(tmp_path: Path) -> None:
    chosen = calibration_files(dataset(tmp_path, [[]] * 12), 10)
    assert (len(chosen), chosen.background) == (10, 10)


def test_calibration_files__same_seed_same_images_other_seed_others(tmp_path: Path) -> None:
    data = dataset(tmp_path, [[index % 3] for index in range(60)])
    first, again, other = (calibration_files(data, 12, seed) for seed in (3, 3, 4))
    assert first == again
    assert first.files != other.files
    assert first.sha256 != other.sha256


def test_calibration_files__hash_sees_the_pixels(tmp_path: Path) -> None:
    data = dataset(tmp_path, [[0]] * 8)
    before = calibration_files(data, 300)
    assert len(before) == 8
    cv2.imwrite(str(before[0]), np.full((32, 48, 3), 200, np.uint8))
    assert calibration_files(data, 300).sha256 != before.sha256


def test_calibration_files__too_few_images(tmp_path: Path) -> None:
    data = dataset(tmp_path, [[0]] * 7)
    with pytest.raises(DataError, match=r"data\.yaml: its training split has 7 images.*at least 8") as caught:
        calibration_files(data)
    assert "\n" not in str(caught.value)


def test_calibration_files__no_images(tmp_path: Path) -> None:
    data = dataset(tmp_path, [[0]] * 9)
    for file in (tmp_path / "images" / "train").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="no images under 'train'"):
        calibration_files(data)


@pytest.mark.parametrize("count", [0, 7, -3, True, 12.0])
def test_calibration_files__bad_count(tmp_path: Path, count: int) -> None:
    with pytest.raises(ConfigError, match=f"calibration_images={count}: must be a whole number of at least 8"):
        calibration_files(tmp_path / "never-read.yaml", count)


def test_calibration_pixels__fills_the_last_batch_and_is_in_0_to_1(tmp_path: Path) -> None:
    files = calibration_files(dataset(tmp_path, [[0]] * 9), 9)
    batches = list(calibration_pixels(files, (32, 64), 3, batch=4))
    assert [batch.shape for batch in batches] == [(4, 3, 32, 64)] * 3
    assert all(batch.dtype == np.float32 and batch.min() >= 0 and batch.max() <= 1 for batch in batches)
    np.testing.assert_array_equal(batches[2][1:], batches[0][:3])


def test_calibration_pixels__unreadable_image_is_named(tmp_path: Path) -> None:
    files = calibration_files(dataset(tmp_path, [[0]] * 9), 9)
    files[4].write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"004\.png: cannot be read as an image") as caught:
        list(calibration_pixels(files, (32, 32)))
    assert "\n" not in str(caught.value)


def test_calibration_pixels__nothing_to_read() -> None:
    with pytest.raises(DataError, match="no images to calibrate with"):
        next(calibration_pixels([], (32, 32)))


def test_calibration_record__names_no_files(tmp_path: Path) -> None:
    chosen = calibration_files(dataset(tmp_path, [[0]] * 9), 9)
    assert calibration_record(chosen)["per_class"] == {"crack": 9, "dent": 0, "stain": 0}
    assert calibration_record(list(chosen)) == {"images": 9}
