from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kd_yolo.export.matching import Detected, GraphOutput, Match, MatchLimits, compare_rows, match_detections, worse
from torch import Tensor

from kd_yolo.inference import RawOutputs, detections

TIE = 1e-3
CUT = 0.1


def rows(*values: tuple[float, float, float, float, float, float]) -> Tensor:
    return torch.tensor(values).reshape(-1, 6)


def match(reference: Tensor, artifact: Tensor, cut: float, tie: float) -> Match:
    return match_detections(Detected(reference), Detected(artifact), MatchLimits(cut, tie=tie))


BIG = (0.0, 0.0, 100.0, 100.0, 0.9, 0.0)
SMALL = (50.0, 50.0, 70.0, 70.0, 0.5, 1.0)


def test_match__equal_sides_pair_completely_in_any_order() -> None:
    found = match(rows(BIG, SMALL), rows(SMALL, BIG), CUT, TIE)
    assert (found.ious, found.alone, found.excused) == ([1.0, 1.0], 0, 0)


def test_match__golden_overlap() -> None:
    # 100x100 against 100x99.5 inside it: 9950 / 10000 = 0.995, a pair; 100x98: 0.98, none, and both are left over
    near, far = (0.0, 0.0, 100.0, 99.5, 0.8, 0.0), (0.0, 0.0, 100.0, 98.0, 0.8, 0.0)
    assert match(rows(BIG), rows(near), CUT, TIE).ious == pytest.approx([0.995], abs=1e-6)
    found = match(rows(BIG), rows(far), CUT, TIE)
    assert (found.ious, found.alone) == ([], 2)


def test_match__other_class_is_no_partner() -> None:
    found = match(rows(BIG), rows((*BIG[:4], 0.8, 2.0)), CUT, TIE)
    assert (found.ious, found.alone, found.excused) == ([], 2, 0)


def test_match__one_partner_each() -> None:
    found = match(rows(BIG), rows(BIG, (*BIG[:4], 0.7, 0.0)), CUT, TIE)
    assert (len(found.ious), found.alone) == (1, 1)


def test_match__ties_are_excused_and_real_differences_are_not() -> None:
    # NMS kept one of two boxes that overlap by 0.9 and whose scores tie; each side kept another one
    other = (0.0, 0.0, 100.0, 90.0)
    tied = match(rows(BIG), rows((*other, 0.9 * (1 - 5e-4), 0.0)), CUT, TIE)
    assert (tied.alone, tied.excused) == (0, 2)
    apart = match(rows(BIG), rows((*other, 0.9 * (1 - 5e-3), 0.0)), CUT, TIE)
    assert (apart.alone, apart.excused) == (2, 0)


def test_match__a_tie_must_stand_in_the_other_sides_raw_output() -> None:
    """A box that moved overlaps its old self and has its score: that is an error, not a tie."""
    other = (0.0, 0.0, 100.0, 90.0, 0.9, 0.0)
    boxes = torch.tensor([BIG[:4], other[:4]])
    scores = torch.tensor([[0.9], [0.9]])
    both = Detected(rows(BIG), boxes, scores), Detected(rows(other), boxes, scores)
    assert match_detections(*both, MatchLimits(CUT)).excused == 2
    moved = Detected(rows(BIG), boxes[:1], scores[:1]), Detected(rows(other), boxes[1:], scores[1:])
    assert match_detections(*moved, MatchLimits(CUT)).alone == 2


def test_match__at_the_cut_is_excused() -> None:
    at_cut, above = (*SMALL[:4], CUT * (1 + TIE / 2), 1.0), (*SMALL[:4], CUT * (1 + 2 * TIE), 1.0)
    assert match(rows(at_cut), rows(), CUT, TIE).excused == 1
    assert match(rows(above), rows(), CUT, TIE).alone == 1


def test_match__inverted_box_equals_itself() -> None:
    inverted = rows((60.0, 10.0, 40.0, 30.0, 0.8, 1.0))
    assert match(inverted, inverted.clone(), CUT, TIE).ious == [1.0]


def test_match__nothing_on_either_side() -> None:
    found = match(rows(), rows(), CUT, TIE)
    assert (found.ious, found.alone, found.excused) == ([], 0, 0)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 10_000))
def test_match__accounts_for_every_detection(n: int, m: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        low = torch.rand(count, 2, generator=generator) * 50
        size = 5 + torch.rand(count, 2, generator=generator) * 20
        score = 0.1 + 0.9 * torch.rand(count, 1, generator=generator)
        label = torch.randint(0, 2, (count, 1), generator=generator).float()
        return torch.cat((low, low + size, score, label), 1)

    one, other = draw(n), draw(m)
    other = torch.cat((other, one[: n // 2]))
    found = match(one, other, CUT, TIE)
    assert 2 * len(found.ious) + found.alone + found.excused == len(one) + len(other)
    assert len(found.ious) >= n // 2


def raw(seed: int = 0, anchors: int = 30) -> RawOutputs:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(2, anchors, 2, generator=generator) * 50
    size = 5 + torch.rand(2, anchors, 2, generator=generator) * 20
    return RawOutputs(torch.cat((low, low + size), 2), torch.rand(2, anchors, 3, generator=generator))


@pytest.mark.parametrize("nms", [True, False])
def test_compare_rows__own_selection_is_equal(nms: bool) -> None:
    output = GraphOutput("rows", nms, confidence=0.2 if nms else 0.0)
    found = compare_rows(raw(), detections(raw(), nms, output.confidence), output)
    assert found.box < 1e-4  # corners to centre and back
    assert found.score == 0


def test_compare_rows__finds_moved_boxes_and_changed_scores() -> None:
    output = GraphOutput("rows", nms=False)
    selected = detections(raw(), False, 0.0)
    moved = [item.clone() for item in selected]
    moved[0][3, 2] += 0.25
    found = compare_rows(raw(), moved, output)
    assert found.box == pytest.approx(0.25, abs=1e-4)
    changed = [item.clone() for item in selected]
    changed[1][0, 4] += 0.125
    assert compare_rows(raw(), changed, output).score == pytest.approx(0.125, abs=1e-6)


def test_compare_rows__finds_left_out_detections_without_nms() -> None:
    selected = [item[5:] for item in detections(raw(), False, 0.0)]
    assert compare_rows(raw(), selected, GraphOutput("rows", nms=False)).score > 1e-3


def test_worse__keeps_nan() -> None:
    assert worse(1.0, 2.0) == worse(2.0, 1.0) == 2.0
    assert math.isnan(worse(float("nan"), 1.0))
    assert math.isnan(worse(1.0, float("nan")))
