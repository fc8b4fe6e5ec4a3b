"""Parity gate: an exported graph must compute what the unfused float32 model computes, or it does not get its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from kd_yolo.export.matching import Detected, GraphOutput, Match, MatchLimits, compare_rows, match_detections, worse
from kd_yolo.export.weights import WeightReport
from torch import Tensor
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.images import Image, ImageSet, to_canvas
from kd_yolo.inference import CONFIDENCE, Difference, RawOutputs, channels_of, detections, raw_outputs, split_raw

MIN_IMAGES = 32
ANCHORS_PER_IMAGE = 20  # above the threshold before NMS, on average: enough to compare


@dataclass(frozen=True)
class Trial:
    """One way to run an artifact.

    Attributes:
        run: Runs it: (B, C, H, W) float32 in 0..1 to its one output.
        canvas: Height and width in pixels.
        batch: Images per call.
    """

    run: Callable[[Tensor], Tensor]
    canvas: tuple[int, int]
    batch: int


@dataclass(frozen=True)
class Tolerance:
    """What an artifact of a precision may differ by.

    Attributes:
        box: Largest difference of any raw box coordinate, as a fraction of the canvas's longer side.
        box_mean: Mean difference of the raw box coordinates, the same unit.
        score: Largest difference of any class score.
        tie: Difference of two scores, as a fraction of the score, that rounding explains.
        match_iou: Lowest IoU of two detections of the same class that are the same detection.
        unmatched: Largest share of detections without a partner, ties apart. It is not zero because a tie in NMS can
            change what the boxes next to it do.
    """

    box: float
    box_mean: float
    score: float
    tie: float
    match_iou: float
    unmatched: float


# Measured on NEU-DET photographs at 128 to 640 px with yolo26n, yolov8n, yolo11n, and LightNets, yolo26n and
# re-parameterized yolo26n trained there, NMS-free heads too, thresholds down to 3e-5.
# float32 (ONNX, OpenVINO, TorchScript, ncnn): box 1.8e-4, box_mean 1.1e-6, score 3.9e-5, unmatched 1e-4; and score
# 1.5e-4 of one yolo26n with merged branches at 224 px, whose file holds exactly the deployed weights. The score is the
# runtimes' arithmetic: the exported weights in float64 are within 2e-6, and it stays at 2e-5 with all graph
# optimizations of ONNX Runtime off. What weights a file holds is checked one by one, see ``weights.py``.
# float16, eleven bits, the same whether ONNX computes in it or OpenVINO and ncnn only store the weights so: box 0.75
# (an anchor that nothing detects), box_mean 2.5e-3, score 0.10 (both of a yolo26n whose BatchNorms multiply by a lot; a
# LightNet 0.12, 1.6e-3, 0.025), unmatched 0.016 (0.18 at IoU 0.99: small boxes move by more than that).
# int8 (ONNX for a CPU and for TensorRT, OpenVINO): box 1.7, box_mean 2.5e-2, score 0.53, unmatched 0.041; what counts
# is the loss of mAP.
TOLERANCES = {
    "fp32": Tolerance(box=5e-4, box_mean=1e-5, score=3e-4, tie=1e-3, match_iou=0.99, unmatched=0.01),
    "fp16": Tolerance(box=2.0, box_mean=6e-3, score=0.25, tie=5e-2, match_iou=0.9, unmatched=0.1),
    "int8": Tolerance(box=4.0, box_mean=5e-2, score=0.7, tie=0.5, match_iou=0.5, unmatched=0.1),
}


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
        box_error_mean: Mean difference of the raw box coordinates, as a fraction of the canvas's longer side.
        score_error: Largest difference of a class score.
        confidence: Lowest score of the compared detections.
        reference_detections: Detections of the float32 model over all images.
        artifact_detections: Detections of the artifact.
        matched: Pairs of the same class with IoU >= ``tolerance.match_iou``.
        excused: Detections without a partner because scores tie or lie at the threshold, within ``tolerance.tie``.
        unmatched: Detections without a partner or an excuse.
        lowest_iou: Smallest IoU among the pairs.
        failures: What is out of bounds, in words.
        weights: Result of comparing the weights themselves; None where the format's cannot be read.
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
    box_error_mean: float
    score_error: float
    confidence: float
    reference_detections: int
    artifact_detections: int
    matched: int
    excused: int
    unmatched: int
    lowest_iou: float
    failures: list[str]
    weights: WeightReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """Return the numbers in one line."""
        return (
            f"raw outputs within {self.box_error_px:.2g} px and {self.score_error:.2g} score; of "
            f"{self.reference_detections} detections {self.matched} matched at IoU >= {self.tolerance.match_iou}, "
            f"{self.excused} tied, {self.unmatched} unmatched; {self.image_source} images"
        )


@dataclass
class _Totals:
    """Sums and extremes over images."""

    box_error_px: float = 0.0
    box_error: float = 0.0
    box_sum: float = 0.0
    images: int = 0
    score_error: float = 0.0
    reference: int = 0
    artifact: int = 0
    matched: int = 0
    excused: int = 0
    alone: int = 0
    lowest_iou: float = 1.0

    def add_raw(self, difference: Difference, side: int, images: int) -> None:
        """Take in the differences of one batch; a NaN must survive."""
        self.box_error_px = worse(self.box_error_px, difference.box)
        self.box_error = worse(self.box_error, difference.box / side)
        self.box_sum += difference.box_mean / side * images
        self.images += images
        self.score_error = worse(self.score_error, difference.score)

    def add_match(self, reference: Detected, artifact: Detected, match: Match) -> None:
        """Take in the detections of one image."""
        self.reference += len(reference.rows)
        self.artifact += len(artifact.rows)
        self.matched += len(match.ious)
        self.excused += match.excused
        self.alone += match.alone
        self.lowest_iou = min([self.lowest_iou, *match.ious])


def check_parity(
    model: DetectionModel,
    trials: Sequence[Trial],
    output: GraphOutput,
    images: ImageSet,
    precision: str = "fp32",
) -> ParityReport:
    """Compare a graph with the unfused float32 model it came from.

    Args:
        model: The training form in float32 and eval mode, its head branch chosen.
        trials: Ways to run the artifact.
        output: What its output holds.
        images: At least 32 images; they are dealt out over the trials.
        precision: Row of ``TOLERANCES``.
    """
    tolerance = TOLERANCES[precision]
    totals = _Totals()
    shares = [images.images[index :: len(trials)] for index in range(len(trials))]
    confidence = output.confidence or _confidence(model, shares[0], trials[0].canvas)
    limits = MatchLimits(confidence, tolerance.match_iou, tolerance.tie, output.iou)
    for share, trial in zip(shares, trials, strict=True):
        for start in range(0, len(share), trial.batch):
            pixels = to_canvas(share[start : start + trial.batch], trial.canvas, channels_of(model))
            _compare(model, trial, output, pixels, limits, totals)
    failures = _failures(totals, tolerance, output)
    return ParityReport(
        passed=not failures,
        precision=precision,
        tolerance=tolerance,
        images=len(images.images),
        image_source=images.describe(),
        real_images=images.real,
        canvases=[trial.canvas for trial in trials],
        box_error_px=totals.box_error_px,
        box_error=totals.box_error,
        box_error_mean=totals.box_sum / max(totals.images, 1),
        score_error=totals.score_error,
        confidence=confidence,
        reference_detections=totals.reference,
        artifact_detections=totals.artifact,
        matched=totals.matched,
        excused=totals.excused,
        unmatched=totals.alone,
        lowest_iou=totals.lowest_iou,
        failures=failures,
    )


def _compare(
    model: DetectionModel,
    trial: Trial,
    output: GraphOutput,
    pixels: Tensor,
    limits: MatchLimits,
    totals: _Totals,
) -> None:
    """Run both on one batch and take in the differences."""
    count = len(pixels)
    reference = raw_outputs(model, pixels)
    padded = torch.cat((pixels, pixels.new_zeros(trial.batch - count, *pixels.shape[1:])))
    result = trial.run(padded)[:count].float()
    if output.kind == "raw":
        raw = split_raw(result.transpose(1, 2), xyxy=False)
        difference = reference.difference(raw)
        found = _with_raw(detections(raw, output.nms, limits.cut), raw)
    else:
        rows = [item[item[:, 4] > output.confidence] for item in result]
        difference = compare_rows(reference, rows, output)
        found = [Detected(item[item[:, 4] > limits.cut]) for item in rows]
    totals.add_raw(difference, max(pixels.shape[-2:]), count)
    wanted = _with_raw(detections(reference, output.nms, limits.cut, output.iou), reference)
    for one, other in zip(wanted, found, strict=True):
        totals.add_match(one, other, match_detections(one, other, limits))


def _with_raw(rows: Sequence[Tensor], raw: RawOutputs) -> list[Detected]:
    return [Detected(*item) for item in zip(rows, raw.boxes, raw.scores, strict=True)]


def _confidence(model: DetectionModel, images: Sequence[Image], canvas: tuple[int, int]) -> float:
    """Return a threshold that leaves enough to compare: the usual one, or a lower one for a model that is less sure."""
    some = images[:8]
    best = raw_outputs(model, to_canvas(some, canvas, channels_of(model))).scores.amax(2).flatten()
    rank = min(ANCHORS_PER_IMAGE * len(some), len(best) - 1)
    high, low = best.topk(rank + 1).values[-2:].tolist()
    return min(CONFIDENCE, (high + low) / 2)


def _failures(totals: _Totals, tolerance: Tolerance, output: GraphOutput) -> list[str]:
    """Return what is out of bounds; written so that NaN is."""
    failures = []
    if not totals.box_error <= tolerance.box:
        failures.append(
            f"raw boxes differ by {totals.box_error_px:.3g} px, {totals.box_error:.2e} of the canvas "
            f"(bound {tolerance.box:g})"
        )
    mean = totals.box_sum / max(totals.images, 1)
    if not mean <= tolerance.box_mean:
        failures.append(f"raw boxes differ by {mean:.2e} of the canvas on average (bound {tolerance.box_mean:g})")
    if not totals.score_error <= tolerance.score:
        failures.append(f"scores differ by {totals.score_error:.3g} (bound {tolerance.score:g})")
    both = totals.reference + totals.artifact
    if both and not totals.alone / both <= tolerance.unmatched:
        failures.append(
            f"{totals.alone} of {both} detections have no partner at IoU >= {tolerance.match_iou} "
            f"(at most {tolerance.unmatched:.0%} may lack one)"
        )
    if not totals.reference and output.kind == "rows":
        failures.append(
            f"no image shows a detection above {output.confidence:g}, so nothing could be compared; "
            "give images that do with data="
        )
    return failures
