from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detector_factory import save_checkpoint, tiny_detector
from torch import nn
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.tasks import ClassificationModel, DetectionModel, RTDETRDetectionModel, SegmentationModel
from ultralytics.utils import DEFAULT_CFG, IterableSimpleNamespace

from kd_yolo.checkpoints import load_model
from kd_yolo.distill.base import DetectorSpec, LevelSpec, build_method
from kd_yolo.distill.model import KDModel
from kd_yolo.distill.teachers.detect import DetectTeacher
from kd_yolo.errors import CheckpointError
from kd_yolo.nn.blocks import RepBlock


class Foreign(nn.Module):
    """A class that neither PyTorch, Ultralytics nor kd_yolo knows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Payload:
    """Runs a command when it is unpickled without restrictions."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail at any attempt to download or install."""

    def refuse(*args: object, **keys: object) -> None:
        raise AssertionError(f"tried to fetch {args}")

    for name in (
        "ultralytics.utils.downloads.safe_download",
        "ultralytics.utils.downloads.get_github_assets",
        "ultralytics.nn.tasks.check_requirements",
    ):
        monkeypatch.setattr(name, refuse)


def with_args(model: DetectionModel) -> DetectionModel:
    model.args = IterableSimpleNamespace(**{**vars(DEFAULT_CFG), "imgsz": 64})
    return model


def test_load_model__own_blocks_float32_eval(tiny_checkpoint: Path) -> None:
    model, checkpoint = load_model(tiny_checkpoint)
    assert sum(isinstance(module, RepBlock) for module in model.modules()) > 5
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(module.training for module in model.modules())
    assert checkpoint["epoch"] == -1


def test_load_model__prefers_ema_and_lifts_half(tmp_path: Path) -> None:
    plain, ema = tiny_detector(seed=0), tiny_detector(seed=1).half()
    model, _ = load_model(save_checkpoint(plain, tmp_path / "a.pt", ema=ema))
    expected = next(ema.parameters()).float()
    assert torch.equal(next(model.parameters()), expected)


def test_load_model__args_are_stock_keys(tmp_path: Path) -> None:
    args = {"imgsz": 96, "lr0": 0.5, "kd.tau": 4, "teacher": "x.pt"}
    model, _ = load_model(save_checkpoint(tiny_detector(), tmp_path / "a.pt", train_args=args))
    assert model.args["imgsz"] == 96
    assert model.args["lr0"] == 0.5
    assert set(model.args) == set(vars(DEFAULT_CFG))


def test_load_model__distillation_wrapper_gives_the_student(tmp_path: Path) -> None:
    spec = DetectorSpec((LevelSpec(24, 8), LevelSpec(32, 16), LevelSpec(48, 32)), 3, 1)
    student = with_args(tiny_detector(seed=1))
    wrapped = KDModel(DetectTeacher(tiny_detector(seed=2)), student, build_method("kd-lightnet", {}, spec, spec))
    model, _ = load_model(save_checkpoint(wrapped, tmp_path / "last.pt"))
    assert type(model) is DetectionModel
    assert torch.equal(next(model.parameters()), next(student.parameters()))


def test_load_model__stock_wrapper_leaves_no_hooks(tmp_path: Path) -> None:
    student = with_args(tiny_detector(seed=1))
    wrapped = DistillationModel(tiny_detector(seed=2), student)
    model, _ = load_model(save_checkpoint(wrapped, tmp_path / "last.pt"))
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(next(model.parameters()), next(student.parameters()))


def test_load_model__foreign_class_is_named(tmp_path: Path) -> None:
    model = tiny_detector()
    model.add_module("extra", Foreign())
    path = save_checkpoint(model, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    text = str(caught.value)
    assert "\n" not in text
    for part in ("foreign.pt", f"{__name__}.Foreign", "pass trust=true only if you trust its source"):
        assert part in text
    trusted, _ = load_model(path, trust=True)
    assert type(trusted.extra).__name__ == "Foreign"


def test_load_model__runs_no_code_of_the_file(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = save_checkpoint(tiny_detector(), tmp_path / "evil.pt", train_metrics=Payload(marker))
    with pytest.raises(CheckpointError, match=r"evil\.pt.*mkdir.*trust=true"):
        load_model(path)
    assert not marker.exists()
    load_model(path, trust=True)
    assert marker.exists()  # the twin: the payload does run where the user allowed it


def test_load_model__functions_of_our_own_are_foreign_too(tmp_path: Path) -> None:
    class Call:
        def __reduce__(self) -> tuple[Any, ...]:
            from kd_yolo.nn.lightnet import build_model

            return build_model, ("lightnet-n",)

    path = save_checkpoint(tiny_detector(), tmp_path / "call.pt", train_metrics=Call())
    with pytest.raises(CheckpointError, match=r"kd_yolo\.nn\.lightnet\.build_model"):
        load_model(path)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("trust", [False, True])
def test_load_model__missing_module_is_never_installed(tmp_path: Path, trust: bool) -> None:
    name = "a_package_nobody_has"
    module = types.ModuleType(name)
    module.Thing = type("Thing", (nn.Module,), {"__module__": name})  # type: ignore[attr-defined]
    sys.modules[name] = module
    model = tiny_detector()
    model.add_module("extra", module.Thing())
    path = save_checkpoint(model, tmp_path / "needs.pt")
    del sys.modules[name]
    with pytest.raises(CheckpointError, match=name):
        load_model(path, trust=trust)


def damage(content: bytes) -> bytes:
    """Overwrite the pickle and keep the archive's directory."""
    return content[:3000] + b"\0" * 3000 + content[6000:]


def flip_weights(content: bytes) -> bytes:
    """Change stored weights, which only the archive's checksum notices."""
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 64]) + content[middle + 64 :]


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "is empty"),
    "truncated": (lambda content: content[: len(content) // 2], "truncated, or not a PyTorch checkpoint"),
    "text": (lambda content: b"hello", "truncated, or not a PyTorch checkpoint"),
    "damaged": (damage, "damaged or not a checkpoint"),
    "flipped": (flip_weights, "checksum"),
}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("kind", BYTES)
def test_load_model__bad_bytes(tiny_checkpoint: Path, tmp_path: Path, kind: str, trust: bool) -> None:
    change, message = BYTES[kind]
    path = tmp_path / "bad.pt"
    path.write_bytes(change(tiny_checkpoint.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"bad\.pt: .*{message}") as caught:
        load_model(path, trust=trust)
    assert "\n" not in str(caught.value)


def not_finite() -> dict[str, Any]:
    model = tiny_detector()
    next(model.parameters()).data[0] = float("nan")
    return {"model": model}


CONTENTS: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (dict, "no model in it"),
    "tensor": (lambda: torch.zeros(3), "cannot be loaded|refused"),
    "list": (lambda: [1, 2], "cannot be loaded|refused"),
    "state_dict": (lambda: dict(tiny_detector().state_dict()), "weights only"),
    "nested_state_dict": (lambda: {"model": tiny_detector().state_dict()}, "weights only"),
    "segment": (lambda: {"model": SegmentationModel("yolov8n-seg.yaml", verbose=False)}, "task segment"),
    "classify": (lambda: {"model": ClassificationModel("yolov8n-cls.yaml", verbose=False)}, "task classify"),
    "transformer": (lambda: {"model": RTDETRDetectionModel("yolov8-rtdetr.yaml", verbose=False)}, "RTDETRDecoder"),
    "layer": (lambda: {"model": nn.Sequential(nn.Conv2d(3, 3, 1))}, "is a Sequential"),
    "quantized": (lambda: {"model": tiny_detector(), "modelopt": {"a": 1}}, "modelopt"),
    "not_finite": (not_finite, "not finite"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_load_model__wrong_content(tmp_path: Path, kind: str) -> None:
    make, message = CONTENTS[kind]
    path = tmp_path / "wrong.pt"
    torch.save(make(), path)
    with pytest.raises(CheckpointError, match=rf"wrong\.pt: .*({message})") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("yolo26n.pt", "no such file"),
        ("gone/best.pt", "no such file"),
        ("model.onnx", "is not a .pt"),
        ("d.pt", "is not a file"),
    ],
)
def test_load_model__names_are_never_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.pt").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message):
        load_model(name)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["yolov5n.pt", "it's.pt"])
def test_load_model__names_read_as_others(tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(tiny_checkpoint.read_bytes())
    if "yolov5" in name and "u" in str(path):
        pytest.skip("Ultralytics leaves yolov5 names alone when the path has the letter it would add")
    with pytest.raises(CheckpointError, match="rename the file"):
        load_model(path)
