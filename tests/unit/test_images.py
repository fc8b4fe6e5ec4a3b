from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detector_factory import tiny_dataset

from kd_yolo.errors import ConfigError, DataError
from kd_yolo.images import dataset_files, dataset_names, image_set, read_image, spread, textured_images, to_canvas


def test_textured_images__deterministic_and_independent_of_count() -> None:
    three, five = textured_images(3, (40, 50), seed=1), textured_images(5, (40, 50), seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(three, five, strict=False))
    assert not np.array_equal(five[3], five[4])
    assert not np.array_equal(three[0], textured_images(1, (40, 50), seed=2)[0])
    assert {image.shape for image in five} == {(40, 50, 3)}
    assert min(float(image.std()) for image in five) > 15


def test_to_canvas__golden() -> None:
    # A 2x1 image (height 2, width 1) on a 4x4 canvas: scaled to 4x2, one column of 114 left and right; BGR becomes RGB.
    image = np.full((2, 1, 3), (10, 20, 255), np.uint8)
    pixels = to_canvas([image], (4, 4))
    assert pixels.shape == (1, 3, 4, 4)
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.full((3,), 114 / 255))
    torch.testing.assert_close(pixels[0, :, 2, 1], torch.tensor([255, 20, 10]) / 255)
    assert pixels.is_contiguous()


def test_to_canvas__grey_and_unknown_channels() -> None:
    image = np.full((8, 8, 3), 77, np.uint8)
    grey = to_canvas([image], (8, 8), channels=1)
    assert grey.shape == (1, 1, 8, 8)
    torch.testing.assert_close(grey, torch.full((1, 1, 8, 8), 77 / 255))
    with pytest.raises(ConfigError, match="4 channels"):
        to_canvas([image], (8, 8), channels=4)


def test_to_canvas__equals_the_stock_predictor() -> None:
    from ultralytics.data.augment import LetterBox

    image = textured_images(1, (50, 70))[0]
    boxed = LetterBox((64, 64), auto=False)(image=image)
    expected = torch.from_numpy(np.ascontiguousarray(boxed[..., ::-1].transpose(2, 0, 1))).float() / 255
    torch.testing.assert_close(to_canvas([image], (64, 64))[0], expected)


def test_image_set__real_ones_first(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "set")
    found = image_set(data, 6)
    assert (found.real, len(found.images)) == (4, 6)
    first = cv2.imread(str(tmp_path / "set" / "images" / "0.png"))
    assert first is not None
    assert np.array_equal(found.images[0], first)
    assert found.describe() == f"4 of {data} and 2 synthetic"
    assert image_set(None, 2).describe() == "2 synthetic"


def test_dataset__files_and_names(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "set")
    assert [file.name for file in dataset_files(data)] == ["0.png", "1.png", "2.png", "3.png"]
    assert dataset_names(data) == ["scratch", "dent", "stain"]


def test_dataset_files__text_list(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "set")
    (tmp_path / "set" / "val.txt").write_text("./images/2.png\n\n./images/1.png\n./labels/1.txt\n")
    data.write_text(data.read_text().replace("val: images", "val: val.txt"))
    assert [file.name for file in dataset_files(data)] == ["1.png", "2.png"]


def test_dataset_files__missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.yaml"):
        dataset_files(tmp_path / "gone.yaml")
    data = tiny_dataset(tmp_path / "set")
    for image in (tmp_path / "set" / "images").iterdir():
        image.unlink()
    with pytest.raises(DataError, match=r"data\.yaml"):
        dataset_files(data)


def test_read_image__not_an_image(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for content in (b"", b"not an image"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.png: cannot be read"):
            read_image(path)
    with pytest.raises(DataError, match=r"gone\.png"):
        read_image(tmp_path / "gone.png")


@pytest.mark.parametrize(("count", "expected"), [(2, [0, 9]), (4, [0, 3, 6, 9]), (20, list(range(10)))])
def test_spread__evenly(count: int, expected: list[int]) -> None:
    files = [Path(str(index)) for index in range(10)]
    assert [int(file.name) for file in spread(files, count)] == expected
