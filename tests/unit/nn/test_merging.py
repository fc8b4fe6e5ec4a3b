from __future__ import annotations

import copy
import pickle
import pickletools
from collections.abc import Callable

import pytest
import torch
from nn_factory import module_types, randomise_bn, stock_model
from torch import Tensor, nn
from ultralytics.nn.modules import Conv
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.errors import ReparamError
from kd_yolo.nn import merging
from kd_yolo.nn.blocks import FORMS, RepBlock
from kd_yolo.nn.lightnet import build_lightnet
from kd_yolo.nn.merging import max_errors, merge, random_images, raw_outputs, rep_blocks, replace_module
from kd_yolo.nn.surgery import reparameterize

FULL = RepBlock._merged_double  # before any test replaces it


def trained_lightnet(form: str = "qarep", nc: int = 6) -> DetectionModel:
    torch.manual_seed(0)
    model = build_lightnet("lightnet-n", nc, form=form)
    randomise_bn(model)
    return model.eval()


@pytest.fixture(scope="module")
def lightnet() -> DetectionModel:
    return trained_lightnet()


def plain_network(model: DetectionModel) -> DetectionModel:
    """Return what stock code builds from the same YAML."""
    return DetectionModel({k: v for k, v in model.yaml.items() if k != "kd_yolo"}, nc=6, verbose=False)


def body_convs(model: DetectionModel) -> int:
    """Return the number of 3x3 ``Conv`` in backbone and neck, those inside other modules too."""
    layers = [layer for row in model.model[:-1] for layer in row.modules() if type(layer) is Conv]
    return sum(layer.conv.kernel_size == (3, 3) for layer in layers)


def imported_modules(pickled: bytes) -> set[str]:
    """Return every text in a pickle: module names are among them."""
    return {str(argument) for _, argument, _ in pickletools.genops(pickled) if isinstance(argument, str)}


@pytest.mark.parametrize("form", FORMS)
def test_merge__lightnet_equals_training_form(form: str) -> None:
    model = trained_lightnet(form)
    before = copy.deepcopy(model.state_dict())
    merged, report = merge(model)
    assert report.checked
    assert report.blocks == len(rep_blocks(model)) == body_convs(plain_network(model))
    assert report.worst_block in rep_blocks(model)
    assert 0 < report.relative_error <= 1e-12
    assert report.worst_block_error <= 1e-12
    images = random_images(model).float()
    with torch.no_grad():
        assert max_errors(raw_outputs(model, images), raw_outputs(merged, images))[1] <= 1e-5
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert len(rep_blocks(model)) == report.blocks


def test_merge__graph_and_size_are_those_of_the_plain_network(lightnet: DetectionModel) -> None:
    merged, _ = merge(lightnet, check=False)
    plain = plain_network(lightnet)
    assert module_types(merged) == module_types(plain)
    assert sum(p.numel() for p in merged.parameters()) == sum(p.numel() for p in plain.parameters())
    plain.load_state_dict(merged.state_dict())  # strict: stock code builds the deployed network from its YAML alone
    assert merged.yaml == plain.yaml
    for ours, stock in zip(merged.model, plain.model, strict=True):
        assert (ours.i, ours.f) == (stock.i, stock.f)
    assert "kd_yolo" in lightnet.yaml


def test_merge__of_merged_changes_nothing(lightnet: DetectionModel) -> None:
    once, _ = merge(lightnet)
    twice, report = merge(once)
    assert (report.blocks, report.max_abs_error, report.worst_block) == (0, 0.0, "")
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True))


def test_merge__equals_stock_fuse(lightnet: DetectionModel) -> None:
    model = copy.deepcopy(lightnet).double()
    images = random_images(model)
    with torch.no_grad():
        merged = merge(model)[0].fuse(verbose=False)
        fused = copy.deepcopy(model).fuse(verbose=False)
        assert not rep_blocks(merged)
        assert fused.is_fused()
        assert max_errors([fused(images)[0]], [merged(images)[0]])[1] <= 1e-10
        raw = raw_outputs(model, images)[:2]  # the one-to-many branch, which fuse() keeps unless end2end is chosen
        assert max_errors(raw, raw_outputs(fused, images))[1] <= 1e-10
    assert sum(p.numel() for p in fused.parameters()) == sum(p.numel() for p in merged.parameters())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in (*merged.modules(), *fused.modules()))


def test_merge__after_stock_fuse_still_gives_stock_classes(lightnet: DetectionModel) -> None:
    fused = copy.deepcopy(lightnet).double().fuse(verbose=False)
    images = random_images(fused)
    merged, report = merge(fused)
    assert report.relative_error <= 1e-12
    assert not rep_blocks(merged)
    with torch.no_grad():
        assert max_errors(raw_outputs(fused, images), raw_outputs(merged, images))[1] <= 1e-12


def test_merge__leaves_no_reference_to_this_package(lightnet: DetectionModel) -> None:
    merged, _ = merge(lightnet, check=False)
    pickled = pickle.dumps(merged)
    assert b"kd_yolo" not in pickled
    assert not [text for text in imported_modules(pickled) if "kd_yolo" in text]
    assert b"kd_yolo" in pickle.dumps(lightnet)  # the check can fail
    twin = pickle.loads(pickled)
    images = random_images(merged).float()
    with torch.no_grad():
        assert max_errors(raw_outputs(merged, images), raw_outputs(twin, images)) == (0.0, 0.0)


def test_merge__keeps_dtype_and_works_from_half_and_train_mode(lightnet: DetectionModel) -> None:
    training = copy.deepcopy(lightnet).train()
    merged, report = merge(training)
    assert training.training
    assert not merged.training
    assert report.relative_error <= 1e-12
    assert next(merged.parameters()).dtype == torch.float32
    half, report = merge(copy.deepcopy(lightnet).half())
    assert report.relative_error <= 1e-12
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert merged.stride.tolist() == lightnet.stride.tolist() == [8.0, 16.0, 32.0]


def test_merge__can_be_trained_on(lightnet: DetectionModel) -> None:
    merged, _ = merge(lightnet, check=False)
    merged.train().requires_grad_(True)
    outputs = raw_outputs(merged, torch.rand(2, 3, 64, 64))
    loss = torch.stack([output.square().mean() for output in outputs]).sum()
    gradients = torch.autograd.grad(loss, list(merged.parameters()))  # an unused parameter would be an error
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0


def drop_identity_bias(block: RepBlock) -> tuple[Tensor, Tensor]:
    kernel, bias = FULL(block)
    return kernel, bias + (0.1 if block.bn0 is not None else 0.0)


def drop_pointwise(block: RepBlock) -> tuple[Tensor, Tensor]:
    kernel, bias = FULL(block)
    kernel = kernel.clone()
    kernel[..., 1, 1] *= 1 + 1e-6  # so small that no detection changes
    return kernel, bias


@pytest.mark.parametrize("wrong", [drop_identity_bias, drop_pointwise])
def test_merge__refuses_a_wrong_merge(
    wrong: Callable[[RepBlock], tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained_lightnet("repvgg")
    monkeypatch.setattr(RepBlock, "_merged_double", wrong)
    with pytest.raises(ReparamError, match=r"worst block 'model\.\d+[\w.]*'"):
        merge(model)
    merge(model, check=False)


def test_merge__names_the_one_bad_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_lightnet()
    bad = list(rep_blocks(model))[4]
    channels = rep_blocks(model)[bad].conv.weight.shape
    before = rep_blocks(model)[bad].conv.weight.double()

    def wrong(block: RepBlock) -> tuple[Tensor, Tensor]:
        kernel, bias = FULL(block)
        hit = block.conv.weight.shape == channels and torch.equal(block.conv.weight, before)
        return (kernel * 1.001, bias) if hit else (kernel, bias)

    monkeypatch.setattr(RepBlock, "_merged_double", wrong)
    with pytest.raises(ReparamError, match=f"worst block '{bad}' with"):
        merge(model)


def test_merge__refuses_nan_weights(lightnet: DetectionModel) -> None:
    model = copy.deepcopy(lightnet)
    name, block = next(iter(rep_blocks(model).items()))
    block.conv.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ReparamError, match=f"relative error nan.*'{name}' with nan"):
        merge(model)


def test_merge__report_without_check(lightnet: DetectionModel) -> None:
    report = merge(lightnet, check=False)[1].as_dict()
    assert report.keys() >= {"blocks", "max_abs_error", "relative_error", "tolerance", "worst_block", "checked"}
    assert report["checked"] is False
    assert report["relative_error"] != report["relative_error"]  # NaN: nothing was measured


def test_merge__keeps_activations_shared_as_in_the_source() -> None:
    model = stock_model("yolov8n.yaml")
    reparameterize(model, "repvgg")
    activations = {id(m) for m in model.modules() if isinstance(m, nn.SiLU)}
    assert len({id(m) for m in merge(model, check=False)[0].modules() if isinstance(m, nn.SiLU)}) == len(activations)


def test_max_errors__hand_values_and_nan() -> None:
    a, b = torch.tensor([1.0, -4.0]), torch.tensor([1.0, -3.0])
    assert max_errors([a, b], [b, b]) == (1.0, 0.25)
    assert max_errors([torch.zeros(2)], [torch.zeros(2)]) == (0.0, 0.0)
    assert all(value != value for value in max_errors([a], [torch.tensor([1.0, float("nan")])]))
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        max_errors([a, b], [a])


def test_raw_outputs__both_branches_and_after_fuse(lightnet: DetectionModel) -> None:
    images = torch.rand(1, 3, 64, 64)
    shapes = [tuple(output.shape) for output in raw_outputs(lightnet, images)]
    assert shapes == [(1, 4, 84), (1, 6, 84)] * 2  # 64 + 16 + 4 anchors
    assert len(raw_outputs(copy.deepcopy(lightnet).fuse(verbose=False), images)) == 2
    assert len(raw_outputs(copy.deepcopy(lightnet).train(), images)) == 4


def test_replace_module__keeps_layer_attributes(lightnet: DetectionModel) -> None:
    model = copy.deepcopy(lightnet)
    order = [name for name, _ in model.model.named_children()]
    old = model.model[1]
    replace_module(model, "model.1", nn.Identity())
    new = model.model[1]
    assert type(new) is nn.Identity
    assert (new.i, new.f, new.type, new.np) == (old.i, old.f, old.type, old.np)
    assert [name for name, _ in model.model.named_children()] == order
    assert merging.YAML_KEY == "kd_yolo"
