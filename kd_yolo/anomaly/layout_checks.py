"""Look at images and masks before training: each flaw is one line that names the file and the remedy."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kd_yolo.data.pixels import BadImageError, decode, in_threads, open_header
from kd_yolo.errors import DataError

MASK_LEVEL = 127
"""Mask pixels above this grey value are a defect."""
_TURNED = frozenset({5, 6, 7, 8})
"""EXIF orientations of images that lie on their side."""
_HEAD_BYTES = 1 << 16
_GREY_MODES = ("1", "L", "I", "F")
"""First letters of Pillow's modes of one colour channel (LA, La, I;16 ... included)."""


@dataclass(frozen=True)
class Header:
    """Width and height in pixels as they will be decoded, and whether there is one colour channel only."""

    width: int
    height: int
    grey: bool


@dataclass(frozen=True)
class MaskFacts:
    """Width and height in pixels, defect pixels that count, those in too small regions, and the highest value found."""

    width: int
    height: int
    pixels: int
    specks: int
    highest: int


def read_mask(file: Path, min_area: int = 1) -> NDArray[np.uint8]:
    """Read a truth mask.

    Args:
        file: Grey or colour image; a pixel counts when one of its channels is above 127.
        min_area: 8-connected regions with fewer pixels are dropped.

    Returns:
        uint8 of shape (H, W), 1 where there is a defect.

    Raises:
        BadImageError: The file cannot be decoded.
    """
    return _binary(_brightest(file), min_area)


def headers_of(images: Sequence[Path]) -> dict[Path, Header]:
    """Read the headers of all images.

    Raises:
        DataError: One of them is no image or has a damaged header.
    """
    found: dict[Path, Header] = {}
    for file, header in in_threads(_header, images):
        if isinstance(header, BadImageError):
            raise DataError(f"{file}: {header}; replace the image or remove it") from header
        found[file] = header
    return found


def mode_note(where: Path, headers: dict[Path, Header]) -> str | None:
    """Return one line when grey and colour images are mixed, else None."""
    grey = sum(header.grey for header in headers.values())
    if grey in {0, len(headers)}:
        return None
    return (
        f"{where}: {grey} grey and {len(headers) - grey} colour images are mixed; all are converted to RGB, but a "
        f"model may take the difference for an anomaly: use one kind of camera image"
    )


def masks_of(masks: Sequence[tuple[Path, Path]], headers: dict[Path, Header], min_area: int) -> dict[Path, MaskFacts]:
    """Read all masks and compare their sizes with their images.

    Args:
        masks: Pairs (mask file, its image).
        headers: Headers of the images.
        min_area: See ``read_mask``.

    Returns:
        What was found, by mask file.

    Raises:
        DataError: A mask cannot be decoded or is of another size than its image.
    """
    image_of = dict(masks)
    facts: dict[Path, MaskFacts] = {}
    for file, found in in_threads(lambda path: _mask_facts(path, min_area), list(image_of)):
        image = image_of[file]
        if isinstance(found, BadImageError):
            raise DataError(f"{file}: mask {found}; replace it, or remove it for image-level truth only") from found
        header = headers[image]
        if (found.width, found.height) != (header.width, header.height):
            raise DataError(
                f"{file}: mask is {found.width}x{found.height} pixels but its image {image.name} is "
                f"{header.width}x{header.height}; write the mask in the size of its image"
            )
        facts[file] = found
    return facts


def leak_note(where: Path, train: Sequence[Path], test: Sequence[Path]) -> str | None:
    """Return one line when test images are byte for byte among the training images, else None.

    Most files are told apart by their size, most others by their first bytes; only the rest is read whole.
    """
    alike, trained = list(test), list(train)
    for mark in (_size, _head, _digest):
        known = {mark(file): file for file in trained}
        alike = [file for file in alike if mark(file) in known]
        marks = {mark(file) for file in alike}
        trained = [file for file in trained if mark(file) in marks]
    if not alike:
        return None
    return (
        f"{where}: {len(alike)} test images are also training images, byte for byte (first: {alike[0]} = "
        f"{known[_digest(alike[0])]}); remove them from one side, or the metrics are too good"
    )


def _size(file: Path) -> str:
    return str(file.stat().st_size)


def _head(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.blake2b(stream.read(_HEAD_BYTES)).hexdigest()


def _digest(file: Path) -> str:
    return hashlib.blake2b(file.read_bytes()).hexdigest()


def _header(file: Path) -> Header:
    try:
        with file.open("rb") as stream:
            image = open_header(stream, file.suffix)
            if image is not None:
                width, height = image.size
                if image.getexif().get(274) in _TURNED:
                    width, height = height, width
                return Header(width, height, image.mode.startswith(_GREY_MODES) and image.mode != "LAB")
    except OSError as error:
        raise BadImageError(f"cannot be read ({error.strerror or error})") from error
    height, width = decode(file)[0].shape[:2]
    return Header(width, height, False)


def _mask_facts(file: Path, min_area: int) -> MaskFacts:
    grey = _brightest(file)
    height, width = grey.shape
    counted, marked = (int(np.count_nonzero(_binary(grey, area))) for area in (min_area, 1))
    return MaskFacts(width, height, counted, marked - counted, int(grey.max()))


def _brightest(file: Path) -> NDArray[np.uint8]:
    """Return the highest channel of every pixel, uint8 of shape (H, W)."""
    blue, green, red = cv2.split(decode(file)[0])
    return np.asarray(cv2.max(cv2.max(blue, green), red), dtype=np.uint8)  # 50 x faster than max(axis=2)


def _binary(grey: NDArray[np.uint8], min_area: int) -> NDArray[np.uint8]:
    mask = (grey > MASK_LEVEL).astype(np.uint8)
    if min_area > 1 and mask.any():
        _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
        kept = stats[:, cv2.CC_STAT_AREA] >= min_area
        kept[0] = False  # the background
        mask = kept[labels].astype(np.uint8)
    return mask
