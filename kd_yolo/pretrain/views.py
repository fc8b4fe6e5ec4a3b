"""Images without labels, and random views of them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from ultralytics.data.utils import IMG_FORMATS
from ultralytics.utils import LOGGER

from kd_yolo.data.datasets import resolve_dataset
from kd_yolo.errors import ConfigError, DataError
from kd_yolo.images import Image, dataset_files, read_image

SMALLEST_CROP = 0.5  # of the image's sides
BRIGHTNESS = 0.3
FEWEST_IMAGES = 8
DATA_FILES = ("data.yaml", "data.yml", "dataset.yaml")  # of a folder that is a data set
IN_MEMORY_BYTES = 2 * 2**30


def find_images(images: str) -> list[Path]:
    """Return the images of a folder and its subfolders, or the training images of a data set.

    A folder with a ``data.yaml`` is a data set: its validation and test images are not learned from.

    Raises:
        DataError: There is no such folder or data set, nothing readable in it, or too little to learn from.
        ConfigError: The description of the data set is malformed.
    """
    folder = Path(images).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in DATA_FILES):
        files = sorted(path for path in folder.rglob("*") if path.suffix[1:].lower() in IMG_FORMATS)
        if not files:
            raise DataError(
                f"images={images}: no images in this folder or below; formats: {', '.join(sorted(IMG_FORMATS))}"
            )
    else:
        try:
            files = dataset_files(resolve_dataset(images), "train")
        except (ConfigError, DataError) as error:
            raise type(error)(f"images={images}: no folder of images, and no data set ({error})") from error
    readable = [path for path in files if _readable(path)]
    if len(readable) < FEWEST_IMAGES:
        raise DataError(
            f"images={images}: {len(readable)} of {len(files)} images can be read, at least {FEWEST_IMAGES} are "
            "needed; give a folder with more"
        )
    if len(readable) < len(files):
        LOGGER.warning(
            f"images={images}: {len(files) - len(readable)} of {len(files)} images cannot be read and are left out"
        )
    return readable


class Views:
    """Random views of a list of images: crop, left-right flip, brightness.

    Every epoch's views follow from the seed and the epoch alone, so that a resumed pretraining sees what an
    uninterrupted one would have.
    """

    def __init__(self, files: list[Path], imgsz: int, seed: int = 0) -> None:
        """Take the files; those that fit into 2 GB stay in memory."""
        self.files, self.imgsz, self.seed = files, imgsz, seed
        self._kept: dict[int, Image] = {}
        self._bytes = 0

    def epoch(self, number: int, batch: int) -> list[list[int]]:
        """Return the order of an epoch as batches of image numbers; an incomplete last batch is left out."""
        order = np.random.default_rng((self.seed, number)).permutation(len(self.files))
        count = max(len(order) // batch, 1)
        return [order[i * batch : (i + 1) * batch].tolist() for i in range(count)]

    def batch(self, numbers: list[int], epoch: int) -> Tensor:
        """Return views (B, 3, imgsz, imgsz) in 0..1, RGB."""
        views = [self._view(self._image(i), np.random.default_rng((self.seed, epoch, i))) for i in numbers]
        return torch.from_numpy(np.stack(views)).float() / 255

    def _image(self, number: int) -> Image:
        if number in self._kept:
            return self._kept[number]
        image = read_image(self.files[number])
        if self._bytes + image.nbytes <= IN_MEMORY_BYTES:
            self._kept[number] = image
            self._bytes += image.nbytes
        return image

    def _view(self, image: Image, rng: np.random.Generator) -> Image:
        height, width = image.shape[:2]
        share = rng.uniform(SMALLEST_CROP, 1.0)
        h, w = max(round(height * share), 1), max(round(width * share), 1)
        y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
        view = cv2.resize(image[y : y + h, x : x + w], (self.imgsz, self.imgsz))
        if rng.random() < 0.5:
            view = view[:, ::-1]
        bright = np.clip(view * rng.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS), 0, 255).astype(np.uint8)
        return np.ascontiguousarray(bright[:, :, ::-1].transpose(2, 0, 1))


def _readable(path: Path) -> bool:
    try:
        read_image(path)
    except DataError:
        return False
    return True
