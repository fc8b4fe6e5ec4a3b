"""A PNG grid of images with their boxes drawn, to see at a glance whether labels sit where they should."""

from __future__ import annotations

import colorsys
import math
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kd_yolo.data.datayaml import DataYaml, label_path, load_data_yaml
from kd_yolo.data.labels import read_labels
from kd_yolo.data.pixels import BadImageError, decode
from kd_yolo.data.validate import keypoint_columns
from kd_yolo.errors import ConfigError, DataError
from kd_yolo.files import written_aside

CELL = 320
"""Side of one picture, pixels."""
CAPTION = 22
GAP = 6
FONT = cv2.FONT_HERSHEY_SIMPLEX

Canvas = NDArray[np.uint8]


def draw_contact_sheet(yaml: Path, out: Path, split: str = "train", count: int = 20, seed: int = 0) -> Path:
    """Draw images of a split with boxes and class names.

    Images are drawn at random so that every class turns up: the classes take turns.

    Args:
        yaml: A data YAML.
        out: The PNG file to write.
        split: Which split.
        count: Number of images, at most.
        seed: Seed of the choice.

    Returns:
        The PNG file.

    Raises:
        ConfigError: ``count`` is under 1, or ``out`` is no PNG name.
        DataError: The split is missing or empty.
        OutputError: ``out`` cannot be written.
    """
    if count < 1:
        raise ConfigError(f"count={count}: must be at least 1")
    if out.suffix.lower() != ".png":
        raise ConfigError(f"out={out}: the contact sheet is a PNG file; give a name that ends in .png")
    data = load_data_yaml(yaml)
    if split not in data.splits:
        raise DataError(f"{yaml}: there is no split '{split}' (there are {', '.join(data.splits)})")
    images = data.images(split)
    if not images:
        raise DataError(f"{yaml}: the split '{split}' holds no image; correct '{split}'")
    chosen = _choose(data, images, count, seed)
    columns = min(len(chosen), max(1, math.ceil(math.sqrt(len(chosen) * 1.5))))
    rows = math.ceil(len(chosen) / columns)
    sheet = np.full((rows * (CELL + CAPTION + GAP) + GAP, columns * (CELL + GAP) + GAP, 3), 255, np.uint8)
    for number, image in enumerate(chosen):
        top = GAP + number // columns * (CELL + CAPTION + GAP)
        left = GAP + number % columns * (CELL + GAP)
        sheet[top : top + CELL + CAPTION, left : left + CELL] = _cell(data, image)
    done, code = cv2.imencode(".png", sheet)
    if not done:
        raise DataError("OpenCV could not encode the contact sheet; reinstall opencv-python")
    with written_aside(out) as aside:
        aside.write_bytes(code.tobytes())
    return out


def class_color(class_id: int) -> tuple[int, int, int]:
    """Return a bright BGR color; neighbouring ids are far apart on the color wheel (golden angle)."""
    r, g, b = colorsys.hsv_to_rgb(class_id * 0.381966 % 1.0, 0.9, 1.0)
    return round(255 * b), round(255 * g), round(255 * r)


def _choose(data: DataYaml, images: list[Path], count: int, seed: int) -> list[Path]:
    """Pick images at random, class after class in turn (background last), without repetition."""
    order = [images[i] for i in np.random.default_rng(seed).permutation(len(images))]
    by_class: dict[int, list[Path]] = {i: [] for i in range(-1, len(data.names))}
    for image in order:
        boxes = read_labels(label_path(image), len(data.names), keypoint_columns(data)).boxes
        for class_id in {box[0] for box in boxes} or {-1}:
            by_class[class_id].append(image)
    queues = [by_class[i] for i in (*range(len(data.names)), -1)]
    chosen: dict[Path, None] = {}
    while len(chosen) < min(count, len(images)):
        for queue in queues:
            while queue and queue[0] in chosen:
                queue.pop(0)
            if queue and len(chosen) < count:
                chosen[queue.pop(0)] = None
    return list(chosen)


def _cell(data: DataYaml, image: Path) -> Canvas:
    """Return one picture with its caption, uint8 of shape (CELL + CAPTION, CELL, 3)."""
    cell = np.full((CELL + CAPTION, CELL, 3), 235, np.uint8)
    try:
        pixels, _, _ = decode(image)
    except BadImageError as error:
        cv2.putText(cell, "bad image", (8, 40), FONT, 0.8, (0, 0, 200), 2, cv2.LINE_AA)
        cv2.putText(cell, str(error)[:48], (8, 66), FONT, 0.36, (0, 0, 200), 1, cv2.LINE_AA)
        pixels = None
    if pixels is not None:
        height, width = pixels.shape[:2]
        scale = CELL / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        _draw_boxes(small, data, image)
        cell[: size[1], : size[0]] = small
    caption = image.name if len(image.name) <= 44 else f"{image.name[:20]}...{image.name[-21:]}"
    cv2.putText(cell, caption, (4, CELL + CAPTION - 7), FONT, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    return cell


def _draw_boxes(small: Canvas, data: DataYaml, image: Path) -> None:
    """Draw boxes, then all names on top, each inside the picture."""
    height, width = small.shape[:2]
    labels = read_labels(label_path(image), len(data.names), keypoint_columns(data))
    names = []
    for class_id, x, y, w, h in labels.boxes:
        left, top = round((x - w / 2) * width), round((y - h / 2) * height)
        right, bottom = round((x + w / 2) * width) - 1, round((y + h / 2) * height) - 1
        cv2.rectangle(small, (left, top), (right, bottom), class_color(class_id), 2)
        names.append((class_id, left, top, bottom))
    for class_id, left, top, bottom in names:
        (text_width, text_height), _ = cv2.getTextSize(data.names[class_id], FONT, 0.45, 1)
        room = text_height + 6
        # above the box, else below it, else inside: a name must not hide the small defect it names
        y0 = top - room if top >= room else (bottom + 1 if bottom + room < height else max(top, 0))
        x0 = min(max(left - 1, 0), max(0, width - text_width - 4))
        cv2.rectangle(small, (x0, y0), (x0 + text_width + 4, y0 + room), class_color(class_id), -1)
        cv2.putText(small, data.names[class_id], (x0 + 2, y0 + room - 3), FONT, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
