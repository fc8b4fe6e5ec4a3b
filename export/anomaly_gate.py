"""Parity gate of anomaly models: an exported graph must give the maps and scores of the float32 checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kd_yolo.export.matching import worse
from numpy.typing import NDArray
from torch import Tensor

from kd_yolo.anomaly.dataset import load_image, stretched
from kd_yolo.anomaly.layouts import categories, read_anomaly_data
from kd_yolo.anomaly.model import AnomalyModel
from kd_yolo.errors import DataError
from kd_yolo.images import spread, textured_images
from kd_yolo.runtimes import artifact_format
from kd_yolo.runtimes.anomaly_session import NUMBERS, Thresholds, open_anomaly

TOLERANCE = 1e-4
"""Largest difference of any map value and of any score."""
IMAGES = 16
DYNAMIC_BATCHES = (1, 4)


@dataclass(frozen=True)
class GateImages:
    """What the gate looks at.

    Attributes:
        files: Test images of the category; made ones stand in where they lack.
        source: Where they came from, in words.
    """

    files: list[Path]
    source: str

    def pixels(self, canvas: tuple[int, int]) -> Tensor:
        """Return the images stretched to a canvas, as training does: (N, 3, H, W), float32 RGB in [0, 1]."""
        real = [load_image(file, canvas) for file in self.files]
        made = [stretched(image, canvas)[..., ::-1].transpose(2, 0, 1) for image in textured_images(IMAGES - len(real))]
        return torch.from_numpy(np.stack([*real, *made])).float() / 255


@dataclass(frozen=True)
class TrialResult:
    """Largest differences of one canvas and batch size.

    Attributes:
        canvas: Height and width in pixels.
        batch: Images per call.
        map_error: Of any map value.
        score_error: Of any image score.
    """

    canvas: tuple[int, int]
    batch: int
    map_error: float
    score_error: float


@dataclass(frozen=True)
class AnomalyParity:
    """Result of the gate.

    Attributes:
        passed: Whether every bound holds.
        tolerance: Bound of both differences.
        images: Number of images compared, on each canvas.
        image_source: Where they came from.
        real_images: How many of them are photographs.
        map_error: Largest difference of any map value.
        score_error: Largest difference of any image score.
        map_low: Smallest map value of the checkpoint, to judge the differences by.
        map_high: Largest one.
        thresholds_equal: Whether the thresholds read back are bit for bit those of the checkpoint.
        trials: The differences by canvas and batch.
        failures: What is out of bounds, in words.
    """

    passed: bool
    tolerance: float
    images: int
    image_source: str
    real_images: int
    map_error: float
    score_error: float
    map_low: float
    map_high: float
    thresholds_equal: bool
    trials: list[TrialResult]
    failures: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """Return the numbers in one line."""
        return (
            f"maps within {self.map_error:.2g} and scores within {self.score_error:.2g} (bound {self.tolerance:g}), "
            f"maps from {self.map_low:.3g} to {self.map_high:.3g}, thresholds equal; {self.image_source} images"
        )


def gate_images(data: str | Path | None, category: str | None, trained: str | None = None) -> GateImages:
    """Return what to compare on: test images of a category, spread over its list, or images made from a seed.

    Args:
        data: Data set, or None.
        category: Its category, or None for the one that was trained, if it is there.
        trained: Category that the checkpoint was trained on, as far as it says.

    Raises:
        DataError: The data or the category is not there, or has no test images.
        ConfigError: Its YAML file is not valid.
    """
    if data is None:
        return GateImages([], f"{IMAGES} synthetic")
    if category is None and trained in categories(data):
        category = trained
    found = read_anomaly_data(data, category)
    if not found.test:
        raise DataError(f"data={data}: {found.category} has no test images to compare on; leave data= out")
    files = spread([sample.image for sample in found.test], IMAGES)
    made = f" and {IMAGES - len(files)} synthetic" if len(files) < IMAGES else ""
    return GateImages(files, f"{len(files)} of {found.name} {found.category}{made}")


def trials_of(canvas: tuple[int, int], batch: int, dynamic: bool, stride: int) -> list[tuple[tuple[int, int], int]]:
    """Return the canvases and batch sizes that the gate runs: a dynamic graph must hold at more than one of each."""
    if not dynamic:
        return [(canvas, batch)]
    height, width = canvas
    lower = max(stride, height * 3 // 4 // stride * stride)
    wider = -(-width * 5 // 4 // stride) * stride
    return [(side, count) for side in (canvas, (lower, wider)) for count in DYNAMIC_BATCHES]


def check_anomaly_parity(
    model: AnomalyModel,
    thresholds: Thresholds,
    path: Path,
    trials: Sequence[tuple[tuple[int, int], int]],
    images: GateImages,
) -> tuple[AnomalyParity, str]:
    """Compare an exported file with the float32 checkpoint it came from.

    Args:
        model: The training form in float32 and eval mode.
        thresholds: Its thresholds.
        path: The exported file or folder.
        trials: Canvases and batch sizes.
        images: What to look at.

    Returns:
        The result, and the runtime that ran the file.

    Raises:
        ModelError: The file cannot be opened, or its output is no anomaly map.
        BackendMissingError: Its runtime is missing.
    """
    device = "cuda" if artifact_format(path) in {"engine", "rtx"} else "cpu"
    results: list[TrialResult] = []
    low, high, equal, runtime = np.inf, -np.inf, True, ""
    wanted: dict[tuple[int, int], NDArray[np.float32]] = {}
    for canvas, batch in trials:
        session = open_anomaly(path, canvas, batch, device)
        runtime = session.runtime
        equal = equal and _same(session.thresholds, thresholds)
        pixels = images.pixels(canvas)
        if canvas not in wanted:
            wanted[canvas] = _reference(model, pixels)
        expected = wanted[canvas]
        found = np.concatenate([session.maps(part) for part in pixels.split(batch)])
        scores = model.image_scores(torch.from_numpy(expected)).numpy()
        results.append(TrialResult(canvas, batch, _largest(found, expected), _largest(session.scores(found), scores)))
        low, high = min(low, float(expected.min())), max(high, float(expected.max()))
    return _report(results, (low, high), equal, images), runtime


def _report(results: list[TrialResult], span: tuple[float, float], equal: bool, images: GateImages) -> AnomalyParity:
    """Judge the differences."""
    map_error = score_error = 0.0
    for result in results:
        map_error, score_error = worse(map_error, result.map_error), worse(score_error, result.score_error)
    failures = _failures(results, equal)
    return AnomalyParity(
        passed=not failures,
        tolerance=TOLERANCE,
        images=IMAGES,
        image_source=images.source,
        real_images=len(images.files),
        map_error=map_error,
        score_error=score_error,
        map_low=span[0],
        map_high=span[1],
        thresholds_equal=equal,
        trials=results,
        failures=failures,
    )


@torch.inference_mode()
def _reference(model: AnomalyModel, pixels: Tensor) -> NDArray[np.float32]:
    return np.concatenate([model(part).numpy() for part in pixels.split(4)])


def _largest(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(found - expected).max())  # NaN stays NaN


def _same(found: Thresholds, wanted: Thresholds) -> bool:
    """Return whether all that an exported file carries is equal, floats to the last bit."""
    numbers = all(getattr(found, key) == getattr(wanted, key) for key in NUMBERS)
    return numbers and found.to_dict() == wanted.to_dict()


def _failures(results: Sequence[TrialResult], equal: bool) -> list[str]:
    """Return what is out of bounds; written so that NaN is."""
    failures = []
    for result in results:
        where = f"at {result.canvas[0]}x{result.canvas[1]}, batch {result.batch}"
        if not result.map_error <= TOLERANCE:
            failures.append(f"maps differ by {result.map_error:.3g} {where} (bound {TOLERANCE:g})")
        if not result.score_error <= TOLERANCE:
            failures.append(f"scores differ by {result.score_error:.3g} {where} (bound {TOLERANCE:g})")
    if not equal:
        failures.append("the thresholds read back are not the checkpoint's")
    return failures
