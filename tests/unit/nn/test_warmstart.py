from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from nn_factory import randomise_bn, stock_model
from torch import nn

from kd_yolo.checkpoints import load_model
from kd_yolo.nn.blocks import FORMS
from kd_yolo.nn.lightnet import build_lightnet, build_model
from kd_yolo.nn.merging import max_errors, random_images, raw_outputs
from kd_yolo.nn.surgery import reparameterize
from kd_yolo.nn.warmstart import warm_start


def difference(a: nn.Module, b: nn.Module) -> float:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        return max_errors(
            raw_outputs(copy.deepcopy(a).double().eval(), images), raw_outputs(copy.deepcopy(b).double().eval(), images)
        )[1]


@pytest.mark.parametrize("name", ["yolo26n.yaml", "yolo11n.yaml", "yolov8n.yaml"])
def test_warm_start__same_architecture_inherits_everything(name: str) -> None:
    source, target = stock_model(name), stock_model(name, seed=1)
    assert difference(source, target) > 1e-2
    report = warm_start(target, source)
    assert report.share == 1.0
    assert set(report.layers) == set(report.layers.values())
    assert difference(source, target) == 0.0


@pytest.mark.parametrize("form", FORMS)
def test_warm_start__re_parameterized_target_computes_the_source(form: str) -> None:
    source, target = stock_model("yolov8n.yaml"), stock_model("yolov8n.yaml", seed=1)
    reparameterize(target, form)
    randomise_bn(target, 2)  # as if it had been trained: new branches are not at zero
    report = warm_start(target, source)
    assert report.parameters == report.total
    assert difference(source, target) < 1e-6


@pytest.mark.parametrize(("source_form", "target_form"), [("qarep", "qarep"), ("qarep", "repvgg"), ("multi", "multi")])
def test_warm_start__from_re_parameterized_source(source_form: str, target_form: str) -> None:
    source = build_lightnet("lightnet-n", 6, form=source_form)
    randomise_bn(source)
    target = build_lightnet("lightnet-n", 6, form=target_form)
    assert warm_start(target, source).share == 1.0
    assert difference(source, target) < 1e-5
    plain = build_model({key: value for key, value in target.yaml.items() if key != "kd_yolo"}, nc=6)
    assert warm_start(plain, source).share == 1.0
    assert difference(source, plain) < 1e-5


def test_warm_start__identity_branch_of_only_one_side() -> None:
    # same tensors, other function: the fixed identity is not in the state dictionary
    source = stock_model("yolov8n.yaml")
    reparameterize(source, "qarep")
    target = build_model({**source.yaml, "kd_yolo": {**source.yaml["kd_yolo"], "identity": True}}, nc=6)
    assert target.state_dict().keys() == source.state_dict().keys()
    warm_start(target, source)
    assert difference(source, target) < 1e-5


def test_warm_start__other_classes_leave_only_the_last_layers() -> None:
    source, target = stock_model("yolo26n.yaml", nc=4), stock_model("yolo26n.yaml", nc=6, seed=1)
    report = warm_start(target, source)
    named = {name for name, module in target.named_modules() if type(module) is nn.Conv2d and module.out_channels == 6}
    assert len(named) == 6
    assert not named & set(report.layers)
    missing = sum(p.numel() for name in named for p in target.get_submodule(name).parameters())
    assert report.total - report.parameters == missing


@pytest.mark.parametrize("name", ["yolo26n.yaml", "yolo11n.yaml", "yolov8n.yaml"])
def test_warm_start__lightnet_takes_layers_of_the_same_role(name: str) -> None:
    source = stock_model(name, nc=80)
    target = build_lightnet("lightnet-m", 6)
    before = copy.deepcopy(target.state_dict())
    images = random_images(target, imgsz=64).float()
    report = warm_start(target.eval(), source)
    assert {"model.0", "model.1"} <= set(report.layers)
    assert report.layers["model.0"] == "model.0"
    with torch.no_grad():  # layer by layer the pretrained function, not only its numbers
        assert torch.allclose(target.model[0](images), source.model[0](images), atol=1e-4)
    for ours, theirs in report.layers.items():
        row, other = int(ours.split(".")[1]), int(theirs.split(".")[1])
        assert ours.split(".")[2:] == theirs.split(".")[2:]
        if row != len(target.model) - 1:
            assert (row < len(target.yaml["backbone"])) == (other < len(source.yaml["backbone"]))
            stock = type(source.model[other]).__name__
            assert stock == ("Conv" if row == 0 or not ours.count(".cv") else type(target.model[row]).__name__)
    changed = [name for name, value in target.state_dict().items() if not torch.equal(value, before[name])]
    untouched = [name for name in changed if not name.startswith(tuple(f"{layer}." for layer in report.layers))]
    assert not untouched


# Share of the training parameters that a COCO-pretrained yolo26n gives by role and shape alone.
SHARE = {"lightnet-s": 0.85, "lightnet-m": 0.13}


@pytest.mark.parametrize("name", SHARE)
def test_warm_start__lightnet_starts_at_pretrained_features(name: str, shared: Path) -> None:
    source = load_model(shared / "weights" / "yolo26n-coco-rebuilt.pt")[0].float().eval()
    target = build_lightnet(name, 6).eval()
    report = warm_start(target, source)
    assert report.share >= SHARE[name]
    # Not only by shape: rows 0 to 6, down to stride 16, are one whole piece that computes what it did before.
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ours = theirs = image
    with torch.no_grad():
        for row in range(7):
            ours, theirs = target.model[row](ours), source.model[row](theirs)
    assert ours.shape == (1, 128, 4, 4)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_warm_start__poor_match_reports_nothing_and_changes_nothing() -> None:
    rows = [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [12, 3, 2]], [[0, 1], 1, "Detect", ["nc"]]]
    tiny = build_model({"nc": 2, "reg_max": 1, "backbone": rows[:2], "head": rows[2:]})
    before = copy.deepcopy(tiny.state_dict())
    report = warm_start(tiny, stock_model("yolov8n.yaml"))
    assert report.layers == {}
    assert (report.parameters, report.share) == (0, 0.0)
    assert "0.0 %" in report.summary()
    assert "\n" not in report.summary()
    assert all(torch.equal(value, tiny.state_dict()[name]) for name, value in before.items())


def test_warm_start__keeps_mode_and_source() -> None:
    source, target = stock_model("yolov8n.yaml"), build_lightnet("lightnet-n", 6).train()
    before = copy.deepcopy(source.state_dict())
    warm_start(target, source)
    assert target.training
    assert not source.training
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in before.items())
    assert not any(module._forward_hooks for module in (*source.modules(), *target.modules()))


def test_warm_start__fused_source_is_no_error() -> None:
    report = warm_start(build_lightnet("lightnet-n", 6), stock_model("yolov8n.yaml").fuse(verbose=False))
    assert report.share < 0.01
