"""What post-training quantization reports, and the search for the layers that stay in float."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kd_yolo.export.calibration import calibration_record

from kd_yolo.errors import ExportError
from kd_yolo.tables import markdown_table

MAX_FLOAT_SHARE = 0.5
"""With more of its layers in float an int8 file is not worth having."""

HEAD_REASON = "output of the head: its few channels hold box distances and class logits"
SENSITIVE_REASON = "sensitive: with fewer layers in float the file lost too much"

Judge = Callable[[Path], float]
"""Returns the mAP50-95, 0 to 1, of an artifact."""


@dataclass(frozen=True)
class LayerError:
    """How much the quantization of one layer alone disturbs what the head says.

    Attributes:
        layer: Name of the convolution.
        error: Noise of the head's outputs over their variance, 0 for none; see ``kd_yolo.export.sensitivity``.
    """

    layer: str
    error: float


@dataclass(frozen=True)
class Trial:
    """One judged choice of float layers.

    Attributes:
        float_layers: How many of the most sensitive layers were in float.
        map50_95: What the artifact reached, 0 to 1.
        drop_points: What it lost, in points of mAP50-95.
    """

    float_layers: int
    map50_95: float
    drop_points: float


@dataclass(frozen=True)
class Int8Report:
    """What was quantized, how, and what it cost.

    Attributes:
        format: ``onnx`` or ``openvino``.
        calibration: The images: number, per class, hash (see ``Calibration.to_dict``).
        layers_total: Convolutions with weights.
        layers_int8: How many of them are int8.
        layers_float: The others by name, with the reason.
        sensitivity: All layers that could be int8, the most sensitive first.
        trials: Every judged choice in order.
        map_float: mAP50-95 of the float artifact, 0 to 1.
        map_int8: mAP50-95 of this one.
        drop_points: What it lost, in points of mAP50-95; negative when it gained.
        max_drop: What it was allowed to lose.
        seconds: Time of everything, judging included.
        settings: How the ranges were chosen, per what the scales are, and so on.
    """

    format: str
    calibration: dict[str, Any]
    layers_total: int
    layers_int8: int
    layers_float: dict[str, str]
    sensitivity: list[LayerError]
    trials: list[Trial]
    map_float: float
    map_int8: float
    drop_points: float
    max_drop: float
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def judge_calls(self) -> int:
        """Return how often an artifact was validated."""
        return len(self.trials)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self) | {"judge_calls": self.judge_calls}

    def describe(self) -> str:
        """Return the outcome in one line."""
        return (
            f"{self.layers_int8} of {self.layers_total} convolutions in int8; mAP50-95 {self.map_int8:.4f}, float "
            f"{self.map_float:.4f}: {self.drop_points:+.2f} points lost (at most {self.max_drop:g}); "
            f"{self.judge_calls} validations, {self.seconds:.0f} s"
        )

    def to_markdown(self) -> str:
        """Return the outcome, the float layers, the trials and the most sensitive layers."""
        shown = self.calibration
        classes = ", ".join(f"{name} {count}" for name, count in shown.get("per_class", {}).items())
        kept = [(name, reason) for name, reason in self.layers_float.items()]
        trials = [(str(t.float_layers), f"{t.map50_95:.4f}", f"{t.drop_points:+.2f}") for t in self.trials]
        parts = [
            self.describe(),
            f"Calibrated with {shown['images']} images{f' ({classes})' if classes else ''}.",
            markdown_table(("sensitive layers in float", "mAP50-95", "points lost"), trials),
            markdown_table(("float layer", "why"), kept) if kept else "No convolution is in float.",
            markdown_table(("layer", "error"), [(e.layer, f"{e.error:.2e}") for e in self.sensitivity]),
        ]
        return "\n\n".join(parts) + "\n"


@dataclass(frozen=True)
class Found:
    """The outcome of ``search_float_layers``.

    Attributes:
        path: The artifact that holds the bound.
        layers: The sensitive layers that are float in it.
        trials: Every judged choice in order.
    """

    path: Path
    layers: tuple[str, ...]
    trials: list[Trial]

    @property
    def map50_95(self) -> float:
        """Return the mAP50-95 of the chosen artifact."""
        return next(t.map50_95 for t in self.trials if t.float_layers == len(self.layers))


class Quantizer(Protocol):
    """What a runtime's quantization offers to ``quantize``."""

    @property
    def layers(self) -> Collection[str]:
        """Convolutions with weights."""

    @property
    def heads(self) -> Collection[str]:
        """Those of them that are never quantized."""

    def rank(self) -> list[LayerError]:
        """Return the layers that could be int8, the most sensitive first."""

    def build(self, folder: Path, floats: Sequence[str]) -> Path:
        """Write the artifact with these layers in float into a folder and return its path."""

    def settings(self) -> dict[str, Any]:
        """Return how the ranges were chosen."""


def quantize(
    format: str,
    quantizer: Quantizer,
    calibration: Sequence[Path],
    publish: Callable[[Path], None],
    judge: Judge,
    float_map: float,
    max_drop: float,
) -> Int8Report:
    """Rank the layers, search the ones that stay in float, publish the artifact and say what it cost.

    Args:
        format: ``onnx`` or ``openvino``.
        quantizer: Writes artifacts.
        calibration: Training images, best a ``Calibration``.
        publish: Takes the chosen artifact, whose folder is removed afterwards.
        judge: Returns the mAP50-95, 0 to 1, of an artifact.
        float_map: That of the float artifact.
        max_drop: Points of mAP50-95 that may be lost.

    Raises:
        ExportError: The bound cannot be held.
    """
    started = time.perf_counter()
    ranking = quantizer.rank()
    with tempfile.TemporaryDirectory(prefix="kd-yolo-int8-") as folder:
        names = [item.layer for item in ranking]
        found = search_float_layers(
            names, lambda floats: quantizer.build(Path(folder), floats), judge, float_map, max_drop
        )
        publish(found.path)
    reasons = dict.fromkeys(quantizer.heads, HEAD_REASON) | dict.fromkeys(found.layers, SENSITIVE_REASON)
    return Int8Report(
        format=format,
        calibration=calibration_record(calibration),
        layers_total=len(quantizer.layers),
        layers_int8=len(quantizer.layers) - len(reasons),
        layers_float=reasons,
        sensitivity=ranking,
        trials=found.trials,
        map_float=float_map,
        map_int8=found.map50_95,
        drop_points=(float_map - found.map50_95) * 100,
        max_drop=max_drop,
        seconds=round(time.perf_counter() - started, 1),
        settings=quantizer.settings(),
    )


def search_float_layers(
    ranking: Sequence[str],
    build: Callable[[tuple[str, ...]], Path],
    judge: Judge,
    float_map: float,
    max_drop: float,
) -> Found:
    """Return the most sensitive layers to float, as few as hold the bound.

    Nothing first, then 1, 2, 4 ... of the ranking up to half of it, then bisection between the last set that failed and
    the first that held. Judged at most 2 log2(n) + 2 times. Because mAP is not monotone in the number of layers, the
    result is the smallest of the judged sets that hold, not of all sets.

    Args:
        ranking: Layers, the most sensitive first.
        build: Makes the artifact in which these layers are float, and returns its path.
        judge: Returns its mAP50-95, 0 to 1.
        float_map: The mAP50-95 of the float artifact.
        max_drop: Points of mAP50-95 that it may lose.

    Raises:
        ExportError: Half of the layers in float do not hold the bound either.
    """
    paths: dict[int, Path] = {}
    trials: list[Trial] = []

    def holds(count: int) -> bool:
        paths[count] = build(tuple(ranking[:count]))
        value = judge(paths[count])
        trials.append(Trial(count, value, (float_map - value) * 100))
        return trials[-1].drop_points <= max_drop + 1e-9  # written so that NaN does not hold

    failed, limit = -1, int(len(ranking) * MAX_FLOAT_SHARE)
    for count in _sizes(limit):
        if holds(count):
            break
        failed = count
    else:
        raise ExportError(_failure(trials, len(ranking), float_map, max_drop))
    while count - failed > 1:
        middle = (failed + count) // 2
        if holds(middle):
            count = middle
        else:
            failed = middle
    return Found(paths[count], tuple(ranking[:count]), trials)


def _sizes(limit: int) -> list[int]:
    """Return 0, 1, 2, 4 ... and the limit itself."""
    sizes = [0]
    while sizes[-1] < limit:
        sizes.append(min(max(1, 2 * sizes[-1]), limit))
    return sizes


def _failure(trials: Sequence[Trial], layers: int, float_map: float, max_drop: float) -> str:
    best = min(trials, key=lambda trial: trial.drop_points)
    return (
        f"int8 loses {best.drop_points:.2f} points of mAP50-95 ({float_map:.4f} in float) even with the "
        f"{best.float_layers} most sensitive of {layers} layers in float, and max_drop={max_drop:g} are allowed; "
        "calibrate with more images, allow a larger max_drop=, train with reparam=qarep, or use quantize=16"
    )
