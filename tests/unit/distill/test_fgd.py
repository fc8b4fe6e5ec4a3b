"""FGD: its terms one by one, against literal forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from taps_factory import Shape, foreground, make, random_taps, total
from torch.testing import assert_close

from kd_yolo.distill.methods.fgd import attention_loss
from kd_yolo.distill.ops.attention import channel_attention, spatial_attention
from kd_yolo.distill.ops.context import context_block, global_context
from kd_yolo.distill.ops.masks import decoupled_masks
from kd_yolo.errors import ConfigError

SHAPE = Shape()
ONE_LEVEL = Shape(sizes=((5, 4),), channels=(6,), strides=(8,))
OFF: dict[str, Any] = {"alpha": 0.0, "beta": 0.0, "gamma": 0.0, "global_weight": 0.0}
TERMS = {"alpha": "kd_fgd_fg", "beta": "kd_fgd_bg", "gamma": "kd_fgd_att", "global_weight": "kd_fgd_global"}


@pytest.mark.parametrize("key", TERMS)
def test_terms__each_alone_and_proportional_to_its_factor(key: str) -> None:
    student, teacher = random_taps(SHAPE, 0), random_taps(SHAPE, 1)
    one, three = (make("fgd", SHAPE, **{**OFF, key: f})(student, teacher, foreground(SHAPE)) for f in (1e-3, 3e-3))
    assert list(one) == [TERMS[key]]
    assert one[TERMS[key]].item() > 0
    assert_close(three[TERMS[key]], 3 * one[TERMS[key]])


def test_init__nothing_to_distil() -> None:
    with pytest.raises(ConfigError, match="all 0"):
        make("fgd", SHAPE, **OFF)


def test_focal__literal_sum_with_the_teachers_attention_alone() -> None:
    student, teacher, batch = random_taps(ONE_LEVEL, 0), random_taps(ONE_LEVEL, 1), foreground(ONE_LEVEL)
    mine, theirs = student.neck[0], teacher.neck[0]
    masks = decoupled_masks(batch["bboxes"], batch["batch_idx"].long(), 2, (5, 4))

    def literal(attended: torch.Tensor) -> list[torch.Tensor]:
        weight = spatial_attention(attended, 0.5)[:, None] * channel_attention(attended, 0.5)[:, :, None, None]
        return [256 / 6 * (m[:, None] * weight * (mine - theirs) ** 2).sum() / 2 for m in masks]

    args: dict[str, Any] = {**OFF, "alpha": 1.0, "beta": 1.0, "attention": "raw"}
    losses = list(make("fgd", ONE_LEVEL, **args)(student, teacher, batch).values())
    for value, expected, wrong in zip(losses, literal(theirs), literal(mine), strict=True):
        assert_close(value, expected)
        assert not torch.allclose(value, wrong, rtol=1e-3)


def test_attention_loss__by_hand() -> None:
    """Two cells, one channel: |F| = (0, tau ln 3) gives attention 2 (1/4, 3/4); flat gives (1, 1). The L1 is 1/2 + 1/2.

    The channel attention of a single channel is 1 on both sides.
    """
    teacher = torch.tensor([0.0, 0.5 * 1.0986123]).reshape(1, 1, 1, 2)
    assert_close(attention_loss(torch.ones(1, 1, 1, 2), teacher, 0.5), torch.tensor(1.0))
    assert_close(attention_loss(teacher, teacher, 0.5), torch.tensor(0.0))


def test_attention_loss__moves_the_student_only() -> None:
    student, teacher = (torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    student.requires_grad_()
    torch.autograd.backward(attention_loss(student, teacher, 0.5))
    assert student.grad is not None
    assert float(student.grad.abs().max()) > 0


def test_global_context__starts_as_the_identity_and_then_adds_one_vector_an_image() -> None:
    torch.manual_seed(0)
    block, feature = context_block(6), torch.randn(2, 6, 5, 4)
    assert torch.equal(global_context(feature, block), feature)
    torch.nn.init.normal_(block["transform"][-1].weight)  # type: ignore[index]
    added = global_context(feature, block) - feature
    assert float(added.detach().abs().max()) > 0.1
    assert_close(added, added[:, :, :1, :1].expand_as(added), rtol=1e-5, atol=1e-5)


def test_global_context__pools_by_the_mask() -> None:
    """A mask that looks at one cell alone gives that cell's features to the transform."""
    block = context_block(3)
    block["mask"].weight.data = torch.tensor([100.0, 0.0, 0.0]).reshape(1, 3, 1, 1)
    feature = torch.zeros(1, 3, 2, 2)
    feature[0, :, 1, 0] = torch.tensor([5.0, -1.0, 2.0])
    seen: list[torch.Tensor] = []
    block["transform"].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    global_context(feature, block)
    assert_close(seen[0], torch.tensor([[5.0, -1.0, 2.0]]))


def test_contexts__one_of_the_student_and_one_of_the_teacher_are_trained() -> None:
    other = Shape(channels=(7, 5))
    method = make("fgd", SHAPE, other)
    student, teacher = random_taps(SHAPE, 0, grad=True), random_taps(other, 1)
    torch.autograd.backward(total(method(student, teacher, foreground(SHAPE))))
    moved = {name for name, p in method.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0}
    for side in ("student", "teacher"):  # the last layer starts at 0, so it moves first
        for level in (0, 1):
            assert f"contexts.{side}.{level}.transform.3.weight" in moved
    assert {"adapters.0.weight", "adapters.1.weight"} <= moved


@pytest.mark.parametrize("boxes", [0, 1])
def test_forward__without_boxes_all_is_background(boxes: int) -> None:
    batch: dict[str, Any] = {"bboxes": torch.full((boxes, 4), 0.4), "batch_idx": torch.zeros(boxes)}
    losses = make("fgd", SHAPE)(random_taps(SHAPE, 0), random_taps(SHAPE, 1), batch)
    assert (losses["kd_fgd_fg"].item() > 0) is (boxes > 0)
    assert losses["kd_fgd_bg"].item() > 0
