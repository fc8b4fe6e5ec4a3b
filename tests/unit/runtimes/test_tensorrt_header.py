from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_files import METADATA, changed, write

from kd_yolo.errors import ModelError
from kd_yolo.runtimes import describe
from kd_yolo.runtimes.tensorrt_header import read_header


def test_read_header__offset_and_metadata(tmp_path: Path) -> None:
    path = write(tmp_path / "best.engine", METADATA, b"the engine")
    offset, metadata = read_header(path)
    assert path.read_bytes()[offset:] == b"the engine"
    assert metadata["kd_yolo"] == METADATA["kd_yolo"]
    as_text = METADATA | {"kd_yolo": json.dumps(METADATA["kd_yolo"])}
    assert read_header(write(path, as_text))[1]["kd_yolo"] == METADATA["kd_yolo"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x10\x00", "its length is wrong"),  # shorter than the length itself
        ((1 << 20).to_bytes(4, "little") + b"{}", "its length is wrong"),  # longer than the file
        ((0).to_bytes(4, "little") + b"{}", "its length is wrong"),
        (b"ftrt" * 100, "its length is wrong"),  # an engine without any header
        ((8).to_bytes(4, "little") + b"\xff" * 40, "no metadata stands before the engine"),  # not UTF-8
        ((8).to_bytes(4, "little") + b'{"a": 1,' + b"x" * 40, "no metadata stands before the engine"),  # cut JSON
        ((6).to_bytes(4, "little") + b"[1, 2]" + b"x" * 40, "no metadata stands before the engine"),  # no mapping
        ((14).to_bytes(4, "little") + b'{"kd_yolo": 1}' + b"x", "kd_yolo is no mapping"),
        ((2).to_bytes(4, "little") + b"{}", "the engine itself is missing"),
    ],
)
def test_read_header__damaged(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "best.engine"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_header__every_cut_is_noticed(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.engine", METADATA, b"").read_bytes()
    path = tmp_path / "cut.engine"
    for length in range(0, len(whole) + 1, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            read_header(path)


def test_describe__needs_neither_gpu_nor_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    said = describe(write(tmp_path / "best.engine", changed({"runtime": "tensorrt-rtx", "precision": "int8"})))
    assert (said.format, said.precision, said.canvas, said.head) == ("rtx", "int8", (64, 64), "nms")
    assert said.names == {0: "scratch", 1: "dent", 2: "stain"}
    assert describe(write(tmp_path / "best.engine", METADATA)).format == "engine"


def test_describe__an_engine_of_plain_ultralytics(tmp_path: Path) -> None:
    stock = {key: value for key, value in METADATA.items() if key != "kd_yolo"} | {"args": {"quantize": 16}}
    said = describe(write(tmp_path / "best.engine", stock))
    assert (said.format, said.precision, said.own) == ("engine", "fp16", {})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (changed({"version": "99.0.0"}), r"was written by kd-yolo 99\.0\.0"),
        (changed({"runtime": "teapot"}), "is for the runtime 'teapot', unknown here"),
        (changed(task="segment"), "is a model for the task 'segment'"),
        ({"kd_yolo": METADATA["kd_yolo"]}, "says nothing about its stride, names, imgsz, batch"),
    ],
)
def test_describe__refuses(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        describe(write(tmp_path / "best.engine", metadata))
