from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kd_yolo.bench.targets_table import targets_table
from kd_yolo.errors import ConfigError
from kd_yolo.targets import Target, load_target, target_names

GOOD: dict[str, Any] = {
    "name": "mine",
    "title": "My GPU",
    "compute_capability": "8.6",
    "tflops": {"fp32": 10.0, "fp16": 40.0, "int8": 80.0},
    "bandwidth_gb_s": 500,
    "launch_us": 0.5,
    "memory_gb": 8,
    "sources": ["its datasheet"],
}


@pytest.mark.parametrize("name", target_names())
def test_target__built_in_is_complete(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    peaks = target.tflops
    assert peaks.fp32 <= peaks.fp16 < peaks.int8
    # Every figure has a source, or stands in a line of several.
    text = " ".join(target.sources)
    for figure in ("fp32", "fp16", "int8", "bandwidth", "launch_us"):
        assert figure in text, f"{name}: {figure} without a source"
    assert target.device is not None
    re.compile(target.device)


def test_target__compute_capabilities() -> None:
    found = {name: load_target(name).compute_capability for name in target_names()}
    assert found == {
        "epyc-avx512": None,
        "h200": "9.0",
        "orin-nano": "8.7",
        "rtx3070ti": "8.6",
        "rtx4070": "8.9",
        "rtx5070": "12.0",
        "t4": "7.5",
    }


def test_target__rtx3070ti_golden() -> None:
    # 6144 cores x 2 x 1.77 GHz = 21.75e12; 192 tensor cores x 128 x 2 x 1.77 GHz = 87.0e12; 256 bit x 19 Gbit/s = 608
    target = load_target("rtx3070ti")
    assert target.tflops.fp32 == pytest.approx(6144 * 2 * 1.77e-3, rel=0.01)
    assert target.tflops.fp16 == pytest.approx(192 * 128 * 2 * 1.77e-3, rel=0.01)
    assert target.tflops.int8 == 2 * target.tflops.fp16
    assert target.bandwidth_gb_s == 256 * 19 / 8


def test_load_target__own_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    target = load_target(path)
    assert (target.title, target.bandwidth_gb_s, target.device) == ("My GPU", 500.0, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bandwith": 1}, "unknown key 'bandwith'; did you mean 'bandwidth_gb_s'"),
        ({"launch_us": -1}, "launch_us=-1 is not valid"),
        ({"compute_capability": 8.6}, "compute_capability=8.6 is not valid"),
        ({"compute_capability": "sm86"}, "compute_capability='sm86' is not valid"),
        ({"tflops": {"fp32": 0.0, "fp16": 1.0, "int8": 1.0}}, "tflops.fp32=0.0 is not valid"),
        ({"sources": []}, "sources"),
    ],
)
def test_load_target__wrong_file(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(GOOD | change))
    with pytest.raises(ConfigError, match=rf"mine\.yaml: {re.escape(message)}"):
        load_target(path)


def test_load_target__unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"target 'rtx3070' not found: .*did you mean 'rtx3070ti'"):
        load_target("rtx3070")


def test_targets_table__one_line_each() -> None:
    text, data = targets_table()
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[1:8]] == target_names()
    assert "608" in next(line for line in lines if line.startswith("rtx3070ti"))
    assert [Target.model_validate(entry).name for entry in data["targets"]] == target_names()
