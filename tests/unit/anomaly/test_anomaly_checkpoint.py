from __future__ import annotations

import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from anomaly_models import textures, tiny_model
from torch import nn

from kd_yolo.anomaly.checkpoint import is_anomaly, load_anomaly, save_anomaly
from kd_yolo.anomaly.merging import deployed
from kd_yolo.anomaly.model import AnomalyModel
from kd_yolo.errors import CheckpointError


@pytest.fixture(scope="module")
def model() -> AnomalyModel:
    model = tiny_model(plus=True, student="lightnet-n")
    images = textures(4)
    model.fit_targets([images])
    model.calibrate([images])
    return model.eval()


@pytest.fixture(scope="module")
def saved(model: AnomalyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "weights" / "best.pt"
    save_anomaly(path, model, {"epochs": 3, "data": Path("a") / "b"}, {"metrics": {"loss": 0.5}, "t": torch.ones(2)})
    return path


def change(source: Path, target: Path, **changes: Any) -> Path:
    content = torch.load(source, weights_only=True)
    for key, value in changes.items():
        content["kd_yolo"][key] = value
    torch.save(content, target)
    return target


def test_save_anomaly__round_trip(model: AnomalyModel, saved: Path) -> None:
    loaded, content = load_anomaly(saved)
    images = textures(2, seed=7)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert loaded.spec == model.spec
    assert loaded.calibration == model.calibration
    assert not loaded.training
    assert content["train_args"] == {"epochs": 3, "data": str(Path("a") / "b")}
    assert content["extra"]["metrics"] == {"loss": 0.5}
    assert torch.equal(content["extra"]["t"], torch.ones(2))
    state = loaded.state_dict()
    assert set(state) == set(model.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert loaded.loss(images)[0].requires_grad  # it can be trained on


def test_save_anomaly__holds_plain_data_only(saved: Path) -> None:
    assert torch.serialization.get_unsafe_globals_in_checkpoint(str(saved)) == []
    content = torch.load(saved, weights_only=True)
    assert content["kd_yolo"]["task"] == "anomaly"
    assert {value.dtype for value in content["state_dict"].values()} <= {torch.float32, torch.int64}


def test_save_anomaly__calibration_survives_half_precision(model: AnomalyModel, tmp_path: Path) -> None:
    path = tmp_path / "half.pt"
    save_anomaly(path, deployed(model).half(), {})
    loaded, content = load_anomaly(path)
    assert model.calibration is not None
    assert content["kd_yolo"]["calibration"] == asdict(model.calibration)
    assert loaded.level_low.tolist() == model.calibration.level_low  # not what half precision made of them


def test_save_anomaly__deployed(model: AnomalyModel, tmp_path: Path) -> None:
    slim = deployed(model)
    save_anomaly(tmp_path / "slim.pt", slim, {})
    loaded, _ = load_anomaly(tmp_path / "slim.pt")
    images = textures(1)
    assert loaded.is_deployed
    with torch.no_grad():
        assert torch.equal(loaded(images), slim(images))


def test_load_anomaly__needs_no_package_of_the_teacher(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd_yolo.anomaly.backbones.find_spec", lambda _: None)
    assert load_anomaly(saved)[0].teacher.channels == {16: 112, 32: 320}


def test_load_anomaly__uncalibrated(tmp_path: Path) -> None:
    save_anomaly(tmp_path / "last.pt", tiny_model(taps=[16]), {})
    assert load_anomaly(tmp_path / "last.pt")[0].calibration is None


def test_load_anomaly__refuses(saved: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    cases = {
        tmp_path / "none.pt": "no such file",
        tiny_checkpoint: "is no anomaly checkpoint",
        change(saved, tmp_path / "spec.pt", spec={"tops": [4]}): "unknown key 'tops'",
        change(saved, tmp_path / "format.pt", format="kd_yolo/anomaly/9"): "has the format 'kd_yolo/anomaly/9'",
        change(saved, tmp_path / "levels.pt", calibration={"level_low": []}): "damaged, or written by another version",
        change(saved, tmp_path / "student.pt", student={}): "no backbone and head",
        change(saved, tmp_path / "teacher.pt", teacher={"kind": "x"}): "unknown kind",
    }
    empty = tmp_path / "empty.pt"
    empty.touch()
    cases[empty] = "empty, truncated"
    whole = saved.read_bytes()
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(whole[: len(whole) // 2])
    cases[truncated] = "empty, truncated"
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    (tmp_path / "flipped.pt").write_bytes(bytes(flipped))
    cases[tmp_path / "flipped.pt"] = "damaged"
    for path, message in cases.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            load_anomaly(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


def test_load_anomaly__weights_that_do_not_fit(saved: Path, tmp_path: Path) -> None:
    for name, edit in (
        ("nan", lambda state: state["level_low"].fill_(float("nan"))),
        ("lost", lambda state: state.pop("level_low")),
        ("foreign", lambda state: state.update(other=torch.ones(1))),
    ):
        content = torch.load(saved, weights_only=True)
        content["kd_yolo"]["calibration"] = None
        edit(content["state_dict"])  # type: ignore[no-untyped-call]
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(CheckpointError, match="not finite" if name == "nan" else "damaged") as caught:
            load_anomaly(tmp_path / f"{name}.pt")
        assert "\n" not in str(caught.value)


def test_is_anomaly__never_raises(saved: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert is_anomaly(saved)
    assert not is_anomaly(tiny_checkpoint)
    assert not is_anomaly(tmp_path)
    assert not is_anomaly(tmp_path / "none.pt")
    text = tmp_path / "text.pt"
    text.write_text("kd_yolo/anomaly/1", encoding="utf-8")
    assert not is_anomaly(text)
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("a/other.txt", "kd_yolo/anomaly/1")
    assert not is_anomaly(tmp_path / "zip.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "state.pt")
    assert not is_anomaly(tmp_path / "state.pt")
