from __future__ import annotations

from pathlib import Path

import pytest
from data_factory import write_image, yolo_set
from ultralytics.data.utils import IMG_FORMATS, img2label_paths

from kd_yolo.data.datayaml import label_path, load_data_yaml
from kd_yolo.data.layout import IMAGE_SUFFIXES
from kd_yolo.errors import ConfigError, DataError


@pytest.fixture
def home(tmp_path: Path) -> Path:
    yolo_set(tmp_path / "set", test=2)
    return tmp_path / "set"


def write(home: Path, text: str) -> Path:
    file = home / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return file


GOOD = "train: images/train\nval: images/val\nnames: [a, b]\n"


def test_image_suffixes__are_those_of_ultralytics() -> None:
    assert {f".{suffix}" for suffix in IMG_FORMATS} == IMAGE_SUFFIXES


@pytest.mark.parametrize(
    "path", ["/d/images/train/a.jpg", "/d/images/x/images/a.b.png", "/d/pics/a.jpg", "/images/a.jpg"]
)
def test_label_path__is_that_of_ultralytics(path: str) -> None:
    assert str(label_path(Path(path))) == img2label_paths([path])[0]


@pytest.mark.parametrize(
    "names", ["[a, b]", "{0: a, 1: b}", "{'0': a, '1': b}", "{1: b, 0: a}"], ids=["list", "dict", "text keys", "order"]
)
def test_load_data_yaml__names_forms(home: Path, names: str) -> None:
    data = load_data_yaml(write(home, f"path: {home}\ntrain: images/train\nval: images/val\nnames: {names}\n"))
    assert data.names == ["a", "b"]


def test_load_data_yaml__absolute_path_is_ready(home: Path) -> None:
    data = load_data_yaml(home / "data.yaml")
    assert data.ready
    assert {split: len(data.images(split)) for split in data.splits} == {"train": 6, "val": 3, "test": 2}


@pytest.mark.parametrize("path", ["", "path: .\n", "path: ../set\n"])
def test_load_data_yaml__relative_to_the_yaml_is_found_but_not_ready(
    home: Path, monkeypatch: pytest.MonkeyPatch, path: str, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    data = load_data_yaml(write(home, path + GOOD))
    assert data.path == home
    assert not data.ready


def test_load_data_yaml__working_folder_comes_first_as_in_ultralytics(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yolo_set(tmp_path / "work/set")
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "far.yaml").write_text("path: set\n" + GOOD)
    assert load_data_yaml(tmp_path / "far.yaml").path == tmp_path / "work/set"


def test_load_data_yaml__roboflow_habits(home: Path) -> None:
    text = "train: ../images/train\nvalidation: ../images/val\nnames: [a, b]\nnc: 2\n"
    text += "roboflow: {workspace: x, version: 3}\n"
    data = load_data_yaml(write(home, text))
    assert data.splits["val"] == [home / "images/val"]
    assert data.extra == {"roboflow": {"workspace": "x", "version": 3}}


def test_load_data_yaml__stock_keys_travel_on_and_download_does_not(home: Path) -> None:
    text = f"path: {home}\n{GOOD}channels: 1\nkpt_shape: [17, 3]\ndownload: https://x/y.zip\n"
    data = load_data_yaml(write(home, text))
    assert not data.ready
    content = data.content()
    assert content["channels"] == 1
    assert content["kpt_shape"] == [17, 3]
    assert "download" not in content


def test_load_data_yaml__lists_of_folders_and_list_files(home: Path) -> None:
    write_image(home / "more/images/z.png", 77)
    (home / "val.txt").write_text("./images/val/val_0.png\n\n" + str(home / "images/val/val_1.png") + "\nnotes.md\n")
    data = load_data_yaml(
        write(home, f"path: {home}\ntrain: [images/train, more/images]\nval: val.txt\nnames: [a, b]\n")
    )
    assert len(data.images("train")) == 7
    assert data.images("val") == [home / "images/val/val_0.png", home / "images/val/val_1.png"]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", ConfigError, "is empty"),
        ("- a\n- b\n", ConfigError, "holds a list"),
        ("train: [\n", ConfigError, "not valid YAML"),
        ("val: images/val\nnames: [a, b]\n", ConfigError, "missing key 'train'"),
        ("train: images/train\nnames: [a, b]\n", ConfigError, "missing key 'val'"),
        ("train: 5\nval: images/val\nnames: [a]\n", ConfigError, "train.*5 is not valid"),
        ("train: images/train\nval: ''\nnames: [a]\n", DataError, "'val' is empty"),
        ("train: images/train\nval: images/val\n", DataError, "'names' is missing"),
        ("train: images/train\nval: images/val\nnames: []\n", DataError, "must be 0, 1, 2"),
        ("train: images/train\nval: images/val\nnames: {1: a, 2: b}\n", DataError, "must be 0, 1, 2"),
        ("train: images/train\nval: images/val\nnames: {x: a}\n", DataError, "whole numbers as keys"),
        ("train: images/train\nval: images/val\nnames: [a, a]\n", DataError, "lists 'a' twice"),
        ("train: images/train\nval: images/val\nnames: [a, [b]]\n", DataError, "not a class name"),
        ("train: images/train\nval: images/val\nnames: [a, ]\nnc: 2\n", DataError, "'nc' is 2 but 'names' lists 1"),
        (GOOD + "chanels: 3\n", DataError, "unknown key 'chanels'; did you mean 'channels'"),
        (GOOD + "channels: 0\n", ConfigError, "channels"),
        ("train: images/training\nval: images/val\nnames: [a]\n", DataError, "'train' images are not there"),
    ],
)
def test_load_data_yaml__bad_input_is_one_line_naming_the_file(
    home: Path, text: str, error: type[Exception], message: str
) -> None:
    file = write(home, text)
    with pytest.raises(error, match=message) as caught:
        load_data_yaml(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_load_data_yaml__missing_folder_names_every_place(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        load_data_yaml(write(home, "path: gone\n" + GOOD), (tmp_path / "root",))
    for place in (tmp_path / "gone", home / "gone", tmp_path / "root/gone"):
        assert f"{place}/images/train" in str(caught.value)


def test_load_data_yaml__nc_alone_gives_numbered_names(home: Path) -> None:
    data = load_data_yaml(write(home, f"path: {home}\ntrain: images/train\nval: images/val\nnc: 2\n"))
    assert data.names == ["class_0", "class_1"]
    assert not data.ready
