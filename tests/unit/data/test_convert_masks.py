from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from data_factory import label_rows, write_image

from kd_yolo.data.convert import convert
from kd_yolo.data.convert_masks import components, read_masks
from kd_yolo.errors import DataError


def write_pair(folder: Path, stem: str, seed: int, places: list[tuple[int, int, int, int]], value: int = 255) -> None:
    write_image(folder / f"{stem}.jpg", seed)
    mask = np.zeros((30, 40), np.uint8)
    for x0, y0, x1, y1 in places:
        mask[y0:y1, x0:x1] = value
    cv2.imwrite(str(folder / f"{stem}.png"), mask)


def tiles(root: Path) -> Path:
    """Two defect classes and free tiles, as published."""
    for index in range(10):
        write_pair(root / "MT_Crack/Imgs", f"exp1_num_{index}", index, [(2, 3, 12, 8)])
        write_pair(root / "MT_Fray/Imgs", f"exp1_num_{100 + index}", 100 + index, [(20, 10, 30, 20), (0, 0, 4, 4)])
        write_pair(root / "MT_Free/Imgs", f"exp1_num_{200 + index}", 200 + index, [])
    return root


def test_components__diagonal_neighbours_are_one(tmp_path: Path) -> None:
    mask = np.zeros((20, 20), np.uint8)
    mask[2:6, 2:6] = 255
    mask[6:10, 6:10] = 255  # touches only at the corner: 8-connected
    assert components(mask, 10, 127) == ([(2, 2, 10, 10)], 0)


@pytest.mark.parametrize(("value", "found"), [(127, 0), (128, 1), (255, 1)])
def test_components__threshold_is_above_127(value: int, found: int) -> None:
    mask = np.zeros((20, 20), np.uint8)
    mask[2:8, 2:8] = value
    assert len(components(mask, 10, 127)[0]) == found


@pytest.mark.parametrize(("area", "kept"), [(9, 0), (10, 1), (11, 1)])
def test_components__smallest_area_is_inclusive(area: int, kept: int) -> None:
    mask = np.zeros((20, 20), np.uint8)
    mask[3, 2 : 2 + area] = 255
    boxes, dropped = components(mask, 10, 127)
    assert (len(boxes), dropped) == (kept, 1 - kept)


def test_convert__masks_as_published(tmp_path: Path) -> None:
    report = convert("masks", tiles(tmp_path / "raw"), tmp_path / "out")
    assert sum(report.images.values()) == 30
    assert sum(report.background.values()) == 10
    assert {name: sum(row.values()) for name, row in report.boxes.items()} == {"Crack": 10, "Fray": 20}
    rows = label_rows(tmp_path / "out/labels")
    # pixels 2..11 x 3..7 of 40 x 30: center 7 / 40, 5.5 / 30, size 10 / 40, 5 / 30
    assert rows["exp1_num_3"] == [[0, 0.175, 0.183333, 0.25, 0.166667]]
    assert rows["exp1_num_200"] == []
    assert not list((tmp_path / "out").rglob("*.png"))


def test_read_masks__contradictions_are_left_out_and_listed(tmp_path: Path) -> None:
    raw = tiles(tmp_path)
    write_pair(raw / "MT_Crack/Imgs", "empty", 900, [])
    write_pair(raw / "MT_Crack/Imgs", "speck", 901, [(1, 1, 3, 3)])
    write_pair(raw / "MT_Free/Imgs", "spoiled", 902, [(1, 1, 9, 9)])
    write_image(raw / "MT_Crack/Imgs/nomask.jpg", 903)
    cv2.imwrite(str(raw / "MT_Crack/Imgs/noimage.png"), np.zeros((9, 9), np.uint8))
    (raw / "MT_Crack/Imgs/bad.png").write_bytes(b"not a png")
    write_image(raw / "MT_Crack/Imgs/bad.jpg", 904)
    reading = read_masks(raw)
    assert len(reading.samples) == 30
    assert {kind: len(files) for kind, files in reading.problems.items()} == {
        "empty mask in a defect folder (left out)": 2,
        "defect mask in a background folder (left out)": 1,
        "image without mask": 1,
        "mask without image": 1,
        "unreadable mask": 1,
    }
    assert "components under 10 pixels dropped: 1" in reading.decisions


def test_read_masks__nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image with a mask"):
        read_masks(tmp_path)


def test_read_masks__area_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="min_area=0"):
        read_masks(tmp_path, min_area=0)
