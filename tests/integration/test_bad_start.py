"""Keys and files that would lose a run's start, its teacher or its recipe: refused before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import SETTINGS

from kd_yolo.cli import main


@pytest.fixture
def refused(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Return a function that runs a training that must be refused, in an empty folder, and returns its line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SETTINGS, "weights_dir", str(tmp_path / "weights"))

    def run(**given: Any) -> str:
        keys = {"data": tiny_data, "model": "lightnet-n", "imgsz": 64, "epochs": 1, "batch": 8, "device": "cpu"}
        keys |= {"project": tmp_path / "runs", "export": "none", "benchmark": False, **given}
        capsys.readouterr()
        status = main(["train", *(f"{key}={value}" for key, value in keys.items())])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kd-yolo: ")]
        assert status == 2
        assert len(lines) == 1
        assert not (tmp_path / "runs").exists()
        return lines[0]

    return run


def saved(path: Path, model: str = "yolo26n.yaml", nc: int = 80) -> Path:
    torch.manual_seed(0)
    network = DetectionModel(model, nc=nc, verbose=False)
    torch.save({"epoch": -1, "model": network, "ema": None, "train_args": {"imgsz": 64}}, path)
    return path


@pytest.mark.parametrize("teacher", ["self", "none"])
def test_train__damaged_pretrained_file_at_hand(refused: Callable[..., str], tmp_path: Path, teacher: str) -> None:
    """Half a download must not become a run from random weights."""
    whole = saved(tmp_path / "whole.pt").read_bytes()
    (tmp_path / "yolo26n.pt").write_bytes(whole[: len(whole) // 2])
    line = refused(teacher=teacher)
    assert str(tmp_path / "yolo26n.pt") in line
    assert "pretrained=false" in line


def test_train__another_network_under_the_name(refused: Callable[..., str], tmp_path: Path) -> None:
    saved(tmp_path / "yolo26n.pt", "yolo11n.yaml")
    assert "is not the yolo26n that its name says" in refused()


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"cfg": "mine.yaml"}, ["'cfg'", "give its keys on the command line"]),
        ({"rect": True}, ["rect=true", "drop rect="]),
        ({"single_cls": True}, ["single_cls=true", "teacher=none"]),
        ({"teacher": "far/big.pt", "method": "none"}, ["teacher=far/big.pt", "method=none", "pretrained=far/big.pt"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_train__keys_that_would_be_lost(refused: Callable[..., str], given: dict[str, Any], parts: list[str]) -> None:
    line = refused(pretrained=False, **given)
    assert all(part in line for part in parts), line
