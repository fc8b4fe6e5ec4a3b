"""What every reader returns: images with named boxes in pixels; and how boxes are put in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kd_yolo.data.layout import IMAGE_SUFFIXES, files_under
from kd_yolo.data.pixels import decode, open_header

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "trainval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""Folder and list names in circulation, and the split each stands for."""


@dataclass(frozen=True)
class RawBox:
    """A box in pixels: edges of a continuous plane, (0, 0) is the outer corner of the first pixel."""

    name: str
    x0: float
    y0: float
    x1: float
    y1: float


@dataclass
class Sample:
    """One image as published; ``split`` is the published one, if any."""

    image: Path
    boxes: list[RawBox]
    split: str | None = None


@dataclass
class Reading:
    """All samples of a raw data set, with what the reader decided and what it could not use."""

    samples: list[Sample] = field(default_factory=list)
    decisions: list[str] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)

    def problem(self, kind: str, detail: str) -> None:
        """Note a file that could not be used."""
        self.problems.setdefault(kind, []).append(detail)


def images_under(folder: Path) -> list[Path]:
    """Return every image file below a folder, sorted; hidden files left out."""
    return files_under(folder, IMAGE_SUFFIXES)


def split_of(relative: Path) -> str | None:
    """Return the split that one of a path's folders names, or None."""
    for part in relative.parts[:-1]:
        if part.lower() in SPLIT_WORDS:
            return SPLIT_WORDS[part.lower()]
    return None


def image_size(path: Path) -> tuple[int, int]:
    """Return width and height as OpenCV will show the image (EXIF turning applied), reading the header only.

    Raises:
        BadImageError: The file is not an image, or its header is damaged.
    """
    with path.open("rb") as stream:
        image = open_header(stream, path.suffix)
        if image is not None:
            width, height = image.size
            turned = image.getexif().get(274) in {5, 6, 7, 8}  # EXIF orientation: lying on its side
            return (height, width) if turned else (width, height)
    pixels, _, _ = decode(path)
    return pixels.shape[1], pixels.shape[0]


def clean(boxes: Sequence[RawBox], width: int, height: int) -> tuple[list[RawBox], Counter[str]]:
    """Clip boxes to the image and drop those that are not boxes.

    Args:
        boxes: Boxes in pixels.
        width: Image width, pixels.
        height: Image height, pixels.

    Returns:
        The boxes kept, in order, and how many were ``clipped`` (kept), ``outside``, ``degenerate`` (under one pixel
        wide or high) and ``duplicate`` (same class and same place; all three dropped).
    """
    counts: Counter[str] = Counter()
    kept: dict[RawBox, None] = {}
    for box in boxes:
        if box.x1 <= box.x0 or box.y1 <= box.y0:
            counts["degenerate"] += 1
            continue
        if box.x0 >= width or box.y0 >= height or box.x1 <= 0 or box.y1 <= 0:
            counts["outside"] += 1
            continue
        inside = RawBox(box.name, max(box.x0, 0.0), max(box.y0, 0.0), min(box.x1, width), min(box.y1, height))
        if inside.x1 - inside.x0 < 1 or inside.y1 - inside.y0 < 1:
            counts["degenerate"] += 1
        elif inside in kept:
            counts["duplicate"] += 1
        else:
            counts["clipped"] += inside != box
            kept[inside] = None
    return list(kept), +counts
