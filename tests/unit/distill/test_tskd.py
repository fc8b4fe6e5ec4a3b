"""TSKD as a method: which terms there are, when they vanish, where their gradient goes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from taps_factory import Shape, foreground, leaves, make, map_leaves, random_taps, reorder, total
from torch import Tensor
from torch.testing import assert_close
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.distill.base import Taps, build_method
from kd_yolo.distill.model import KDModel
from kd_yolo.distill.taps import describe, detect_head
from kd_yolo.distill.teacher import map_classes, prepare_teacher
from kd_yolo.distill.teachers.detect import DetectTeacher
from kd_yolo.errors import ConfigError, TeacherError

SHAPE = Shape()
CRD, DED = ("kd_crd_cls", "kd_crd_box"), ("kd_fg", "kd_bg")
DRD, SE = ("kd_px", "kd_ins"), ("kd_se",)
PLAIN: dict[str, Any] = {"crd": False, "ded": False, "drd": False, "se": False}
RELATIONS = ["random", "frozen", "learned", "drkd"]

# The rows of an honest ablation, from plain training (no term at all, refused below) to the whole method.
ABLATION: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "crd": ({**PLAIN, "crd": True}, CRD),
    "ded": ({**PLAIN, "ded": True}, DED),
    "crd + ded": ({"drd": False, "se": False}, CRD + DED),
    "published": ({"variant": "published"}, CRD + DED),
    "crd + ded + drd": ({"se": False}, CRD + DED + DRD),
    "published + drd": ({"variant": "published", "drd": True}, CRD + DED + DRD),
    "intended": ({}, CRD + DED + DRD + SE),
    "crd + bins": ({**PLAIN, "crd": True, "lambda_d": 1.0}, (*CRD, "kd_crd_dfl")),
    "without foreground": ({**PLAIN, "ded": True, "alpha_fg": 0.0}, ("kd_bg",)),
}


def consistent(taps: Taps) -> Taps:
    """Return taps whose predictions are what the head makes of its holds."""
    head = taps.head
    assert head is not None
    if taps.boxes.shape[1] == 4:  # distances themselves: their sign must be right
        for tail in head.box_tail:
            tail[-1].bias.data += 3.0  # type: ignore[index]

    def predict(holds: Any, tails: Any) -> Tensor:
        return torch.cat([t(head.activate(h)).flatten(2) for h, t in zip(holds, tails, strict=True)], -1)

    return replace(taps, scores=predict(head.cls, head.cls_tail), boxes=predict(head.box, head.box_tail))


@pytest.mark.parametrize("row", ABLATION)
def test_terms__ablation_rows(row: str) -> None:
    args, terms = ABLATION[row]
    method = make("tskd", SHAPE, **args)
    losses = method(random_taps(SHAPE, 0, grad=True), random_taps(SHAPE, 1), foreground(SHAPE))
    assert tuple(losses) == terms
    assert all(value.item() > 0 for value in losses.values())
    assert ("head" in method.reads) is (CRD[0] in terms)
    assert ("neck" in method.reads) is (set(terms) - {*CRD, "kd_crd_dfl"} != set())


def test_forward__published_is_intended_without_the_three_terms() -> None:
    shared: dict[str, Any] = {"hold": "pre", "attention": "raw", "alpha_fg": 2e-4, "alpha_bg": 3e-4}
    without: dict[str, Any] = {"alpha_px": 0.0, "alpha_ins": 0.0, "alpha_se": 0.0}
    student, teacher, batch = random_taps(SHAPE, 0), random_taps(SHAPE, 1), foreground(SHAPE)
    published = make("tskd", SHAPE, variant="published", **shared)(student, teacher, batch)
    intended = make("tskd", SHAPE, variant="intended", **shared, **without)(student, teacher, batch)
    assert published == intended
    own = make("tskd", SHAPE, variant="published")(student, teacher, batch)
    assert all(own[name] != intended[name] for name in intended)  # else the comparison above shows nothing


@pytest.mark.parametrize("relation", ["random", "frozen", "learned"])
def test_forward__feature_terms_vanish_at_equality(relation: str) -> None:
    teacher = random_taps(SHAPE, 3)
    student = map_leaves(random_taps(SHAPE, 3, grad=True), lambda x: x)
    losses = make("tskd", SHAPE, crd=False, relation=relation)(student, teacher, foreground(SHAPE))
    torch.autograd.backward(total(losses))
    assert all(abs(value.item()) < 1e-6 for value in losses.values())
    assert max(float(x.grad.abs().max()) for x in leaves(student) if x.grad is not None) < 1e-6


@pytest.mark.parametrize("hold", ["pre", "post"])
@pytest.mark.parametrize("reg_max", [1, 4])
def test_forward__equal_holds_reuse_the_teachers_predictions(hold: str, reg_max: int) -> None:
    shape = Shape(reg_max=reg_max)
    teacher = consistent(random_taps(shape, 3))
    losses = make("tskd", shape, **{**PLAIN, "crd": True}, hold=hold)(teacher, teacher, foreground(shape))
    assert max(value.item() for value in losses.values()) < 2e-4
    other = make("tskd", shape, **{**PLAIN, "crd": True}, hold=hold)(random_taps(shape, 4), teacher, foreground(shape))
    assert min(value.item() for value in other.values()) > 0.05


def test_forward__hold_is_scale_and_shift_free() -> None:
    """The student's own mean and deviation do not reach the teacher's layers."""
    method = make("tskd", SHAPE, **{**PLAIN, "crd": True})
    student, teacher = random_taps(SHAPE, 0), random_taps(SHAPE, 1)
    assert student.head is not None
    moved = replace(
        student.head, cls=tuple(3 * x + 2 for x in student.head.cls), box=tuple(0.5 * x - 1 for x in student.head.box)
    )
    losses = method(student, teacher, foreground(SHAPE))
    again = method(replace(student, head=moved), teacher, foreground(SHAPE))
    for name, value in losses.items():
        assert_close(again[name], value, rtol=1e-4, atol=0)


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("boxes", [0, 1, 2])
def test_forward__few_boxes(relation: str, boxes: int) -> None:
    batch = {key: value[:boxes] for key, value in foreground(SHAPE).items() if key in {"bboxes", "cls", "batch_idx"}}
    student = random_taps(SHAPE, 0, grad=True)
    losses = make("tskd", SHAPE, relation=relation)(student, random_taps(SHAPE, 1), batch)
    assert all(bool(torch.isfinite(value)) for value in losses.values())
    assert (losses["kd_ins"].item() > 0) is (boxes == 2)
    assert (losses["kd_fg"].item() > 0) is (boxes > 0)
    torch.autograd.backward(total(losses))


def test_forward__images_covered_by_a_box_have_no_background() -> None:
    batch = {
        "bboxes": torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.5, 0.5, 1.2, 1.2]]),
        "batch_idx": torch.tensor([0.0, 1.0]),
    }
    student = random_taps(SHAPE, 0, grad=True)
    losses = make("tskd", SHAPE)(student, random_taps(SHAPE, 1), batch)
    assert losses["kd_bg"].item() == 0
    assert all(bool(torch.isfinite(value)) for value in losses.values())
    torch.autograd.backward(total(losses))


def test_forward__repeated_batch_changes_only_what_depends_on_the_batch() -> None:
    shape, order = Shape(images=3), [0, 1, 2, 0, 1, 2]
    method, batch = make("tskd", shape), foreground(shape)
    student, teacher = random_taps(shape, 0), random_taps(shape, 1)
    losses = method(student, teacher, batch)
    doubled = (map_leaves(x, lambda v: v[order]) for x in (student, teacher))
    again = method(*doubled, reorder(batch, order))
    for name, value in losses.items():  # the unbiased deviation of 3 x 9 values is 1 % from that of twice as many
        assert_close(again[name], value, rtol=0.02 if name in CRD else 1e-5, atol=1e-7)


def test_forward__order_of_the_boxes_does_not_matter() -> None:
    batch = foreground(SHAPE)
    turned = {**batch, **{key: batch[key].flip(0) for key in ("bboxes", "cls", "batch_idx")}}
    student, teacher = random_taps(SHAPE, 0), random_taps(SHAPE, 1)
    for relation, same in (("frozen", True), ("random", False)):  # random takes the boxes as channels, as released
        values = [make("tskd", SHAPE, relation=relation)(student, teacher, b)["kd_ins"] for b in (batch, turned)]
        assert torch.allclose(values[0], values[1], rtol=1e-5) is same


def test_forward__foreground_does_not_depend_on_the_number_of_channels() -> None:
    """256 / C: twice the same channels are twice the sum."""
    wide = Shape(channels=(8, 12))
    student, teacher = random_taps(SHAPE, 0), random_taps(SHAPE, 1)
    doubled = [replace(t, neck=tuple(torch.cat([x, x], 1) for x in t.neck)) for t in (student, teacher)]
    args: dict[str, Any] = {**PLAIN, "ded": True}
    narrow = make("tskd", SHAPE, **args)(student, teacher, foreground(SHAPE))
    for name, value in make("tskd", wide, **args)(*doubled, foreground(SHAPE)).items():
        assert_close(value, narrow[name])


def test_relation__random_is_drawn_at_every_step_from_its_own_stream() -> None:
    student, teacher, batch = random_taps(SHAPE, 0), random_taps(SHAPE, 1), foreground(SHAPE)
    before = torch.get_rng_state()
    for relation, changes in (("random", True), ("frozen", False)):
        method = make("tskd", SHAPE, crd=False, ded=False, se=False, relation=relation)
        first, second = method(student, teacher, batch), method(student, teacher, batch)
        assert all((first[name].item() != second[name].item()) is changes for name in DRD)
        again = make("tskd", SHAPE, crd=False, ded=False, se=False, relation=relation)(student, teacher, batch)
        assert first == again
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("relation", "units"), [("random", 0), ("frozen", 0), ("learned", 1), ("drkd", 2)])
def test_relation__trainable_units(relation: str, units: int) -> None:
    """Frozen weights are buffers: the trainer switches the gradient of every frozen parameter on again."""
    method = make("tskd", SHAPE, crd=False, ded=False, se=False, relation=relation)
    parameters = dict(method.named_parameters())
    assert len(parameters) == units * 2 * 2 * 10  # units a term and level, of ten tensors each
    torch.autograd.backward(total(method(random_taps(SHAPE, 0, grad=True), random_taps(SHAPE, 1), foreground(SHAPE))))
    moved = {name.rsplit(".", 1)[1] for name, p in parameters.items() if p.grad is not None and p.grad.abs().max() > 0}
    if relation == "learned":  # gamma starts at 0: the unit is the identity and only gamma can leave it
        assert moved == {"gamma"}
    elif relation == "drkd":
        assert {"theta", "phi", "node", "state", "back", "gamma"} <= moved


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (PLAIN, "all off"),
        ({"window": 4}, "window=4: give an odd number"),
        ({"lambda_d": 1.0}, "lambda_d needs a teacher with box bins"),
    ],
)
def test_init__refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make("tskd", Shape(reg_max=1), **args)


def test_init__heads_that_cannot_be_crossed() -> None:
    with pytest.raises(TeacherError, match="the teacher has no YOLO head"):
        make("tskd", SHAPE, Shape(head=False))
    make("tskd", SHAPE, Shape(head=False), crd=False)
    shallow = replace(SHAPE.spec(), levels=tuple(replace(v, cls_channels=(4, 5)) for v in SHAPE.spec().levels))
    with pytest.raises(ConfigError, match=r"k=2, but the teacher's head has 1 blocks"):
        build_method("tskd", {"k": 2}, SHAPE.spec(), shallow)


def test_forward__head_that_was_not_tapped() -> None:
    student, teacher = random_taps(SHAPE, 0), random_taps(SHAPE, 1)
    with pytest.raises(TeacherError, match="the student has no YOLO head"):
        make("tskd", SHAPE)(replace(student, head=None), teacher, {})


@torch.no_grad()
def make_informative(model: DetectionModel) -> None:
    """Give an untrained detector normalised maps and a head whose scores and boxes differ from cell to cell."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(torch.rand(8, 3, 64, 64))
    model.eval()
    head = detect_head(model)
    distances = head.reg_max == 1  # whose sign must be right
    for branch, gain, bias in ((head.cv3, 5.0, -1.0), (head.cv2, 1.0 if distances else 5.0, 4.0 if distances else 0.0)):
        for level in branch:
            level[-1].weight.mul_(gain)
            level[-1].bias.fill_(bias)


def wrapped(family: str, **args: Any) -> tuple[KDModel, DetectionModel]:
    """Return a nano student under a small teacher of one family with random weights, three classes, and the teacher."""
    torch.manual_seed(0)
    student, source = (DetectionModel(f"{family}{size}.yaml", nc=3, verbose=False) for size in "ns")
    from ultralytics.cfg import get_cfg

    student.args = get_cfg(overrides={"imgsz": 64})
    make_informative(source)
    names = {0: "a", 1: "b", 2: "c"}
    teacher = prepare_teacher(source, map_classes(names, names))
    specs = describe(student), describe(teacher)
    return KDModel(DetectTeacher(teacher), student, build_method("tskd", args, *specs)).train(), teacher


BATCH = {
    "img": torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
    "bboxes": torch.tensor([[0.4, 0.4, 0.3, 0.5], [0.6, 0.5, 0.5, 0.3], [0.3, 0.6, 0.2, 0.2]]),
    "cls": torch.tensor([[0.0], [2.0], [1.0]]),
    "batch_idx": torch.tensor([0.0, 0.0, 1.0]),
}


@pytest.mark.parametrize(("family", "k"), [("yolo26", 1), ("yolo11", 1), ("yolo26", 0), ("yolo26", 2)])
def test_crd__gradient_reaches_blocks_up_to_k_neck_and_backbone_only(family: str, k: int) -> None:
    model, teacher = wrapped(family, **{**PLAIN, "crd": True}, k=k)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    loss, _ = model.loss(BATCH)
    student = model.student_model
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss[-2:].sum(), list(parameters.values()), allow_unused=True)
    reached = {
        name for name, grad in zip(parameters, grads, strict=True) if grad is not None and float(grad.abs().max()) > 0
    }
    last = len(student.model) - 1
    for branch in ("cv2", "cv3"):
        for level in range(3):
            for block in range(3):
                touched = any(name.startswith(f"model.{last}.{branch}.{level}.{block}.") for name in reached)
                assert touched is (block < k), (branch, level, block)
    assert any(name.startswith("model.0.") for name in reached)
    assert any(name.startswith(f"model.{last - 1}.") for name in reached)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_intended__a_step_leaves_teacher_and_structure_of_the_student_alone() -> None:
    model, teacher = wrapped("yolo26")
    plain = DetectionModel("yolo26n.yaml", nc=3, verbose=False)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    loss, items = model.loss(BATCH)
    torch.autograd.backward(loss.sum())
    optimizer.step()
    assert all(f"{name}_loss" in items for name in model.projector.terms)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert list(model.student_model.state_dict()) == list(plain.state_dict())
    assert all(not hook for hook in (m._forward_hooks for m in detect_head(model.student_model).modules()))
