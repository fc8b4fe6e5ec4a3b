"""The published data sets themselves, when they are at hand: counts must be those of their provenance notes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kd_yolo.data.check import check_dataset
from kd_yolo.data.convert import convert
from kd_yolo.data.convert_voc import read_voc
from kd_yolo.data.datasets import load_builtin
from kd_yolo.data.splits import SplitSpec, expand_stems
from kd_yolo.data.validate import validate_for_training
from kd_yolo.resources import find

SHARED = Path(os.environ.get("KD_YOLO_SHARED") or Path(__file__).parents[3] / ".." / "shared").resolve()
NEU_FOLDER = SHARED / "datasets/neu-det"
TILE_FOLDER = SHARED / "datasets/magnetic-tile"

needs_neu = pytest.mark.skipif(not (NEU_FOLDER / "IMAGES").is_dir(), reason="NEU-DET is not there; set KD_YOLO_SHARED")
needs_tiles = pytest.mark.skipif(not (TILE_FOLDER / "MT_Free").is_dir(), reason="no magnetic tiles; set KD_YOLO_SHARED")


@pytest.fixture(scope="module")
def neu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("neu") / "neu"


@needs_neu
def test_neu__counts_and_check(neu: Path) -> None:
    report = convert("voc", NEU_FOLDER, neu, mode="link")
    assert report.images == {"train": 1440, "val": 180, "test": 180}
    # 4189 boxes as published, less the three listed twice (inclusion_62, patches_198, crazing_120)
    assert {name: sum(row.values()) for name, row in report.boxes.items()} == {
        "crazing": 689 - 1,
        "inclusion": 1011 - 1,
        "patches": 881 - 1,
        "pitted_surface": 432,
        "rolled-in_scale": 628,
        "scratches": 548,
    }
    assert report.dropped == {"duplicate": 3}
    assert not report.problems
    validate_for_training(report.yaml)
    found = check_dataset(report.yaml, imgsz=224)
    assert [problem.kind for problem in found.problems] == ["duplicate image"]
    assert "patches_10" in found.problems[0].file  # patches_101 and patches_105, both in train


@needs_neu
def test_neu__without_lists_gets_the_same_split(neu: Path, tmp_path: Path) -> None:
    raw = tmp_path / "NEU-DET"
    raw.mkdir()
    for folder in ("IMAGES", "ANNOTATIONS"):
        (raw / folder).symlink_to(NEU_FOLDER / folder)
    first = convert("voc", NEU_FOLDER, neu, mode="link")
    second = convert("voc", raw, tmp_path / "out", mode="link")
    assert second.lists_sha256 == first.lists_sha256


@needs_neu
def test_neu__as_published_has_4189_boxes_inside_1_to_200() -> None:
    boxes = [box for sample in read_voc(NEU_FOLDER).samples for box in sample.boxes]
    assert len(boxes) == 4189
    assert min(min(box.x0, box.y0) for box in boxes) == 1
    assert max(max(box.x1, box.y1) for box in boxes) == 200


@needs_neu
def test_neu__built_in_split_is_the_one_of_the_lists() -> None:
    split = load_builtin(find("datasets", "neu")).split
    assert split is not None
    for part in ("val", "test"):
        assert sorted(expand_stems(split[part])) == sorted((NEU_FOLDER / f"splits/{part}.txt").read_text().split())


@needs_tiles
def test_tiles__counts_and_no_tile_in_two_splits(tmp_path: Path) -> None:
    report = convert("masks", TILE_FOLDER, tmp_path / "tiles", split=SplitSpec(group="similar"), mode="link")
    # components of at least 10 pixels: the table's counts less its specks (9 Break, 3 Fray, 8 Uneven)
    boxes = {"Blowhole": 118, "Break": 126 - 9, "Crack": 70, "Fray": 41 - 3, "Uneven": 107 - 8}
    assert {name: sum(row.values()) for name, row in report.boxes.items()} == boxes
    assert sum(report.background.values()) == 952
    # four masks are empty and two hold only specks
    assert {kind: len(files) for kind, files in report.problems.items()} == {
        "empty mask in a defect folder (left out)": 6,
    }
    assert "components under 10 pixels dropped: 20" in report.decisions
    assert report.images == {"train": 1070, "val": 134, "test": 134}
    # one tile was photographed under several exposures: none may be on two sides
    kinds = {problem.kind for problem in check_dataset(report.yaml, imgsz=224).problems}
    assert not kinds & {"near duplicate across splits", "leakage"}
