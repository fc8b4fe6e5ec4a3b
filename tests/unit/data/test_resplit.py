from __future__ import annotations

from pathlib import Path

import pytest
from data_factory import yolo_set

from kd_yolo.data.datayaml import load_data_yaml
from kd_yolo.data.resplit import make_split
from kd_yolo.data.splits import SplitSpec, parse_split
from kd_yolo.data.validate import validate_for_training
from kd_yolo.errors import DataError, OutputError


def test_make_split__pools_and_splits_again_without_moving(tmp_path: Path) -> None:
    source = yolo_set(tmp_path / "set", train=20, val=6, test=4)
    before = sorted(path for path in (tmp_path / "set").rglob("*"))
    (written,) = make_split(source, tmp_path / "again", parse_split("8:1:1"))
    data = load_data_yaml(written)
    assert data.ready
    assert {split: len(data.images(split)) for split in data.splits} == {"train": 24, "val": 3, "test": 3}
    assert data.names == ["a", "b"]
    validate_for_training(written)
    assert sorted(path for path in (tmp_path / "set").rglob("*")) == before


def test_make_split__folds(tmp_path: Path) -> None:
    source = yolo_set(tmp_path / "set", train=20, val=10)
    files = make_split(source, tmp_path / "folds", SplitSpec(method="kfold", folds=3))
    assert [file.parent.name for file in files] == ["fold0", "fold1", "fold2"]
    tests = [image for file in files for image in load_data_yaml(file).images("test")]
    assert len(tests) == len(set(tests)) == 30
    for file in files:
        data = load_data_yaml(file)
        parts = [set(data.images(split)) for split in ("train", "val", "test")]
        assert sum(len(part) for part in parts) == len(set.union(*parts)) == 30


def test_make_split__other_keys_travel_on(tmp_path: Path) -> None:
    source = yolo_set(tmp_path / "set", train=10, val=5)
    source.write_text(source.read_text() + "channels: 1\n")
    (written,) = make_split(source, tmp_path / "again", SplitSpec())
    assert "channels: 1" in written.read_text()


def test_make_split__refuses_a_foreign_folder_and_a_missing_image(tmp_path: Path) -> None:
    source = yolo_set(tmp_path / "set")
    with pytest.raises(OutputError, match="was not made by kd-yolo"):
        make_split(source, tmp_path / "set", SplitSpec())
    listed = tmp_path / "list.txt"
    listed.write_text(str(tmp_path / "gone.jpg"))
    (tmp_path / "listed.yaml").write_text(f"path: {tmp_path}\ntrain: list.txt\nval: list.txt\nnames: [a]\n")
    with pytest.raises(DataError, match=r"gone\.jpg: cannot be read"):
        make_split(tmp_path / "listed.yaml", tmp_path / "out", SplitSpec())
