from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_factory import read_pixels, yolo_set

from kd_yolo.data.contact_sheet import CAPTION, CELL, GAP, class_color, draw_contact_sheet
from kd_yolo.errors import ConfigError, DataError


def test_draw_contact_sheet__size_and_boxes(tmp_path: Path) -> None:
    yaml = yolo_set(tmp_path, train=1, val=1, names=("a",))
    (tmp_path / "labels/train/train_0.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    sheet = read_pixels(draw_contact_sheet(yaml, tmp_path / "sheet.png"))
    assert sheet.shape == (CELL + CAPTION + 2 * GAP, CELL + 2 * GAP, 3)
    # 40x30 image at CELL 320: scale 8, so the left edge of the box is at x = 80, its middle at y = 120
    assert np.array_equal(sheet[GAP + 120, GAP + 80], class_color(0))
    assert not np.array_equal(sheet[GAP + 120, GAP + 60], class_color(0))


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (6, 3, 2), (20, 4, 3)])
def test_draw_contact_sheet__grid(tmp_path: Path, count: int, columns: int, rows: int) -> None:
    yaml = yolo_set(tmp_path, train=10)
    if count == 20:  # only 10 images are there: 4 columns, 3 rows
        count = 10
    sheet = read_pixels(draw_contact_sheet(yaml, tmp_path / "out/sheet.png", count=count))
    assert sheet.shape[:2] == (rows * (CELL + CAPTION + GAP) + GAP, columns * (CELL + GAP) + GAP)


def test_draw_contact_sheet__seed_decides(tmp_path: Path) -> None:
    yaml = yolo_set(tmp_path, train=12)
    drawn = [
        draw_contact_sheet(yaml, tmp_path / f"{i}.png", count=4, seed=s).read_bytes() for i, s in enumerate((0, 0, 1))
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_draw_contact_sheet__corrupt_image_is_shown_as_such(tmp_path: Path) -> None:
    yaml = yolo_set(tmp_path, train=2)
    (tmp_path / "images/train/train_0.png").write_bytes(b"nothing")
    assert draw_contact_sheet(yaml, tmp_path / "sheet.png").is_file()


def test_draw_contact_sheet__bad_input(tmp_path: Path) -> None:
    yaml = yolo_set(tmp_path)
    with pytest.raises(ConfigError, match="ends in"):
        draw_contact_sheet(yaml, tmp_path / "sheet.jpg")
    with pytest.raises(ConfigError, match="count=0"):
        draw_contact_sheet(yaml, tmp_path / "sheet.png", count=0)
    with pytest.raises(DataError, match=r"no split 'test' \(there are train, val\)"):
        draw_contact_sheet(yaml, tmp_path / "sheet.png", split="test")


def test_class_color__neighbours_differ() -> None:
    colors = np.array([class_color(i) for i in range(8)], dtype=int)
    distances = np.abs(colors[:, None] - colors[None]).sum(-1)
    assert distances[np.triu_indices(8, 1)].min() > 80
