from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_factory import label_rows, write_image

from kd_yolo.data.convert import convert
from kd_yolo.data.convert_coco import read_coco
from kd_yolo.errors import DataError


def write_coco(file: Path, names: list[str], first_id: int) -> None:
    """Category ids are as sparse as COCO's own; the last image has no annotation."""
    content: dict[str, Any] = {
        "images": [{"id": first_id + i, "file_name": name, "width": 40, "height": 30} for i, name in enumerate(names)],
        "categories": [{"id": 7, "name": "scratch"}, {"id": 18, "name": "dent"}],
        "annotations": [
            {"id": i, "image_id": first_id + i, "category_id": 18 if i % 2 else 7, "bbox": [4, 3, 20, 15]}
            for i in range(len(names) - 1)
        ],
    }
    content["annotations"].append(
        {"id": 99, "image_id": first_id, "category_id": 7, "bbox": [0, 0, 9, 9], "iscrowd": 1}
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def coco_folder(root: Path) -> Path:
    for number, split in enumerate(("train2017", "val2017")):
        names = [f"{split}_{i}.jpg" for i in range(4)]
        for i, name in enumerate(names):
            write_image(root / split / name, 10 * number + i)
        write_coco(root / "annotations" / f"instances_{split}.json", names, 100 * number)
    return root


def test_convert__coco_as_published(tmp_path: Path) -> None:
    report = convert("coco", coco_folder(tmp_path / "raw"), tmp_path / "out")
    assert report.images == {"train": 4, "val": 4}
    assert report.background == {"train": 1, "val": 1}
    assert report.boxes == {"dent": {"train": 1, "val": 1}, "scratch": {"train": 2, "val": 2}}
    assert "crowd regions dropped: 2" in report.decisions
    # x 4..24 of 40, y 3..18 of 30
    assert label_rows(tmp_path / "out/labels")["train2017_0"] == [[1, 0.35, 0.35, 0.5, 0.5]]


def test_read_coco__one_json_inside_each_split_folder(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        names = [f"{split}_{i}.jpg" for i in range(3)]
        for i, name in enumerate(names):
            write_image(tmp_path / split / name, i + len(split))
        write_coco(tmp_path / split / "_annotations.coco.json", names, 0)
    assert [s.split for s in read_coco(tmp_path).samples] == ["train"] * 3 + ["val"] * 3


def test_read_coco__missing_image_is_listed(tmp_path: Path) -> None:
    raw = coco_folder(tmp_path)
    (raw / "train2017/train2017_1.jpg").unlink()
    assert read_coco(raw).problems == {
        "annotation without image": ["annotations/instances_train2017.json: train2017_1.jpg"]
    }


def test_read_coco__malformed(tmp_path: Path) -> None:
    raw = coco_folder(tmp_path)
    file = raw / "annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["category_id"] = 55
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"instances_train2017\.json: malformed COCO entry \(KeyError"):
        read_coco(raw)
    file.write_text("{")
    with pytest.raises(DataError, match="not readable as JSON"):
        read_coco(raw)


def test_read_coco__no_coco_file(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"name": "x"}')
    with pytest.raises(DataError, match="no COCO file"):
        read_coco(tmp_path)
