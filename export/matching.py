"""Compare the outputs of two detectors: pairs of detections, and selections that may break ties differently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from ultralytics.utils.metrics import box_iou

from kd_yolo.inference import MAX_DETECTIONS, NMS_IOU, Difference, RawOutputs, detections


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
class MatchLimits:
    """When two detections are the same, and when a difference is rounding.

    Attributes:
        cut: Lowest score that a detection may have.
        same: Lowest IoU of a pair.
        tie: Difference of scores that rounding explains, as a fraction of the larger one.
        nms: Overlap bound of NMS.
    """

    cut: float
    same: float = 0.99
    tie: float = 1e-3
    nms: float = NMS_IOU


@dataclass(frozen=True)
class Detected:
    """Detections of one image, and what they were selected from.

    Attributes:
        rows: (n, 6): x1, y1, x2, y2, score, class; best first.
        boxes: All boxes (A, 4) before selection, or None where only the selection is known.
        scores: Their class scores (A, K), or None.
    """

    rows: Tensor
    boxes: Tensor | None = None
    scores: Tensor | None = None

    def says(self, row: Tensor, limits: MatchLimits) -> bool:
        """Return whether a detection (6,) stands among what was selected from; True where that is not known."""
        if self.boxes is None or self.scores is None:
            return True
        same_score = (self.scores[:, int(row[5])] - row[4]).abs() <= limits.tie * row[4]
        return bool((same_score & (_overlap(row[None, :4], self.boxes)[0] >= limits.same)).any())


@dataclass(frozen=True)
class Match:
    """How the detections of one image pair up.

    Attributes:
        ious: IoU of every pair of the same class.
        alone: Detections of either side without a partner, and without an excuse.
        excused: Detections without a partner that rounding explains: the other side has the same box with the same
            score but did not select it, because the score ties with that of an overlapping box which it kept instead,
            or lies at the cut below which nothing is kept.
    """

    ious: list[float]
    alone: int
    excused: int


def match_detections(reference: Detected, artifact: Detected, limits: MatchLimits) -> Match:
    """Pair the detections of two sides one to one: same class, the same box, best overlap first.

    Args:
        reference: What the float32 model detects in one image.
        artifact: What the graph detects.
        limits: When two detections are the same.
    """
    ours, theirs = reference.rows, artifact.rows
    overlap = _overlap(ours[:, :4], theirs[:, :4])
    scores = ours[:, None, 4], theirs[None, :, 4]
    near = (scores[0] - scores[1]).abs() <= limits.tie * scores[0].maximum(scores[1])
    tied = (overlap > limits.nms) & near  # whatever the class: two classes of one anchor may tie as well
    overlap[ours[:, None, 5] != theirs[None, :, 5]] = 0.0
    pairs = [(float(overlap[i, j]), i, j) for i, j in (overlap >= limits.same).nonzero().tolist()]
    rows: set[int] = set()
    columns: set[int] = set()
    ious: list[float] = []
    for value, row, column in sorted(pairs, key=lambda pair: -pair[0]):
        if row not in rows and column not in columns:
            rows.add(row)
            columns.add(column)
            ious.append(value)
    alone = excused = 0
    for side, other, has_tie, paired in (
        (ours, artifact, tied.any(1), rows),
        (theirs, reference, tied.any(0), columns),
    ):
        full = len(other.rows) == MAX_DETECTIONS
        lowest = max(limits.cut, float(other.rows[:, 4].min())) if full else limits.cut
        for index in set(range(len(side))) - paired:
            explained = bool(has_tie[index]) or float(side[index, 4]) <= lowest * (1 + limits.tie)
            if explained and other.says(side[index], limits):
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


def _overlap(one: Tensor, other: Tensor) -> Tensor:
    """Return the IoU (n, m) of boxes (n, 4) and (m, 4), corners in any order.

    A head without box distribution may put x2 left of x1 where it is unsure; such a box must still equal itself.
    """
    pairs = [torch.cat((b[:, :2].minimum(b[:, 2:]), b[:, :2].maximum(b[:, 2:])), 1) for b in (one, other)]
    return box_iou(*pairs)


def _nearest_pair(boxes: Tensor, scores: Tensor, found: Tensor) -> tuple[Tensor, float]:
    """Return box distances (n,) and the largest score distance of rows (n, 6) to the nearest of (A, 4), (A, K)."""
    scale = boxes.abs().max().clamp_min(1.0)
    box = (boxes[None] - found[:, None, :4]).abs().amax(2)
    score = (scores.T[found[:, 5].long()] - found[:, None, 4]).abs()
    nearest = (box / scale + score).argmin(1, keepdim=True)
    return box.gather(1, nearest)[:, 0], float(score.gather(1, nearest).max())
