"""Time and judge anomaly models the way their user runs them: stretch, network, score, map at the image's size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kd_yolo.anomaly.dataset import AnomalyDataset, collate, stretched
from kd_yolo.anomaly.layouts import read_anomaly_data
from kd_yolo.anomaly.metrics import AnomalyMetrics
from kd_yolo.anomaly.projectors import FrozenProjector
from kd_yolo.bench.runners import SessionRunner
from kd_yolo.errors import DataError
from kd_yolo.images import Image, spread
from kd_yolo.runtimes.anomaly_session import AnomalySession, CheckpointMaps

BATCH = 16  # does not change the result; a file with a fixed batch is fed in portions


class AnomalyRunner(SessionRunner):
    """An anomaly model from any file, opened and ready.

    Attributes:
        flagged: Which images of the last batch are anomalous.
    """

    flagged: NDArray[np.bool_]

    def __init__(self, path: Path, opened: AnomalySession) -> None:
        """Take an opened session; see ``kd_yolo.bench.runners.open_runner``."""
        super().__init__(path, opened.session)
        self.opened = opened
        if isinstance(opened.session, CheckpointMaps):
            self.params, self.gflops = _complexity(opened.session, self.canvas)

    def preprocess(self, images: list[Image]) -> Tensor:
        """Stretch decoded images to the canvas, as training does."""
        planes = [stretched(image, self.canvas)[..., ::-1].transpose(2, 0, 1) for image in images]
        return torch.from_numpy(np.stack(planes)).float().div_(255)

    def postprocess(self, output: Tensor, images: list[Image]) -> list[Tensor]:
        """Return the map of each image at the image's size; the scores and decisions are taken too."""
        maps = output.cpu().numpy()
        self.flagged = self.opened.scores(maps) > self.opened.thresholds.threshold_image
        sized = [cv2.resize(one[0], image.shape[1::-1]) for one, image in zip(maps, images, strict=False)]
        return [torch.from_numpy(one) for one in sized]


def judge_anomaly(runner: AnomalyRunner, data: str, category: str | None) -> dict[str, float | int]:
    """Return image and pixel AUROC over the test images of a category, on the canvas that was timed.

    Raises:
        DataError: The category has no test images, or not both normal and anomalous ones.
    """
    found = read_anomaly_data(data, category)
    if {sample.label for sample in found.test} != {0, 1}:
        raise DataError(f"data={data}: {found.category} needs normal and anomalous test images to judge on")
    dataset = AnomalyDataset(found.test, runner.canvas)
    maps = []
    for start in range(0, len(dataset), BATCH):
        part = collate(dataset[index] for index in range(start, min(start + BATCH, len(dataset))))
        maps.append(runner.opened.maps(part["img"].float() / 255))
    every = np.concatenate(maps)
    metrics = AnomalyMetrics.compute(
        runner.opened.scores(every), dataset.labels(), every[:, 0], dataset.masks(), dataset.has_mask()
    )
    return {"image_auroc": metrics.image_auroc, "pixel_auroc": metrics.pixel_auroc, "images": metrics.images}


def anomaly_files(data: str, category: str | None, count: int) -> list[Path]:
    """Return at most ``count`` test images of a category, evenly over its list.

    Raises:
        DataError: The data or its category is not there, or it has no test images.
    """
    found = read_anomaly_data(data, category)
    if not found.test:
        raise DataError(f"data={data}: {found.category} has no test images; leave data= out to time alone")
    return spread([sample.image for sample in found.test], count)


def _complexity(session: CheckpointMaps, canvas: Sequence[int]) -> tuple[int, float]:
    """Return weights and biases of the convolutions, and GFLOPs for one image, two per multiply-add."""
    params = 0
    for part in session.model.modules():
        if isinstance(part, (nn.Conv2d, FrozenProjector)):  # a teacher's weights are buffers
            own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
            params += sum(value.numel() for value in own)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        session.model(torch.zeros(1, 3, *canvas, device=session.device))
    return params, counter.get_total_flops() / 1e9
