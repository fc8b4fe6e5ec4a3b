from __future__ import annotations

from pathlib import Path

import pytest
from data_factory import yolo_set
from ultralytics.data.dataset import YOLODataset

from kd_yolo.data.datayaml import load_data_yaml
from kd_yolo.data.layout import built_aside, files_under
from kd_yolo.errors import OutputError


def test_files_under__follows_links_once_and_passes_hidden_over(tmp_path: Path) -> None:
    (tmp_path / "real/deep").mkdir(parents=True)
    for name in ("real/b.xml", "real/deep/a.XML", "real/.hidden.xml", "real/c.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "real/.git").mkdir()
    (tmp_path / "real/.git/d.xml").write_text("")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/link").symlink_to(tmp_path / "real")
    (tmp_path / "real/deep/loop").symlink_to(tmp_path / "real")
    link = tmp_path / "raw/link"
    assert files_under(tmp_path / "raw", {".xml"}) == [link / "b.xml", link / "deep/a.XML"]
    assert files_under(tmp_path / "raw") == [link / "b.xml", link / "c.txt", link / "deep/a.XML"]


def test_images__are_those_that_ultralytics_finds(tmp_path: Path) -> None:
    yaml = yolo_set(tmp_path / "set")
    (tmp_path / "set/images/train/.hidden.png").write_bytes(b"")
    (tmp_path / "set/images/train/more").symlink_to(tmp_path / "set/images/val")
    (tmp_path / "set/images/train/notes.txt").write_text("")
    data = load_data_yaml(yaml)
    stock = YOLODataset.get_img_files(
        type("Probe", (), {"prefix": "", "fraction": 1.0})(), str(tmp_path / "set/images/train")
    )
    assert [str(path) for path in data.images("train")] == sorted(stock)
    assert len(stock) == 9


def test_built_aside__failure_keeps_the_old_and_removes_the_new(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with built_aside(out) as folder:
        (folder / "conversion.json").write_text("1")

    def stopped() -> None:
        with built_aside(out) as folder:
            (folder / "conversion.json").write_text("2")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        stopped()
    assert (out / "conversion.json").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_built_aside__removes_what_killed_processes_left(tmp_path: Path) -> None:
    dead = tmp_path / ".out.999999999.part"
    dead.mkdir()
    other = tmp_path / ".others.999999999.part"
    other.mkdir()
    with built_aside(tmp_path / "out") as folder:
        (folder / "conversion.json").write_text("1")
    assert not dead.exists()
    assert other.exists()


def test_built_aside__refuses_what_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/photo.jpg").write_bytes(b"x")
    with pytest.raises(OutputError, match="was not made by kd-yolo"), built_aside(tmp_path / "out"):
        pass
    (tmp_path / "empty").mkdir()
    with built_aside(tmp_path / "empty") as folder:
        (folder / "a").write_text("")
    assert (tmp_path / "empty/a").is_file()
