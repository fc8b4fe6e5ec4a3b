from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from grow_factory import difference, mini_model, tiny_model
from nn_factory import stock_model
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.checkpoints import load_model
from kd_yolo.errors import ModelError
from kd_yolo.nn import grow as growing
from kd_yolo.nn.grow import GrowReport, grow
from kd_yolo.nn.lightnet import build_lightnet, build_model
from kd_yolo.nn.merging import raw_outputs
from kd_yolo.nn.surgery import reparameterize


@pytest.fixture(scope="module")
def tiny() -> DetectionModel:
    return tiny_model("yolo26n.yaml")


@pytest.fixture(scope="module")
def mini() -> DetectionModel:
    return mini_model()


@pytest.fixture(scope="module")
def grown(tiny: DetectionModel) -> tuple[DetectionModel, GrowReport]:
    return grow(tiny, "n")


@pytest.mark.parametrize("name", ["yolo26n.yaml", "yolo11n.yaml", "yolov8n.yaml"])
def test_grow__stock_nano_computes_the_same_at_s(name: str) -> None:
    model = stock_model(name)
    large, report = grow(model)
    stock = build_model(name.replace("n.yaml", "s.yaml"), nc=6)
    assert {key: value.shape for key, value in large.state_dict().items()} == {
        key: value.shape for key, value in stock.state_dict().items()
    }
    assert difference(model, large) < 1e-12
    assert difference(model, large, dtype=torch.float32) < 1e-5
    assert max(report.max_relative_difference, report.max_feature_difference) < 1e-12
    assert (report.source_scale, report.scale) == ("n", "s")
    assert report.parameters == sum(parameter.numel() for parameter in stock.parameters())
    assert 0.5 < report.share < 0.52


def test_grow__train_mode_computes_the_same(tiny: DetectionModel, grown: tuple[DetectionModel, GrowReport]) -> None:
    # the batch statistics of a repetition are those of what it repeats
    assert difference(tiny, grown[0], train=True) < 1e-12


def test_grow__deeper_rows_start_as_the_identity_or_unread() -> None:
    # twice the depth in C3k2 with Bottlenecks, C3k2 with C3k, and C2PSA; twice the width and heads
    model = tiny_model("yolo11n.yaml", deep=[1.0, 0.25, 1024])
    large, report = grow(model, "deep")
    assert max(report.max_relative_difference, report.max_feature_difference) < 1e-12
    assert difference(model, large, train=True) < 1e-12
    rows: Any = large.model
    assert [len(rows[index].m) for index in (2, 6, 10)] == [2, 2, 2]
    assert not rows[2].m[1].cv2.bn.weight.any()
    assert not rows[10].m[1].attn.proj.bn.weight.any()
    assert not rows[10].m[1].ffn[1].bn.bias.any()
    feature = torch.randn(1, rows[2].c, 4, 4)
    assert torch.equal(rows[2].m[1](feature), feature)
    last = rows[6].c  # C3k ends in an activation: it has features, but nobody reads them
    assert rows[6].m[1].cv3.bn.weight.all()
    assert not rows[6].cv2.conv.weight[:, -last:].any()
    assert rows[6].cv2.conv.weight[:, -2 * last : -last].any()


@pytest.mark.parametrize(
    ("name", "scale"), [("yolov8n.yaml", [0.67, 0.1875, 768]), ("yolov5n.yaml", [0.33, 0.25, 1024])]
)
def test_grow__other_families_and_scales(name: str, scale: list[float]) -> None:
    model = tiny_model(name, nc=1, wide=scale)
    large, report = grow(model, "wide")
    assert max(report.max_relative_difference, report.max_feature_difference) < 1e-12
    assert difference(model, large) < 1e-12


def test_grow__all_parameters_learn(grown: tuple[DetectionModel, GrowReport]) -> None:
    large = copy.deepcopy(grown[0]).train()
    assert all(parameter.requires_grad for parameter in large.parameters())
    squares = [value.square().mean() for value in raw_outputs(large, torch.rand(2, 3, 64, 64))]
    torch.autograd.backward(squares)
    silent = {}
    for name, parameter in large.named_parameters():
        assert parameter.grad is not None, name
        if parameter.ndim == 4:
            silent[name] = int((parameter.grad.flatten(1).abs().sum(1) == 0).sum())
    assert not any(silent.values()), silent
    # the filters of row 0 repeat each other, but not what they learn
    first: Any = large.model[0].conv.weight
    half = len(first) // 2
    assert torch.equal(first[:half], first[half:])
    assert first.grad is not None
    cosine = torch.cosine_similarity(first.grad[:half].flatten(1), first.grad[half:].flatten(1))
    assert float(cosine.max()) < 0.999


def test_grow__unread_features_learn_after_one_step() -> None:
    model = tiny_model("yolov8n.yaml", deep=[0.67, 0.125, 1024])
    large, _ = grow(model, "deep")
    large.train()
    optimizer = torch.optim.SGD(large.parameters(), lr=0.01)
    images = torch.rand(2, 3, 64, 64)
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        torch.autograd.backward([value.square().mean() for value in raw_outputs(large, images)])
        rows: Any = large.model
        found.append(float(rows[15].m[1].cv1.conv.weight.grad.abs().sum()))  # of the neck: no shortcut
        optimizer.step()
    assert found[0] == 0.0
    assert found[1] > 0.0


def test_grow__leaves_source_and_random_state_alone(mini: DetectionModel) -> None:
    before, yaml = copy.deepcopy(mini.state_dict()), copy.deepcopy(mini.yaml)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, _ = grow(mini, "n", seed=1)
    assert torch.equal(torch.rand(3), expected)
    second, third = grow(mini, "n", seed=1)[0], grow(mini, "n", seed=2)[0]
    assert mini.yaml == yaml
    assert all(torch.equal(value, before[name]) for name, value in mini.state_dict().items())
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert not torch.equal(first.state_dict()["model.1.conv.weight"], third.state_dict()["model.1.conv.weight"])


def test_grow__keeps_dtype_mode_names_and_head(mini: DetectionModel) -> None:
    source = copy.deepcopy(mini).to(torch.bfloat16).train()
    source.end2end = False
    large, report = grow(source, "n")
    assert report.max_relative_difference < 1e-12
    assert {parameter.dtype for parameter in large.parameters()} == {torch.bfloat16}
    assert large.training
    assert large.names == mini.names
    assert large.names is not source.names
    assert large.end2end is False
    assert large.yaml["scale"] == "n"
    assert len(report.summary().splitlines()) == 1


def test_grow__renames_the_yaml_file() -> None:
    cfg = growing._scaled({"scales": {"n": [], "s": []}, "yaml_file": "cfg/yolo26n.yaml"}, "n", "s")
    assert cfg["yaml_file"] == "cfg/yolo26s.yaml"
    own = growing._scaled({"scales": {"n": [], "s": []}, "yaml_file": "mine.yaml"}, "n", "s")
    assert own["yaml_file"] == "mine.yaml"


@pytest.mark.parametrize("name", ["yolo26n", "yolo11n", "yolov8n"])
def test_grow__pretrained_nano(name: str, shared: Path) -> None:
    file = shared / "weights" / f"{name}-coco-rebuilt.pt"
    if not file.is_file():
        pytest.skip(f"no pretrained weights at {file}")
    model, _ = load_model(file)
    large, report = grow(model, "s")
    assert max(report.max_relative_difference, report.max_feature_difference) < 1e-11
    assert difference(model, large, dtype=torch.float32) < 1e-5
    assert large.names[0] == "person"


# What cannot be grown says so.


@pytest.mark.parametrize(
    ("name", "scale", "message"),
    [
        ("yolo26n.yaml", "n", "scale=n: is this model's scale already"),
        ("yolo26n.yaml", "xs", "scale=xs: is not one of n, s, m, l, x; did you mean"),
        ("yolov8s.yaml", "n", "scale=n: is not larger than this model's scale s"),
        ("yolo26n.yaml", "m", r"scale=m: row 2 \(C3k2\) has a C3k where this model has a Bottleneck"),
        ("yolo12n.yaml", "s", r"scale=s: row 6 \(A2C2f\) holds A2C2f, which cannot be grown \(known: Attention"),
        ("yolov10n.yaml", "s", "a v10Detect head; only a detector with a Detect head"),
    ],
)
def test_grow__refuses_scales_and_structures(name: str, scale: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        grow(stock_model(name), scale)
    assert len(str(error.value).splitlines()) == 1


def test_grow__refuses_chains_that_cannot_start_as_the_identity() -> None:
    with pytest.raises(ModelError, match=r"row 13 \(C3\) has one more Bottleneck in a chain there"):
        grow(tiny_model("yolov5n.yaml", deep=[0.67, 0.125, 1024]), "deep")


def test_grow__refuses_heads_of_another_width() -> None:
    with pytest.raises(ModelError, match=r"row 10 \(C2PSA\) has head_dim=96 there, this model 64"):
        grow(tiny_model("yolo11n.yaml", odd=[0.5, 0.1875, 1024]), "odd")


def test_grow__refuses_fewer_channels_in_any_row() -> None:
    with pytest.raises(ModelError, match="a network can only grow"):
        grow(tiny_model("yolov8n.yaml", odd=[1.0, 0.5, 128]), "odd")


def test_grow__refuses_fused_merged_and_foreign(mini: DetectionModel) -> None:
    with pytest.raises(ModelError, match="is fused; give the training checkpoint"):
        grow(copy.deepcopy(mini).fuse(verbose=False), "n")
    student = copy.deepcopy(mini)
    reparameterize(student)
    with pytest.raises(ModelError, match="re-parameterized; run kd-yolo deploy first"):
        grow(student, "n")
    with pytest.raises(ModelError, match="re-parameterized"):
        grow(build_lightnet("lightnet-n", 6), "s")
    with pytest.raises(ModelError, match="YAML has no scales"):
        grow(build_model({key: value for key, value in mini.yaml.items() if key != "scales"}), "n")
    lost: Any = copy.deepcopy(mini)
    lost.model[-1].one2one_cv2 = None
    with pytest.raises(ModelError, match="has lost its branch one2one_cv2"):
        grow(lost, "n")
