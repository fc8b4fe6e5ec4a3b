"""The default command with a pretrained detector at hand: it becomes the teacher, the student is narrowed from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ultralytics.nn.tasks import DetectionModel, load_checkpoint

from kd_yolo.config import split_train_keys
from kd_yolo.tasks.stock_defaults import narrowed_defaults
from kd_yolo.training import train


@pytest.fixture
def at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put an untrained detector where a pretrained one is looked for."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    model = DetectionModel("yolo26n.yaml", nc=80, verbose=False)
    torch.save({"epoch": -1, "model": model.half(), "ema": None, "train_args": {}}, folder / "yolo26n.pt")
    return folder / "yolo26n.pt"


def trained_with(weights: Path) -> dict[str, Any]:
    return dict(torch.load(weights, weights_only=False, map_location="cpu")["train_args"])


def test_train__default_uses_what_is_at_hand_and_resumes_elsewhere_without_it(
    at_hand: Path, train_keys: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pretrained file is moved and the working folder is another one: teacher and start are in the run folder."""
    keys = train_keys(model="lightnet-n", allow_weak_teacher=True, epochs=1)
    report = train(*split_train_keys(keys))
    run = report.run_dir
    assert [phase.name for phase in report.phases] == ["teacher", "student"]
    assert load_checkpoint(run / "teacher" / "weights" / "best.pt")[0].yaml["scale"] == "n"
    plan = yaml.safe_load((run / "run.yaml").read_text())
    assert plan["peer"] == str(at_hand.resolve())
    said = json.loads((run / "student.start.json").read_text())
    assert said["source"] == "best.pt"  # the teacher, after its training on this data
    assert said["narrowed"]["share"] > 0.5
    for phase in ("teacher", "student"):  # both go on from trained weights
        arguments = trained_with(run / phase / "weights" / "best.pt")
        assert {key: arguments[key] for key in narrowed_defaults()} == narrowed_defaults()
    assert report.artifacts["deployed"].endswith("-deploy.pt")

    made = (run / "student.start.pt").stat().st_mtime_ns
    (run / "student" / "phase.json").unlink()
    (run / "report.json").unlink()
    at_hand.unlink()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    report = train(*split_train_keys({"data": keys["data"], "resume": str(run)}))
    assert [phase.name for phase in report.phases] == ["teacher", "student"]
    assert (run / "student.start.pt").stat().st_mtime_ns == made


def test_train__start_is_made_once_and_a_given_mosaic_counts(
    at_hand: Path, train_keys: Callable[..., dict[str, Any]]
) -> None:
    keys = train_keys(model="lightnet-n", pretrained="yolo26n.pt", teacher="none", epochs=1, mosaic=0.5)
    run = train(*split_train_keys(keys)).run_dir
    assert yaml.safe_load((run / "run.yaml").read_text())["config"]["pretrained"] == str(at_hand)
    assert trained_with(run / "student" / "weights" / "best.pt")["mosaic"] == 0.5  # what is given counts
    said = json.loads((run / "student.start.json").read_text())
    assert said["source"] == "yolo26n.pt"
    made = (run / "student.start.pt").stat().st_mtime_ns
    (run / "student" / "phase.json").unlink()
    (run / "report.json").unlink()
    train(*split_train_keys({"data": keys["data"], "resume": str(run)}))
    assert (run / "student.start.pt").stat().st_mtime_ns == made
