"""A teacher on a larger canvas: which of its cells speaks, and where its boxes arrive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from kd_yolo.distill.base import DetectorSpec, LevelSpec, Taps
from kd_yolo.distill.ops.boxes import decode_boxes
from kd_yolo.distill.teachers.base import Teacher
from kd_yolo.distill.teachers.dense import anchor_grid, dense_taps, distances, empty_maps
from kd_yolo.distill.teachers.scaled import ScaledTeacher
from kd_yolo.distill.teachers.several import SeveralTeachers

STRIDES = (8, 16, 32)


class Painted(Teacher):
    """A teacher whose neck maps, scores and boxes are given for its own canvas."""

    provides = frozenset({"neck", "scores", "boxes", "head"})

    def __init__(self, canvas: int, corners: Tensor | None = None, seed: int = 0, known: Tensor | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.strides, self.canvas, self.class_known = STRIDES, canvas, known
        self.maps = {
            s: torch.randn(2, c, canvas // s, canvas // s, generator=generator) for s, c in self.widths.items()
        }
        cells = {s: (canvas // s) ** 2 for s in STRIDES}
        self.scores = {s: torch.randn(2, 3, cells[s], generator=generator) for s in STRIDES}
        self.corners = torch.tensor([40.0, 30.0, 90.0, 110.0]) if corners is None else corners

    widths: ClassVar = {8: 4, 16: 6, 32: 8}

    def describe(self, strides: Sequence[int]) -> DetectorSpec:
        return DetectorSpec(tuple(LevelSpec(self.widths[s], s) for s in strides), 3, reg_max=1)

    def taps(self, images: Tensor, reads: frozenset[str], strides: Sequence[int], hold: int = 1) -> Taps:
        assert images.shape[-1] == self.canvas
        maps = [self.maps[s] for s in strides]
        anchors, stride_of = anchor_grid(maps, strides)
        boxes = distances(self.corners.expand(2, len(anchors), 4), anchors, stride_of)
        return dense_taps(maps, strides, torch.cat([self.scores[s] for s in strides], 2), boxes)


def ask(teacher: Teacher, canvas: int, strides: Sequence[int] = STRIDES) -> Taps:
    return teacher.taps(torch.zeros(2, 3, canvas, canvas), frozenset({"scores", "boxes", "neck"}), strides)


def test_source__position_takes_the_nearest_share_of_the_picture() -> None:
    assert [ScaledTeacher(Painted(128), 128, 64, "position").source(s) for s in STRIDES] == [16, 32, 32]
    assert [ScaledTeacher(Painted(224), 224, 128, "position").source(s) for s in STRIDES] == [16, 32, 32]
    assert [ScaledTeacher(Painted(128), 128, 96, "position").source(s) for s in STRIDES] == [8, 16, 32]
    assert [ScaledTeacher(Painted(128), 128, 64, "stride").source(s) for s in STRIDES] == [8, 16, 32]


def test_position__at_twice_the_canvas_the_grids_are_equal() -> None:
    inner = Painted(128)
    found = ask(ScaledTeacher(inner, 128, 64, "position"), 128, (8, 16))
    assert torch.equal(found.scores[..., :64], inner.scores[16])  # 8 x 8 cells of both
    assert torch.equal(found.scores[..., 64:], inner.scores[32])
    assert torch.equal(found.neck[0], inner.maps[16])
    assert torch.equal(found.neck[1], inner.maps[32])


def test_several_teachers__have_no_maps_and_answer_as_the_one_they_all_are() -> None:
    one = ScaledTeacher(Painted(128, seed=1), 128, 64, "stride")
    two = ScaledTeacher(SeveralTeachers([Painted(128, seed=1), Painted(128, seed=1)], 3), 128, 64, "stride")
    reads = frozenset({"scores", "boxes"})
    alone, merged = (teacher.taps(torch.zeros(2, 3, 128, 128), reads, STRIDES) for teacher in (one, two))
    assert [tuple(x.shape) for x in merged.neck] == [(2, 0, 8, 8), (2, 0, 4, 4), (2, 0, 2, 2)]
    assert torch.allclose(merged.scores, alone.scores, atol=1e-5)
    assert torch.allclose(merged.boxes, alone.boxes, atol=1e-5)


def test_stride__the_most_confident_of_the_cells_speaks() -> None:
    inner = Painted(128, seed=1)
    found = ask(ScaledTeacher(inner, 128, 64, "stride"), 128, (8,))
    scores = inner.scores[8].view(2, 3, 16, 16)
    for y, x in ((0, 0), (3, 5), (7, 7)):
        block = scores[:, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].flatten(2)
        best = block.amax(1).argmax(1)
        expected = torch.stack([block[i, :, best[i]] for i in range(2)])
        assert torch.equal(found.scores[..., 8 * y + x], expected)


def test_stride__classes_that_the_teacher_lacks_do_not_count() -> None:
    inner = Painted(128, known=torch.tensor([True, True, False]))
    inner.scores[8][:, 2] = 50.0
    inner.scores[8][:, 2, 0] = 90.0  # would win in the first cell
    inner.scores[8][:, 0, 1] = 9.0
    found = ask(ScaledTeacher(inner, 128, 64, "stride"), 128, (8,))
    assert torch.equal(found.scores[..., 0], inner.scores[8][..., 1])


@pytest.mark.parametrize("pairing", ["position", "stride"])
@pytest.mark.parametrize(("canvas", "student"), [(128, 64), (224, 128), (160, 96), (256, 64)])
def test_boxes__arrive_in_pixels_of_the_students_canvas(canvas: int, student: int, pairing: str) -> None:
    inner = Painted(canvas)
    found = ask(ScaledTeacher(inner, canvas, student, pairing), canvas)  # type: ignore[arg-type]
    expected = inner.corners * student / canvas
    assert found.scores.shape[-1] == sum((student // s) ** 2 for s in STRIDES)
    assert torch.allclose(decode_boxes(found, 1), expected.expand(2, found.scores.shape[-1], 4), atol=1e-3)
    assert not torch.allclose(decode_boxes(found, 1), inner.corners.expand_as(decode_boxes(found, 1)), atol=1.0)


def test_same_canvas__changes_nothing() -> None:
    inner = Painted(64)
    found, plain = ask(ScaledTeacher(inner, 64, 64), 64), ask(inner, 64)
    assert torch.equal(found.scores, plain.scores)
    assert torch.allclose(found.boxes, plain.boxes, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(found.neck, plain.neck, strict=True))


def test_describe__gives_the_widths_of_the_levels_that_are_taken() -> None:
    spec = ScaledTeacher(Painted(128), 128, 64, "position").describe((8, 16, 32))
    assert [level.channels for level in spec.levels] == [6, 8, 8]
    assert spec.reg_max == 1


def test_provides__the_inside_of_the_head_is_not_given() -> None:
    teacher = ScaledTeacher(Painted(128), 128, 64)
    assert teacher.provides == {"neck", "scores", "boxes"}
    assert "twice" in teacher.title or "2 times" in teacher.title


def test_taps__neck_alone() -> None:
    teacher = ScaledTeacher(Painted(128), 128, 64)
    found = teacher.taps(torch.zeros(2, 3, 128, 128), frozenset({"neck"}), STRIDES)
    assert [tuple(x.shape[-2:]) for x in found.neck] == [(8, 8), (4, 4), (2, 2)]
    assert found.scores.shape[1] == 0
    assert empty_maps(torch.zeros(2, 3, 64, 64), STRIDES)[0].shape[-2:] == found.neck[0].shape[-2:]
