"""Classification folders: read strictly, and made of detection data and of plain folders without leaks."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from class_factory import class_folder, draw

from kd_yolo.classify.convert import convert_classes
from kd_yolo.classify.data import resolve_class_data, to_classification
from kd_yolo.classify.folder import read_class_folder
from kd_yolo.data.layout import MARKER
from kd_yolo.data.splits import SplitSpec
from kd_yolo.errors import ConfigError, DataError, OutputError
from kd_yolo.files import sha256


def detection_set(out: Path, background: int = 0) -> Path:
    """Write a detection data set of 2 classes, 6 images each in train, 2 in val; and some images without a box."""
    for split, count in (("train", 6), ("val", 2)):
        (out / "images" / split).mkdir(parents=True)
        (out / "labels" / split).mkdir(parents=True)
        for number in range(count):
            for index, name in enumerate(("dots", "lines")):
                stem = f"{split}{number}-{index}"
                cv2.imwrite(str(out / "images" / split / f"{stem}.png"), draw(name, number + 50 * (split == "val")))
                (out / "labels" / split / f"{stem}.txt").write_text(f"{index} 0.5 0.5 0.4 0.4\n")
        for number in range(background):
            image = out / "images" / split / f"free{number}.png"
            cv2.imwrite(str(image), draw("plain", number + 50 * (split == "val")))
    file = out / "data.yaml"
    file.write_text(f"path: {out}\ntrain: images/train\nval: images/val\nnames: [dots, lines]\n")
    return file


# ---- reading ----------------------------------------


def test_read_class_folder__names_in_ultralytics_order(tmp_path: Path) -> None:
    found = read_class_folder(class_folder(tmp_path / "data"), check_images=True)
    assert found.names == {0: "dots", 1: "lines", 2: "plain"}
    assert (found.count("train"), found.count("val"), found.count("test")) == (24, 12, 6)
    assert found.commonest_share("val") == pytest.approx(1 / 3)


def loose_image(data: Path) -> None:
    shutil.copy(data / "train/dots/dots_0.png", data / "train/lost.png")


def empty_class(data: Path) -> None:
    (data / "train" / "aempty").mkdir()


def emptied_in_val(data: Path) -> None:
    shutil.rmtree(data / "val" / "lines")


def unknown_in_val(data: Path) -> None:
    (data / "val" / "plain").rename(data / "val" / "Plain2")


def no_val(data: Path) -> None:
    shutil.rmtree(data / "val")


def no_train(data: Path) -> None:
    (data / "train").rename(data / "trainset")


def one_class(data: Path) -> None:
    for split in ("train", "val", "test"):
        for name in ("lines", "plain"):
            shutil.rmtree(data / split / name)


def imagenet_code(data: Path) -> None:
    for split in ("train", "val", "test"):
        (data / split / "dots").rename(data / split / "n0_dots")
        (data / split / "lines").rename(data / split / "z")


def broken_image(data: Path) -> None:
    (data / "val/dots/dots_1.png").write_bytes(b"no image")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (loose_image, r"lost\.png: this image is in no class folder"),
        (empty_class, r"aempty: this class folder holds no image"),
        (emptied_in_val, r"val: has no images of the class 'lines'"),
        (unknown_in_val, r"Plain2: train has no class 'Plain2'"),
        (no_val, r"has no 'val' folder"),
        (no_train, r"has no 'train' folder"),
        (one_class, r"holds 1 class folder"),
        (imagenet_code, r"n0_dots: rename it"),
        (broken_image, r"dots_1\.png .*repair or remove it"),
    ],
)
def test_read_class_folder__refuses(tmp_path: Path, spoil: Callable[[Path], None], said: str) -> None:
    data = class_folder(tmp_path / "data")
    spoil(data)
    with pytest.raises(DataError, match=said) as caught:
        read_class_folder(data, check_images=True)
    assert "\n" not in str(caught.value)


def test_read_class_folder__warns_of_equal_files_in_two_splits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("ultralytics")
    monkeypatch.setattr(logger, "handlers", [*logger.handlers, caplog.handler])  # whoever changed the root logger
    data = class_folder(tmp_path / "data")
    read_class_folder(data, check_images=True)
    assert "byte for byte" not in caplog.text
    shutil.copy(data / "train/dots/dots_3.png", data / "val/dots/copy.png")
    read_class_folder(data, check_images=True)
    assert "1 images are in two splits byte for byte" in caplog.text


def test_read_class_folder__a_test_split_may_lack_a_class_and_hidden_folders_are_refused(tmp_path: Path) -> None:
    data = class_folder(tmp_path / "data")
    shutil.rmtree(data / "test/dots")
    assert list(read_class_folder(data).images["test"]) == ["lines", "plain"]
    (data / "train/.ipynb_checkpoints").mkdir()
    with pytest.raises(DataError, match="Ultralytics takes this hidden folder for a class; remove it"):
        read_class_folder(data)


# ---- making ----------------------------------------


def test_to_classification__class_of_the_boxes_keeps_the_split(tmp_path: Path) -> None:
    file = detection_set(tmp_path / "det")
    report = to_classification(file, tmp_path / "out")
    assert report.kind == "class"
    assert report.images == {"train": {"dots": 6, "lines": 6}, "val": {"dots": 2, "lines": 2}}
    for image in (tmp_path / "out").rglob("*.png"):
        source = tmp_path / "det" / "images" / image.parent.parent.name / image.name
        assert image.read_bytes() == source.read_bytes()
        assert image.parent.name == ("dots", "lines")[int(image.stem[-1])]
    assert read_class_folder(tmp_path / "out").names == {0: "dots", 1: "lines"}


def test_to_classification__largest_area_wins_and_the_file_name_before_it(tmp_path: Path) -> None:
    file = detection_set(tmp_path / "det")
    labels = tmp_path / "det/labels/train"
    (labels / "train0-0.txt").write_text("0 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.1 0.1\n")
    for folder, suffix in (("images", "png"), ("labels", "txt")):
        old = tmp_path / "det" / folder / "train" / f"train1-0.{suffix}"
        old.rename(old.with_name(f"lines_7.{suffix}"))
    to_classification(file, tmp_path / "out")
    assert (tmp_path / "out/train/lines/train0-0.png").is_file()
    assert (tmp_path / "out/train/lines/lines_7.png").is_file()


def test_to_classification__background_makes_good_or_defective(tmp_path: Path) -> None:
    file = detection_set(tmp_path / "det", background=3)
    assert to_classification(file, tmp_path / "two").names == ["defective", "good"]
    three = to_classification(file, tmp_path / "three", kind="class")
    assert three.names == ["dots", "good", "lines"]
    assert three.images["train"] == {"dots": 6, "good": 3, "lines": 6}


def test_to_classification__long_images_become_squares_without_losing_a_pixel(tmp_path: Path) -> None:
    """Ultralytics cuts the middle square out of an image; on a long one a defect at the end would be gone."""
    raw = tmp_path / "raw"
    for name in ("dots", "lines"):
        for index in range(12):
            image = draw(name, index)
            image = image if index else np.ascontiguousarray(image[:24])  # the first is 64 x 24
            (raw / name).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(raw / name / f"{name}{index}.bmp"), image)
    report = to_classification(raw, tmp_path / "out")
    assert any(text.startswith("2 images padded to squares") for text in report.decisions)
    padded = list((tmp_path / "out").rglob("*.png"))
    assert sorted(path.name for path in padded) == ["dots0.png", "lines0.png"]
    for path in padded:
        found = np.asarray(cv2.imread(str(path)))
        assert found.shape == (64, 64, 3)
        np.testing.assert_array_equal(found[20:44], cv2.imread(str(raw / path.stem[:-1] / f"{path.stem}.bmp")))
        np.testing.assert_array_equal(found[0], found[20])
    assert read_class_folder(tmp_path / "out", check_images=True).count("train") > 0


def test_to_classification__never_replaces_its_own_source(tmp_path: Path) -> None:
    file = detection_set(tmp_path / "det")
    (tmp_path / "det" / "conversion.json").write_text("{}")  # what marks a folder as replaceable
    before = sorted(path for path in (tmp_path / "det").rglob("*"))
    for mode in ("copy", "link"):
        with pytest.raises(ConfigError, match="holds the images of src"):
            to_classification(file, tmp_path / "det", mode=mode)
    assert sorted(path for path in (tmp_path / "det").rglob("*")) == before


def test_to_classification__copies_and_contradictions(tmp_path: Path) -> None:
    file = detection_set(tmp_path / "det")
    images = tmp_path / "det" / "images"
    shutil.copy(images / "val/val0-0.png", images / "train/train0-0.png")  # a leak: val keeps it
    shutil.copy(images / "train/train1-0.png", images / "train/train1-1.png")  # one image, two classes
    report = to_classification(file, tmp_path / "out")
    assert report.images == {"train": {"dots": 4, "lines": 5}, "val": {"dots": 2, "lines": 2}}
    assert any("1 images left out of an earlier split" in line for line in report.decisions)
    assert any("2 images left out: the same bytes carry two classes" in line for line in report.decisions)
    seen: dict[str, str] = {}
    for path in (tmp_path / "out").rglob("*.png"):
        assert seen.setdefault(sha256(path), path.parts[-3]) == path.parts[-3]


def test_to_classification__plain_folder_is_split_by_groups(tmp_path: Path) -> None:
    src = tmp_path / "raw"
    for name in ("dots", "lines"):
        (src / name).mkdir(parents=True)
        for part in range(10):
            for view in range(3):
                cv2.imwrite(str(src / name / f"{name}{part}_v{view}.png"), draw(name, 10 * part + view))
    report = to_classification(src, tmp_path / "out", split=SplitSpec(group=r"^(\w+\d+)_v", seed=1))
    assert report.kind == "folder"
    assert sum(sum(found.values()) for found in report.images.values()) == 60
    splits: dict[str, set[str]] = {}
    for path in (tmp_path / "out").rglob("*.png"):
        splits.setdefault(path.stem.partition("_")[0], set()).add(path.parts[-3])
    assert len(splits) == 20
    assert all(len(found) == 1 for found in splits.values())


def test_to_classification__refuses(tmp_path: Path) -> None:
    file = detection_set(tmp_path / "det")
    with pytest.raises(ConfigError, match="did you mean 'defect'"):
        to_classification(file, tmp_path / "out", kind="defects")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="needs images with and without boxes"):
        to_classification(file, tmp_path / "out", kind="defect")
    with pytest.raises(ConfigError, match="keeps its own split"):
        to_classification(file, tmp_path / "out", split=SplitSpec())
    with pytest.raises(DataError, match="is split already"):
        to_classification(class_folder(tmp_path / "done"), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("x")
    with pytest.raises(OutputError, match="not made by kd-yolo"):
        to_classification(file, tmp_path / "mine")
    for label in (tmp_path / "det/labels/val").glob("*-1.txt"):
        label.write_text("0 0.5 0.5 0.4 0.4\n")
    with pytest.raises(DataError, match="the 'val' part would have no image of the class 'lines'"):
        to_classification(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_convert_classes__keys_of_the_command_line(tmp_path: Path) -> None:
    src = tmp_path / "raw"
    for name in ("dots", "lines"):
        (src / name).mkdir(parents=True)
        for index in range(10):
            cv2.imwrite(str(src / name / f"{name}{index}.png"), draw(name, index))
    keys = {"from": "classes", "src": str(src), "out": str(tmp_path / "out"), "split": "0.6/0.2/0.2"}
    text, content = convert_classes(keys)
    assert {split: sum(found.values()) for split, found in content["images"].items()} == {
        "train": 12,
        "val": 4,
        "test": 4,
    }
    assert f"use it with task=classify data={tmp_path / 'out'}" in text
    with pytest.raises(ConfigError, match="did you mean 'split'"):
        convert_classes({**keys, "spilt": "0.8/0.1/0.1"})
    with pytest.raises(ConfigError, match="missing key 'src'"):
        convert_classes({"from": "classes", "out": "x"})


def test_resolve_class_data__makes_a_built_in_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = detection_set(tmp_path / "det")
    monkeypatch.setattr("kd_yolo.classify.data.resolve_dataset", lambda *_: file)
    first = resolve_class_data("neu", root=tmp_path)
    stamp = (first / "conversion.json").stat().st_mtime_ns
    assert first == tmp_path / "neu-cls"
    assert resolve_class_data("neu.yaml", root=tmp_path) == first
    assert (first / "conversion.json").stat().st_mtime_ns == stamp
    assert resolve_class_data(str(first)) == first
    file.write_text(file.read_text() + "# another version\n")
    resolve_class_data("neu", root=tmp_path)
    assert (first / "conversion.json").stat().st_mtime_ns != stamp


def test_resolve_class_data__names_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'magnetic-tile'"):
        resolve_class_data("magnetic-tyle", root=tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        resolve_class_data(str(tmp_path / "nothing"), root=tmp_path)
    with pytest.raises(DataError, match="is a detection data set"):
        read_class_folder(detection_set(tmp_path / "det").parent)


def test_neu__has_six_classes_by_file_name(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (shared / "datasets" / "neu-det").is_dir():
        pytest.skip("no NEU-DET in the shared data")
    monkeypatch.setenv("KD_YOLO_SHARED", str(shared))
    home = resolve_class_data("neu", root=tmp_path)
    counts = {split: set(found.values()) for split, found in json.loads((home / MARKER).read_text())["images"].items()}
    assert counts == {"train": {240}, "val": {30}, "test": {30}}
    assert all(path.name.startswith(f"{path.parent.name}_") for path in home.rglob("*.jpg"))
