from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import yaml
from data_factory import NEU, neu_published, write_image, write_voc

from kd_yolo.data.convert import convert
from kd_yolo.data.splits import SplitSpec
from kd_yolo.data.validate import validate_for_training
from kd_yolo.errors import ConfigError, DataError, OutputError


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return neu_published(tmp_path / "raw")


def test_convert__lists_beside_the_data_are_used(tmp_path: Path) -> None:
    src = neu_published(tmp_path / "raw", splits=True)
    report = convert("voc", src, tmp_path / "out")
    assert report.images == {"train": 48, "val": 6, "test": 6}
    for split in ("train", "val", "test"):
        listed = sorted((src / f"splits/{split}.txt").read_text().split())
        assert sorted(path.stem for path in (tmp_path / f"out/images/{split}").iterdir()) == listed
        assert report.lists_sha256[split] == hashlib.sha256("".join(f"{s}\n" for s in listed).encode()).hexdigest()


def test_convert__layout_is_ready_for_training(raw: Path, tmp_path: Path) -> None:
    report = convert("voc", raw, tmp_path / "out")
    content = yaml.safe_load(report.yaml.read_text())
    assert content["path"] == str(tmp_path / "out")
    assert content["names"] == dict(enumerate(NEU))
    assert [content[s] for s in ("train", "val", "test")] == ["images/train", "images/val", "images/test"]
    assert report.images == {"train": 48, "val": 6, "test": 6}
    validate_for_training(report.yaml)
    record = json.loads((tmp_path / "out/conversion.json").read_text())
    assert record["images"] == report.images
    assert record["boxes"] == report.boxes
    assert record["lists_sha256"] == report.lists_sha256
    assert all(name in report.to_text() for name in NEU)


def test_convert__images_are_copied_byte_for_byte_or_linked(raw: Path, tmp_path: Path) -> None:
    convert("voc", raw, tmp_path / "copy")
    convert("voc", raw, tmp_path / "link", mode="link")
    for copy in (tmp_path / "copy/images").rglob("*.jpg"):
        assert copy.read_bytes() == (raw / "IMAGES" / copy.name).read_bytes()
        assert not copy.is_symlink()
    links = list((tmp_path / "link/images").rglob("*.jpg"))
    assert len(links) == 60
    assert all(link.is_symlink() and link.resolve() == raw / "IMAGES" / link.name for link in links)
    validate_for_training(tmp_path / "link/data.yaml")


def test_convert__same_input_same_output(raw: Path, tmp_path: Path) -> None:
    first, second = convert("voc", raw, tmp_path / "a"), convert("voc", raw, tmp_path / "b")
    assert first.lists_sha256 == second.lists_sha256
    other = convert("voc", raw, tmp_path / "c", split=SplitSpec(seed=1))
    assert other.lists_sha256 != first.lists_sha256


def test_convert__replaces_its_own_but_nothing_else(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert("voc", raw, out)
    (out / "images/train/stale.jpg").write_bytes(b"x")
    convert("voc", raw, out)
    assert not (out / "images/train/stale.jpg").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="was not made by kd-yolo"):
        convert("voc", raw, foreign)
    assert (foreign / "thesis.txt").read_text() == "years of work"


def test_convert__failure_leaves_nothing(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        convert("voc", raw, tmp_path / "out", names=["crazing", "inclusions"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


def test_convert__interrupted_writing_leaves_nothing_and_keeps_the_old(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert("voc", raw, out)
    before = (out / "conversion.json").read_bytes()

    def stop(done: int, _total: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert("voc", raw, out, split=SplitSpec(seed=9), progress=stop)
    assert (out / "conversion.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


def test_convert__unknown_class_names_the_nearest(raw: Path, tmp_path: Path) -> None:
    names = ["crazing", "inclusions", *NEU[2:]]
    with pytest.raises(DataError, match=r"class 'inclusion' is not one of .*did you mean 'inclusions'"):
        convert("voc", raw, tmp_path / "out", names=names)


def test_convert__names_give_the_order(raw: Path, tmp_path: Path) -> None:
    report = convert("voc", raw, tmp_path / "out", names=NEU[::-1])
    assert yaml.safe_load(report.yaml.read_text())["names"] == dict(enumerate(NEU[::-1]))


def test_convert__unreadable_image_is_listed_and_left_out(raw: Path, tmp_path: Path) -> None:
    (raw / "IMAGES/crazing_3.jpg").write_bytes(b"no image")
    report = convert("voc", raw, tmp_path / "out")
    assert sum(report.images.values()) == 59
    assert "IMAGES/crazing_3.jpg" in report.problems["unreadable image (left out)"][0]
    assert "unreadable image" in report.to_text()


def test_convert__equal_images_stay_on_one_side(tmp_path: Path) -> None:
    src = tmp_path / "raw"
    for index in range(40):
        write_voc(src / f"a{index}.jpg", src / f"a{index}.xml", index // 2, [("x", 1, 1, 9, 9)])  # twins
    for seed in range(5):
        convert("voc", src, tmp_path / "out", split=SplitSpec(method="random", seed=seed, ratios=(0.5, 0.3, 0.2)))
        split_of = {p.stem: p.parent.name for p in (tmp_path / "out/images").rglob("*.jpg")}
        assert all(split_of[f"a{i}"] == split_of[f"a{i + 1}"] for i in range(0, 40, 2))


def test_convert__same_stem_in_two_folders_keeps_both(tmp_path: Path) -> None:
    src = tmp_path / "raw"
    for index in range(6):
        for number, folder in enumerate(("left", "right")):
            write_voc(
                src / folder / f"{index}.jpg", src / folder / f"{index}.xml", 10 * index + number, [("x", 1, 1, 9, 9)]
            )
    report = convert("voc", src, tmp_path / "out")
    assert sum(report.images.values()) == 12
    assert len({p.name for p in (tmp_path / "out/images").rglob("*.jpg")}) == 12


def test_convert__bad_arguments(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"from=vco: not known.*did you mean 'voc'"):
        convert("vco", raw, tmp_path / "out")
    with pytest.raises(DataError, match="no such folder"):
        convert("voc", tmp_path / "gone", tmp_path / "out")
    with pytest.raises(ConfigError, match="lies inside src"):
        convert("voc", raw, raw / "out")
    with pytest.raises(ConfigError, match="origin=2"):
        convert("voc", raw, tmp_path / "out", origin="2")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="mode=move"):
        convert("voc", raw, tmp_path / "out", mode="move")  # type: ignore[arg-type]


def test_convert__no_box_at_all(tmp_path: Path) -> None:
    src = tmp_path / "raw"
    write_voc(src / "a.jpg", src / "a.xml", 1, [])
    with pytest.raises(DataError, match="no box in any of 1 images"):
        convert("voc", src, tmp_path / "out")


def test_convert__output_on_a_file(raw: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "taken.jpg", 1)
    with pytest.raises(OutputError, match="not a folder"):
        convert("voc", raw, tmp_path / "taken.jpg")
    with pytest.raises(OutputError, match="cannot be created"):
        convert("voc", raw, tmp_path / "taken.jpg" / "below")
