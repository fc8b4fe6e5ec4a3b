"""``from kd_yolo import KDYOLO``: the commands from Python."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics import YOLO
from ultralytics.engine.results import Results
from ultralytics.nn.tasks import DetectionModel

import kd_yolo
from kd_yolo import KDYOLO
from kd_yolo.config import split_train_keys
from kd_yolo.errors import CheckpointError, ConfigError, ModelError
from kd_yolo.nn.blocks import RepBlock
from kd_yolo.training import TrainReport


class Foreign(torch.nn.Module):
    """A class that no installation but this test has."""


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[KDYOLO, TrainReport]:
    """Return a model that trained one epoch through the interface, and its report."""
    model = KDYOLO("lightnet-n")
    keys: dict[str, Any] = {"imgsz": 64, "batch": 8, "epochs": 1, "workers": 0, "device": "cpu", "plots": False}
    keys |= {"teacher": "none", "export": "none", "benchmark": False, "verbose": False}
    report = model.train(data=str(tiny_data), project=str(tmp_path_factory.mktemp("api")), name="run", **keys)
    return model, report


def images(data: Path) -> list[str]:
    return [str(path) for path in sorted((data.parent / "images" / "val").iterdir())]


def test_package__offers_the_class_lazily() -> None:
    assert kd_yolo.__all__ == ["KDYOLO", "__version__"]
    with pytest.raises(AttributeError, match="KDYOLOO"):
        _ = kd_yolo.KDYOLOO


@pytest.mark.parametrize("name", ["lightnet-n", "lightnet-n.yaml", "yolo26n.yaml"])
def test_kdyolo__builds_by_name(name: str) -> None:
    model = KDYOLO(name)
    assert isinstance(model, YOLO)
    assert isinstance(model.model, DetectionModel)
    assert model.task == "detect"
    has_blocks = any(isinstance(module, RepBlock) for module in model.model.modules())
    assert has_blocks == name.startswith("lightnet")


def test_kdyolo__loads_a_checkpoint(tiny_teacher: Path) -> None:
    for given in (tiny_teacher, str(tiny_teacher)):
        model = KDYOLO(given)
        assert Path(str(model.ckpt_path)) == tiny_teacher
        assert len(model.names) == 6


def test_train__returns_a_report_and_loads_the_student(trained: tuple[KDYOLO, TrainReport]) -> None:
    model, report = trained
    assert [phase.name for phase in report.phases] == ["student"]
    assert report.best.is_file()
    assert Path(str(model.ckpt_path)) == report.best
    assert Path(report.artifacts["deployed"]).is_file()


def test_train__dotted_keys_and_typos(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'tau'"):
        KDYOLO("lightnet-n").train(data=str(tiny_data), imgsz=64, project=str(tmp_path), **{"kd.tua": 2})
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        KDYOLO("lightnet-n").train(data=str(tiny_data), epoch=1, project=str(tmp_path))
    assert not any(tmp_path.iterdir())


def test_train__takes_paths(tmp_path: Path) -> None:
    """A caller from Python has ``Path`` objects, and every other method takes them."""
    keys = {name: tmp_path / name for name in ("data", "model", "teacher", "method", "pretrained", "resume")}
    config, _, _ = split_train_keys(keys)
    assert config.data == str(tmp_path / "data")
    assert config.teacher == str(tmp_path / "teacher")


def test_val__square_canvas(trained: tuple[KDYOLO, TrainReport], tiny_data: Path, tmp_path: Path) -> None:
    """Stock ``val`` pads rectangular batches by half a stride: 64 would be judged at 96."""
    seen: list[tuple[bool, bool]] = []
    model = KDYOLO(trained[1].best)
    model.add_callback(
        "on_val_start", lambda validator: seen.append((validator.args.rect, validator.dataloader.dataset.rect))
    )
    metrics = model.val(data=str(tiny_data), imgsz=64, batch=8, device="cpu", workers=0, project=str(tmp_path))
    assert seen == [(False, False)]
    assert 0 <= float(metrics.box.map) <= float(metrics.box.map50) <= 1


def test_predict__returns_results(trained: tuple[KDYOLO, TrainReport], tiny_data: Path) -> None:
    found = trained[0].predict(images(tiny_data), imgsz=64, conf=0.001, device="cpu", verbose=False)
    assert isinstance(found, list)
    assert [type(result) for result in found] == [Results] * 8
    assert sum(len(result.boxes) for result in found) > 0
    called = trained[0](images(tiny_data)[0], imgsz=64, device="cpu", verbose=False)
    assert [type(result) for result in called] == [Results]


def test_predict__streams(trained: tuple[KDYOLO, TrainReport], tiny_data: Path) -> None:
    stream = trained[0].predict(images(tiny_data)[:2], stream=True, imgsz=64, device="cpu", verbose=False)
    assert not isinstance(stream, list)
    assert sum(1 for _ in stream) == 2


@pytest.mark.parametrize("program", ["bin/kd-yolo", "bin/yolo", "inspect_ultralytics"])
def test_predict__returns_results_in_a_program_whose_name_ends_in_yolo(
    program: str, tiny_teacher: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ultralytics takes such a program with the word predict for its own command line and returns nothing."""
    monkeypatch.setattr(sys, "argv", [program, "predict"])
    monkeypatch.setattr("ultralytics.engine.model.ARGV", [program, "predict"])  # read once, when it is imported
    keys: dict[str, Any] = {"imgsz": 64, "device": "cpu", "verbose": False, "project": str(tmp_path)}
    found = KDYOLO(tiny_teacher).predict(images(tiny_data)[:1], **keys)
    assert isinstance(found, list)
    assert [type(result) for result in found] == [Results]
    assert not any(tmp_path.iterdir()), "nothing was to be saved"


def test_deploy__writes_stock_classes(trained: tuple[KDYOLO, TrainReport], tiny_data: Path, tmp_path: Path) -> None:
    report = trained[0].deploy(out=tmp_path / "small.pt")
    assert report.path == tmp_path / "small.pt"
    assert report.merge.blocks > 0
    stock = YOLO(report.path)
    assert not any(type(module).__module__.startswith("kd_yolo") for module in stock.model.modules())
    one = stock.predict(images(tiny_data)[:1], imgsz=64, conf=0.001, rect=False, device="cpu", verbose=False)[0]
    assert isinstance(one, Results)


@pytest.mark.parametrize("what", ["deploy", "export"])
def test_untrained__has_nothing_to_ship(what: str) -> None:
    with pytest.raises(ModelError, match=f"no checkpoint to {what}"):
        getattr(KDYOLO("lightnet-n"), what)()


def test_kdyolo__foreign_checkpoint_is_refused_unless_trusted(tmp_path: Path) -> None:
    model = DetectionModel("yolo26n.yaml", nc=2, verbose=False)
    model.add_module("extra", Foreign())
    path = tmp_path / "foreign.pt"
    torch.save({"epoch": -1, "model": model, "ema": None, "train_args": {}}, path)
    with pytest.raises(CheckpointError, match=r"foreign\.pt: holds the foreign class .*Foreign.*trust=true"):
        KDYOLO(path)
    assert KDYOLO(path, trust=True).model.yaml["nc"] == 2


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("gone.pt", CheckpointError),
        ("gone.onnx", CheckpointError),
        ("lightnet-x", ConfigError),
        ("gone.yaml", ConfigError),
    ],
)
def test_kdyolo__not_there(
    name: str,
    error: type[Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refuse_network: Callable[[], None],
) -> None:
    monkeypatch.chdir(tmp_path)
    refuse_network()
    with pytest.raises(error, match=name.partition(".")[0]):
        KDYOLO(name)
    assert not any(tmp_path.iterdir())


@pytest.fixture
def refuse_network(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function after whose call any attempt to open a connection fails the test."""

    def arm() -> None:
        def refuse(*arguments: Any, **keys: Any) -> None:
            raise AssertionError("tried to open a connection")

        monkeypatch.setattr("socket.socket.connect", refuse)

    return arm
