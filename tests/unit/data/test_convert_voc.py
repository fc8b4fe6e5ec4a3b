from __future__ import annotations

from pathlib import Path

import pytest
from data_factory import label_rows, neu_published, voc_text, write_image, write_voc

from kd_yolo.data.convert import convert
from kd_yolo.data.convert_voc import read_voc
from kd_yolo.data.samples import RawBox
from kd_yolo.errors import DataError


def test_read_voc__neu_as_published(tmp_path: Path) -> None:
    reading = read_voc(neu_published(tmp_path / "raw", each=2))
    assert len(reading.samples) == 12
    assert not reading.problems
    first = next(s for s in reading.samples if s.image.name == "crazing_1.jpg")
    assert first.boxes == [RawBox("crazing", 2, 2, 21, 25)]


def test_read_voc__class_comes_from_name_not_from_file(tmp_path: Path) -> None:
    write_voc(
        tmp_path / "IMAGES/scratches_1.jpg", tmp_path / "ANNOTATIONS/scratches_1.xml", 1, [("inclusion", 1, 1, 9, 9)]
    )
    assert [box.name for box in read_voc(tmp_path).samples[0].boxes] == ["inclusion"]


def test_read_voc__train_validation_mirror(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "validation")):
        for name in ("crazing", "patches"):
            image = tmp_path / split / "images" / name / f"{name}_{number}.jpg"
            write_voc(
                image,
                tmp_path / split / "annotations" / f"{name}_{number}.xml",
                number + len(name),
                [(name, 1, 1, 9, 9)],
            )
    reading = read_voc(tmp_path)
    assert sorted((s.image.stem, s.split) for s in reading.samples) == [
        ("crazing_0", "train"),
        ("crazing_1", "val"),
        ("patches_0", "train"),
        ("patches_1", "val"),
    ]


def test_read_voc__same_stem_in_two_splits_pairs_within_the_split(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "validation")):
        write_voc(
            tmp_path / split / "images/x/1.jpg",
            tmp_path / split / "annotations/1.xml",
            number,
            [("x", 1 + number, 1, 9, 9)],
        )
    reading = read_voc(tmp_path)
    assert {s.split: s.boxes[0].x0 for s in reading.samples} == {"train": 1, "val": 2}
    report = convert("voc", tmp_path, tmp_path.parent / "out-same-stem")
    assert report.images == {"train": 1, "val": 1}


def test_read_voc__pku_per_class_folders(tmp_path: Path) -> None:
    for name, folder in (("short", "Short"), ("spur", "Spur")):
        image = tmp_path / "images" / folder / f"01_{name}_01.jpg"
        write_voc(image, tmp_path / "Annotations" / folder / f"01_{name}_01.xml", len(name), [(name, 3, 3, 9, 9)])
    write_image(tmp_path / "PCB_USED" / "01.JPG", 9)
    reading = read_voc(tmp_path)
    assert sorted(s.boxes[0].name for s in reading.samples) == ["short", "spur"]
    assert reading.problems == {"image without annotation": ["PCB_USED/01.JPG"]}


def test_read_voc__pascal_folders_count_from_one_and_bring_their_split(tmp_path: Path) -> None:
    for index, split in enumerate(("train", "val", "test")):
        stem = f"2007_{index:06d}"
        write_voc(
            tmp_path / "JPEGImages" / f"{stem}.jpg",
            tmp_path / "Annotations" / f"{stem}.xml",
            index,
            [("x", 1, 1, 40, 30)],
        )
        sets = tmp_path / "ImageSets/Main"
        sets.mkdir(parents=True, exist_ok=True)
        (sets / f"{split}.txt").write_text(f"{stem}\n")
    (sets / "trainval.txt").write_text("2007_000000\n2007_000001\n")
    reading = read_voc(tmp_path)
    assert {s.image.stem[-1]: s.split for s in reading.samples} == {"0": "train", "1": "val", "2": "test"}
    # pixels 1..40 and 1..30 are the whole image: its edges are 0, 0, 40, 30
    assert reading.samples[0].boxes == [RawBox("x", 0, 0, 40, 30)]


@pytest.mark.parametrize(("origin", "x0"), [("0", 1.0), ("1", 0.0), ("auto", 1.0)])
def test_read_voc__origin(tmp_path: Path, origin: str, x0: float) -> None:
    write_voc(tmp_path / "a.jpg", tmp_path / "a.xml", 1, [("x", 1, 1, 9, 9)])
    reading = read_voc(tmp_path, origin)  # type: ignore[arg-type]
    assert reading.samples[0].boxes[0].x0 == x0
    assert any("coordinates read as" in decision for decision in reading.decisions)


def test_read_voc__a_zero_rules_out_counting_from_one(tmp_path: Path) -> None:
    write_voc(tmp_path / "JPEGImages/a.jpg", tmp_path / "Annotations/a.xml", 1, [("x", 0, 1, 9, 9)])
    (tmp_path / "ImageSets").mkdir()
    assert read_voc(tmp_path).samples[0].boxes[0].y0 == 1


def test_read_voc__lists_what_cannot_be_used(tmp_path: Path) -> None:
    write_voc(tmp_path / "good.jpg", tmp_path / "good.xml", 1, [("x", 1, 1, 9, 9)])
    (tmp_path / "lonely.xml").write_text(voc_text([("x", 1, 1, 9, 9)], filename="gone.jpg"))
    write_image(tmp_path / "bare.jpg", 2)
    (tmp_path / "broken.xml").write_text("<annotation><object>")
    (tmp_path / "other.xml").write_text("<html/>")
    write_voc(tmp_path / "half.jpg", tmp_path / "half.xml", 3, [("", 1, 1, 9, 9), ("x", 1, 1, 9, 9)])
    reading = read_voc(tmp_path)
    assert reading.problems["annotation without image"] == ["lonely.xml"]
    assert reading.problems["image without annotation"] == ["bare.jpg"]
    assert len(reading.problems["unreadable annotation"]) == 2
    assert reading.problems["unusable object"] == ["half.xml: object 1 has no <name> or no numeric <bndbox>"]
    assert len(reading.samples) == 2


def test_read_voc__stated_file_name_finds_the_image(tmp_path: Path) -> None:
    write_image(tmp_path / "photo.jpg", 1)
    (tmp_path / "note.xml").write_text(voc_text([("x", 1, 1, 9, 9)], filename="photo.jpg"))
    assert read_voc(tmp_path).samples[0].image.name == "photo.jpg"


def test_read_voc__size_that_differs_is_listed(tmp_path: Path) -> None:
    write_image(tmp_path / "a.jpg", 1)
    (tmp_path / "a.xml").write_text(voc_text([("x", 1, 1, 9, 9)], width=80, height=60))
    assert read_voc(tmp_path).problems["size in annotation differs"] == ["a.jpg: XML says 80x60, the image is 40x30"]


def test_read_voc__no_xml_says_so(tmp_path: Path) -> None:
    write_image(tmp_path / "a.jpg", 1)
    with pytest.raises(DataError, match=r"no \.xml file"):
        read_voc(tmp_path)


def test_convert__voc_values_clipping_and_dropping(tmp_path: Path) -> None:
    boxes = [
        ("x", 10, 15, 30, 30),
        ("x", 10, 15, 30, 30),  # duplicate
        ("x", -5, 5, 20, 10),  # clipped to 0
        ("x", 50, 5, 60, 10),  # outside
        ("x", 7, 5, 7, 10),  # no width
        ("x", 39.5, 5, 60, 10),  # half a pixel left after clipping
        ("y", 10, 15, 30, 30),  # another class: no duplicate
    ]
    raw = tmp_path / "raw"
    write_voc(raw / "a.jpg", raw / "a.xml", 1, boxes)
    for index in range(4):
        write_voc(raw / f"b{index}.jpg", raw / f"b{index}.xml", 10 + index, [("x", 1, 1, 9, 9)])
    report = convert("voc", raw, tmp_path / "out")
    assert report.dropped == {"clipped": 1, "degenerate": 2, "duplicate": 1, "outside": 1}
    # (10 + 30) / 2 / 40 = 0.5, (15 + 30) / 2 / 30 = 0.75, 20 / 40 = 0.5, 15 / 30 = 0.5; second 0..20 x 5..10
    assert label_rows(tmp_path / "out/labels")["a"] == [
        [0, 0.5, 0.75, 0.5, 0.5],
        [0, 0.25, 0.25, 0.5, 0.166667],
        [1, 0.5, 0.75, 0.5, 0.5],
    ]
