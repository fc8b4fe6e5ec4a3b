from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from anomaly_models import textures, tiny_model, train
from torch import Tensor, nn
from ultralytics.utils.torch_utils import ModelEMA

from kd_yolo.anomaly.calibration import Calibration
from kd_yolo.anomaly.guard import LEAST_RATIO, collapse_ratio
from kd_yolo.anomaly.model import AnomalyModel
from kd_yolo.anomaly.projectors import StudentProjector
from kd_yolo.errors import ConfigError, DataError, ModelError

VARIANTS: list[dict[str, Any]] = [
    {},
    {"plus": True},
    {"plus": True, "plus_targets": "top", "plus_depth": 1},
    {"same": 1.0},
    {"same": 1.0, "maps": "both"},
    {"cross": 0.0, "same": 1.0, "cbam": "none"},
    {"projector": "teacher-frozen"},
    {"projector": "teacher-anchored", "same": 1.0},
    {"cbam": "block", "hard_quantile": 0.9},
    {"student": "lightnet-n", "fuse": "product", "score": "topk"},
    {"student": "yolo11n", "taps": [8, 16]},
]


def teacher_state(model: AnomalyModel) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.teacher.state_dict().items()}


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_loss__goes_down_and_reaches_every_parameter(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    images = textures(4)
    model.fit_targets([images])
    before = teacher_state(model)
    losses = train(model, images, steps=4)
    assert losses[-1] < 0.97 * losses[0]
    assert len(model.loss_names) == len(model.levels) + 1
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name
    assert all(torch.equal(value, before[key]) for key, value in model.teacher.state_dict().items())
    with torch.no_grad():
        final = model(images)
    assert final.shape == (4, 1, 64, 64)
    assert final.dtype == torch.float32
    assert model.image_scores(final).shape == (4,)


def test_loss__names_and_items() -> None:
    model = tiny_model(plus=True, same=1.0, cross=2.0)
    assert model.loss_names == ("x_p2", "x_p3", "x_p4", "x_p5", "same")
    total, items = model.loss(textures(2))
    assert items.requires_grad is False
    assert float(total.detach()) == pytest.approx(2 * float(items[:4].sum()) + float(items[4]), rel=1e-5)


@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_loss__equals_the_equation(floor: float) -> None:
    model = tiny_model(floor=floor).eval()
    images = textures(2)
    model.fit_targets([images])
    _, items = model.loss(images)
    top = model.teacher(images)[16]
    top = (top - top.mean((0, 2, 3), keepdim=True)) / (top.var((0, 2, 3), correction=0, keepdim=True).sqrt() + 1e-6)
    x = images
    for level, (part, gate) in enumerate(zip(model.student.parts, model.student.gates, strict=True)):
        x = gate(part(x))
        own = model.projectors[f"s{4 * 2**level}"](x)
        goal = nn.functional.interpolate(top, size=own.shape[2:], mode="bilinear", align_corners=False)
        own, goal = (nn.functional.pad(part, (0, 0, 0, 0, 0, 1), value=floor**0.5) for part in (own, goal * 112**-0.5))
        expected = 1 - nn.functional.cosine_similarity(own, goal, dim=1).mean()
        assert float(items[level]) == pytest.approx(float(expected.detach()), abs=1e-4)


def test_loss__kept_targets_skip_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    images = textures(2)
    expected = model.loss(images)[0]
    targets = model.targets(images)
    assert {key: tuple(value.shape) for key, value in targets.items()} == {"s16": (2, 112, 4, 4)}
    assert not any(value.requires_grad for value in targets.values())

    def fail(*_: object) -> None:
        raise AssertionError("the teacher ran")

    monkeypatch.setattr(model.teacher, "forward", fail)
    assert float(model.loss(images, targets)[0].detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_loss__plus_targets() -> None:
    assert set(tiny_model(plus=True).targets(textures(1))) == {"s16", "s32"}
    assert set(tiny_model(plus=True, plus_targets="top").targets(textures(1))) == {"s32"}


def test_loss__float32_under_autocast() -> None:
    model = tiny_model()
    images = textures(2)
    expected = float(model.loss(images)[0].detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, items = model.loss(images)
    assert (total.dtype, items.dtype) == (torch.float32, torch.float32)
    assert float(total.detach()) == pytest.approx(expected, rel=0.02)


def test_teacher__cannot_be_trained_by_ultralytics_habits() -> None:
    model = tiny_model()
    images = textures(4)
    for parameter in model.parameters():
        parameter.requires_grad = True  # what the stock trainer does to everything outside its freeze list
    before = teacher_state(model)
    ema = ModelEMA(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    model.train()
    for _ in range(2):
        model.loss(images)[0].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        ema.update(model)
    assert not any(name.startswith("teacher.") for name, _ in model.named_parameters())
    for state in (model.teacher.state_dict(), ema.ema.teacher.state_dict()):
        assert len(state) == len(before)
        assert all(torch.equal(value, before[key]) for key, value in state.items())
    assert not any(module.training for module in model.teacher.modules())


def test_teacher__copies_are_whole() -> None:
    model = tiny_model().eval()
    twin = copy.deepcopy(model)
    images = textures(1)
    expected = model(images)
    with torch.no_grad():
        for value in model.teacher.state_dict().values():
            value.zero_()
    assert torch.equal(twin(images), expected)


def test_fit_targets__standardises() -> None:
    model = tiny_model(same=1.0)
    images = textures(6)
    model.fit_targets(images.split(2))  # type: ignore[no-untyped-call]
    for values in model.targets(images).values():
        torch.testing.assert_close(values.mean((0, 2, 3)), torch.zeros(values.shape[1]), atol=1e-4, rtol=0)
        torch.testing.assert_close(values.std((0, 2, 3), correction=0), torch.ones(values.shape[1]), atol=1e-3, rtol=0)


def test_forward__refuses() -> None:
    model = tiny_model()
    with pytest.raises(ModelError, match="train mode"):
        model.train()(textures(1))
    with pytest.raises(ModelError, match="multiples of 32"):
        model.eval()(torch.rand(1, 3, 64, 80))
    with pytest.raises(ModelError, match="multiples of 32"):
        model.loss(torch.rand(1, 3, 64, 80))


def test_forward__each_image_on_its_own() -> None:
    model = tiny_model(plus=True).eval()
    images = textures(3, 96)[:, :, :64]
    with torch.no_grad():
        together = model(images)
        torch.testing.assert_close(together, torch.cat([model(image[None]) for image in images]), atol=1e-5, rtol=1e-4)
    assert together.shape == (3, 1, 64, 96)


def test_calibrate__quantiles_and_thresholds() -> None:
    model = tiny_model(threshold_margin=0.0).train()
    images = textures(8)
    calibration = model.calibrate(images.split(3))  # type: ignore[no-untyped-call]
    assert model.training  # as it was
    assert model.calibration is calibration
    model.eval()
    with torch.no_grad():
        levels = model.level_maps(images)
        final = model(images)
    for level, low, high in zip(levels, calibration.level_low, calibration.level_high, strict=True):
        expected = torch.quantile(level.flatten(), torch.tensor([0.9, 0.995])).tolist()
        assert [low, high] == pytest.approx(expected, rel=1e-3)
    scores = model.image_scores(final)
    assert calibration.threshold_image == pytest.approx(float(torch.quantile(scores, 0.995)), abs=1e-5)
    assert calibration.threshold_pixel == pytest.approx(float(torch.quantile(final.flatten(), 0.995)), abs=1e-4)
    assert (calibration.score_min, calibration.score_max) == pytest.approx((float(scores.min()), float(scores.max())))


def test_calibrate__refuses() -> None:
    model = tiny_model()
    with pytest.raises(DataError, match="no held-out normal images"):
        model.calibrate([])
    with pytest.raises(DataError, match="no normal images"):
        model.fit_targets([])
    with pytest.raises(DataError, match="not finite"):
        model.calibrate([torch.full((1, 3, 64, 64), float("nan"))])


def test_apply_calibration__of_another_number_of_levels() -> None:
    with pytest.raises(ModelError, match="has 1 levels, the model 3"):
        tiny_model().apply_calibration(Calibration([0.0], [1.0], 0.5, 0.5, 0.0, 1.0))


def test_apply_calibration__changes_the_map() -> None:
    model = tiny_model().eval()
    images = textures(2)
    with torch.no_grad():
        before = model(images)
        model.apply_calibration(Calibration([0.1] * 3, [0.3] * 3, 0.5, 0.5, 0.0, 1.0))
        torch.testing.assert_close(model(images), 0.1 * (before - 0.1) / 0.2)  # one line for all levels, blur keeps it


@pytest.mark.parametrize("projector", ["student", "teacher-frozen"])
def test_collapse_ratio__of_the_projectors_that_can_be_chosen(projector: str) -> None:
    images = textures(8)
    model = tiny_model(projector=projector, taps=[16])
    model.fit_targets([images])
    losses = train(model, images, steps=20)
    assert losses[-1] < 0.8 * losses[0]
    assert collapse_ratio(model, images) > 2 * LEAST_RATIO


class BareTeacherSide(AnomalyModel):
    """Wrong on purpose: trained projectors on the teacher's side, without an anchor; no spec can ask for this."""

    def cross_pair(self, stride: int, feature: Tensor, goals: Any) -> tuple[Tensor, Tensor]:
        return feature * feature.shape[1] ** -0.5, self.projectors[f"s{stride}"](goals["s16"])


@torch.no_grad()
def answer_constantly(model: AnomalyModel) -> None:
    """Make the last trained layer of every projector, and the student where it has none, give one direction only."""
    for projector in model.projectors.values():
        if isinstance(projector, StudentProjector):
            projector.conv2.weight.zero_()
            projector.conv2.bias.fill_(1.0)  # type: ignore[union-attr]
    if not (model.spec.projector == "student" and type(model) is AnomalyModel):
        for gate in model.student.gates:
            gate.register_forward_hook(lambda _module, _inputs, output: torch.ones_like(output))


def test_collapse__is_free_only_on_the_trained_teachers_side() -> None:
    images = textures(8)
    found: dict[str, float] = {}
    for name in ("student", "teacher-frozen", "bare"):
        model = tiny_model(projector="student" if name == "bare" else name)
        if name == "bare":
            model.__class__ = BareTeacherSide
            for stride in model.levels:
                model.projectors[f"s{stride}"] = StudentProjector(112, model.student.channels[stride])
        model.fit_targets([images])
        answer_constantly(model.eval())
        found[name] = float(model.loss(images)[1][:-1].mean())
        assert collapse_ratio(model, images) < LEAST_RATIO
    assert found["bare"] < 1e-5  # the loss is at its minimum, and no image can be told from another
    # standardised targets point everywhere, so that one direction is right on average nowhere: 1 - cos is about 1
    assert found["student"] > 0.8
    assert found["teacher-frozen"] > 0.8


def test_collapse_ratio__refuses() -> None:
    with pytest.raises(ConfigError, match="two or more images"):
        collapse_ratio(tiny_model(), textures(1))
    with pytest.raises(ConfigError, match="cross > 0"):
        collapse_ratio(tiny_model(cross=0.0, same=1.0), textures(2))
