"""What every method file must do; a new file is tested by existing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from taps_factory import (
    Shape,
    foreground,
    inference_copy,
    leaves,
    make,
    map_leaves,
    random_taps,
    reorder,
    total,
    with_leaves,
)
from torch import Tensor

from kd_yolo.config import MethodFile, validate
from kd_yolo.distill.base import build_method, list_methods, load_method, parse_args
from kd_yolo.distill.schedule import Schedule
from kd_yolo.errors import ConfigError, TeacherError
from kd_yolo.resources import builtin_names, find, load_yaml

METHODS = list_methods()
SHAPE = Shape()

# (student, teacher): everything that may differ between the two, and the smallest sizes.
PAIRS = {
    "same": (SHAPE, SHAPE),
    "one class": (Shape(classes=1), Shape(classes=1)),
    "one image": (Shape(images=1), Shape(images=1)),
    "1x1 maps": (Shape(sizes=((1, 1), (1, 1))), Shape(sizes=((1, 1), (1, 1)))),
    "non-square": (Shape(sizes=((2, 5), (1, 3))), Shape(sizes=((2, 5), (1, 3)))),
    "other widths": (SHAPE, Shape(channels=(7, 3))),
    "no bins": (Shape(reg_max=1), Shape(reg_max=1)),
    "bins for the teacher only": (Shape(reg_max=1), Shape(reg_max=4)),
    "bins for the student only": (Shape(reg_max=4), Shape(reg_max=1)),
    "other bins": (Shape(reg_max=4), Shape(reg_max=6)),
    "P2 to P5": (
        Shape(sizes=((6, 6), (3, 3), (2, 2), (1, 1)), channels=(2, 3, 4, 5), strides=(4, 8, 16, 32)),
        Shape(sizes=((6, 6), (3, 3), (2, 2), (1, 1)), channels=(3, 3, 5, 5), strides=(4, 8, 16, 32)),
    ),
}

pytestmark = pytest.mark.parametrize("name", METHODS)


def refuse_without_bins(name: str, student: Shape, teacher: Shape) -> None:
    """Skip exactly the pairs that a method of box bins must refuse, after seeing that it does."""
    if load_method(name).needs_bins and not student.reg_max == teacher.reg_max > 1:
        with pytest.raises(ConfigError, match=rf"reg_max.*{student.reg_max}.*{teacher.reg_max}"):
            make(name, student, teacher)
        pytest.skip(f"{name} refuses reg_max {student.reg_max} and {teacher.reg_max}: it compares box bins")


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_forward__named_finite_scalars_not_negative_with_gradient(name: str, pair: str, seed: int) -> None:
    mine, theirs = PAIRS[pair]
    refuse_without_bins(name, mine, theirs)
    method = make(name, mine, theirs)
    student, teacher = random_taps(mine, seed, grad=True), random_taps(theirs, seed + 100)
    losses = method(student, teacher, foreground(mine, seed))
    assert tuple(losses) == method.terms
    for value in losses.values():
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert bool(torch.isfinite(value))
        assert value.item() >= 0
    torch.autograd.backward(total(losses))
    grads = [x.grad for x in leaves(student) if x.grad is not None]
    assert grads
    assert all(bool(torch.isfinite(g).all()) for g in grads)
    if method.needs_cells and all(h * w == 1 for h, w in mine.sizes):
        assert float(total(losses).detach()) == 0.0  # nothing to compare; exactly what the attribute says
        return
    assert max(float(g.abs().max()) for g in grads) > 0


@pytest.mark.parametrize("classes", [1, 3])
def test_forward__gradcheck_in_float64(name: str, classes: int) -> None:
    """One random direction of all inputs at once: the whole Jacobian of every method takes minutes."""
    shape = Shape(classes=classes)
    method = make(name, shape, **load_method(name).gradcheck_args).double()
    student = random_taps(shape, 0, torch.float64, grad=True)
    teacher, batch = random_taps(shape, 1, torch.float64), foreground(shape)

    def loss(*values: Tensor) -> Tensor:
        return total(method(with_leaves(student, values), teacher, batch))

    def wrong(*values: Tensor) -> Tensor:
        return 1.01 * loss(*values) - 0.01 * loss(*values).detach()  # the same value, a gradient 1 % too large

    numeric, analytic = slopes(loss, leaves(student))
    assert numeric != 0
    assert analytic == pytest.approx(numeric, rel=1e-4, abs=0)
    numeric, analytic = slopes(wrong, leaves(student))
    assert analytic != pytest.approx(numeric, rel=1e-4, abs=0)


def slopes(loss: Callable[..., Tensor], inputs: Sequence[Tensor], step: float = 1e-5) -> tuple[float, float]:
    """Return a loss' slope along one random direction: by central differences, and by its gradients."""
    generator = torch.Generator().manual_seed(7)
    direction = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in inputs]
    ahead, behind = ([x.detach() + sign * step * v for x, v in zip(inputs, direction, strict=True)] for sign in (1, -1))
    numeric = (loss(*ahead) - loss(*behind)) / (2 * step)
    gradients = torch.autograd.grad(loss(*inputs), inputs, allow_unused=True)
    analytic = sum((g * v).sum() for g, v in zip(gradients, direction, strict=True) if g is not None)
    return float(numeric.detach()), float(analytic)


def test_forward__float64_stays_float64(name: str) -> None:
    method = make(name, SHAPE).double()
    losses = method(random_taps(SHAPE, 0, torch.float64), random_taps(SHAPE, 1, torch.float64), {})
    assert {value.dtype for value in losses.values()} == {torch.float64}


@pytest.mark.parametrize("reg_max", [1, 4])
def test_forward__zero_at_equality_exactly_when_declared(name: str, reg_max: int) -> None:
    shape = Shape(reg_max=reg_max)
    refuse_without_bins(name, shape, shape)
    teacher = random_taps(shape, 3)
    student = map_leaves(random_taps(shape, 3, grad=True), lambda x: x)
    losses = make(name, shape)(student, teacher, foreground(shape))
    torch.autograd.backward(total(losses))
    values = [float(value.detach()) for value in losses.values()]
    gradients = [float(x.grad.abs().max()) for x in leaves(student) if x.grad is not None]
    vanishes = max(map(abs, values)) < 1e-5 and max(gradients) < 1e-6
    assert vanishes is load_method(name).zero_at_equality


def test_forward__no_gradient_to_the_teacher(name: str) -> None:
    student, teacher = random_taps(SHAPE, 0, grad=True), random_taps(SHAPE, 1, grad=True)
    torch.autograd.backward(total(make(name, SHAPE)(student, teacher, foreground(SHAPE))))
    assert all(x.grad is None for x in leaves(teacher))


def test_forward__teacher_under_inference_mode(name: str) -> None:
    student, teacher = random_taps(SHAPE, 0, grad=True), random_taps(SHAPE, 1)
    method = make(name, SHAPE)
    losses = method(student, inference_copy(teacher), foreground(SHAPE))
    assert torch.equal(total(losses), total(method(student, teacher, foreground(SHAPE))))
    torch.autograd.backward(total(losses))


def test_forward__reads_nothing_of_the_teacher_that_it_does_not_name(name: str) -> None:
    method = make(name, SHAPE)
    teacher = random_taps(SHAPE, 1)
    assert method.reads <= {"neck", "scores", "boxes", "scores_one2one", "head"}
    bare = replace(
        teacher,
        neck=teacher.neck if "neck" in method.reads else tuple(x * torch.nan for x in teacher.neck),
        scores=teacher.scores if "scores" in method.reads else teacher.scores[:, :0],
        boxes=teacher.boxes if "boxes" in method.reads else teacher.boxes[:, :0],
        scores_one2one=teacher.scores_one2one if "scores_one2one" in method.reads else None,
        head=teacher.head if "head" in method.reads else None,
    )
    student = random_taps(SHAPE, 0)
    assert torch.equal(total(method(student, bare, {})), total(method(student, teacher, {})))


NO_BOX = {
    "fg_mask": torch.zeros(2, 13, dtype=torch.bool),
    "target_labels": torch.zeros(2, 13, dtype=torch.long),
    "target_scores": torch.zeros(2, 13, 3),
    "bboxes": torch.zeros(0, 4),
    "cls": torch.zeros(0, 1),
    "batch_idx": torch.zeros(0),
}


@pytest.mark.parametrize("batch", [{}, NO_BOX], ids=["nothing", "no box"])
def test_forward__batch_without_boxes(name: str, batch: dict[str, Any]) -> None:
    student = random_taps(SHAPE, 0, grad=True)
    losses = make(name, SHAPE)(student, random_taps(SHAPE, 1), batch)
    assert bool(torch.isfinite(total(losses)))
    torch.autograd.backward(total(losses))


@pytest.mark.parametrize("one2one", [True, False])
def test_forward__teacher_lacks_classes(name: str, one2one: bool) -> None:
    known = torch.tensor([True, False, True])
    teacher = replace(random_taps(SHAPE, 1, one2one=one2one), class_mask=known)

    def poisoned(scores: Tensor | None, value: float) -> Tensor | None:
        return None if scores is None else scores.masked_fill(~known[:, None], value)

    values, method = [], make(name, SHAPE)
    student = random_taps(SHAPE, 0, grad=True)
    for value in (-30.0, 50.0, float("nan")):
        scores = poisoned(teacher.scores, value)
        assert scores is not None
        masked = replace(teacher, scores=scores, scores_one2one=poisoned(teacher.scores_one2one, value))
        values.append(total(method(student, masked, foreground(SHAPE))))
    assert values[0].item() == values[1].item() == values[2].item()
    torch.autograd.backward(values[0])
    if student.scores.grad is not None:
        assert float(student.scores.grad[:, 1].abs().max()) == 0.0
        assert float(student.scores.grad[:, 0].abs().max()) > 0.0


@pytest.mark.parametrize("pair", ["same", "other bins", "no bins"])
def test_forward__half_precision_taps_under_autocast(name: str, pair: str) -> None:
    mine, theirs = PAIRS[pair]
    refuse_without_bins(name, mine, theirs)
    method = make(name, mine, theirs)
    student = map_leaves(random_taps(mine, 0, grad=True), lambda x: x.bfloat16())
    teacher = map_leaves(random_taps(theirs, 1), lambda x: x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        losses = method(student, teacher, foreground(mine))
    exact = method(map_leaves(student, lambda x: x.float()), map_leaves(teacher, lambda x: x.float()), foreground(mine))
    for term, value in losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[term], rtol=1e-6, atol=1e-7)
    torch.autograd.backward(total(losses))
    assert all(bool(torch.isfinite(x.grad).all()) for x in leaves(student) if x.grad is not None)


@pytest.mark.parametrize("order", [[1, 0, 2], [0, 1, 2, 0, 1, 2]], ids=["permuted", "repeated"])
def test_forward__same_for_a_permuted_or_repeated_batch(name: str, order: list[int]) -> None:
    shape = Shape(images=3)
    method, batch = make(name, shape), foreground(shape)
    if len(order) > shape.images and method.batch_statistics:
        pytest.skip(f"{name} uses statistics over the batch")
    student, teacher = random_taps(shape, 0), random_taps(shape, 1)
    losses = method(student, teacher, batch)
    again = method(
        map_leaves(student, lambda x: x[order]),
        map_leaves(teacher, lambda x: x[order]),
        reorder(batch, order),
    )
    for term, value in losses.items():
        torch.testing.assert_close(again[term], value, rtol=1e-5, atol=1e-7)


def test_forward__weight_is_a_factor_and_zero_is_plain_training(name: str) -> None:
    student, teacher = random_taps(SHAPE, 0), random_taps(SHAPE, 1)
    one = make(name, SHAPE, weight=1.0)(student, teacher, foreground(SHAPE))
    three = make(name, SHAPE, weight=3.0)(student, teacher, foreground(SHAPE))
    torch.testing.assert_close(total(three), 3 * total(one))
    off = make(name, SHAPE, weight=0.0)
    none = off(student, teacher, foreground(SHAPE))
    assert tuple(none) == off.terms == tuple(one)
    assert all(value.item() == 0.0 for value in none.values())


def test_forward__unmatched_logits_are_refused_with_both_shapes(name: str) -> None:
    method = make(name, SHAPE)
    if "scores" not in method.reads:
        pytest.skip(f"{name} reads no class logits")
    with pytest.raises(TeacherError, match=r"\(2, 3, 13\).*\(2, 5, 13\)"):
        method(random_taps(SHAPE, 0), random_taps(replace(SHAPE, classes=5), 1), {})


def test_build_method__adapters_repeat_and_leave_the_random_streams_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(seed: int) -> None:
        raise AssertionError(f"the GPUs were seeded with {seed}")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    before = torch.get_rng_state()
    spec = SHAPE.spec()
    first, again, other = (build_method(name, {}, spec, spec, seed=s).state_dict() for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not first or any(not torch.equal(first[key], other[key]) for key in first)


def test_parse_args__typo_names_the_nearest(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no argument 'wieght'; did you mean 'weight'\?"):
        parse_args(name, {"wieght": 1.0})


@pytest.mark.parametrize("value", ["2", -1.0, float("nan"), float("inf"), True, None])
def test_parse_args__weight_must_be_a_finite_number_from_0(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="weight="):
        parse_args(name, {"weight": value})


def test_build_method__unequal_levels_are_refused_with_both_numbers(name: str) -> None:
    student, teacher = SHAPE.spec(), Shape(sizes=((3, 3),), channels=(4,), strides=(8,)).spec()
    with pytest.raises(ConfigError, match="2 student and 1 teacher levels"):
        build_method(name, {}, student, teacher)


def test_method_file__of_the_same_name_holds_the_defaults(name: str) -> None:
    path = find("methods", name)
    content = validate(MethodFile, load_yaml(path), where=str(path))
    assert content.name == name
    assert parse_args(name, content.args) == load_method(name).Args()
    validate(Schedule, content.schedule, where=str(path))
    make(name, SHAPE, **content.args)


def test_method_files__every_file_is_a_method_or_none(name: str) -> None:
    assert set(builtin_names("methods")) == {*METHODS, "none"}
    assert load_yaml(find("methods", "none")) == {"name": "none"}
    assert name != "none"
