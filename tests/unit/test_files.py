"""Results are whole or not there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd_yolo.errors import OutputError
from kd_yolo.files import folder_aside, sha256, size_mb, write_json, written_aside

NO_SPACE = OSError(28, "No space left on device")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def fill(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)


def test_folder_aside__appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "best_openvino_model"
    with folder_aside(target) as aside:
        assert not target.exists()
        assert aside.parent == target.parent, "a rename must stay on one file system"
        fill(aside, a="1")
        (aside / "deep").mkdir()
        fill(aside / "deep", b="2")
    assert contents(target.parent) == {f"{target.name}/a": b"1", f"{target.name}/deep/b": b"2"}


def test_folder_aside__replaces_and_leaves_nothing_of_the_old(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    fill(target, old="x")
    with folder_aside(target) as aside:
        fill(aside, new="y")
        assert contents(target) == {"old": b"x"}
    assert contents(tmp_path) == {"model/new": b"y"}


@pytest.mark.parametrize("error", [NO_SPACE, RuntimeError("export failed"), KeyboardInterrupt()])
def test_folder_aside__failure_keeps_the_old(error: BaseException, tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    fill(target, old="x")
    expected = OutputError if isinstance(error, OSError) else type(error)

    def fail_halfway() -> None:
        with folder_aside(target) as aside:
            fill(aside, half="y")
            raise error

    with pytest.raises(expected):
        fail_halfway()
    assert contents(tmp_path) == {"model/old": b"x"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_folder_aside__failed_rename_brings_the_old_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, real = tmp_path / "model", os.replace
    target.mkdir()
    fill(target, old="x")

    def refuse(source: Any, destination: Any) -> None:
        if ".part" in str(source):
            raise NO_SPACE
        real(source, destination)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OutputError, match=r"cannot be written \(No space left"), folder_aside(target) as aside:
        fill(aside, new="y")
    assert contents(tmp_path) == {"model/old": b"x"}


def test_folder_aside__where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "model").touch()
    with pytest.raises(OutputError, match="is a file, but a folder is to be written"), folder_aside(tmp_path / "model"):
        pytest.fail("must not get here")


def test_folder_aside__cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"), folder_aside(tmp_path / "file" / "model"):
        pytest.fail("must not get here")


@pytest.mark.parametrize("error", [NO_SPACE, RuntimeError("export failed")])
def test_written_aside__failure_keeps_the_old(error: Exception, tmp_path: Path) -> None:
    target = tmp_path / "best.onnx"
    target.write_text("old")
    expected = OutputError if isinstance(error, OSError) else type(error)

    def fail_halfway() -> None:
        with written_aside(target) as aside:
            aside.write_text("half")
            raise error

    with pytest.raises(expected):
        fail_halfway()
    assert contents(tmp_path) == {"best.onnx": b"old"}


def test_written_aside__keeps_the_suffix(tmp_path: Path) -> None:
    """Exporters decide by it."""
    with written_aside(tmp_path / "best.onnx") as aside:
        assert aside.suffix == ".onnx"
        aside.write_text("new")
    assert contents(tmp_path) == {"best.onnx": b"new"}


def test_write_json__is_read_back(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"path": Path("x"), "n": [1, None]})
    assert (tmp_path / "a.json").read_text() == '{\n  "path": "x",\n  "n": [\n    1,\n    null\n  ]\n}\n'


def test_sha256__of_a_file(tmp_path: Path) -> None:
    fill(tmp_path, a="abc")
    # The test vector of FIPS 180-2, appendix B.1.
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_sha256__of_a_folder(tmp_path: Path) -> None:
    """Over the sorted lines 'name hash', by hand."""
    for name in ("b", "a"):
        fill(tmp_path, **{name: name * 3})
    lines = [f"{name} {hashlib.sha256((name * 3).encode()).hexdigest()}\n" for name in "ab"]
    assert sha256(tmp_path) == hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "a").write_text("other"),
        lambda folder: (folder / "a").rename(folder / "c"),
        lambda folder: (folder / "d" / "e").unlink(),
        lambda folder: (folder / "new").touch(),
    ],
)
def test_sha256__of_a_folder_sees_every_change(change: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    fill(tmp_path, a="1", b="2")
    fill(tmp_path / "d", e="3")
    before = sha256(tmp_path)
    change(tmp_path)
    assert sha256(tmp_path) != before


def test_size_mb__file_and_folder(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "a").write_bytes(b"x" * 1_500_000)
    (tmp_path / "d" / "b").write_bytes(b"x" * 500_000)
    assert size_mb(tmp_path / "a") == 1.5
    assert size_mb(tmp_path) == 2.0
