"""Built-in data set ``steel-synth``: grey images of six NEU-like defect classes, made in seconds, with true boxes.

It exists so that a newcomer, the demo and the tests can train without any download. It imitates the look of NEU-DET
(hot-rolled steel strip, 200x200 pixels, the same six classes in the same order) but is no substitute for it.
The same arguments give the same bytes on the same machine and package versions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kd_yolo.data.layout import SPLITS, built_aside, write_data_yaml, write_labels
from kd_yolo.data.progress import Progress, silent
from kd_yolo.data.steel import DRAW, STYLES, Image, Region, distract, surface
from kd_yolo.errors import ConfigError, DataError
from kd_yolo.files import write_json

VERSION = 1
"""Raised whenever the same seed would draw other images, so that cached copies are made anew."""

NAMES = tuple(DRAW)

# Difficulty. Raise the first two for easier images, the others for harder ones.
CONTRAST = 1.0
"""Scale of every defect's contrast."""
FAINT_STRENGTH = (0.5, 0.8)
"""Contrast range of a faint defect, as a share of a normal one (0.9 to 1.6)."""
FAINT_SHARE = 0.3
"""Share of defects that are faint."""
FOREIGN_STYLE_SHARE = 0.35
"""Share of images whose surface is drawn from all styles instead of the main class's own: it must not give it away."""
DISTRACTORS = 3.0
"""Mean number of harmless marks an image (Poisson)."""
SENSOR_NOISE = (1.0, 5.0)
"""Standard deviation of the camera's noise, grey values."""
BLUR = (0.0, 0.9)
"""Sigma of the camera's blur, pixels of a 200-pixel image."""
EMPTY_SHARE = 0.05
"""Share of images without any defect."""
SECOND_CLASS_SHARE = 0.2
"""Share of images that hold a second defect class."""

JPEG_QUALITY = 92


@dataclass(frozen=True)
class _Kind:
    """How a class is placed: home style, contrast, number and size ranges in pixels of a 200-pixel image."""

    style: str
    contrast: float
    most: int
    width: tuple[float, float]
    height: tuple[float, float]


_KINDS = {
    "crazing": _Kind("rough", 2.3, 3, (70, 165), (42, 95)),
    "inclusion": _Kind("smooth", 1.9, 4, (14, 38), (35, 130)),
    "patches": _Kind("rough", 2.6, 3, (38, 80), (42, 120)),
    "pitted_surface": _Kind("mottled", 3.0, 2, (80, 190), (110, 195)),
    "rolled-in_scale": _Kind("oblique", 3.2, 3, (45, 100), (45, 105)),
    "scratches": _Kind("smooth", 4.0, 4, (8, 30), (70, 200)),
}

Box = tuple[int, float, float, float, float]


def make_steel_synth(
    out: Path,
    train: int = 240,
    val: int = 60,
    test: int = 60,
    seed: int = 0,
    imgsz: int = 200,
    progress: Progress = silent,
) -> Path:
    """Write the built-in data set in Ultralytics form.

    Args:
        out: Folder to create (replaced when it holds an earlier ``steel-synth``).
        train: Number of training images.
        val: Number of validation images.
        test: Number of test images.
        seed: Seed of everything; each image depends on it, its split and its number alone.
        imgsz: Side of the square images, pixels.
        progress: Called with (images done, all images).

    Returns:
        The path of ``data.yaml``.

    Raises:
        ConfigError: A count or the size is out of range.
        OutputError: ``out`` cannot be written, or holds something else.
    """
    counts = dict(zip(SPLITS, (train, val, test), strict=True))
    _check(counts, imgsz, seed)
    arguments = {**counts, "seed": seed, "imgsz": imgsz}
    with built_aside(out) as folder:
        boxes_by_class = dict.fromkeys(NAMES, 0)
        jobs = [(split, number, index) for number, split in enumerate(SPLITS) for index in range(counts[split])]
        for split in SPLITS:
            for kind in ("images", "labels"):
                (folder / kind / split).mkdir(parents=True)
        progress(0, len(jobs))
        for done, (split, number, index) in enumerate(jobs, 1):
            image, boxes = make_image(np.random.default_rng([seed, number, index]), index % len(NAMES), imgsz)
            stem = f"steel_{split}_{index:04d}"
            (folder / "images" / split / f"{stem}.jpg").write_bytes(_jpeg(image))
            write_labels(folder / "labels" / split / f"{stem}.txt", boxes)
            for box in boxes:
                boxes_by_class[NAMES[box[0]]] += 1
            progress(done, len(jobs))
        write_data_yaml(folder, out, NAMES, [split for split in SPLITS if counts[split]])
        record = {"source": "kd-yolo steel-synth", "version": VERSION, "arguments": arguments}
        write_json(folder / "conversion.json", {**record, "boxes": boxes_by_class})
    return out.absolute() / "data.yaml"


def make_image(rng: np.random.Generator, class_id: int, imgsz: int = 200) -> tuple[NDArray[np.uint8], list[Box]]:
    """Draw one image.

    Args:
        rng: Source of all randomness.
        class_id: The main class, 0 to 5; the image may hold another class too, or nothing.
        imgsz: Side of the image, pixels.

    Returns:
        The grey image, uint8 of shape (imgsz, imgsz), and its boxes as (class, x center, y center, width, height),
        normalised to 0..1.
    """
    name = NAMES[class_id]
    foreign = rng.random() < FOREIGN_STYLE_SHARE
    style = str(rng.choice(STYLES)) if foreign else _KINDS[name].style
    image = surface(rng, imgsz, style)
    spread = float((image - cv2.GaussianBlur(image, (0, 0), imgsz / 20)).std())
    for _ in range(int(rng.poisson(DISTRACTORS))):
        distract(rng, image, 4 + 1.2 * spread)
    boxes: list[Box] = []
    if rng.random() >= EMPTY_SHARE:
        boxes = _draw_defects(rng, image, name, spread)
    return _photograph(rng, image), boxes


def _jpeg(image: NDArray[np.uint8]) -> bytes:
    done, code = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not done:
        raise DataError("OpenCV could not encode a JPEG image; reinstall opencv-python")
    return code.tobytes()


def _check(counts: dict[str, int], imgsz: int, seed: int) -> None:
    for split, count in counts.items():
        least = 0 if split == "test" else 1
        if not least <= count <= 1_000_000:
            raise ConfigError(f"{split}={count}: the number of images must be {least} to 1000000")
    if not 32 <= imgsz <= 4096:
        raise ConfigError(f"imgsz={imgsz}: the image size of steel-synth must be 32 to 4096 pixels")
    if seed < 0:
        raise ConfigError(f"seed={seed}: must be 0 or more")


def _draw_defects(rng: np.random.Generator, image: Image, name: str, spread: float) -> list[Box]:
    """Draw one to four defects that hardly overlap and return their boxes."""
    plan = [name] * int(rng.integers(1, _KINDS[name].most + 1))
    if rng.random() < SECOND_CLASS_SHARE and len(plan) < 4:
        plan.append(str(rng.choice([other for other in NAMES if other != name])))
    taken: list[Region] = []
    boxes: list[Box] = []
    for kind_name in plan:
        kind = _KINDS[kind_name]
        region = _place(rng, kind, image.shape[0], taken, is_scratch=kind_name == "scratches")
        if region is None:
            continue
        strength = rng.uniform(*FAINT_STRENGTH) if rng.random() < FAINT_SHARE else rng.uniform(0.9, 1.6)
        mask = DRAW[kind_name](rng, image, region, CONTRAST * kind.contrast * strength * (6 + 0.8 * spread))
        found = _box(mask)
        if found is not None:
            taken.append(region)
            boxes.append((NAMES.index(kind_name), *found))
    return boxes


def _place(rng: np.random.Generator, kind: _Kind, n: int, taken: list[Region], *, is_scratch: bool) -> Region | None:
    """Find room for a defect that covers at most 10 % of any other, or None after 30 attempts."""
    s = n / 200
    for _ in range(30):
        w, h = rng.uniform(*kind.width) * s, rng.uniform(*kind.height) * s
        turn = rng.random() if is_scratch else 1.0
        if turn < 0.2:
            w, h = h, w
        elif turn < 0.35:
            w = h = rng.uniform(45, 110) * s
        x, y = (float(rng.uniform(-0.12 * side, n - 0.88 * side)) for side in (w, h))
        if all(_overlap((x, y, w, h), other) <= 0.1 for other in taken):
            return x, y, w, h
    return None


def _overlap(a: Region, b: Region) -> float:
    """Return the shared area as a part of the smaller region."""
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(w, 0.0) * max(h, 0.0) / min(a[2] * a[3], b[2] * b[3])


def _box(mask: NDArray[np.bool_]) -> tuple[float, float, float, float] | None:
    """Return the normalised box around a mask, or None when too little of the defect shows to be called one."""
    n = mask.shape[0]
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if len(columns) < 4 or len(rows) < 4:
        return None
    left, right, top, bottom = columns[0] / n, (columns[-1] + 1) / n, rows[0] / n, (rows[-1] + 1) / n
    return (left + right) / 2, (top + bottom) / 2, right - left, bottom - top


def _photograph(rng: np.random.Generator, image: Image) -> NDArray[np.uint8]:
    """Apply contrast, blur, noise and 8-bit rounding as a camera would."""
    n = image.shape[0]
    gain, mean = np.float32(rng.uniform(0.7, 1.25)), image.mean()
    image = (image - mean) * gain + mean
    image = cv2.GaussianBlur(image, (0, 0), max(0.05, rng.uniform(*BLUR)) * n / 200)
    image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(*SENSOR_NOISE))
    return np.clip(np.round(image), 0, 255).astype(np.uint8)
