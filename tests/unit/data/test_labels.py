from __future__ import annotations

from pathlib import Path

import pytest
from data_factory import write_image
from hypothesis import given, settings
from hypothesis import strategies as st
from ultralytics.data.utils import verify_image_label

from kd_yolo.data.labels import read_labels


def read(tmp_path: Path, text: str, nc: int = 3, keypoint_columns: int = 0) -> tuple[list[tuple[int, ...]], list[str]]:
    file = tmp_path / "a.txt"
    file.write_text(text, encoding="utf-8")
    labels = read_labels(file, nc, keypoint_columns)
    return labels.boxes, [f"{fault.kind}@{fault.line}{'!' if fault.fatal else ''}" for fault in labels.faults]  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("text", "boxes", "faults"),
    [
        ("", 0, []),
        ("\n  \n", 0, []),
        ("0 0.5 0.5 0.2 0.2\n2 0.1 0.1 0.1 0.1\n", 2, []),
        ("1.0 0.5 0.5 0.2 0.2", 1, []),
        ("0 0.5 0.5 0.2", 0, ["wrong columns@1!"]),
        ("0 0.5 0.5 0.2 0.2 0.9", 0, ["wrong columns@1!"]),
        ("\n0 0.5 0.5 0.2 0.2\n0 0.5\n", 1, ["wrong columns@3!"]),
        ("0 0.5 0.5 0.2 wide", 0, ["not a number@1!"]),
        ("0 0.5 0.5 0.2 nan", 0, ["not a number@1!"]),
        ("3 0.5 0.5 0.2 0.2", 0, ["class id out of range@1!"]),
        ("-1 0.5 0.5 0.2 0.2", 0, ["class id out of range@1!"]),
        ("0.5 0.5 0.5 0.2 0.2", 0, ["class id not whole@1!"]),
        ("0 100 80 20 20", 0, ["coordinates not normalised@1!"]),
        ("0 -0.2 0.5 0.2 0.2", 0, ["coordinates not normalised@1!"]),
        ("0 0.5 0.5 0 0.2", 0, ["degenerate box@1"]),
        ("0 0.5 0.5 0.2 -0.005", 0, ["degenerate box@1!"]),
        ("0 0.5 0.5 0.2 0.2\n0 0.5 0.5 0.2 0.2", 1, ["duplicate box@2"]),
        ("0 0.5 0.5 0.2 0.2\n0 0.50 0.5 0.20 0.2", 1, ["duplicate box@2"]),
        ("0 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.2 0.2", 2, []),
        ("0 0.05 0.5 0.2 0.2", 1, ["box outside@1"]),
        ("0 0.1 0.1 0.2001 0.2", 1, []),
        ("0 0.1 0.1 0.9 0.1 0.5 0.8", 1, []),
        ("0 0.1 0.1 0.9 0.1 0.5 0.8\n0 0.5 0.5 0.1 0.1", 2, ["mixed rows@1!"]),
    ],
)
def test_read_labels(tmp_path: Path, text: str, boxes: int, faults: list[str]) -> None:
    found, named = read(tmp_path, text)
    assert len(found) == boxes
    assert named == faults


def test_read_labels__polygon_gives_its_bounding_box(tmp_path: Path) -> None:
    boxes, _ = read(tmp_path, "1 0.1 0.2 0.9 0.3 0.5 0.8")
    assert boxes[0] == pytest.approx((1, 0.5, 0.5, 0.8, 0.6))


def test_read_labels__keypoints_are_cut_off(tmp_path: Path) -> None:
    boxes, faults = read(tmp_path, "1 0.5 0.5 0.2 0.2 0.1 0.1 2 0.2 0.2 2", keypoint_columns=6)
    assert boxes == [(1, 0.5, 0.5, 0.2, 0.2)]
    assert not faults


def test_read_labels__missing_file_is_background(tmp_path: Path) -> None:
    labels = read_labels(tmp_path / "none.txt", 3)
    assert not labels.exists
    assert not labels.boxes
    assert not labels.faults


def test_read_labels__binary_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00\x81")
    assert read_labels(tmp_path / "a.txt", 3).faults[0].kind == "unreadable label file"


def test_read_labels__byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf0 0.5 0.5 0.2 0.2\n")
    labels = read_labels(tmp_path / "a.txt", 3)
    assert len(labels.boxes) == 1
    assert not labels.faults


@given(st.text(alphabet="0123456789.-e \n\tx", max_size=80))
def test_read_labels__never_fails_and_boxes_are_always_sound(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.txt"
    file.write_text(text)
    for class_id, x, y, w, h in read_labels(file, 3).boxes:
        assert class_id in {0, 1, 2}
        assert w > 0
        assert h > 0
        assert -0.02 <= min(x, y) <= max(x, y) <= 1.02


number = st.sampled_from(["0", "1", "2", "3", "-1", "0.5", "0.25", "1.005", "1.02", "-0.005", "-0.02", "7", "nan", "x"])


@given(rows=st.lists(st.lists(number, min_size=4, max_size=6), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_read_labels__fatal_exactly_when_ultralytics_drops_the_image(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]
) -> None:
    base = tmp_path_factory.getbasetemp()
    image = base / "parity.png"
    if not image.exists():
        write_image(image, 1)
    file = base / "parity.txt"
    file.write_text("\n".join(" ".join(row) for row in rows))
    dropped = verify_image_label((str(image), str(file), "", False, 3, 0, 0, False))[0] is None
    faults = read_labels(file, 3).faults
    assert any(fault.fatal for fault in faults) == dropped, [fault.kind for fault in faults]
