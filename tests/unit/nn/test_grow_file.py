from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from detector_factory import save_checkpoint
from grow_factory import difference, mini_model
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.checkpoints import load_model, serialize
from kd_yolo.deploy import deploy
from kd_yolo.errors import CheckpointError, ConfigError, ModelError
from kd_yolo.files import sha256
from kd_yolo.images import textured_images
from kd_yolo.nn import grow as growing
from kd_yolo.nn.grow import grow_file
from kd_yolo.nn.student import student_spec
from kd_yolo.provenance import foreign_to_stock


@pytest.fixture(scope="module")
def mini() -> DetectionModel:
    return mini_model()


@pytest.fixture(scope="module")
def mini_file(mini: DetectionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grow") / "source.pt"
    return save_checkpoint(mini, path, train_metrics={"fitness": 0.5})


def test_grow_file__round_trip(mini: DetectionModel, mini_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "grown.pt"
    report = grow_file(mini_file, out, "n", seed=3)
    assert [file.name for file in out.parent.iterdir()] == ["grown.pt"]
    model, checkpoint = load_model(out)
    assert not foreign_to_stock(out)
    assert difference(mini, model) < 1e-12
    assert model.names == mini.names
    assert model.args["imgsz"] == 64
    assert checkpoint["train_metrics"] == {"fitness": 0.5}
    about = checkpoint["kd_yolo"]
    assert (about["source"], about["source_sha256"]) == ("source.pt", sha256(mini_file))
    assert about["grown"] == {**report.to_dict(), "seed": 3}
    assert about["versions"]["ultralytics"]


def test_grow_file__result_predicts_and_trains_as_any_other(mini_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "grown.pt"
    report = grow_file(mini_file, out, "n")
    images = textured_images(2, (64, 64))
    found = [YOLO(file).predict(images, imgsz=64, conf=1e-7, verbose=False) for file in (mini_file, out)]
    for first, second in zip(*found, strict=True):
        assert first.names == second.names
        assert len(first.boxes) == len(second.boxes) > 0
        apart = (first.boxes.data[:, None] - second.boxes.data).abs().amax(2)  # near ties come in any order
        assert max(apart.amin(0).max(), apart.amin(1).max()) < 1e-2
    spec = student_spec(str(out))
    assert spec.weights == out.resolve()
    student = spec.build(6)
    student.load_state_dict(load_model(out)[0].state_dict())
    assert sum(parameter.numel() for parameter in student.parameters()) == report.parameters


def test_grow_file__grows_a_deployed_file(mini_file: Path, tmp_path: Path) -> None:
    deployed = deploy(mini_file, out=tmp_path / "deployed.pt").path
    report = grow_file(deployed, tmp_path / "grown.pt", "n")
    assert report.max_relative_difference < 1e-12
    assert difference(load_model(deployed)[0], load_model(tmp_path / "grown.pt")[0]) < 1e-12
    nms_free = deploy(mini_file, out=tmp_path / "nms-free.pt", nms=False).path
    with pytest.raises(ModelError, match="has lost its branch cv2"):
        grow_file(nms_free, tmp_path / "other.pt", "n")


def test_grow_file__refusals_leave_nothing(mini_file: Path, tmp_path: Path) -> None:
    source = Path(shutil.copy(mini_file, tmp_path / "source.pt"))
    with pytest.raises(ConfigError, match="is the source itself"):
        grow_file(source, tmp_path / "sub" / ".." / "source.pt", "n")
    with pytest.raises(ConfigError, match=r"ends in \.pt"):
        grow_file(source, tmp_path / "grown.onnx", "n")
    with pytest.raises(ModelError, match=r"source\.pt: scale=t: is this model's scale already"):
        grow_file(source, tmp_path / "grown.pt", "t")
    with pytest.raises(CheckpointError, match="no such file"):
        grow_file(tmp_path / "missing.pt", tmp_path / "grown.pt", "n")
    assert sha256(source) == sha256(mini_file)
    assert [file.name for file in tmp_path.iterdir()] == ["source.pt"]


def test_grow_file__does_not_keep_a_file_that_reads_back_otherwise(
    mini_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: DetectionModel, *rest: Any) -> bytes:
        other: Any = copy.deepcopy(model)
        with torch.no_grad():
            other.model[3].conv.weight[0] += 1e-3
        return serialize(other, *rest)

    monkeypatch.setattr(growing, "serialize", wrong)
    with pytest.raises(CheckpointError, match="read back, it differs"):
        grow_file(mini_file, tmp_path / "grown.pt", "n")
    assert not list(tmp_path.iterdir())
