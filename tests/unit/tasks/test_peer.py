"""The pretrained detector that a student takes over: found, named, or refused before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import SETTINGS

from kd_yolo.config import TrainConfig
from kd_yolo.data.synthetic import make_steel_synth
from kd_yolo.errors import CheckpointError, ConfigError, DataError, ModelError
from kd_yolo.nn.student import StudentSpec, student_spec
from kd_yolo.tasks.peer import pretrained_peer
from kd_yolo.tasks.preflight import resolve_student
from kd_yolo.tasks.start import check_start, own_teacher, start_source, start_student

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Save:
    """Return a function that puts an untrained detector into the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SETTINGS, "weights_dir", str(tmp_path / "weights"))

    def write(name: str, model: str = "yolo26n.yaml", nc: int = 6) -> Path:
        torch.manual_seed(0)
        network = DetectionModel(model, nc=nc, verbose=False)
        torch.save({"epoch": -1, "model": network.half(), "ema": None, "train_args": {}}, tmp_path / name)
        return tmp_path / name

    return write


def config(**given: Any) -> TrainConfig:
    return TrainConfig(**{"data": "steel-synth", "model": "lightnet-n", **given})


def peer_of(**given: Any) -> Path | None:
    return pretrained_peer(config(**given), resolve_student(config(**given)))


def own_rows(rows: list[int], source: str = "yolo26n") -> StudentSpec:
    """Return a student whose YAML says other rows."""
    spec = student_spec("lightnet-n")
    spec.cfg["inherits"] = {"from": source, "rows": rows}
    return spec


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off while it was copied"])
def test_pretrained_peer__damaged_file_is_not_passed_over(save: Save, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "yolo26n.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"yolo26n\.pt: .*found by its name: put yolo26n\.pt as .*pretrained=fa"):
        peer_of()
    assert peer_of(pretrained=False) is None


def test_pretrained_peer__another_network_under_its_name(save: Save) -> None:
    save("yolo26n.pt", "yolo26s.yaml")
    with pytest.raises(ModelError, match=r"yolo26n\.pt: is not the yolo26n that its name says"):
        peer_of()


def test_pretrained_peer__named_file_of_another_family_says_what_is_taken(save: Save, heard: Any) -> None:
    save("yolov8n.pt", "yolov8n.yaml", nc=80)
    assert peer_of(pretrained="yolov8n.pt") is None
    assert "pretrained=yolov8n.pt: is not the yolo26n that lightnet-n takes over" in heard.text
    assert "% inherited" in heard.text or "%) inherited" in heard.text


def test_pretrained_peer__nothing_to_say_of_the_students_own_network(save: Save, heard: Any) -> None:
    network = student_spec("lightnet-n").build(nc=6)
    torch.save({"epoch": -1, "model": network, "ema": None, "train_args": {}}, "start.pt")
    assert peer_of(pretrained="start.pt") is None
    assert "is not the" not in heard.text


def test_inherits__unknown_source(save: Save) -> None:
    path = save("yolo26n.pt")
    with pytest.raises(ModelError, match=r"Ultralytics knows no yolo26z\.yaml"):
        start_source(config(), own_rows(list(range(23)), "yolo26z"), [path], None)


def test_check_start__rows_that_do_not_fit(save: Save, tiny_data: Path) -> None:
    peer = save("yolo26n.pt", nc=80)
    check_start(config(), student_spec("lightnet-n"), (), peer, tiny_data, {})
    with pytest.raises(ModelError, match=r"lightnet-n: cannot take over .*yolo26n\.pt: .*rows are given.*'inherits'"):
        check_start(config(), own_rows([0, 1, 2]), (), peer, tiny_data, {})


def test_check_start__images(save: Save, tmp_path: Path) -> None:
    peer, spec = save("yolo26n.pt", nc=80), student_spec("lightnet-n")
    data = make_steel_synth(tmp_path / "few", train=7, val=2, test=2, seed=3)
    with pytest.raises(DataError, match=r"with 7 training images; 8 are needed, or say pretrained=false"):
        check_start(config(), spec, (), peer, data, {})
    check_start(config(pretrained=False), spec, (), None, data, {})
    whole = make_steel_synth(tmp_path / "whole", train=16, val=2, test=2, seed=3)
    check_start(config(), spec, (), peer, whole, {"fraction": 0.5})
    with pytest.raises(DataError, match="with 6 training images"):
        check_start(config(), spec, (), peer, whole, {"fraction": 0.4})
    data = make_steel_synth(tmp_path / "spectral", train=8, val=2, test=2, seed=3)
    data.write_text(yaml.safe_dump({**yaml.safe_load(data.read_text()), "channels": 5}))
    with pytest.raises(ConfigError, match=r"cannot be fitted on 5 channels; say pretrained=false"):
        check_start(config(), spec, (), peer, data, {})


def test_start_student__what_was_taken_over_is_kept_when_its_source_is_gone(save: Save, tiny_data: Path) -> None:
    peer, spec = save("yolo26n.pt"), student_spec("lightnet-n")
    plan = {"config": config(data=str(tiny_data)).model_dump(), "stock": {"imgsz": 64}}
    first, defaults = start_student(peer.parent, "student", spec, (), peer, plan)
    peer.unlink()
    again, same = start_student(peer.parent, "student", spec, (), peer, plan)
    assert again.weights == first.weights == peer.parent / "student.start.pt"
    assert same == defaults
    with pytest.raises(CheckpointError, match="no such file"):  # never from random weights without a word
        start_student(peer.parent, "student-2", spec, (), peer, plan)


def test_start_student__grey_images(save: Save, tmp_path: Path) -> None:
    data = make_steel_synth(tmp_path / "grey", train=8, val=2, test=2, seed=3)
    data.write_text(yaml.safe_dump({**yaml.safe_load(data.read_text()), "channels": 1}))
    torch.manual_seed(0)
    teacher = DetectionModel("yolo26n.yaml", ch=1, nc=6, verbose=False)  # as the trainer builds it for such data
    torch.save({"epoch": -1, "model": teacher, "ema": None, "train_args": {}}, tmp_path / "grey.pt")
    plan = {"config": config(data=str(data)).model_dump(), "stock": {"imgsz": 64}}
    started, _ = start_student(tmp_path, "student", student_spec("lightnet-n"), (tmp_path / "grey.pt",), None, plan)
    assert started.weights is not None
    saved = torch.load(started.weights, weights_only=False)["model"]
    assert next(saved.parameters()).shape[1] == 1


def test_own_teacher__a_named_checkpoint_goes_on_from_itself(save: Save) -> None:
    grown, peer = save("grown.pt", "yolo26s.yaml"), save("yolo26n.pt")
    for given in ({"pretrained": str(peer)}, {"pretrained": False}, {"reparam": "repvgg"}):
        own = own_teacher(config(teacher_model=str(grown), **given), peer)
        assert own.weights == grown.resolve()
        assert own.goes_on
        assert "kd_yolo" not in own.cfg
