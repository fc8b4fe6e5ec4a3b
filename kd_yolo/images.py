"""Images to check and time detectors with: real ones of a data set, or textured ones made from a seed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor
from ultralytics.data.augment import LetterBox
from ultralytics.data.utils import IMG_FORMATS, check_det_dataset

from kd_yolo.data.datasets import resolve_dataset
from kd_yolo.errors import ConfigError, DataError

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class ImageSet:
    """Images and where they came from.

    Attributes:
        images: BGR images, uint8, (H, W, 3), of any size.
        real: How many, counted from the first, are photographs of the data set; the rest is made from a seed.
        source: The data set's file, or ``synthetic``.
    """

    images: list[Image]
    real: int
    source: str

    def describe(self) -> str:
        """Return one phrase for reports."""
        made = len(self.images) - self.real
        parts = [f"{self.real} of {self.source}"] if self.real else []
        return " and ".join(parts + ([f"{made} synthetic"] if made else []))


def image_set(data: str | Path | None, count: int, seed: int = 0) -> ImageSet:
    """Return ``count`` images: of a data set's validation split as far as they go, then synthetic ones.

    Args:
        data: An Ultralytics data YAML, or None for synthetic images only.
        count: Number of images; a larger split is sampled evenly over its sorted list.
        seed: Seed of the synthetic images.

    Raises:
        DataError: The data set or one of its images cannot be read.
    """
    if data is None:
        return ImageSet(textured_images(count, seed=seed), 0, "synthetic")
    files = dataset_files(data)
    images = [read_image(file) for file in spread(files, count)]
    return ImageSet(images + textured_images(count - len(images), seed=seed), len(images), str(data))


def dataset_files(data: str | Path, split: str = "val") -> list[Path]:
    """Return the image files of a split, sorted. Nothing is downloaded.

    Args:
        data: A data YAML, or what ``resolve_dataset`` knows: a folder or a built-in name.
        split: Name of the split.

    Raises:
        DataError: The YAML or the images are missing or malformed; the message names the file and the remedy.
    """
    content = _description(data, split)
    try:
        entries = content[split]
        files = _listed(entries if isinstance(entries, list) else [entries])
    except OSError as error:
        raise DataError(f"{data}: the images of '{split}' cannot be listed ({error})") from error
    if not files:
        raise DataError(f"{data}: no images under '{split}'; check the paths in it")
    return files


def spread(files: list[Path], count: int) -> list[Path]:
    """Return at most ``count`` files, evenly over the list."""
    if len(files) <= count:
        return files
    return [files[index] for index in np.linspace(0, len(files) - 1, count).round().astype(int)]


def dataset_names(data: str | Path) -> list[str]:
    """Return the class names of a data set in order.

    Raises:
        DataError: The data set is missing or malformed.
    """
    names = _description(data, "val")["names"]
    return [str(names[key]) for key in sorted(names)]


def read_image(file: Path) -> Image:
    """Read an image as BGR.

    Raises:
        DataError: The file is missing or cannot be decoded.
    """
    content = None
    with contextlib.suppress(OSError, cv2.error):
        content = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_COLOR)
    if content is None:
        raise DataError(f"{file}: cannot be read as an image; replace it or take it out of the data set")
    return content.astype(np.uint8, copy=False)


def textured_images(count: int, size: tuple[int, int] = (200, 200), seed: int = 0) -> list[Image]:
    """Draw grey textures with bright and dark rectangles and lines on them; the same seed gives the same images.

    Flat noise would leave most of a network's outputs at rest; these have structure at every scale a detector looks at.

    Args:
        count: Number of images.
        size: Height and width in pixels.
        seed: Seed of the whole set; image i does not depend on ``count``.
    """
    return [_texture(np.random.default_rng((seed, index)), size) for index in range(count)]


def to_canvas(images: Sequence[Image], canvas: tuple[int, int], channels: int = 3) -> Tensor:
    """Letterbox images onto one canvas, as Ultralytics' predictor does with ``rect=False``.

    Args:
        images: BGR images of any size.
        canvas: Height and width in pixels.
        channels: 3 for RGB, 1 for grey.

    Returns:
        (N, channels, H, W), float32 in 0..1.

    Raises:
        ConfigError: A number of channels that photographs do not have.
    """
    return to_bytes(images, canvas, channels).float().div_(255)


def to_bytes(images: Sequence[Image], canvas: tuple[int, int], channels: int = 3) -> Tensor:
    """Letterbox images as ``to_canvas`` does, and leave them as bytes.

    Returns:
        (N, channels, H, W), uint8.

    Raises:
        ConfigError: As ``to_canvas``.
    """
    if channels not in {1, 3}:
        raise ConfigError(f"the model reads {channels} channels; only RGB (3) and grey (1) images can be made for it")
    letterbox = LetterBox(canvas, auto=False)
    batch = np.empty((len(images), channels, *canvas), np.uint8)
    for planes, image in zip(batch, images, strict=True):
        fitted = letterbox(image=image)
        if channels == 1:
            cv2.cvtColor(fitted, cv2.COLOR_BGR2GRAY, dst=planes[0])
        else:  # planes straight into place, blue last: a transposition and a flip of the batch cost twice the letterbox
            cv2.split(fitted, list(planes[::-1]))
    return torch.from_numpy(batch)


def _description(data: str | Path, split: str) -> dict[str, Any]:
    """Return what Ultralytics makes of a data YAML, paths resolved; nothing is downloaded."""
    file = resolve_dataset(str(data))
    try:
        content: dict[str, Any] = check_det_dataset(str(file), autodownload=False, split=split)
    except (OSError, SyntaxError, TypeError, KeyError, ValueError, AttributeError, yaml.YAMLError) as error:
        lines = str(error).strip().splitlines()
        raise DataError(f"{file}: {lines[0] if lines else type(error).__name__}") from error
    return content


def _listed(entries: Sequence[str]) -> list[Path]:
    """Return the images that the entries of a split stand for: folders, or text files with one path a line."""
    found: list[Path] = []
    for entry in map(Path, entries):
        if entry.is_dir():
            found += [path for path in entry.rglob("*.*") if path.is_file()]
            continue
        for line in entry.read_text(encoding="utf-8-sig").split("\n"):
            name = line.strip()
            if name:
                found.append(entry.parent / name[2:] if name.startswith("./") else Path(name))
    return sorted(path for path in found if path.suffix[1:].lower() in IMG_FORMATS)


def _texture(rng: np.random.Generator, size: tuple[int, int]) -> Image:
    height, width = size
    canvas = np.full((height, width), 128.0, np.float32)
    for cells in (3, 9, 27, 81):
        noise = rng.normal(0.0, 1.0, (cells, cells)).astype(np.float32)
        canvas += 60.0 / np.sqrt(cells) * cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)
    for _ in range(int(rng.integers(2, 7))):
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        w, h = int(rng.integers(4, max(5, width // 2))), int(rng.integers(4, max(5, height // 2)))
        canvas[y : y + h, x : x + w] += float(rng.uniform(-70, 70))
    canvas += rng.normal(0.0, 6.0, canvas.shape).astype(np.float32)
    tint = rng.uniform(0.85, 1.0, 3).astype(np.float32)
    return np.clip(canvas[..., None] * tint, 0, 255).astype(np.uint8)
