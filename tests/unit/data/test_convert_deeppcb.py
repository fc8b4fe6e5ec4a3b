from __future__ import annotations

from pathlib import Path

import pytest
from data_factory import label_rows, write_image

from kd_yolo.data.convert import convert
from kd_yolo.data.convert_deeppcb import TYPES, read_deeppcb
from kd_yolo.errors import DataError


def deeppcb(root: Path, separator: str = " ") -> Path:
    lines: dict[str, list[str]] = {"trainval": [], "test": []}
    for group in ("00041", "12000"):
        for index in range(12):
            number = f"{group}{index:03d}"
            base = root / f"group{group}"
            write_image(base / group / f"{number}_test.jpg", int(number))
            write_image(base / group / f"{number}_temp.jpg", int(number) + 1_000_000)
            text = base / f"{group}_not" / f"{number}.txt"
            text.parent.mkdir(exist_ok=True)
            text.write_text(separator.join(str(v) for v in (4, 3, 24, 18, index % 6 + 1)) + "\n")
            split = "test" if index % 3 == 0 else "trainval"
            lines[split].append(f"group{group}/{group}/{number}.jpg group{group}/{group}_not/{number}.txt")
    for split, rows in lines.items():
        (root / f"{split}.txt").write_text("\n".join(rows) + "\n")
    return root


@pytest.mark.parametrize("separator", [" ", ","])
def test_convert__deeppcb_as_published(tmp_path: Path, separator: str) -> None:
    report = convert("deeppcb", deeppcb(tmp_path / "raw", separator), tmp_path / "out")
    assert report.images["test"] == 8
    assert report.images["train"] + report.images["val"] == 16
    assert 1 <= report.images["val"] <= 3  # a tenth of 16, at least one
    assert list(report.boxes) == list(TYPES.values())
    assert [sum(row.values()) for row in report.boxes.values()] == [4] * 6
    assert label_rows(tmp_path / "out/labels")["00041001_test"] == [[1, 0.35, 0.35, 0.5, 0.5]]
    assert not list((tmp_path / "out").rglob("*_temp.jpg"))
    assert any("no val published" in decision for decision in report.decisions)


def test_read_deeppcb__faults_are_listed(tmp_path: Path) -> None:
    raw = deeppcb(tmp_path)
    (raw / "group00041/00041_not/00041000.txt").unlink()
    (raw / "group00041/00041/00041001_test.jpg").unlink()
    (raw / "group00041/00041_not/00041002.txt").write_text("1 2 3 4 9\n1 2 3 4\n5 5 20 20 1\n")
    problems = read_deeppcb(raw).problems
    assert problems["image without annotation"] == ["group00041/00041/00041000_test.jpg"]
    assert problems["annotation without image"] == ["group00041/00041_not/00041001.txt"]
    assert len(problems["unusable object"]) == 2
    assert "line 1: '1 2 3 4 9'" in problems["unusable object"][0]


def test_read_deeppcb__nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="PCBData"):
        read_deeppcb(tmp_path)
