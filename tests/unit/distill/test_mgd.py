"""MGD: masks, the generation block, and what is and is not random."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from taps_factory import Shape, make, random_taps, total
from torch import Tensor, nn

from kd_yolo.distill.base import build_method
from kd_yolo.distill.methods.mgd import cell_masks, generation_block
from kd_yolo.errors import ConfigError

SHAPE = Shape()


def parameters_of(block: str, student: int, teacher: int) -> int:
    shapes = Shape(channels=(student,), sizes=((3, 3),), strides=(8,)), Shape(channels=(teacher,), sizes=((3, 3),))
    method = make("mgd", shapes[0], replace(shapes[1], strides=(8,)), block=block)
    return sum(p.numel() for p in method.parameters())


def test_generation_block__parameters_are_those_of_the_formula() -> None:
    # Adapter 4 x 6 + 6. Full: two 6 x 6 x 3 x 3 + 6. Separable: two times 6 x 3 x 3, and 6 x 6 + 6.
    assert parameters_of("full", 4, 6) == 30 + 2 * (6 * 6 * 9 + 6)
    assert parameters_of("separable", 4, 6) == 30 + 2 * (6 * 9 + 6 * 6 + 6)
    assert parameters_of("full", 6, 6) == 2 * (6 * 6 * 9 + 6)


@pytest.mark.parametrize("block", ["separable", "full"])
def test_generation_block__sees_two_cells_in_every_direction(block: Any) -> None:
    torch.manual_seed(0)
    generate = generation_block(3, block)
    dot = torch.zeros(1, 3, 9, 9)
    changed = (generate(dot) - generate(dot.index_fill(2, torch.tensor([4]), 1.0))).abs().amax((0, 1, 3)) > 0
    assert not bool(changed[:2].any() or changed[7:].any())
    assert int(changed.sum()) > 3  # one 3x3 alone would reach three rows


def test_mgd__golden_value() -> None:
    # Both 3x3 convolutions reduced to the identity by hand, ReLU between: G(x) = max(x, 0). Nothing hidden, one level:
    # student 2 everywhere and teacher 5 everywhere, so the mean squared difference is 9; times weight 0.5.
    shape = Shape(images=2, channels=(3,), sizes=((4, 4),), strides=(8,))
    method = make("mgd", shape, mask_ratio=0.0, block="full", weight=0.5)
    for layer in method.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.dirac_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    student, teacher = (replace(random_taps(shape, 0), neck=(torch.full((2, 3, 4, 4), value),)) for value in (2.0, 5.0))
    assert method(student, teacher, {})["kd_mgd"].item() == pytest.approx(4.5)


def test_mgd__hidden_cells_get_no_gradient_and_all_cells_of_the_teacher_count() -> None:
    shape = Shape(images=2, channels=(3,), sizes=((12, 12),), strides=(8,))
    method = make("mgd", shape, mask_ratio=0.8)
    (mask,) = cell_masks([(12, 12)], 0.8, int(method.state_dict()["step"]))
    student, teacher = random_taps(shape, 0, grad=True), random_taps(shape, 1)
    loss = total(method(student, teacher, {}))
    torch.autograd.backward(loss)
    gradient = student.neck[0].grad
    assert gradient is not None
    seen = mask.bool().expand_as(gradient)
    assert float(gradient[~seen].abs().max()) == 0.0
    assert float(gradient[seen].abs().max()) > 0.0
    for cell in ((0, 0), (7, 3)):
        other = teacher.neck[0].clone()
        other[:, :, cell[0], cell[1]] += 1.0
        moved = total(make("mgd", shape, mask_ratio=0.8)(student, replace(teacher, neck=(other,)), {}))
        assert moved.item() != loss.item()


@settings(max_examples=30, deadline=None)
@given(ratio=st.floats(0.0, 0.99), step=st.integers(0, 2**31), height=st.integers(1, 9), width=st.integers(1, 9))
def test_cell_masks__zeros_and_ones_never_all_hidden(ratio: float, step: int, height: int, width: int) -> None:
    (mask,) = cell_masks([(height, width)], ratio, step)
    assert mask.shape == (1, 1, height, width)
    assert bool(((mask == 0.0) | (mask == 1.0)).all())
    assert mask.sum() >= 1
    assert torch.equal(mask, cell_masks([(height, width)], ratio, step)[0])


def test_cell_masks__hide_the_share_and_differ_by_step() -> None:
    masks = torch.cat([cell_masks([(20, 20)], 0.65, step)[0] for step in range(50)])
    # 20000 draws of probability 0.35: standard deviation of the mean 0.0034
    assert float(masks.mean()) == pytest.approx(0.35, abs=0.017)
    assert not torch.equal(masks[0], masks[1])


# ---- what is random --------------------------------------------------------------------------------------------------


def test_mgd__masks_move_on_with_every_gradient_and_only_then() -> None:
    method, student, teacher = make("mgd", SHAPE), random_taps(SHAPE, 0, grad=True), random_taps(SHAPE, 1)
    first = total(method(student, teacher, {}))
    again = total(method(student, teacher, {}))
    assert torch.equal(first, again)  # no gradient was taken
    # a checked and balanced first step takes several gradients of one forward pass; they count once
    step = int(method.state_dict()["step"])
    torch.autograd.grad(again, student.neck[0], retain_graph=True)
    torch.autograd.grad(again, student.neck[0], retain_graph=True)
    torch.autograd.backward(again)
    assert int(method.state_dict()["step"]) == step + 1
    assert not torch.equal(first, total(method(student, teacher, {})))


def test_mgd__global_random_stream_stays_where_it_was() -> None:
    method, student, teacher = make("mgd", SHAPE), random_taps(SHAPE, 0, grad=True), random_taps(SHAPE, 1)
    before = torch.get_rng_state()
    torch.autograd.backward(total(method(student, teacher, {})))
    assert torch.equal(torch.get_rng_state(), before)


def test_mgd__a_restored_method_goes_on_with_the_same_masks() -> None:
    student, teacher = random_taps(SHAPE, 0, grad=True), random_taps(SHAPE, 1)

    def losses(method: Any, steps: int) -> list[Tensor]:
        values = []
        for _ in range(steps):
            values.append(total(method(student, teacher, {})))
            torch.autograd.backward(values[-1])
        return [value.detach() for value in values]

    method = make("mgd", SHAPE)
    losses(method, 3)
    fresh = build_method("mgd", {}, SHAPE.spec(), SHAPE.spec(), seed=5)
    fresh.load_state_dict(method.state_dict())
    copy = pickle.loads(pickle.dumps(method))
    expected = losses(method, 3)
    assert all(torch.equal(a, b) for a, b in zip(losses(fresh, 3), expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(losses(copy, 3), expected, strict=True))


def test_mgd__seeds_start_at_other_masks() -> None:
    starts = {
        int(build_method("mgd", {}, SHAPE.spec(), SHAPE.spec(), seed=seed).state_dict()["step"]) for seed in (0, 0, 1)
    }
    assert len(starts) == 2


def test_mgd__learns_to_generate_the_teacher() -> None:
    wide = Shape(channels=(7, 9))
    method, student, teacher = make("mgd", SHAPE, wide), random_taps(SHAPE, 0, grad=True), random_taps(wide, 1)
    optimizer = torch.optim.Adam([*student.neck, *method.parameters()], lr=0.05)
    values = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = total(method(student, teacher, {}))
        torch.autograd.backward(loss)
        optimizer.step()
        values.append(loss.item())
    assert sum(values[-10:]) < 0.6 * sum(values[:10])


@pytest.mark.parametrize("given", [{"mask_ratio": 1.0}, {"mask_ratio": -0.1}, {"block": "huge"}])
def test_mgd__bad_arguments_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(given))}="):
        make("mgd", SHAPE, **given)
