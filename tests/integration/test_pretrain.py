"""``kd-yolo pretrain`` and ``kd-yolo grow`` from the command line: what they leave, resume, and every bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ultralytics.nn.tasks import ClassificationModel, DetectionModel

from kd_yolo.checkpoints import load_model
from kd_yolo.cli import main
from kd_yolo.config import split_train_keys
from kd_yolo.errors import ConfigError
from kd_yolo.pretrain import run as module
from kd_yolo.pretrain.settings import PretrainConfig, split_pretrain_keys
from kd_yolo.training import train

NAMES = {0: "cat", 1: "dog"}


def plain(*widths: int, **more: Any) -> dict[str, Any]:
    """Return a model dictionary of five convolutions with a head on the last three."""
    backbone = [[-1, 1, "Conv", [width, 3, 2]] for width in widths]
    return {"nc": 2, "backbone": backbone, "head": [[[2, 3, 4], 1, "Detect", ["nc"]]], **more}


SMALL_PEER = plain(8, 24, 32, 40, 48)  # multiples of 8, as Ultralytics rounds widths
SMALL_STUDENT = plain(8, 16, 16, 24, 32, kd_yolo={"reparam": "qarep"})


class PowerCutError(Exception):
    """Stands for a machine that stops."""


@torch.no_grad()
def save_random(path: Path, model: DetectionModel, **keys: Any) -> Path:
    """Write a network whose BatchNorms know its activations, as those of a trained one do."""
    model.train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    model(torch.rand(8, int(model.yaml.get("channels", 3)), 64, 64, generator=torch.Generator().manual_seed(0)))
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 0.03
    torch.save({"epoch": -1, "model": model.eval(), "ema": None, "train_args": {"imgsz": 64}, **keys}, path)
    return path


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a yolo26n checkpoint with random weights and two classes."""
    torch.manual_seed(1)
    model = DetectionModel("yolo26n.yaml", nc=2, verbose=False)
    model.names = dict(NAMES)
    return save_random(tmp_path_factory.mktemp("peer") / "yolo26n.pt", model)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the keys of a pretraining of two small networks."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(1)
    model = DetectionModel(SMALL_PEER, verbose=False)
    model.names = dict(NAMES)
    (folder / "student.yaml").write_text(yaml.safe_dump(SMALL_STUDENT))
    return {"from": save_random(folder / "small.pt", model), "model": str(folder / "student.yaml"), "batch": 8}


@pytest.fixture
def keys(peer: Path, tiny_data: Path, tmp_path: Path) -> Callable[..., PretrainConfig]:
    """Return a function that builds a tiny pretraining's configuration."""

    def build(**given: Any) -> PretrainConfig:
        base = {"model": "lightnet-n", "from": peer, "images": tiny_data.parent / "images" / "train", "imgsz": 64}
        base |= {"epochs": 4, "batch": 8, "out": str(tmp_path / "out.pt")}
        return split_pretrain_keys({**base, **given})

    return build


@pytest.fixture
def refused(
    small: dict[str, Any], tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return a function that runs a command with changed keys, which must be refused, and returns its line."""
    base = {**small, "images": tiny_data.parent / "images" / "train", "imgsz": 64}
    base |= {"epochs": 0, "out": tmp_path / "out.pt"}

    def run(command: str = "pretrain", **given: Any) -> str:
        merged = {**(base if command == "pretrain" else {}), **given}
        capsys.readouterr()
        status = main([command, *(f"{key}={value}" for key, value in merged.items() if value is not None)])
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("kd-yolo: ")]
        assert status == 2, captured
        assert len(lines) == 1, captured.err
        assert "Traceback" not in captured.err
        assert not (tmp_path / "out.pt").exists()
        return lines[0]

    return run


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(path)[0].state_dict())


def assert_same_weights(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# ---- what it leaves --------------------------------------------------------------------------------------------------


def test_pretrain__from_start_to_training(
    keys: Callable[..., PretrainConfig],
    small: dict[str, Any],
    train_keys: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    report = module.pretrain(keys(**small, epochs=24, lr0=0.005, forced=0.25))
    assert report.path == tmp_path / "out.pt"
    assert report.peer == "small.pt"
    assert 0 < report.inherited < 1  # the first convolution has the same shape
    assert report.images == 24
    assert list(report.after) == [
        "backbone/4",
        "backbone/8",
        "head/8",
        "backbone/16",
        "head/16",
        "backbone/32",
        "head/32",
    ]
    assert sum(report.after.values()) < 0.95 * sum(report.before.values())
    assert json.loads((tmp_path / "out.json").read_text()) == report.to_dict()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.pt"]
    model, checkpoint = load_model(report.path)
    assert model.names == NAMES
    assert model.args["imgsz"] == 64
    assert checkpoint["kd_yolo"]["pretrain"]["inherited"] == report.inherited
    assert checkpoint["kd_yolo"]["pretrain"]["peer_sha256"] == report.peer_sha256

    run = train_keys(model=small["model"], pretrained=str(report.path), teacher="none", epochs=1)
    best = load_model(train(*split_train_keys({**run, "lr0": 1e-9, "warmup_epochs": 0, "optimizer": "SGD"})).best)[0]
    kept, start = best.state_dict()["model.2.conv.weight"], model.state_dict()["model.2.conv.weight"]
    assert torch.allclose(kept, start, atol=2e-3)  # stored in half precision
    assert float(start.abs().max()) > 0.1


def test_pretrain__same_architecture_is_narrowed(
    keys: Callable[..., PretrainConfig], tmp_path: Path, heard: Any
) -> None:
    """Without an epoch it takes over and fits only; the default name is used."""
    report = module.pretrain(keys(epochs=0))
    assert report.inherited > 0.7
    assert report.after == report.before
    assert any("narrowed from" in record.getMessage() for record in heard.records)
    assert "0 epochs" in report.to_text()
    assert not list(tmp_path.glob(".*"))


def test_pretrain__another_family_says_what_is_inherited(
    keys: Callable[..., PretrainConfig], tmp_path: Path, heard: Any
) -> None:
    torch.manual_seed(1)
    other = save_random(tmp_path / "yolov8n.pt", DetectionModel("yolov8n.yaml", nc=2, verbose=False))
    report = module.pretrain(keys(**{"from": other, "epochs": 0}))
    said = [record.getMessage() for record in heard.records if "inherited" in record.getMessage()]
    assert len(said) == 1
    assert "yolov8n.pt" in said[0]
    assert "whose rows are those of yolo26n" in said[0]
    assert f"({100 * report.inherited:.1f} %) inherited" in said[0]


def test_pretrain__nothing_inherited_is_a_warning(
    keys: Callable[..., PretrainConfig], tmp_path: Path, heard: Any
) -> None:
    """A network of other widths everywhere."""
    torch.manual_seed(1)
    other = save_random(tmp_path / "odd.pt", DetectionModel(SMALL_PEER, verbose=False))
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(plain(16, 24, 128, 48, 64, reg_max=1)))
    report = module.pretrain(keys(**{"from": other, "epochs": 0, "model": str(tmp_path / "other.yaml")}))
    assert report.inherited == 0
    warned = [record.getMessage() for record in heard.records if record.levelname == "WARNING"]
    assert any("odd.pt" in line and "0 % inherited" in line and "random weights" in line for line in warned)


def test_pretrain__a_checkpoint_goes_on_from_its_own_weights(
    keys: Callable[..., PretrainConfig], small: dict[str, Any], tmp_path: Path
) -> None:
    first = module.pretrain(keys(**small, epochs=0))
    second = module.pretrain(keys(**{**small, "model": str(first.path)}, epochs=0, out=str(tmp_path / "second.pt")))
    assert second.inherited == 1.0
    assert second.before == pytest.approx(first.before)
    assert_same_weights(first.path, second.path)


# ---- resume ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cut_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[PretrainConfig, int], None]:
    """Return a function that starts a pretraining and stops it in an epoch, after its first step."""

    def cut(config: PretrainConfig, epoch: int) -> None:
        original = module._set_rate

        def stop(optimizer: torch.optim.Optimizer, config: PretrainConfig, step: int, steps: int) -> None:
            if step == epoch * steps // config.epochs + 1:
                raise PowerCutError
            original(optimizer, config, step, steps)

        with monkeypatch.context() as patch:
            patch.setattr(module, "_set_rate", stop)
            with pytest.raises(PowerCutError):
                module.pretrain(config)

    return cut


def test_pretrain__resumed_equals_uninterrupted(
    keys: Callable[..., PretrainConfig],
    small: dict[str, Any],
    cut_after: Callable[[PretrainConfig, int], None],
    tmp_path: Path,
) -> None:
    """Stopped in the phase apart and once more in the joined one."""
    whole = module.pretrain(keys(**small, out=str(tmp_path / "whole.pt")))
    for epoch in (1, 3):
        cut_after(keys(**small), epoch)
        assert (tmp_path / ".out.part.pt").is_file()
        assert not (tmp_path / "out.pt").exists()
    resumed = module.pretrain(keys(**small))
    assert_same_weights(whole.path, resumed.path)
    assert resumed.provenance() == whole.provenance()
    assert not (tmp_path / ".out.part.pt").exists()
    other = module.pretrain(keys(**small, out=str(tmp_path / "other.pt"), seed=1))
    assert not torch.equal(weights(other.path)["model.1.conv.weight"], weights(whole.path)["model.1.conv.weight"])


def test_pretrain__stopped_between_result_and_cleaning_up(
    keys: Callable[..., PretrainConfig], small: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    config = keys(**small, epochs=1, out=None)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", lambda *_: (_ for _ in ()).throw(PowerCutError))
        with pytest.raises(PowerCutError):
            module.pretrain(config)
    module.pretrain(config)
    assert sorted(path.name for path in tmp_path.glob("*-from-*")) == [
        "student-from-small.json",
        "student-from-small.pt",
    ]
    with pytest.raises(ConfigError, match=r"student-from-small\.pt: exists already; give out=FILE"):
        module.pretrain(config)


def test_pretrain__state_of_other_keys(
    keys: Callable[..., PretrainConfig],
    cut_after: Callable[[PretrainConfig, int], None],
    refused: Callable[..., str],
    tiny_data: Path,
    small: dict[str, Any],
    tmp_path: Path,
) -> None:
    given = {**small, "epochs": 2}
    cut_after(keys(**given), 1)
    assert "lr0=0.002, not lr0=0.001" in refused(**given, lr0=0.001)
    assert "epochs=2, not epochs=3" in refused(**{**given, "epochs": 3})
    fewer = tmp_path / "fewer"
    shutil.copytree(tiny_data.parent / "images" / "train", fewer)
    next(fewer.iterdir()).unlink()
    line = refused(**given, images=fewer)
    assert "another images" in line
    assert "resume=false" in line
    torch.manual_seed(5)
    other = save_random(tmp_path / "small.pt", DetectionModel(SMALL_PEER, verbose=False))
    assert "another from" in refused(**{**given, "from": other})
    (tmp_path / "student.yaml").write_text(yaml.safe_dump(plain(8, 16, 24, 24, 32)))
    assert "another model" in refused(**{**given, "model": tmp_path / "student.yaml"})
    part = tmp_path / ".out.part.pt"
    part.write_bytes(part.read_bytes()[:5000])
    assert ".out.part.pt: damaged; delete it" in refused(**given)
    part.write_text("garbage")
    assert ".out.part.pt: damaged; delete it" in refused(**given)
    module.pretrain(keys(**given, resume=False))
    assert not part.exists()


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_pretrain__bad_keys(refused: Callable[..., str]) -> None:
    assert "missing key 'from'" in refused(**{"from": None})
    assert "from=5 is not valid" in refused(**{"from": 5})
    assert "missing key 'images'" in refused(images=None)
    assert "did you mean 'epochs'" in refused(epoch=3)
    assert "forced=2 is not valid" in refused(forced=2)
    assert "imgsz=100 is not a multiple of the model's largest stride 32; use 96 or 128" in refused(imgsz=100)
    assert "device=7" in refused(device=7)
    assert "no-such-model" in refused(model="no-such-model")


def test_pretrain__bad_images(refused: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    assert "no images in this folder" in refused(images=folder)
    (folder / "a.jpg").write_text("no image")
    assert "0 of 1 images can be read, at least 8 are needed" in refused(images=folder)
    assert "nowhere: no folder of images, and no data set" in refused(images=tmp_path / "nowhere")


def test_pretrain__bad_output(refused: Callable[..., str], small: dict[str, Any], tmp_path: Path) -> None:
    peer = small["from"]
    before = peer.read_bytes()
    assert "would overwrite what is read" in refused(out=peer)
    assert "would overwrite what is read" in refused(out=peer, model=peer)
    assert peer.read_bytes() == before
    assert "a checkpoint ends in .pt" in refused(out=tmp_path / "out.onnx")
    (tmp_path / "folder.pt").mkdir()
    assert "is a folder" in refused(out=tmp_path / "folder.pt")
    (tmp_path / "file").write_text("")
    line = refused(out=tmp_path / "file" / "x.pt")
    assert "not writable" in line
    assert "out=" in line


def test_pretrain__bad_peer(refused: Callable[..., str], small: dict[str, Any], tmp_path: Path) -> None:
    assert "no-such.pt: no such file" in refused(**{"from": tmp_path / "no-such.pt"})
    cut = tmp_path / "cut.pt"
    cut.write_bytes(small["from"].read_bytes()[:20_000])
    assert "cut.pt" in refused(**{"from": cut})
    other = tmp_path / "cls.pt"
    model = ClassificationModel("yolo26n-cls.yaml", nc=2, verbose=False)
    torch.save({"epoch": -1, "model": model, "ema": None, "train_args": {"imgsz": 64}}, other)
    assert "classif" in refused(**{"from": other}).lower()
    level = {"nc": 2, "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]]], "head": []}
    level["head"] = [[[1], 1, "Detect", ["nc"]]]
    coarse = save_random(tmp_path / "p2.pt", DetectionModel(level, verbose=False))
    line = refused(**{"from": coarse})
    assert "student.yaml from p2.pt" in line
    assert "share none" in line
    grey = save_random(tmp_path / "grey.pt", DetectionModel({**SMALL_PEER, "channels": 1}, ch=1, verbose=False))
    assert "grey.pt: reads 1 channels" in refused(**{"from": grey})


# ---- grow ------------------------------------------------------------------------------------------------------------


def test_grow__writes_and_says_what_it_did(
    peer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["grow", f"model={peer}"]) == 0
    said = capsys.readouterr().out
    assert "yolo26n-grown-s.pt: grown from scale n to s" in said
    assert "% inherited" in said
    grown, _ = load_model(tmp_path / "yolo26n-grown-s.pt")
    assert grown.yaml["scale"] == "s"
    assert grown.names == NAMES
    assert main(["grow", f"model={peer}"]) == 2
    assert "yolo26n-grown-s.pt: exists already; give out=FILE" in capsys.readouterr().err


def test_grow__bad_input(refused: Callable[..., str], peer: Path, tmp_path: Path) -> None:
    assert "missing key 'model'" in refused("grow")
    assert "did you mean 'scale'" in refused("grow", model=peer, scal="s")
    assert "no-such.pt: no such file" in refused("grow", model=tmp_path / "no-such.pt")
    assert "is the source itself" in refused("grow", model=peer, out=peer)
    assert "a checkpoint ends in .pt" in refused("grow", model=peer, out=tmp_path / "out.onnx")
    assert "scale=q" in refused("grow", model=peer, scale="q", out=tmp_path / "out.pt")
    assert "choose a larger one" in refused("grow", model=peer, scale="n", out=tmp_path / "out.pt")
