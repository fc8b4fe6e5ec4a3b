"""Answers at anchors: dense mathematics, queries of a transformer, several teachers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kd_yolo.distill.base import DetectorSpec, Taps
from kd_yolo.distill.ops.boxes import decode_boxes
from kd_yolo.distill.teacher import UNKNOWN_CLASS_LOGIT, map_classes
from kd_yolo.distill.teachers.base import Teacher
from kd_yolo.distill.teachers.choice import choose
from kd_yolo.distill.teachers.dense import (
    BACKGROUND_LOGIT,
    anchor_grid,
    dense_spec,
    dense_taps,
    distances,
    empty_maps,
    probability_logits,
    product_root_logits,
    student_classes,
)
from kd_yolo.distill.teachers.rtdetr import CENTRE_RADIUS, query_targets
from kd_yolo.distill.teachers.several import SeveralTeachers, mean_boxes, mean_logits, pick_boxes, pick_logits
from kd_yolo.errors import TeacherError


def grid(canvas: tuple[int, int] = (64, 96), strides: Sequence[int] = (8, 16, 32)) -> tuple[Tensor, Tensor]:
    return anchor_grid(empty_maps(torch.zeros(1, 3, *canvas), strides), strides)


def drawn(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


class Fixed(Teacher):
    """A teacher that always gives the same answers."""

    def __init__(self, scores: Tensor, boxes: Tensor, known: Tensor | None = None, strides: tuple[int, ...] = (8, 16)):
        super().__init__()
        self.scores, self.boxes, self.strides, self.class_known = scores, boxes, strides, known
        self.provides = frozenset({"scores", "boxes", "neck"})

    def describe(self, strides: Sequence[int]) -> DetectorSpec:
        return dense_spec(strides, self.scores.shape[1])

    def taps(self, images: Tensor, reads: frozenset[str], strides: Sequence[int], hold: int = 1) -> Taps:
        return dense_taps(empty_maps(images, strides), strides, self.scores, self.boxes)


# ---- dense mathematics ----


@pytest.mark.parametrize("canvas", [(64, 64), (64, 96), (32, 160)])
@pytest.mark.parametrize("strides", [(8, 16, 32), (4, 8, 16, 32), (16,), (8, 64)])
def test_distances__come_back_as_the_same_corners(canvas: tuple[int, int], strides: tuple[int, ...]) -> None:
    maps = empty_maps(torch.zeros(2, 3, *canvas), strides)
    anchors, stride_of = anchor_grid(maps, strides)
    first = drawn(2, len(anchors), 2, scale=20.0)
    corners = torch.cat((first, first + drawn(2, len(anchors), 2, seed=1, scale=20.0).abs()), -1)
    taps = dense_taps(maps, strides, None, distances(corners, anchors, stride_of))
    assert torch.allclose(decode_boxes(taps, 1), corners, atol=1e-4)
    assert taps.scores.shape == (2, 0, len(anchors))


def test_anchor_grid__centres_by_hand() -> None:
    anchors, strides = grid((32, 64), (16, 32))
    # 16: 2 x 4 cells, x first; 32: 1 x 2 cells
    assert anchors.tolist()[:5] == [[0.5, 0.5], [1.5, 0.5], [2.5, 0.5], [3.5, 0.5], [0.5, 1.5]]
    assert anchors.tolist()[8:] == [[0.5, 0.5], [1.5, 0.5]]
    assert strides.tolist() == [16.0] * 8 + [32.0] * 2


def test_empty_maps__canvas_that_is_no_multiple_is_rounded_up() -> None:
    assert [tuple(x.shape) for x in empty_maps(torch.zeros(2, 3, 96, 64), (32, 64))] == [(2, 0, 3, 2), (2, 0, 2, 1)]


@pytest.mark.parametrize(("first", "second"), [(0.0, 0.0), (2.0, -1.0), (-30.0, 5.0), (40.0, 3.0), (-60.0, -60.0)])
def test_product_root_logits__equals_the_definition_in_float64(first: float, second: float) -> None:
    p, q = (1 / (1 + math.exp(-x)) for x in (first, second))
    score = math.sqrt(p * q)
    expected = math.log(score) - math.log1p(-score)
    found = float(product_root_logits(torch.tensor(first), torch.tensor(second)))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_product_root_logits__finite_where_both_are_certain() -> None:
    assert bool(torch.isfinite(product_root_logits(torch.tensor(200.0), torch.tensor(200.0))))


def test_probability_logits__inverse_of_sigmoid_and_finite_at_the_ends() -> None:
    logits = torch.linspace(-10, 10, 41)
    assert torch.allclose(probability_logits(logits.sigmoid()), logits, atol=5e-2)
    ends = probability_logits(torch.tensor([0.0, 1.0]))
    assert ends.tolist() == pytest.approx([-13.8155, 13.8155], abs=0.1)  # log(1e-6 / (1 - 1e-6))


def test_student_classes__by_name_and_a_constant_for_the_rest() -> None:
    class_map = map_classes({0: "Dent ", 1: "hole", 2: "scratch"}, {0: "scratch", 1: "stain", 2: "dent"})
    scores = drawn(2, 3, 5)
    mapped = student_classes(scores, class_map)
    assert torch.equal(mapped[:, 0], scores[:, 2])
    assert torch.equal(mapped[:, 2], scores[:, 0])
    assert bool((mapped[:, 1] == UNKNOWN_CLASS_LOGIT).all())


# ---- queries ----


def test_query_targets__one_box_by_hand() -> None:
    anchors, strides = grid((64, 64), (8, 16, 32))
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.25]]])  # x 16..48, y 24..40 of 64 pixels
    scores, sides = query_targets(boxes, torch.tensor([[[2.0], [-1.0]]]), anchors, strides, (64, 64))
    covered = (scores[0, 0] == 2.0).nonzero().flatten()
    points = (anchors * strides.unsqueeze(-1))[covered].tolist()
    # stride 8: x 20, 28, 36, 44 and y 28, 36, all within 20 px of the centre; 16: x 24, 40 and y 24, 40 lie on the
    # edge in y, which is outside; 32: x and y 16, 48 are on or beyond the edge
    assert points == [[x, y] for y in (28.0, 36.0) for x in (20.0, 28.0, 36.0, 44.0)]
    first = covered[0]  # centre 20, 28: left 4, top 4, right 28, bottom 12 pixels, in strides of 8
    assert sides[0, :, first].tolist() == [0.5, 0.5, 3.5, 1.5]
    outside = scores[0, 0] != 2.0
    assert bool((scores[0, :, outside] == BACKGROUND_LOGIT).all())
    assert bool((sides[0, :, outside] == 0).all())


def test_query_targets__the_surest_of_the_covering_speaks_for_all_its_classes() -> None:
    anchors, strides = grid((64, 64), (16,))
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.5, 0.5, 0.9, 0.9], [0.9, 0.9, 0.01, 0.01]]])
    logits = torch.tensor([[[0.0, 1.0, 9.0], [-3.0, -20.0, 9.0]]])  # the third covers no anchor centre
    scores, sides = query_targets(boxes, logits, anchors, strides, (64, 64))
    centre = (anchors == 1.5).all(-1).nonzero().flatten().tolist()[0]
    assert scores[0, :, centre].tolist() == pytest.approx([1.0, BACKGROUND_LOGIT])  # never below the background
    corners = decode_boxes(Taps((), scores, sides, strides, anchors), 1)
    assert corners[0, centre].tolist() == pytest.approx([3.2, 3.2, 60.8, 60.8], abs=1e-4)


def test_query_targets__an_unknown_class_does_not_choose() -> None:
    anchors, strides = grid((64, 64), (16,))
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.5, 0.5, 0.9, 0.9]]])
    logits = torch.tensor([[[0.0, 1.0], [50.0, -50.0]]])
    known = torch.tensor([True, False])
    scores, _ = query_targets(boxes, logits, anchors, strides, (64, 64), known)
    assert float(scores[0, 0].max()) == 1.0
    wrong, _ = query_targets(boxes, logits, anchors, strides, (64, 64))  # the twin without the mask
    assert float(wrong[0, 0].max()) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_query_targets__agrees_with_a_loop(seed: int) -> None:
    anchors, strides = grid((64, 96), (8, 16, 32))
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(2, 7, 4, generator=generator) * torch.tensor([1.0, 1.0, 0.6, 0.6])
    logits = torch.randn(2, 3, 7, generator=generator) * 2
    scores, sides = query_targets(boxes, logits, anchors, strides, (64, 96))
    for b in range(2):
        for a in range(0, len(anchors), 7):
            x, y = (anchors[a] * strides[a]).tolist()
            best, number = -math.inf, None
            for n in range(7):
                cx, cy, w, h = (boxes[b, n] * torch.tensor([96, 64, 96, 64])).tolist()
                reach = CENTRE_RADIUS * float(strides[a])
                inside = abs(x - cx) < w / 2 and abs(y - cy) < h / 2
                if inside and abs(x - cx) <= reach and abs(y - cy) <= reach and float(logits[b, :, n].max()) > best:
                    best, number = float(logits[b, :, n].max()), n
            if number is None:
                assert bool((scores[b, :, a] == BACKGROUND_LOGIT).all())
                assert bool((sides[b, :, a] == 0).all())
            else:
                assert torch.equal(scores[b, :, a], logits[b, :, number].clamp_min(BACKGROUND_LOGIT))


# ---- several ----


def test_mean_logits__is_the_mean_probability() -> None:
    scores, known = drawn(3, 2, 4, 5), torch.ones(3, 4, dtype=torch.bool)
    expected = torch.logit(scores.double().sigmoid().mean(0))
    assert torch.allclose(mean_logits(scores, known).double(), expected, atol=1e-4)


def test_mean_logits__of_one_or_equal_teachers_is_the_same() -> None:
    scores = torch.cat((drawn(1, 2, 3, 5), torch.full((1, 2, 3, 1), 60.0), torch.full((1, 2, 3, 1), -80.0)), -1)
    one = torch.ones(1, 3, dtype=torch.bool)
    assert torch.allclose(mean_logits(scores, one), scores[0], atol=1e-4)
    assert torch.allclose(mean_logits(scores.repeat(3, 1, 1, 1), one.repeat(3, 1)), scores[0], atol=1e-4)


def test_mean_logits__only_those_who_know_a_class_vote() -> None:
    scores = drawn(2, 1, 3, 4)
    known = torch.tensor([[True, True, False], [True, False, False]])
    merged = mean_logits(scores, known)
    assert torch.allclose(merged[:, 1], scores[0, :, 1], atol=1e-5)
    assert bool((merged[:, 2] == UNKNOWN_CLASS_LOGIT).all())
    assert not torch.allclose(merged[:, 0], scores[0, :, 0], atol=1e-2)


def test_mean_boxes__the_sure_teacher_decides() -> None:
    sides = torch.stack([torch.full((1, 4, 2), 1.0), torch.full((1, 4, 2), 5.0)])
    strength = torch.tensor([[[40.0, 0.0]], [[-40.0, 0.0]]])
    assert torch.allclose(mean_boxes(sides, strength), torch.tensor([1.0, 3.0]).expand(1, 4, 2))
    # probabilities 0.8 and 0.2: 0.8 * 1 + 0.2 * 5
    one = torch.logit(torch.tensor([[[0.8, 0.8]], [[0.2, 0.2]]]))
    assert torch.allclose(mean_boxes(sides, one), torch.full((1, 4, 2), 1.8), atol=1e-5)


def test_pick__classes_and_the_box_of_the_winning_class() -> None:
    scores = torch.tensor([[[[1.0, -9.0]], [[7.0, 7.0]]], [[[8.0, 8.0]], [[-1.0, 3.0]]]]).squeeze(2).unsqueeze(1)
    assert scores.shape == (2, 1, 2, 2)  # teachers, images, classes, anchors
    choice = torch.tensor([0, 1])
    merged = pick_logits(scores, choice)
    assert merged.tolist() == [[[1.0, -9.0], [-1.0, 3.0]]]
    sides = torch.stack([torch.full((1, 4, 2), 1.0), torch.full((1, 4, 2), 5.0)])
    assert pick_boxes(sides, merged, choice)[0, 0].tolist() == [1.0, 5.0]


def test_choose__best_ap_of_each_class() -> None:
    assert choose([[0.5, 0.1, None, 0.0, None], [0.4, 0.2, 0.0, 0.0, None]]) == [0, 1, 1, 0, 0]


@pytest.mark.parametrize("choice", [None, [1, 0, 0]])
def test_several__equal_teachers_teach_as_one(choice: list[int] | None) -> None:
    scores, boxes = drawn(2, 3, 80), drawn(2, 4, 80, seed=1)
    images, reads = torch.zeros(2, 3, 64, 64), frozenset({"scores", "boxes"})
    both = SeveralTeachers([Fixed(scores, boxes), Fixed(scores, boxes)], 3, choice)
    taps = both.taps(images, reads, (8, 16))
    assert torch.allclose(taps.scores, scores, atol=1e-4)
    assert torch.allclose(taps.boxes, boxes, atol=1e-4)
    assert both.class_known is None
    assert both.provides == {"scores", "boxes"}
    assert [x.shape[1] for x in taps.neck] == [0, 0]


def test_several__knows_what_any_of_them_knows() -> None:
    known = [torch.tensor([True, False, False]), torch.tensor([False, True, False])]
    members = [Fixed(drawn(1, 3, 80), drawn(1, 4, 80), k) for k in known]
    merged = SeveralTeachers(members, 3)
    assert merged.class_known is not None
    assert merged.class_known.tolist() == [True, True, False]
    taps = merged.taps(torch.zeros(1, 3, 64, 64), frozenset({"scores", "boxes"}), (8, 16))
    assert bool(torch.isfinite(taps.scores).all())
    assert bool(torch.isfinite(taps.boxes).all())


def test_several__no_common_level_is_refused() -> None:
    scores, boxes = drawn(1, 3, 80), drawn(1, 4, 80)
    with pytest.raises(TeacherError, match="no common feature level"):
        SeveralTeachers([Fixed(scores, boxes, strides=(4,)), Fixed(scores, boxes, strides=(8, 16))], 3)


def test_check_reads__names_what_is_missing() -> None:
    both = SeveralTeachers([Fixed(drawn(1, 3, 80), drawn(1, 4, 80))] * 2, 3)
    both.check_reads("kd-lightnet", frozenset({"scores", "boxes", "scores_one2one"}))
    with pytest.raises(TeacherError, match=r"'cwd' reads the teacher's neck.*gives boxes, scores") as caught:
        both.check_reads("cwd", frozenset({"neck"}))
    assert "\n" not in str(caught.value)


def test_predict__unknown_classes_have_no_probability() -> None:
    teacher = Fixed(drawn(2, 3, 80), drawn(2, 4, 80).abs(), torch.tensor([True, False, True]))
    output = teacher.predict(torch.zeros(2, 3, 64, 64))
    assert output.shape == (2, 7, 80)
    assert float(output[:, 5].abs().max()) == 0
    assert torch.allclose(output[:, 4], teacher.scores[:, 0].sigmoid())
