from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import yaml
from nn_factory import module_types, stock_model
from torch import nn
from ultralytics.nn.modules import Conv
from ultralytics.nn.tasks import DetectionModel, load_checkpoint

from kd_yolo.errors import ModelError
from kd_yolo.nn.blocks import FORMS, RepBlock
from kd_yolo.nn.lightnet import build_lightnet, build_model
from kd_yolo.nn.merging import max_errors, merge, random_images, raw_outputs, rep_blocks
from kd_yolo.nn.surgery import eligible_convs, reparam_plan, reparameterize

STOCK = {"yolo26n.yaml": 45, "yolo11n.yaml": 35, "yolov8n.yaml": 39}  # plain 3x3 convolutions, counted on 8.4.190


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", STOCK)
def test_reparameterize__same_function_then_same_network(name: str, form: str) -> None:
    original = stock_model(name).double()
    model = copy.deepcopy(original)
    assert reparameterize(model, form) == STOCK[name] == len(rep_blocks(model))
    images = random_images(model, imgsz=64)
    with torch.no_grad():
        expected = raw_outputs(original, images)
        assert max_errors(expected, raw_outputs(model, images))[1] <= 1e-9
        merged, report = merge(model)
        assert report.blocks == STOCK[name]
        assert max_errors(expected, raw_outputs(merged, images))[1] <= 1e-9
    assert module_types(merged) == module_types(original)
    assert {k: v.shape for k, v in merged.state_dict().items()} == {
        k: v.shape for k, v in original.state_dict().items()
    }
    assert merged.yaml == original.yaml


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["yolo26n", "yolo11n", "yolov8n"])
def test_reparameterize__pretrained_weights(shared: Path, name: str, form: str) -> None:
    file = shared / "weights" / f"{name}-coco-rebuilt.pt"
    if not file.is_file():
        pytest.skip(f"no {file.name} in the shared data")
    original = load_checkpoint(str(file))[0].float().eval()
    model = copy.deepcopy(original)
    reparameterize(model, form)
    images = random_images(model, imgsz=96).float()
    with torch.no_grad():
        # float32 arithmetic itself is good to some 1e-5 through so many layers; what counts is the stored weights
        error = max_errors(
            raw_outputs(original.double(), images.double()), raw_outputs(copy.deepcopy(model).double(), images.double())
        )[1]
    assert error <= 1e-6
    assert (error == 0.0) == (form != "qarep")  # branches of scale zero add nothing at all
    assert merge(model)[1].relative_error <= 1e-12


@pytest.mark.parametrize("form", ["repvgg", "multi"])
def test_reparameterize__train_mode_is_exact(form: str) -> None:
    original = stock_model("yolo26n.yaml").double()
    model = copy.deepcopy(original)
    reparameterize(model, form)
    images = random_images(model, batch=4, imgsz=64)
    with torch.no_grad():
        assert max_errors(raw_outputs(original.train(), images), raw_outputs(model.train(), images))[1] <= 1e-9


def test_reparameterize__keeps_mode_gradients_and_layer_attributes() -> None:
    model = stock_model("yolov8n.yaml")
    model.model[0].requires_grad_(False)
    attributes = [(layer.i, layer.f, layer.type, layer.np) for layer in model.model]
    names = eligible_convs(model)
    activations = [model.get_submodule(name).act for name in names]
    reparameterize(model.eval(), "qarep")
    assert attributes == [(layer.i, layer.f, layer.type, layer.np) for layer in model.model]
    assert [model.get_submodule(name).act for name in names] == activations
    assert not any(module.training for module in model.modules())
    for name in names:
        block = model.get_submodule(name)
        assert type(block) is RepBlock
        assert {p.requires_grad for p in block.parameters()} == {name != "model.0"}
        assert not block.skip  # the trainable 1x1 branch can hold the identity itself
    training = stock_model("yolov8n.yaml").train()
    reparameterize(training)
    assert all(module.training for module in rep_blocks(training).values())


@pytest.mark.parametrize("form", FORMS)
def test_reparameterize__yaml_rebuilds_the_structure(form: str) -> None:
    model = stock_model("yolo11n.yaml")
    source_yaml = model.yaml
    reparameterize(model, form)
    assert "kd_yolo" not in source_yaml  # the caller's dictionary is not written to
    assert model.yaml["kd_yolo"] == {"reparam": form, "scope": "all", "identity": form != "qarep", "branches": 2}
    again = build_model(yaml.safe_load(yaml.safe_dump(model.yaml)), nc=6)
    again.load_state_dict(model.state_dict())
    images = random_images(model, imgsz=64).float()
    with torch.no_grad():
        assert max_errors(raw_outputs(model, images), raw_outputs(again.eval(), images)) == (0.0, 0.0)
    assert module_types(again) == module_types(model)


def test_reparameterize__stock_load_still_works() -> None:
    # a head of other class counts is rebuilt by load(), which reads .conv.in_channels of the head's first layers
    source, target = stock_model("yolov8n.yaml", nc=80), stock_model("yolov8n.yaml", nc=6, seed=1)
    reparameterize(source, "repvgg")
    reparameterize(target, "repvgg")
    target.load(source, verbose=False)
    assert torch.equal(target.model[0].conv.weight, source.model[0].conv.weight)
    assert torch.equal(target.model[-1].cv3[0][0].conv.weight, source.model[-1].cv3[0][0].conv.weight)


def test_reparameterize__twice_or_fused_or_unknown() -> None:
    model = stock_model("yolov8n.yaml")
    assert reparameterize(model, "repvgg") == 39
    assert reparameterize(model, "repvgg") == 0
    with pytest.raises(ModelError, match="already"):
        reparameterize(model, "qarep")
    with pytest.raises(ModelError, match="already"):
        reparameterize(build_lightnet("lightnet-n", 6), "qarep")  # body only: another structure
    with pytest.raises(ModelError, match="unfused"):
        reparameterize(stock_model("yolov8n.yaml").fuse(verbose=False))
    with pytest.raises(ModelError, match="did you mean 'qarep'"):
        reparameterize(stock_model("yolov8n.yaml"), "qrep")


def test_eligible_convs__exactly_plain_ones() -> None:
    model = stock_model("yolo26n.yaml")
    names = eligible_convs(model)
    for name in names:
        conv = model.get_submodule(name)
        assert type(conv) is Conv
        assert (conv.conv.kernel_size, conv.conv.groups) == ((3, 3), 1)
    body = eligible_convs(model, "body")
    head = [name for name in names if name.startswith("model.23.")]
    assert body == [name for name in names if name not in head]
    assert len(head) == 12  # two box convolutions, three levels, two branches
    for change in ("groups", "dilation", "act", "bn"):
        twin = copy.deepcopy(model)
        conv = twin.model[1]
        if change == "groups":
            conv.conv.groups = 2
        elif change == "dilation":
            conv.conv.dilation = (2, 2)
        elif change == "bn":
            conv.bn = nn.BatchNorm2d(32, affine=False)
        else:
            twin.model[1] = type("MyConv", (Conv,), {})(16, 32, 3, 2)
        assert set(names) - set(eligible_convs(twin)) == {"model.1"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("qarep", "is not a mapping"),
        ({}, r"kd_yolo\.reparam"),
        ({"reparam": "fancy"}, r"kd_yolo\.reparam: .*'qarep'"),
        ({"reparm": "qarep"}, "unknown key 'reparm'.*did you mean 'reparam'"),
        ({"reparam": "qarep", "branches": 0}, r"kd_yolo\.branches"),
        ({"reparam": "qarep", "branches": "2"}, r"kd_yolo\.branches"),
        ({"reparam": "qarep", "scope": "neck"}, r"kd_yolo\.scope"),
        ({"reparam": "qarep", 5: 1}, "unknown key '5'"),
    ],
)
def test_reparam_plan__one_clear_line(content: object, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        reparam_plan({"kd_yolo": content})
    assert "\n" not in str(caught.value)


def test_reparam_plan__absent() -> None:
    assert reparam_plan({"nc": 6}) is None
    assert isinstance(stock_model("yolov8n.yaml"), DetectionModel)
