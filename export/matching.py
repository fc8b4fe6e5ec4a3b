"""Compare the outputs of two detectors: pairs of detections, and selections that may break ties differently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from ultralytics.utils.metrics import box_iou

from kd_yolo.inference import MAX_DETECTIONS, NMS_IOU, Difference, RawOutputs, detections

MATCH_IOU = 0.99


@dataclass(frozen=True)
class GraphOutput:
    """What the output of a graph holds.

    Attributes:
        kind: ``raw`` for all anchors (B, 4 + K, A), centre-size boxes; ``rows`` for selected detections (B, n, 6).
        nms: Whether the head branch behind it needs NMS (inside or outside of the graph).
        confidence: Lowest score that an NMS inside the graph lets through; 0 without one.
        iou: Overlap bound of an NMS inside the graph.
    """

    kind: str
    nms: bool
    confidence: float = 0.0
    iou: float = NMS_IOU


@dataclass(frozen=True)
class Match:
    """How the detections of one image pair up.

    Attributes:
        ious: IoU of every pair of the same class, all >= 0.99.
        alone: Detections of either side without a partner, and without an excuse.
        excused: Detections without a partner that rounding explains: their score ties with that of the overlapping box
            which the other side kept instead, or lies at the cut below which nothing is kept.
    """

    ious: list[float]
    alone: int
    excused: int


def match_detections(reference: Tensor, artifact: Tensor, cut: float, tie: float, iou: float = NMS_IOU) -> Match:
    """Pair detections (n, 6) and (m, 6) of one image one to one, same class, IoU >= 0.99, best overlap first.

    Args:
        reference: x1, y1, x2, y2, score, class; best first.
        artifact: The same of the other side.
        cut: Lowest score that a detection may have.
        tie: Difference of scores that rounding explains, as a fraction of the larger one.
        iou: Overlap bound of NMS.
    """
    overlap = box_iou(reference[:, :4], artifact[:, :4])
    ours, theirs = reference[:, None, 4], artifact[None, :, 4]
    near = (ours - theirs).abs() <= tie * ours.maximum(theirs)
    tied = (overlap > iou) & near  # whatever the class: two classes of one anchor may tie as well
    overlap[reference[:, None, 5] != artifact[None, :, 5]] = 0.0
    pairs = [(float(overlap[i, j]), i, j) for i, j in (overlap >= MATCH_IOU).nonzero().tolist()]
    rows: set[int] = set()
    columns: set[int] = set()
    ious: list[float] = []
    for value, row, column in sorted(pairs, key=lambda pair: -pair[0]):
        if row not in rows and column not in columns:
            rows.add(row)
            columns.add(column)
            ious.append(value)
    left = [(reference, tied.any(1), rows, artifact), (artifact, tied.any(0), columns, reference)]
    alone = excused = 0
    for side, has_tie, paired, other in left:
        lowest = max(cut, float(other[:, 4].min())) if len(other) == MAX_DETECTIONS else cut
        for index in set(range(len(side))) - paired:
            if bool(has_tie[index]) or float(side[index, 4]) <= lowest * (1 + tie):
                excused += 1
            else:
                alone += 1
    return Match(ious, alone, excused)


def compare_rows(raw: RawOutputs, rows: Sequence[Tensor], output: GraphOutput) -> Difference:
    """Compare selected detections with everything the reference says, however the selection broke its ties.

    Every row must be one of the reference's (anchor, class) pairs. Without NMS the sorted scores must agree too: which
    of two equal scores comes first is open, the list of scores is not.

    Args:
        raw: The reference's raw outputs for B images.
        rows: The graph's detections, B tensors (n, 6).
        output: How the graph selects.

    Returns:
        Distances of the rows' boxes to their pairs, and the largest difference of scores.
    """
    score_error = 0.0
    apart: list[Tensor] = []
    expected = detections(raw, output.nms, output.confidence, output.iou)
    for boxes, scores, found, wanted in zip(raw.boxes, raw.scores, rows, expected, strict=True):
        if not output.nms:
            n = min(len(found), len(wanted))
            ours, theirs = (rows[:, 4].sort(descending=True).values[:n] for rows in (found, wanted))
            score_error = worse(score_error, float((ours - theirs).abs().max()) if n else 0.0)
        if len(found):
            box, score = _nearest_pair(boxes, scores, found)
            apart.append(box)
            score_error = worse(score_error, score)
    distances = torch.cat(apart) if apart else torch.zeros(1)
    return Difference(float(distances.max()), float(distances.mean()), score_error)


def worse(a: float, b: float) -> float:
    """Return the larger number, or NaN if either is."""
    return float("nan") if a != a or b != b else max(a, b)


def _nearest_pair(boxes: Tensor, scores: Tensor, found: Tensor) -> tuple[Tensor, float]:
    """Return box distances (n,) and the largest score distance of rows (n, 6) to the nearest of (A, 4), (A, K)."""
    scale = boxes.abs().max().clamp_min(1.0)
    box = (boxes[None] - found[:, None, :4]).abs().amax(2)
    score = (scores.T[found[:, 5].long()] - found[:, None, 4]).abs()
    nearest = (box / scale + score).argmin(1, keepdim=True)
    return box.gather(1, nearest)[:, 0], float(score.gather(1, nearest).max())
