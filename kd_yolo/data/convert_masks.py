"""Read pixel masks: one folder for each class, every image beside a PNG mask of its name (magnetic tile data set)."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from kd_yolo.data.pixels import BadImageError, decode
from kd_yolo.data.samples import RawBox, Reading, Sample, images_under
from kd_yolo.errors import DataError

BACKGROUND_NAMES = frozenset({"free", "good", "normal", "ok", "background"})
"""Folders of images without any defect."""
PREFIX = "MT_"


def read_masks(src: Path, min_area: int = 10, threshold: int = 127) -> Reading:
    """Read CLASS/[Imgs/]NAME.jpg + NAME.png.

    Every 8-connected component of ``mask > threshold`` with at least ``min_area`` pixels becomes a box. The class is
    the folder's name without ``MT_``. An image in a defect folder whose mask shows nothing contradicts itself and is
    left out.

    Args:
        src: The folder of class folders.
        min_area: Smallest component kept, pixels.
        threshold: Grey value above which a mask pixel is a defect.

    Raises:
        DataError: No image with a mask was found, or a setting is out of range.
    """
    if min_area < 1 or not 0 <= threshold <= 254:
        raise DataError(f"min_area={min_area} threshold={threshold}: need min_area >= 1 and threshold 0 to 254")
    reading = Reading()
    images = images_under(src)
    masks = {path for path in images if path.suffix.lower() == ".png"}
    dropped = 0
    for image in [path for path in images if path not in masks]:
        mask_file = next(
            (path for path in (image.with_suffix(".png"), image.with_suffix(".PNG")) if path in masks), None
        )
        if mask_file is None:
            reading.problem("image without mask", image.relative_to(src).as_posix())
            continue
        masks.discard(mask_file)
        dropped += _add(reading, src, image, mask_file, min_area, threshold)
    for mask_file in sorted(masks):
        reading.problem("mask without image", mask_file.relative_to(src).as_posix())
    if not reading.samples:
        raise DataError(f"{src}: no image with a mask beside it; from=masks needs CLASS/NAME.jpg + CLASS/NAME.png")
    reading.decisions += [
        f"boxes are the 8-connected components of mask > {threshold} with at least {min_area} pixels",
        f"components under {min_area} pixels dropped: {dropped}",
        f"class is the folder name without {PREFIX}; images of {', '.join(sorted(BACKGROUND_NAMES))} are background",
    ]
    return reading


def components(mask: np.ndarray, min_area: int, threshold: int) -> tuple[list[tuple[int, int, int, int]], int]:
    """Return the boxes (x0, y0, x1, y1) of a mask's components and how many smaller ones were dropped.

    Args:
        mask: Grey mask, uint8 of shape (H, W).
        min_area: Smallest component kept, pixels.
        threshold: Grey value above which a pixel counts.
    """
    _, _, stats, _ = cv2.connectedComponentsWithStats((mask > threshold).astype(np.uint8), connectivity=8)
    parts = stats[1:]  # the first is the background
    kept = parts[parts[:, cv2.CC_STAT_AREA] >= min_area]
    return [(int(x), int(y), int(x + w), int(y + h)) for x, y, w, h, _ in kept], len(parts) - len(kept)


def _add(reading: Reading, src: Path, image: Path, mask_file: Path, min_area: int, threshold: int) -> int:
    """Add one image; return the number of specks dropped."""
    shown = image.relative_to(src).as_posix()
    try:
        mask = decode(mask_file)[0][..., 0]  # all channels of a grey PNG are equal
    except BadImageError as error:
        reading.problem("unreadable mask", f"{mask_file.relative_to(src).as_posix()} {error}")
        return 0
    parts = image.relative_to(src).parts
    name = (parts[0] if len(parts) > 1 else src.name).removeprefix(PREFIX)
    places, dropped = components(mask, min_area, threshold)
    if name.lower() in BACKGROUND_NAMES:
        if places:
            reading.problem("defect mask in a background folder (left out)", shown)
            return 0
        reading.samples.append(Sample(image, []))
    elif places:
        reading.samples.append(Sample(image, [RawBox(name, *place) for place in places]))
    else:
        reading.problem("empty mask in a defect folder (left out)", shown)
    return dropped
