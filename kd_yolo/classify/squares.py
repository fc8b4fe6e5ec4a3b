"""Place images as squares, because Ultralytics' classifiers look at the middle square of an image only."""

from __future__ import annotations

from pathlib import Path

import cv2

from kd_yolo.data.layout import place_image
from kd_yolo.data.pixels import BadImageError, decode
from kd_yolo.errors import DataError


def place_squared(image: Path, target: Path, link: bool) -> bool:
    """Place an image as it is when it is a square, else padded; return whether it was padded.

    Ultralytics scales the short side of an image to the canvas and cuts out the middle: on a long image the defect may
    lie outside of it. Padding repeats the border pixels, so that it adds no edge.

    Args:
        image: The image.
        target: Where it goes; a padded one gets the suffix ``.png``.
        link: Link to a square image instead of copying it; a padded one is always written.

    Raises:
        DataError: It cannot be decoded.
        OutputError: It cannot be written.
    """
    try:
        pixels, _, _ = decode(image)
    except BadImageError as error:
        raise DataError(f"{image}: {error}; repair or remove it") from error
    height, width = pixels.shape[:2]
    if height == width:
        place_image(image, target, link)
        return False
    tall, wide = (max(height, width) - side for side in (height, width))
    border = (tall // 2, tall - tall // 2, wide // 2, wide - wide // 2)
    done, code = cv2.imencode(".png", cv2.copyMakeBorder(pixels, *border, cv2.BORDER_REPLICATE))
    if not done:
        raise DataError(f"{image}: OpenCV could not encode it as PNG; reinstall opencv-python")
    target.with_suffix(".png").write_bytes(code.tobytes())
    return True
