"""What a file says about itself, and the checks of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from detector_factory import tiny_dataset

import kd_yolo
from kd_yolo.errors import ConfigError, DataError, ModelError
from kd_yolo.runtimes import Description, check_same_classes
from kd_yolo.runtimes.description import check_signature, description_of

# As Ultralytics writes it into an ONNX file: Python literals in text.
STORED = {
    "stride": "32",
    "names": "{0: 'scratch', 1: 'dent'}",
    "imgsz": "[64, 96]",
    "batch": "2",
    "task": "detect",
    "args": "{'batch': 2, 'dynamic': False, 'nms': None, 'quantize': None}",
    "end2end": "False",
    "channels": "3",
    "description": "it's {not a literal",
}


def described(**changes: Any) -> Description:
    return description_of("onnx", {**STORED, **changes}, "x.onnx")


def test_description_of__text_and_native_values_agree() -> None:
    native = {
        "stride": 32,
        "names": {"0": "scratch", "1": "dent"},  # JSON has no number keys
        "imgsz": [64, 96],
        "batch": 2,
        "args": {"dynamic": False},
        "end2end": False,
    }
    told = described()
    assert told == description_of("onnx", native, "x")
    assert (told.names, told.canvas, told.batch) == ({0: "scratch", 1: "dent"}, (64, 96), 2)
    assert (told.precision, told.head, told.dynamic, told.own) == ("fp32", "nms", False, {})


@pytest.mark.parametrize(
    ("args", "end2end", "head", "precision"),
    [
        ({"nms": True}, "False", "nms inside", "fp32"),
        ({"nms": True}, "True", "nms inside", "fp32"),
        ({"nms": False}, "True", "nms-free", "fp32"),
        ({"quantize": 16}, "False", "nms", "fp16"),
        ({"half": True}, "False", "nms", "fp16"),
        ({"int8": True}, "False", "nms", "int8"),
        ({"quantize": 8}, "False", "nms", "int8"),
    ],
)
def test_description_of__head_and_precision(args: dict[str, Any], end2end: str, head: str, precision: str) -> None:
    told = described(args=str(args), end2end=end2end)
    assert (told.head, told.precision) == (head, precision)


@pytest.mark.parametrize("own", [{"version": kd_yolo.__version__, "precision": "int8"}, {"precision": "int8"}])
def test_description_of__own_entry_wins(own: dict[str, Any]) -> None:
    assert described(kd_yolo=own) == described(kd_yolo=json.dumps(own))
    assert described(kd_yolo=own).own == own
    assert described(kd_yolo=own).precision == "int8"


@pytest.mark.parametrize("key", ["stride", "names", "imgsz", "batch"])
def test_description_of__incomplete(key: str) -> None:
    with pytest.raises(ModelError, match=rf"x\.onnx: says nothing about its {key}; .*export it again"):
        description_of("onnx", {name: value for name, value in STORED.items() if name != key}, "x.onnx")


@pytest.mark.parametrize(
    "changes",
    [
        {"stride": "wide"},
        {"imgsz": "[64]"},
        {"names": "5"},
        {"batch": "[]"},
        {"args": "7"},
        {"kd_yolo": "{half"},
        {"kd_yolo": 3},
        {"kd_yolo": "[1]"},
        {"stride": "0"},
        {"imgsz": "[0, 64]"},
        {"batch": "-1"},
        {"names": "{}"},
        {"names": "{1: 'dent'}"},
    ],
)
def test_description_of__damaged(changes: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"x\.onnx: its metadata is damaged .*export it again"):
        described(**changes)


def test_description_of__other_task() -> None:
    with pytest.raises(ModelError, match="task 'segment'; a detector is needed"):
        described(task="segment")


@pytest.mark.parametrize(
    ("version", "newer"), [("99.0.0", True), ("99.0.dev1+abc", True), (kd_yolo.__version__, False), ("0.0.1", False)]
)
def test_description_of__version(version: str, newer: bool) -> None:
    if not newer:
        assert described(kd_yolo={"version": version}).own["version"] == version
        return
    with pytest.raises(ModelError, match=rf"written by kd-yolo {version.split('+')[0]}.*update kd-yolo"):
        described(kd_yolo={"version": version})


def test_check__fixed_file() -> None:
    told = described()
    assert told.check("x") == told.check("x", [64, 96], 2) == (64, 96)
    with pytest.raises(ConfigError, match=r"x: its canvas is fixed at 64x96; use imgsz=\[64,96\]"):
        told.check("x", 64)
    with pytest.raises(ConfigError, match="x: its batch is fixed at 2; use batch=2"):
        told.check("x", None, 1)
    with pytest.raises(ConfigError, match="multiple of the stride 32"):
        told.check("x", 65)


def test_check__dynamic_file() -> None:
    told = described(args="{'dynamic': True}")
    assert told.check("x", 128, 7) == (128, 128)
    with pytest.raises(ConfigError, match="multiple of the stride 32"):
        told.check("x", [64, 65])


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ([[2, 3, 64, 96]], [[2, 6, 126]]),
        ([[None, 3, None, None]], [[None, None, None]]),
    ],
)
def test_check_signature__a_detector(inputs: list[list[int | None]], outputs: list[list[int | None]]) -> None:
    check_signature(described(), inputs, outputs, "x")


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ([[1, 3]], [[1, 6, 9]], "not a detector"),
        ([[2, 3, 64, 96], [1]], [[1, 6, 9]], "not a detector"),
        ([[2, 3, 64, 96]], [[1, 1000]], "not a detector"),
        ([[2, 3, 64, 96]], [[1, 6, 9], [1, 32, 16, 16]], "not a detector"),
        ([[1, 3, 64, 96]], [[1, 6, 9]], "says batch 2, but its graph takes 1"),
        ([[2, 1, 64, 96]], [[1, 6, 9]], "says channels 3, but its graph takes 1"),
        ([[2, 3, 96, 96]], [[1, 6, 9]], "says height 64, but its graph takes 96"),
    ],
)
def test_check_signature__another_graph(inputs: list[list[int]], outputs: list[list[int]], message: str) -> None:
    with pytest.raises(ModelError, match=f"x: .*{message}"):
        check_signature(described(), inputs, outputs, "x")


def test_check_signature__dynamic_file_still_needs_its_channels() -> None:
    told = dataclasses.replace(described(), dynamic=True)
    check_signature(told, [[1, 3, 640, 640]], [[1, 6, 8400]], "x")
    with pytest.raises(ModelError, match="says channels 3"):
        check_signature(told, [[None, 1, None, None]], [[1, 6, 9]], "x")


def test_check_same_classes__case_and_space_do_not_matter(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "d", names=("scratch", "dent", "stain"))
    check_same_classes({1: "Dent", 0: " scratch", 2: "stain"}, data, "x")


@pytest.mark.parametrize(
    "names",
    [{0: "dent", 1: "scratch", 2: "stain"}, {0: "scratch", 1: "dent"}, {0: "scratch", 1: "dent", 2: "stains"}],
)
def test_check_same_classes__others(names: dict[int, str], tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "d", names=("scratch", "dent", "stain"))
    with pytest.raises(DataError, match=r"x\.onnx: its \d classes .* are not the 3 of .*data\.yaml"):
        check_same_classes(names, data, "x.onnx")
