"""Classifiers: built, re-parameterized, warm-started, wrapped beside a teacher, loaded, merged."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from class_factory import NAMES, TINY_YAML, save_classifier, tiny_classifier
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.tasks import ClassificationModel

from kd_yolo.classify.checkpoints import load_classifier, load_source
from kd_yolo.classify.deploy import deploy_classifier, logits, merge_classifier
from kd_yolo.classify.methods import build_method
from kd_yolo.classify.model import (
    KDClassifier,
    check_same_order,
    prepare_teacher,
    tap_channels,
    tapped,
    wrap_classifier,
)
from kd_yolo.classify.settings import ClassifyConfig, resolve_method, split_classify_keys
from kd_yolo.classify.student import build_classifier, model_dictionary, resolve_classifier, start_classifier
from kd_yolo.config import Recipe
from kd_yolo.errors import CheckpointError, ConfigError, ModelError, ReparamError, TeacherError
from kd_yolo.files import sha256
from kd_yolo.nn.blocks import RepBlock
from kd_yolo.nn.lightnet import build_model
from kd_yolo.nn.merging import rep_blocks
from kd_yolo.resources import builtin_names

PLAIN_YAML = {key: value for key, value in TINY_YAML.items() if key != "kd_yolo"}


def images(batch: int = 4, side: int = 32) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def recipe_for(path: Path, method: str = "hflkd", **args: Any) -> Recipe:
    return Recipe(teacher=str(path), teacher_sha256=sha256(path), method=method, args=args)


LAYOUTS = Path(__file__).resolve().parents[3] / "benchmarks" / "layouts"


# ---- structure and warm start ----------------------------------------


@pytest.mark.parametrize(("name", "least"), [("lightnet-n-cls", 9), ("lightnet-s-cls", 12)])
def test_lightnet__backbone_is_the_detectors(name: str, least: int) -> None:
    model = build_classifier(model_dictionary(name), 6)
    detector = build_model(str(LAYOUTS / f"{name.removesuffix('-cls')}-shallow.yaml"), nc=6)
    mine, theirs = model.model[:-1].state_dict(), detector.model[: len(model.model) - 1].state_dict()
    assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in theirs.items()}
    assert len(rep_blocks(model)) >= least
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    assert name not in builtin_names("models")  # the listing of detectors stays as it is
    again = build_classifier(model.yaml, 6)
    again.load_state_dict(model.state_dict())


def test_start_classifier__inherits_a_detectors_backbone_and_its_norm_settings() -> None:
    detector = build_model("yolo26n.yaml", nc=6)
    model = start_classifier(model_dictionary("lightnet-n-cls"), detector, NAMES)
    torch.testing.assert_close(model.model[0].conv.weight, detector.model[0].conv.weight)
    block = model.model[0]
    assert isinstance(block, RepBlock)
    x = images()
    block.eval()
    detector.eval()
    torch.testing.assert_close(block(x), detector.model[0](x), atol=1e-5, rtol=1e-4)
    stock = start_classifier(model_dictionary("yolo26n-cls.yaml"), detector, NAMES).eval()
    assert stock.model[0].bn.eps == 1e-3
    torch.testing.assert_close(stock.model[:2](x), detector.model[:2](x))


def test_start_classifier__matches_classes_by_name() -> None:
    source = tiny_classifier(names={0: "plain", 1: "Dots", 2: "other"})
    model = start_classifier(TINY_YAML, source, NAMES).eval()
    target, old = model.model[-1].linear, source.model[-1].linear
    torch.testing.assert_close(target.weight[0], old.weight[1])  # dots
    torch.testing.assert_close(target.weight[2], old.weight[0])  # plain
    assert not torch.equal(target.weight[1], old.weight[2])  # lines is new
    x = images()
    torch.testing.assert_close(logits(model, x)[:, [0, 2]], logits(source, x)[:, [1, 0]])


def test_start_classifier__placeholder_names_match_nothing() -> None:
    source = tiny_classifier(names={0: "0", 1: "1", 2: "2"})
    model = start_classifier(TINY_YAML, source, {0: "0", 1: "x", 2: "2"})
    assert not torch.equal(model.model[-1].linear.weight[0], source.model[-1].linear.weight[0])


@pytest.mark.parametrize("form", ["qarep", "repvgg", "multi"])
def test_start_classifier__reparameterized_starts_at_the_pretrained_function(form: str, tmp_path: Path) -> None:
    source = tiny_classifier(cfg=PLAIN_YAML)
    path = save_classifier(source, tmp_path / "best.pt")
    config = ClassifyConfig(data="x", model=str(path), reparam=form)  # type: ignore[arg-type]
    spec = resolve_classifier(config)
    model = start_classifier(spec.cfg, source, NAMES).eval()
    assert len(rep_blocks(model)) == 3
    torch.testing.assert_close(logits(model, images()), logits(source, images()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("lightnet-x-cls", "did you mean 'lightnet-"),
        ("yolo26n", "yolo26n-cls.yaml"),
        ("lightnet-n", "did you mean 'lightnet-n-cls'"),
        ("none.yaml", "not found"),
    ],
)
def test_model_dictionary__names_the_nearest(model: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        model_dictionary(model)


def test_build_classifier__refuses_a_detector_and_a_broken_yaml() -> None:
    with pytest.raises(ModelError, match="not in a Classify head"):
        build_classifier(model_dictionary("yolo26n.yaml"), 3)
    with pytest.raises(ModelError, match="'head' is missing"):
        build_classifier({"nc": 3, "backbone": []})


# ---- checkpoints ----------------------------------------


def test_load_classifier__refuses_detectors_and_broken_weights(tmp_path: Path) -> None:
    detector = build_model("lightnet-n", nc=3)
    torch.save({"epoch": -1, "ema": None, "model": detector, "train_args": {}}, tmp_path / "det.pt")
    with pytest.raises(CheckpointError, match="a classifier with a Classify head is needed"):
        load_classifier(tmp_path / "det.pt")
    assert type(load_source(tmp_path / "det.pt")).__name__ == "DetectionModel"
    model = tiny_classifier()
    with torch.no_grad():
        model.model[-1].linear.bias.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        load_classifier(save_classifier(model, tmp_path / "nan.pt"))
    with pytest.raises(CheckpointError, match="no such file"):
        load_classifier(tmp_path / "gone.pt")


# ---- wrapper ----------------------------------------


def wrapped(tmp_path: Path, method: str = "hflkd", **args: Any) -> KDClassifier:
    path = save_classifier(tiny_classifier(seed=1), tmp_path / "teacher.pt")
    student = tiny_classifier(seed=2).train().requires_grad_(True)
    return wrap_classifier(student, recipe_for(path, method, **args), NAMES)


def batch() -> dict[str, torch.Tensor]:
    return {"img": images(6), "cls": torch.tensor([0, 1, 2, 0, 1, 2])}


@pytest.mark.parametrize("mode", ["fixed", "frozen", "regularised", "uncertainty", "bilevel"])
def test_kd_classifier__teacher_stays_bit_identical_and_hidden(tmp_path: Path, mode: str) -> None:
    model = wrapped(tmp_path, weighting=mode).train()
    teacher = model.teacher_model
    assert teacher is not None
    before = copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        loss, items = model(batch())
        torch.autograd.backward(loss)
        optimizer.step()
    assert set(items) == {"loss", "hflkd_feat", "hflkd_rel", "hflkd_irr"}
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    assert not any("teacher" in key for key in model.state_dict())
    names = {id(p) for p in model.parameters()}
    assert not names & {id(p) for p in teacher.parameters()}


def test_kd_classifier__validation_is_plain_cross_entropy_with_zero_extras(tmp_path: Path) -> None:
    model = wrapped(tmp_path).eval()
    preds = model(batch()["img"])
    loss, items = model.loss(batch(), preds)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(preds[1], batch()["cls"]))
    assert {name: float(value) for name, value in items.items() if name != "loss"} == dict.fromkeys(
        ("hflkd_feat", "hflkd_rel", "hflkd_irr"), 0.0
    )


def test_kd_classifier__copies_and_pickles_carry_no_teacher(tmp_path: Path) -> None:
    model = wrapped(tmp_path).train()
    model(batch())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.teacher_model is None
        assert len(pickle.dumps(twin)) < len(pickle.dumps(model)) + 1000
        twin.eval()(images())
    assert not any(module._forward_hooks for module in model.modules())


def test_kd_classifier__factor_scales_the_terms_and_zero_skips_the_teacher(tmp_path: Path) -> None:
    model = wrapped(tmp_path, "kd").train()
    teacher = model.teacher_model
    assert teacher is not None
    full, items = model.loss(batch())
    model.factor = 0.5
    half, half_items = model.loss(batch())
    torch.testing.assert_close(half_items["kd_kl"], items["kd_kl"] / 2)
    torch.testing.assert_close(full - half, items["kd_kl"] / 2)
    model.factor = 0.0
    calls: list[int] = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    model.loss(batch())
    assert calls == []


def test_wrap_classifier__refuses_a_changed_file_and_other_classes(tmp_path: Path) -> None:
    path = save_classifier(tiny_classifier(seed=1), tmp_path / "teacher.pt")
    recipe = recipe_for(path)
    with pytest.raises(TeacherError, match="in another order \\(class 0: dots, the data's lines\\)"):
        wrap_classifier(tiny_classifier(), recipe, {0: "lines", 1: "dots", 2: "plain"})
    save_classifier(tiny_classifier(seed=3), path)
    with pytest.raises(TeacherError, match="changed since this run began"):
        wrap_classifier(tiny_classifier(), recipe, NAMES)


def test_check_same_order__names_the_difference() -> None:
    check_same_order({0: "a", 1: "b"}, {0: "a", 1: "b"}, "t.pt")
    with pytest.raises(TeacherError, match="'c' is not among the teacher's"):
        check_same_order({0: "a", 1: "b"}, {0: "a", 1: "b", 2: "c"}, "t.pt")
    with pytest.raises(TeacherError, match="'b' is not among the data's"):
        check_same_order({0: "a", 1: "b", 2: "c"}, {0: "a", 1: "c"}, "t.pt")


def test_tapped__head_and_backbone_maps() -> None:
    model = tiny_classifier()
    head, backbone = (tapped(model, images(), tap) for tap in ("head", "backbone"))
    assert head.feature.shape == (4, 1280, 8, 8)
    assert backbone.feature.shape == (4, 16, 8, 8)
    assert (tap_channels(model, "head"), tap_channels(model, "backbone")) == (1280, 16)
    torch.testing.assert_close(head.logits, model(images())[1])
    torch.testing.assert_close(model.model[-1].linear(head.feature.mean((2, 3))), head.logits)


def test_prepare_teacher__computes_the_same_with_fewer_operations() -> None:
    model = tiny_classifier()
    teacher = prepare_teacher(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in teacher.modules())
    torch.testing.assert_close(logits(teacher, images()), logits(model, images()), atol=1e-5, rtol=1e-4)
    assert len(rep_blocks(model)) == 3  # the source stays


# ---- deploy ----------------------------------------


def test_deploy_classifier__stock_classes_and_equal_outputs(tmp_path: Path) -> None:
    model = tiny_classifier()
    report = deploy_classifier(save_classifier(model, tmp_path / "best.pt"))
    assert report.merge.blocks == 3
    assert report.merge.relative_error < 1e-9
    assert report.probability_error < 1e-5
    loaded, checkpoint = load_classifier(report.path)
    assert type(loaded) is ClassificationModel
    assert not rep_blocks(loaded)
    assert checkpoint["kd_yolo"]["task"] == "classify"
    torch.testing.assert_close(logits(loaded, images()), logits(model, images()), atol=1e-5, rtol=1e-4)
    yolo = YOLO(str(report.path))
    assert yolo.task == "classify"
    assert yolo.names == NAMES


def test_merge_classifier__catches_a_wrong_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    original = RepBlock._merged_double

    def wrong(self: RepBlock) -> tuple[torch.Tensor, torch.Tensor]:
        kernel, bias = original(self)
        return kernel * (1 + 1e-6), bias

    merge_classifier(tiny_classifier())
    monkeypatch.setattr(RepBlock, "_merged_double", wrong)
    with pytest.raises(ReparamError, match="differs from the trained one"):
        merge_classifier(tiny_classifier())


def test_deploy_classifier__refuses_its_own_source(tmp_path: Path) -> None:
    path = save_classifier(tiny_classifier(), tmp_path / "best.pt")
    with pytest.raises(ConfigError, match="is the trained checkpoint itself"):
        deploy_classifier(path, out=path)
    with pytest.raises(ConfigError, match=r"ends in \.pt"):
        deploy_classifier(path, out=tmp_path / "best.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt"]


# ---- keys ----------------------------------------


def test_split_classify_keys__sorts_them() -> None:
    config, stock, groups = split_classify_keys(
        {"task": "classify", "data": "d", "epochs": 3, "kd.tau": 2.0, "schedule.warmup": 0.2, "teacher": None}
    )
    assert (config.data, config.teacher, config.method_name) == ("d", "none", "none")
    assert stock == {"epochs": 3}
    assert groups == {"kd": {"tau": 2.0}, "schedule": {"warmup": 0.2}}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"epoch": 3}, "did you mean 'epochs'"),
        ({"task": "detect"}, "give task=classify"),
        ({"distill_model": "x"}, "use teacher=FILE"),
        ({"generations": 2}, "unknown key 'generations'"),
        ({"trust": "yes"}, "trust='yes'"),
    ],
)
def test_split_classify_keys__refuses(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        split_classify_keys({"data": "d", **keys})
    with pytest.raises(ConfigError, match="missing key 'data'"):
        split_classify_keys({})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"method": "hflkd"}, "needs a teacher"),
        ({"method": "none", "teacher": "t.pt"}, "teacher=t.pt would have no effect"),
        ({"method": "none", "chain": "a,b,c"}, "chain= would have no effect"),
        ({"kd.tau": 2.0}, r"kd\.tau has no effect"),
        ({"method": "hflk", "teacher": "t.pt"}, "did you mean 'hflkd'"),
        ({"method": "cwd", "teacher": "t.pt"}, "built-in: dkd, hflkd, kd, none"),
        ({"method": "kd", "teacher": "t.pt", "kd.alpha": 1.0}, "no argument 'alpha'"),
        ({"method": "kd", "teacher": "t.pt", "schedule.off_last": 100}, "leaves no epoch"),
    ],
)
def test_resolve_method__never_falls_back_silently(keys: dict[str, Any], said: str) -> None:
    config, stock, groups = split_classify_keys({"data": "d", **keys})
    with pytest.raises(ConfigError, match=said):
        resolve_method(config, groups, stock)


@pytest.mark.parametrize("name", builtin_names("methods/classify"))
def test_method_files__hold_every_argument(name: str) -> None:
    teacher = "none" if name == "none" else "t.pt"
    config, stock, groups = split_classify_keys({"data": "d", "teacher": teacher, "method": name})
    method = resolve_method(config, groups, stock)
    if name != "none":
        assert set(method["args"]) == set(type(build_method(name, method["args"], 8, 8, 3).args).model_fields)
        assert build_method(name, method["args"], 8, 8, 3).args == build_method(name, {}, 8, 8, 3).args
