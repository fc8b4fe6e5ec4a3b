"""Images and masks of ``task=anomaly`` as tensors: stretched to one size, no letterbox, no augmentation.

Padding would light up in the anomaly map, so images are stretched. Images are shrunk by a bilinear filter with
antialiasing, masks by the nearest pixel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from PIL import Image as PillowImage
from torch import Tensor
from torch.utils.data import Dataset
from ultralytics.utils import LOGGER

from kd_yolo.anomaly.layout_checks import read_mask
from kd_yolo.anomaly.layout_parts import AnomalySample
from kd_yolo.data.pixels import BadImageError, decode, in_threads
from kd_yolo.errors import ConfigError, DataError

Item = dict[str, Any]
SMALLEST_IMGSZ = 32
CACHE_SHARE = 0.5
"""Share of the free memory that cached images may take."""


class AnomalyDataset(Dataset[Item]):
    """Samples as uint8 tensors of one size.

    An item is ``{"img": uint8 (3, H, W) RGB, "mask": uint8 (H, W) of 0 and 1, "label": 0 or 1, "has_mask": bool,
    "im_file": str, "defect": str, "index": int}``. ``has_mask`` is false where an anomalous image has no truth mask;
    its mask is then all zero and must not be counted in pixel metrics.

    Args:
        samples: Images and their truth.
        imgsz: Side of the square images, or (height, width), pixels.
        cache: Decode everything once, on all cores, and keep the resized images in memory (H * W * 3 bytes each). Left
            aside, with a warning, when that would take more than half of the free memory.

    Raises:
        ConfigError: ``imgsz`` is below 32.
        DataError: There are no samples, or an image cannot be decoded (at once with ``cache``, else when it is used).
    """

    def __init__(self, samples: Sequence[AnomalySample], imgsz: int | tuple[int, int], cache: bool = True) -> None:
        self.samples = list(samples)
        self.size = (imgsz, imgsz) if isinstance(imgsz, int) else (int(imgsz[0]), int(imgsz[1]))
        if min(self.size) < SMALLEST_IMGSZ:
            raise ConfigError(f"imgsz={imgsz}: every side must have at least {SMALLEST_IMGSZ} pixels")
        if not self.samples:
            raise DataError("there are no images to read; check data= and category=")
        self._images: NDArray[np.uint8] | None = None
        if cache and self._fits():
            self._images = self._decoded()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        """Return one item; see the class.

        Raises:
            DataError: The image or the mask cannot be decoded.
        """
        sample = self.samples[index]
        image = load_image(sample.image, self.size) if self._images is None else self._images[index]
        return {
            "img": torch.from_numpy(image.copy()),
            "mask": torch.from_numpy(load_mask(sample, self.size)),
            "label": int(sample.label),
            "has_mask": sample.has_truth,
            "im_file": str(sample.image),
            "defect": sample.defect,
            "index": index,
        }

    def labels(self) -> NDArray[np.int64]:
        """Return the labels of all images, shape (N,)."""
        return np.array([sample.label for sample in self.samples], dtype=np.int64)

    def masks(self) -> NDArray[np.uint8]:
        """Return the masks of all images, uint8 of shape (N, H, W)."""
        return np.stack([load_mask(sample, self.size) for sample in self.samples])

    def has_mask(self) -> NDArray[np.bool_]:
        """Return for every image whether its defective pixels are known, shape (N,)."""
        return np.array([sample.has_truth for sample in self.samples])

    def _fits(self) -> bool:
        need = len(self.samples) * 3 * self.size[0] * self.size[1]
        free = psutil.virtual_memory().available
        if need <= CACHE_SHARE * free:
            return True
        LOGGER.warning(
            f"{len(self)} images need {need / 1e9:.1f} GB of {free / 1e9:.1f} GB free; read from disk instead"
        )
        return False

    def _decoded(self) -> NDArray[np.uint8]:
        images = np.empty((len(self.samples), 3, *self.size), np.uint8)
        found = in_threads(lambda file: _resized(file, self.size), [sample.image for sample in self.samples])
        for index, (file, image) in enumerate(found):
            if isinstance(image, BadImageError):
                raise _unreadable(file, image) from image
            images[index] = image
        return images


def load_image(file: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Read and resize an image as training does.

    Args:
        file: The image.
        size: Height and width, pixels.

    Returns:
        RGB, uint8 of shape (3, H, W).

    Raises:
        DataError: It cannot be decoded.
    """
    try:
        return _resized(file, size)
    except BadImageError as error:
        raise _unreadable(file, error) from error


def load_mask(sample: AnomalySample, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return a sample's mask, nearest pixel, uint8 of shape (H, W) of 0 and 1; all zero when it has none.

    A region thinner than the shrinking factor may vanish; it is then no region for the metrics.

    Args:
        sample: The sample.
        size: Height and width, pixels.

    Raises:
        DataError: The mask cannot be decoded.
    """
    if sample.mask is None:
        return np.zeros(size, np.uint8)
    try:
        mask = read_mask(sample.mask, sample.min_area)
    except BadImageError as error:
        raise DataError(f"{sample.mask}: mask {error}; replace it") from error
    if mask.shape != size:
        mask = cv2.resize(mask, (size[1], size[0]), interpolation=cv2.INTER_NEAREST_EXACT).astype(np.uint8, copy=False)
    return mask


def stretched(rgb: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize an image by a bilinear filter with antialiasing, without keeping its proportions.

    Args:
        rgb: uint8 of shape (H0, W0, 3), any order of channels.
        size: Height and width, pixels.

    Returns:
        uint8 of shape (H, W, 3).
    """
    if rgb.shape[:2] == size:
        return rgb
    image = PillowImage.fromarray(np.ascontiguousarray(rgb))
    return np.array(image.resize((size[1], size[0]), PillowImage.Resampling.BILINEAR))  # asarray is read-only


def collate(items: Iterable[Item]) -> Item:
    """Stack items to a batch: img (B, 3, H, W), mask (B, H, W), label, has_mask and index (B,), lists of the rest."""
    rows = list(items)
    stacked: dict[str, Tensor] = {key: torch.stack([row[key] for row in rows]) for key in ("img", "mask")}
    numbers = {key: torch.tensor([row[key] for row in rows]) for key in ("label", "has_mask", "index")}
    return {**stacked, **numbers, **{key: [row[key] for row in rows] for key in ("im_file", "defect")}}


def _resized(file: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    rgb = decode(file)[0][..., ::-1]
    return np.ascontiguousarray(stretched(rgb, size).transpose(2, 0, 1))


def _unreadable(file: Path, error: BadImageError) -> DataError:
    return DataError(f"{file}: {error}; replace the image or remove it")
