"""A teacher averaged over mirror images: it answers a mirrored image with the mirror of its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from teacher_files import DATA_NAMES, check_step, recipe_for, wrapped, yolo_file
from torch import Tensor

from kd_yolo.distill.base import DetectorSpec, LevelSpec, Taps
from kd_yolo.distill.teachers import mirrored
from kd_yolo.distill.teachers.base import Teacher
from kd_yolo.distill.teachers.build import build_teacher
from kd_yolo.distill.teachers.cache import CachedTeacher
from kd_yolo.distill.teachers.dense import dense_taps
from kd_yolo.distill.teachers.mirrored import MIRRORS, MirroredTeacher
from kd_yolo.errors import TeacherError

STRIDES = (8, 16, 32)
BOTH = frozenset({"scores", "boxes"})
SIZE = (64, 96)  # pixels; not square, so that the axes cannot be mixed up
BINS = (1, 16)  # distances, and bins a side


class Uneven(Teacher):
    """A small detector of three classes whose kernels have a left and a right; everything in float64.

    A random YOLO would not do: its answers hardly depend on the image.
    """

    provides = frozenset({"neck", "scores", "boxes", "scores_one2one"})
    strides = STRIDES

    def __init__(self, reg_max: int = 1, known: Tensor | None = None) -> None:
        super().__init__()
        self.reg_max, self.class_known = reg_max, known
        self.asked: list[frozenset[str]] = []
        random = torch.Generator().manual_seed(5)
        self.kernels = {s: torch.randn(6 + 4 * reg_max, 3, 3, 3, generator=random).double() for s in STRIDES}

    def describe(self, strides: Sequence[int]) -> DetectorSpec:
        return DetectorSpec(tuple(LevelSpec(3, s) for s in strides), 3, self.reg_max)

    def taps(self, images: Tensor, reads: frozenset[str], strides: Sequence[int], hold: int = 1) -> Taps:
        self.asked.append(reads)
        neck = [F.avg_pool2d(images, s) for s in strides]
        maps = [4 * F.conv2d(x - 0.5, self.kernels[s], padding=1) for x, s in zip(neck, strides, strict=True)]
        scores, one2one, boxes = torch.split(torch.cat([x.flatten(2) for x in maps], 2), [3, 3, 4 * self.reg_max], 1)
        if self.reg_max == 1:
            boxes = boxes.exp()
        found = dense_taps(neck, strides, scores, boxes if "boxes" in reads else None)
        return replace(found, scores_one2one=one2one)


def noise(batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def mirror_of(predicted: Tensor, axes: Sequence[int]) -> Tensor:
    """Return predictions (B, 4 + K, A) as they must be on the mirrored image: other centres, at other anchors."""
    predicted = predicted.clone()
    for axis in axes:
        row, side = (0, SIZE[1]) if axis == -1 else (1, SIZE[0])
        predicted[:, row] = side - predicted[:, row]
    sizes = [(SIZE[0] // s, SIZE[1] // s) for s in STRIDES]
    levels = torch.split(predicted, [h * w for h, w in sizes], -1)
    return torch.cat(
        [
            torch.flip(x.reshape(*x.shape[:2], *size), tuple(axes)).flatten(2)
            for x, size in zip(levels, sizes, strict=True)
        ],
        -1,
    )


@pytest.mark.parametrize("reg_max", BINS)
@pytest.mark.parametrize("views", [2, 4])
def test_predict__a_mirrored_image_gives_the_mirrored_answer(reg_max: int, views: int) -> None:
    plain, images = Uneven(reg_max), noise()
    teacher = MirroredTeacher(plain, views)
    for axes in MIRRORS[views]:
        found = teacher.predict(images.flip(axes))
        torch.testing.assert_close(found, mirror_of(teacher.predict(images), axes), rtol=1e-4, atol=1e-3)
        unaveraged = plain.predict(images.flip(axes)) - mirror_of(plain.predict(images), axes)
        assert unaveraged.abs().max() > 0.1  # a convolution alone does not


@pytest.mark.parametrize("reg_max", BINS)
def test_predict__sides_that_stay_in_place_are_found_out(reg_max: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrored, "SIDES", {-1: (0, 1, 2, 3), -2: (0, 1, 2, 3)})
    teacher, images = MirroredTeacher(Uneven(reg_max), 2), noise()
    wrong = teacher.predict(images.flip(-1)) - mirror_of(teacher.predict(images), (-1,))
    assert wrong[:, :4].abs().max() > 0.1


@pytest.mark.parametrize("reg_max", BINS)
def test_taps__averaging_again_changes_nothing(reg_max: int) -> None:
    once = MirroredTeacher(Uneven(reg_max), 2)
    first, again = (t.taps(noise(), BOTH, STRIDES) for t in (once, MirroredTeacher(once, 2)))
    torch.testing.assert_close(again.scores, first.scores, rtol=1e-4, atol=1e-4)
    bins = [x.boxes.reshape(2, 4, reg_max, -1) for x in (again, first)]
    if reg_max > 1:  # logits are the same but for a constant
        bins = [x.log_softmax(2) for x in bins]
    torch.testing.assert_close(bins[0], bins[1], rtol=1e-4, atol=1e-4)


def test_taps__mean_probability_of_both_views() -> None:
    plain, images = Uneven(), noise()
    own, turned = plain.predict(images)[:, 4:], mirror_of(plain.predict(images.flip(-1)), (-1,))[:, 4:]
    found = MirroredTeacher(plain, 2).predict(images)[:, 4:]
    torch.testing.assert_close(found, ((own + turned) / 2).float(), rtol=1e-4, atol=1e-5)


def test_taps__the_rest_is_of_the_image_itself_and_asked_for_once() -> None:
    plain, images = Uneven(), noise()
    teacher, reads = MirroredTeacher(plain, 4), frozenset({"neck", "boxes", "scores_one2one"})
    found = teacher.taps(images, reads, STRIDES)
    assert plain.asked == [reads | {"scores"}, BOTH, BOTH, BOTH]
    expected = plain.taps(images, reads | {"scores"}, STRIDES)
    for one, other in zip(found.neck, expected.neck, strict=True):
        assert torch.equal(one, other)
    assert found.scores_one2one is not None
    assert expected.scores_one2one is not None
    assert torch.equal(found.scores_one2one, expected.scores_one2one)
    assert not torch.allclose(found.scores.double(), expected.scores, atol=1e-2)
    plain.asked.clear()
    teacher.taps(images, frozenset({"neck"}), STRIDES)
    assert plain.asked == [frozenset({"neck"})]


def test_predict__a_class_the_teacher_lacks_stays_unknown() -> None:
    found = MirroredTeacher(Uneven(known=torch.tensor([True, False, True])), 2).predict(noise())
    assert torch.isfinite(found).all()
    assert found[:, 5].abs().max() == 0
    assert found[:, 4].max() > 0


def test_build_teacher__views_come_before_the_cache(tmp_path: Path) -> None:
    file = yolo_file(tmp_path, "yolo26n.yaml")
    kd = wrapped(recipe_for(file, teacher_views=2), imgsz=64)
    assert isinstance(kd.teacher_model, MirroredTeacher)
    assert "averaged over 2 views" in kd.teacher_model.title
    check_step(kd)
    kept = build_teacher(recipe_for(file, teacher_views=2, cache_teacher="ram"), DATA_NAMES, kd.student_model)
    assert isinstance(kept, CachedTeacher)
    assert isinstance(kept.inner, MirroredTeacher)
    plain = build_teacher(recipe_for(file, cache_teacher="ram"), DATA_NAMES, kd.student_model)
    assert isinstance(plain, CachedTeacher)
    assert plain.identity != kept.identity  # no answer is mistaken for one of the other


def test_check_reads__a_method_of_neck_maps_is_refused() -> None:
    teacher = MirroredTeacher(Uneven(), 2)
    with pytest.raises(TeacherError, match="teacher_views=2 has no effect: method 'cwd' reads the teacher's neck"):
        teacher.check_reads("cwd", frozenset({"neck"}))
    teacher.check_reads("hflkd", frozenset({"neck", "scores"}))
    teacher.check_reads("zero", frozenset())
