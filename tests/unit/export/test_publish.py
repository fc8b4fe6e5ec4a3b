from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from kd_yolo.export.publish import publish

from kd_yolo.errors import OutputError


@pytest.fixture(params=["file", "folder"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return an artifact in a temporary folder."""
    path = tmp_path / "temporary" / "made"
    path.parent.mkdir()
    if request.param == "file":
        path.write_bytes(b"new")
    else:
        (path / "sub").mkdir(parents=True)
        (path / "sub" / "x.bin").write_bytes(b"new")
    return path


def content(path: Path) -> bytes:
    return (path / "sub" / "x.bin" if path.is_dir() else path).read_bytes()


def old(made: Path, path: Path, parity: Path) -> None:
    """Write what an earlier export left."""
    if made.is_dir():
        (path / "sub").mkdir(parents=True)
        (path / "sub" / "x.bin").write_bytes(b"old")
        (path / "gone.bin").write_bytes(b"old")
    else:
        path.parent.mkdir()
        path.write_bytes(b"old")
    parity.write_text("{}")


def test_publish__artifact_and_proof_together(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "x"
    parity = path.with_name("x.parity.json")
    publish(made, path, parity, {"passed": True})
    assert content(path) == b"new"
    assert json.loads(parity.read_text()) == {"passed": True}
    assert sorted(item.name for item in path.parent.iterdir()) == ["x", "x.parity.json"]


def test_publish__replaces_all_of_an_old_one(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "x"
    parity = path.with_name("x.parity.json")
    old(made, path, parity)
    publish(made, path, parity, {"passed": True})
    assert content(path) == b"new"
    assert not (path / "gone.bin").exists()
    assert parity.read_text() != "{}"


@pytest.mark.parametrize("there", [True, False], ids=["old one there", "nothing there"])
@pytest.mark.parametrize("step", ["proof", "name"])
def test_publish__full_disk_changes_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, step: str
) -> None:
    path = tmp_path / "out" / "x"
    parity = path.with_name("x.parity.json")
    if there:
        old(made, path, parity)
    right: Any = os.replace

    def full(source: Path, target: Path) -> None:
        forward = ".part" in Path(source).name and not (Path(source).is_file() and Path(source).read_bytes() == b"{}")
        if forward and target == (parity if step == "proof" else path):
            raise OSError(errno.ENOSPC, "No space left on device")
        right(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left on device"):
        publish(made, path, parity, {"passed": True})
    if there:
        assert content(path) == b"old"
        assert parity.read_text() == "{}"
    assert sorted(item.name for item in path.parent.iterdir()) == (["x", "x.parity.json"] if there else [])
