"""CrossKD: crossing, what it shares with TSKD, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from taps_factory import Shape, foreground, make, random_taps, total
from torch.testing import assert_close

from kd_yolo.distill.base import Taps
from kd_yolo.distill.ops.boxes import decode_boxes
from kd_yolo.distill.ops.crossing import head_adapters, reused_predictions
from kd_yolo.errors import ConfigError, TeacherError

SHAPE = Shape()


def test_forward__equals_the_crossed_responses_of_tskd() -> None:
    student, teacher, batch = random_taps(SHAPE, 0), random_taps(SHAPE, 1), foreground(SHAPE)
    for hold in ("pre", "post"):
        alone = make("crosskd", SHAPE, hold=hold, lambda_d=1.0)(student, teacher, batch)
        args: dict[str, Any] = {"ded": False, "drd": False, "se": False, "lambda_d": 1.0, "hold": hold}
        part = make("tskd", SHAPE, **args)(student, teacher, batch)
        for mine, theirs in (("cls", "cls"), ("box", "box"), ("dfl", "dfl")):
            assert_close(alone[f"kd_cross_{mine}"], part[f"kd_crd_{theirs}"], rtol=0, atol=0)


def crossed(hold: Any, student: Taps, teacher: Taps) -> tuple[torch.Tensor, torch.Tensor]:
    assert student.head is not None
    assert teacher.head is not None
    adapters = head_adapters("crosskd", SHAPE.spec(), SHAPE.spec(), 1)
    return reused_predictions(student.head, teacher.head, adapters, hold)


def test_reused_predictions__shapes_and_one_activation_whatever_the_hold() -> None:
    student, teacher = random_taps(SHAPE, 0), random_taps(SHAPE, 1)
    assert student.head is not None
    pre, post = crossed("pre", student, teacher), crossed("post", student, teacher)
    for one, other, raw in zip(pre, post, (teacher.scores, teacher.boxes), strict=True):
        assert one.shape == raw.shape
        assert not torch.allclose(one, other)
    # A twin that activates again after matching activated maps: SiLU, unlike ReLU, is not idempotent.
    activated = replace(student.head, cls=tuple(map(student.head.activate, student.head.cls)))
    assert teacher.head is not None
    theirs = replace(teacher.head, cls=tuple(map(teacher.head.activate, teacher.head.cls)))
    twice, _ = crossed("pre", replace(student, head=activated), replace(teacher, head=theirs))
    assert not torch.allclose(twice, post[0])


def test_reused_predictions__come_from_the_teachers_layers() -> None:
    """The student's own last layers and predictions play no part."""
    student, teacher = random_taps(SHAPE, 0), random_taps(SHAPE, 1)
    other = random_taps(SHAPE, 7)
    assert student.head is not None
    assert other.head is not None
    head = replace(student.head, cls_tail=other.head.cls_tail, box_tail=other.head.box_tail)
    changed = replace(student, head=head, scores=other.scores, boxes=other.boxes)
    batch = foreground(SHAPE)
    method = make("crosskd", SHAPE)
    assert method(changed, teacher, batch) == method(student, teacher, batch)


def test_forward__literal_class_loss() -> None:
    student, teacher, batch = random_taps(SHAPE, 0), random_taps(SHAPE, 1), foreground(SHAPE)
    scores, boxes = crossed("pre", student, teacher)
    q, s = teacher.scores.sigmoid(), scores.sigmoid()
    cross_entropy = -(q * s.log() + (1 - q) * (1 - s).log())
    positives = batch["target_scores"].sum().clamp_min(1)
    losses = make("crosskd", SHAPE, lambda_c=1.0, lambda_r=1.0)(student, teacher, batch)
    assert_close(losses["kd_cross_cls"], ((s - q).abs() * cross_entropy).sum() / positives)
    mine, theirs = decode_boxes(replace(teacher, boxes=boxes), 4), decode_boxes(teacher, 4)
    from torchvision.ops import generalized_box_iou_loss

    apart = generalized_box_iou_loss(mine, theirs) * q.amax(1)
    assert_close(losses["kd_cross_box"], apart.sum() / positives, rtol=1e-4, atol=1e-6)


def test_forward__boxes_of_the_teacher_without_area_say_nothing() -> None:
    shape = Shape(reg_max=1)
    student, teacher = random_taps(shape, 0, grad=True), random_taps(shape, 1)
    inverted = replace(teacher, boxes=-teacher.boxes.abs() - 1)
    losses = make("crosskd", shape)(student, inverted, foreground(shape))
    assert losses["kd_cross_box"].item() == 0
    torch.autograd.backward(total(losses))


def test_forward__unknown_class_of_high_score_gives_no_weight() -> None:
    """The box weight is the confidence in classes both know."""
    known = torch.tensor([True, False, True])
    student, teacher = random_taps(SHAPE, 0), random_taps(SHAPE, 1)
    scores = teacher.scores.clone()
    scores[:, 1] = 50.0
    method, batch = make("crosskd", SHAPE), foreground(SHAPE)
    masked = method(student, replace(teacher, scores=scores, class_mask=known), batch)
    believed = method(student, replace(teacher, scores=scores), batch)
    assert masked["kd_cross_box"] < believed["kd_cross_box"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"lambda_c": 0.0, "lambda_r": 0.0}, "all 0"),
        ({"lambda_d": 1.0}, "lambda_d needs a teacher with box bins"),
        ({"k": 3}, "k=3"),
    ],
)
def test_init__refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make("crosskd", Shape(reg_max=1), **args)


def test_init__no_head() -> None:
    with pytest.raises(TeacherError, match="the student has no YOLO head"):
        make("crosskd", Shape(head=False), SHAPE)
    with pytest.raises(TeacherError, match="the teacher has no YOLO head"):
        make("crosskd", SHAPE)(random_taps(SHAPE, 0), replace(random_taps(SHAPE, 1), head=None), {})
