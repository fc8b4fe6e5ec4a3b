"""Parity gate: an exported graph must compute what the unfused float32 model computes, or it does not get its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.images import Image, ImageSet, to_canvas
from kd_yolo.inference import MAX_DETECTIONS, RawOutputs, detections, raw_outputs, split_raw

MIN_IMAGES = 32
MATCH_IOU = 0.99
WANTED_PER_IMAGE = 5  # detections per image that make a comparison worth its name
LOWEST_CONFIDENCE = 1e-6

Session = Callable[[Tensor], Tensor]
"""Runs an exported graph: (B, C, H, W) float32 in 0..1 to its one output."""


@dataclass(frozen=True)
class Tolerance:
    """What an artifact of a precision may differ by.

    Attributes:
        box: Largest difference of any raw box coordinate, as a fraction of the canvas's longer side.
        score: Largest difference of any class score.
        unmatched: Largest share of detections without a partner of the same class at IoU 0.99. It is not zero because two
            boxes whose scores tie to the last digit may leave NMS in either order.
    """

    box: float
    score: float
    unmatched: float


# Measured with float32 models at 64 to 640 px: running the same weights in another order of additions moves boxes by up
# to 1e-5 of the canvas and scores by up to 2e-6. Half precision has eleven bits: boxes move by up to 5e-3 of the canvas.
TOLERANCES = {
    "fp32": Tolerance(box=1e-4, score=1e-4, unmatched=0.01),
    "fp16": Tolerance(box=1e-2, score=1e-2, unmatched=0.10),
}


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
    iou: float = 0.7


@dataclass(frozen=True)
class ParityReport:
    """Result of the gate.

    Attributes:
        passed: Whether every bound holds.
        precision: Row of the tolerance table.
        tolerance: That row.
        images: Number of images compared.
        image_source: Where they came from.
        real_images: How many of them are photographs.
        canvases: Heights and widths compared.
        box_error_px: Largest difference of a raw box coordinate.
        box_error: The same as a fraction of the canvas's longer side; the worst over the canvases.
        score_error: Largest difference of a class score.
        confidence: Lowest score of the compared detections.
        reference_detections: Detections of the float32 model over all images.
        artifact_detections: Detections of the artifact.
        matched: Pairs of the same class with IoU >= 0.99.
        lowest_iou: Smallest IoU among the pairs.
        failures: What is out of bounds, in words.
    """

    passed: bool
    precision: str
    tolerance: Tolerance
    images: int
    image_source: str
    real_images: int
    canvases: list[tuple[int, int]]
    box_error_px: float
    box_error: float
    score_error: float
    confidence: float
    reference_detections: int
    artifact_detections: int
    matched: int
    lowest_iou: float
    failures: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """Return the numbers in one line."""
        return (
            f"raw outputs within {self.box_error_px:.2g} px and {self.score_error:.2g} score, {self.matched} of "
            f"{max(self.reference_detections, self.artifact_detections)} detections matched at IoU >= {MATCH_IOU}, "
            f"{self.images} images ({self.image_source})"
        )


@dataclass
class _Totals:
    """Sums and extremes over images."""

    box_error_px: float = 0.0
    box_error: float = 0.0
    score_error: float = 0.0
    reference: int = 0
    artifact: int = 0
    matched: int = 0
    lowest_iou: float = 1.0

    def add_raw(self, box: float, score: float, side: int) -> None:
        """Take in differences of one batch; a NaN must survive."""
        self.box_error_px = _worse(self.box_error_px, box)
        self.box_error = _worse(self.box_error, box / side)
        self.score_error = _worse(self.score_error, score)

    def add_match(self, reference: Tensor, artifact: Tensor) -> None:
        """Take in the detections of one image."""
        ious = match_detections(reference, artifact)
        self.reference += len(reference)
        self.artifact += len(artifact)
        self.matched += len(ious)
        self.lowest_iou = min([self.lowest_iou, *ious])


def check_parity(
    model: DetectionModel,
    session: Session,
    output: GraphOutput,
    images: ImageSet,
    plan: Sequence[tuple[tuple[int, int], int]],
    precision: str = "fp32",
) -> ParityReport:
    """Compare a graph with the unfused float32 model it came from.

    Args:
        model: The training form in float32 and eval mode, its head branch chosen.
        session: Runs the graph.
        output: What the graph's output holds.
        images: At least 32 images; they are dealt out over the plan.
        plan: Canvas (height, width) and batch size pairs to run the graph with.
        precision: Row of ``TOLERANCES``.
    """
    tolerance = TOLERANCES[precision]
    totals = _Totals()
    shares = [images.images[index :: len(plan)] for index in range(len(plan))]
    confidence = output.confidence or _confidence(model, shares[0], plan[0][0])
    for share, (canvas, batch) in zip(shares, plan, strict=True):
        for start in range(0, len(share), batch):
            pixels = to_canvas(share[start : start + batch], canvas, _channels(model))
            _compare(model, session, output, pixels, batch, confidence, totals)
    failures = _failures(totals, tolerance)
    return ParityReport(
        passed=not failures,
        precision=precision,
        tolerance=tolerance,
        images=len(images.images),
        image_source=images.describe(),
        real_images=images.real,
        canvases=[canvas for canvas, _ in plan],
        box_error_px=totals.box_error_px,
        box_error=totals.box_error,
        score_error=totals.score_error,
        confidence=confidence,
        reference_detections=totals.reference,
        artifact_detections=totals.artifact,
        matched=totals.matched,
        lowest_iou=totals.lowest_iou,
        failures=failures,
    )


def match_detections(reference: Tensor, artifact: Tensor) -> list[float]:
    """Pair detections (n, 6) and (m, 6) of one image one to one, same class, IoU >= 0.99, best overlap first.

    Returns:
        The IoU of every pair.
    """
    if not len(reference) or not len(artifact):
        return []
    overlap = box_iou(reference[:, :4], artifact[:, :4])
    overlap[reference[:, None, 5] != artifact[None, :, 5]] = -1.0
    found: list[float] = []
    for index in overlap.flatten().argsort(descending=True).tolist():
        row, column = divmod(index, overlap.shape[1])
        value = float(overlap[row, column])
        if value < MATCH_IOU and found is not None and _exhausted(overlap):
            break
        if value >= MATCH_IOU:
            found.append(value)
            overlap[row, :] = overlap[:, column] = -1.0
    return found


def compare_rows(raw: RawOutputs, rows: Sequence[Tensor], nms: bool, confidence: float, iou: float) -> tuple[float, float]:
    """Compare selected detections with everything the reference says, however the selection broke its ties.

    Every row must be one of the reference's (anchor, class) pairs, and the sorted scores of both selections must agree.

    Args:
        raw: The reference's raw outputs for B images.
        rows: The graph's detections, B tensors (n, 6).
        nms: Whether NMS made them.
        confidence: Its lowest score.
        iou: Its overlap bound.

    Returns:
        Largest distance of a row's box in pixels to a pair of the same class and (nearly) the same score, and largest
        difference of scores.
    """
    box_error = score_error = 0.0
    expected = detections(raw, nms, confidence, iou)
    for boxes, scores, found, wanted in zip(raw.boxes, raw.scores, rows, expected, strict=True):
        n = min(len(found), len(wanted))
        best = [rows[:, 4].sort(descending=True).values[:n] for rows in (found, wanted)]
        score_error = _worse(score_error, float((best[0] - best[1]).abs().max()) if n else 0.0)
        if len(found):
            box, score = _nearest_pair(boxes, scores, found)
            box_error, score_error = _worse(box_error, box), _worse(score_error, score)
    return box_error, score_error


def _compare(
    model: DetectionModel,
    session: Session,
    output: GraphOutput,
    pixels: Tensor,
    batch: int,
    confidence: float,
    totals: _Totals,
) -> None:
    """Run both on one batch and take in the differences."""
    count = len(pixels)
    reference = raw_outputs(model, pixels)
    padded = torch.cat((pixels, pixels.new_zeros(batch - count, *pixels.shape[1:])))
    result = session(padded)[:count].float()
    side = max(pixels.shape[-2:])
    if output.kind == "raw":
        raw = split_raw(result.transpose(1, 2), xyxy=False)
        totals.add_raw(*reference.difference(raw), side)
        found = detections(raw, output.nms, confidence)
        wanted = detections(reference, output.nms, confidence)
    else:
        found = [rows[rows[:, 4] > confidence] for rows in result]
        wanted = detections(reference, output.nms, confidence, output.iou)
        totals.add_raw(*compare_rows(reference, found, output.nms, confidence, output.iou), side)
    for one, other in zip(wanted, found, strict=True):
        totals.add_match(one, other)
