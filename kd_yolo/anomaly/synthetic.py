"""Built-in data set ``surface-synth``: drawn rolled steel, normal and with four kinds of defects, with true masks.

It exists so that a newcomer, the demo and the tests can train and measure without any download. It has the layout of
MVTec AD; the surfaces are those of ``steel-synth``, of one style, as one product would be. Some images, normal ones
too, carry a harmless mark (smudge, dust, dried drop), so that a mark alone is no anomaly. The same arguments give the
same bytes on the same machine and package versions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kd_yolo.data.layout import MARKER, built_aside
from kd_yolo.data.lock import locked
from kd_yolo.data.progress import Progress, silent, stderr_progress
from kd_yolo.data.steel import DRAW, Image, Mask, Region, distract, field, surface
from kd_yolo.errors import ConfigError, DataError
from kd_yolo.files import write_json

VERSION = 2
"""Raised whenever the same seed would draw other images, so that cached copies are made anew."""

STYLE = "oblique"
DISTRACTORS = 0.5
"""Mean number of harmless marks an image (Poisson)."""
SENSOR_NOISE = (1.0, 3.0)
"""Standard deviation of the camera's noise, grey values."""
SMALLEST_DEFECT = 150
"""Pixels of a 256-pixel image that a mask has at least."""
FOREIGN_GRAIN = 1.5
"""Contrast of a pasted surface, times its own."""
DEFECTS = ("foreign", "inclusion", "patch", "scratch")
"""Folder names, in the order in which they are drawn in turn."""
_SIZES = {"foreign": (36, 72, 36, 72), "inclusion": (18, 40, 60, 130), "patch": (44, 90, 44, 90)}
"""Least and most width, then height of the place of a defect, pixels of a 256-pixel image; scratches differ."""
_CONTRAST = {"inclusion": 3.6, "patch": 3.6, "scratch": 6.0}
DEFAULTS = {"train": 80, "normal": 20, "defects": 40, "seed": 0, "imgsz": 256}


def ensure_surface_synth(home: Path, arguments: Mapping[str, int]) -> Path:
    """Return the folder of the data set; make it on first use, by one process at a time.

    Args:
        home: Where it lives.
        arguments: Those of ``make_surface_synth``; another set of them makes it anew.

    Raises:
        OutputError: The folder cannot be written, or holds something else.
    """
    wanted = {**DEFAULTS, **arguments}
    if not _is_made(home, wanted):
        with locked(home.parent / ".kd-yolo" / f"{home.name}.lock"):
            if not _is_made(home, wanted):  # another process may have finished while this one waited
                make_surface_synth(home, **wanted, progress=stderr_progress(f"surface-synth: drawing images in {home}"))
    return home


def make_surface_synth(
    out: Path,
    train: int = 80,
    normal: int = 20,
    defects: int = 40,
    seed: int = 0,
    imgsz: int = 256,
    progress: Progress = silent,
) -> Path:
    """Write the built-in anomaly data set.

    Args:
        out: Folder to create (replaced when it holds an earlier one).
        train: Number of normal training images.
        normal: Number of normal test images.
        defects: Number of defective test images, the kinds in turn.
        seed: Seed of everything; each image depends on it, its part and its number alone.
        imgsz: Side of the square images, pixels.
        progress: Called with (images done, all images).

    Returns:
        ``out``.

    Raises:
        ConfigError: A count or the size is out of range.
        OutputError: ``out`` cannot be written, or holds something else.
    """
    counts = {"train": train, "normal": normal, "defects": defects}
    _check(counts, seed, imgsz)
    arguments = {**counts, "seed": seed, "imgsz": imgsz}
    with built_aside(out) as folder:
        jobs = [(number, part, index) for number, part in enumerate(counts) for index in range(counts[part])]
        progress(0, len(jobs))
        for done, (number, part, index) in enumerate(jobs, 1):
            kind = DEFECTS[index % len(DEFECTS)] if part == "defects" else None
            image, mask = draw_surface(np.random.default_rng([seed, number, index]), kind, imgsz)
            place = f"test/{kind}" if kind else ("train/good" if part == "train" else "test/good")
            _write_png(folder / place / f"{index:03d}.png", image)
            if kind is not None:
                _write_png(folder / "ground_truth" / kind / f"{index:03d}_mask.png", mask * np.uint8(255))
            progress(done, len(jobs))
        write_json(folder / MARKER, {"source": "kd-yolo surface-synth", "version": VERSION, "arguments": arguments})
    return out


def draw_surface(
    rng: np.random.Generator, kind: str | None, imgsz: int = 256
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one image.

    Args:
        rng: Source of all randomness.
        kind: One of ``DEFECTS``, or None for a normal surface.
        imgsz: Side of the image, pixels.

    Returns:
        The grey image, and its mask of 0 and 1; both uint8 of shape (imgsz, imgsz).
    """
    image = surface(rng, imgsz, STYLE)
    spread = float((image - cv2.GaussianBlur(image, (0, 0), imgsz / 20)).std())
    for _ in range(int(rng.poisson(DISTRACTORS))):
        distract(rng, image, 4 + spread)
    mask = np.zeros((imgsz, imgsz), np.bool_)
    if kind is not None:
        image, mask = _with_defect(rng, image, kind, spread)
    image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(*SENSOR_NOISE))
    return np.clip(np.round(image), 0, 255).astype(np.uint8), mask.astype(np.uint8)


def _with_defect(rng: np.random.Generator, image: Image, kind: str, spread: float) -> tuple[Image, Mask]:
    """Draw a defect on a copy of the image until enough of it shows."""
    n = image.shape[0]
    least = SMALLEST_DEFECT * (n / 256) ** 2
    while True:
        attempt = image.copy()
        region = _place(rng, kind, n)
        if kind == "foreign":
            mask = _paste(rng, attempt, region)
        else:
            depth = _CONTRAST[kind] * rng.uniform(0.8, 1.5) * (6 + 0.8 * spread)
            name = {"inclusion": "inclusion", "patch": "patches", "scratch": "scratches"}[kind]
            mask = DRAW[name](rng, attempt, region, depth)
        if np.count_nonzero(mask) >= least:
            return attempt, mask


def _place(rng: np.random.Generator, kind: str, n: int) -> Region:
    """Return a place for a defect inside the image."""
    s = n / 256
    if kind == "scratch":
        w, h = rng.uniform(8, 24) * s, rng.uniform(70, 180) * s
        if rng.random() < 0.5:
            w, h = h, w
    else:
        low_w, high_w, low_h, high_h = _SIZES[kind]
        w, h = rng.uniform(low_w, high_w) * s, rng.uniform(low_h, high_h) * s
    return float(rng.uniform(0, n - w)), float(rng.uniform(0, n - h)), float(w), float(h)


def _paste(rng: np.random.Generator, image: Image, region: Region) -> Mask:
    """Paste a ragged blob of another surface of the same mean brightness: only its texture tells it apart."""
    x, y, w, h = region
    n = image.shape[0]
    other = surface(rng, n, "rough")
    across = (np.arange(n, dtype=np.float32) - np.float32(x + w / 2)) / np.float32(w / 2)
    along = (np.arange(n, dtype=np.float32) - np.float32(y + h / 2)) / np.float32(h / 2)
    outline = across[None, :] ** 2 + along[:, None] ** 2
    mask = np.asarray(outline < 0.85 + 0.15 * field(rng, n, 8 * n / 256, 8 * n / 256))
    if mask.any():
        image[mask] = (other[mask] - other[mask].mean()) * np.float32(FOREIGN_GRAIN) + image[mask].mean()
    return mask


def _is_made(home: Path, arguments: dict[str, int]) -> bool:
    try:
        record = json.loads((home / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(record, dict):
        return False
    return bool(record.get("version") == VERSION and record.get("arguments") == arguments)


def _write_png(file: Path, pixels: NDArray[np.uint8]) -> None:
    done, code = cv2.imencode(".png", pixels)
    if not done:
        raise DataError("OpenCV could not encode a PNG image; reinstall opencv-python")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(code.tobytes())


def _check(counts: dict[str, int], seed: int, imgsz: int) -> None:
    for part, count in counts.items():
        least = 1 if part == "train" else 0
        if not least <= count <= 100_000:
            raise ConfigError(f"{part}={count}: the number of images must be {least} to 100000")
    if not 64 <= imgsz <= 4096:
        raise ConfigError(f"imgsz={imgsz}: the image size of surface-synth must be 64 to 4096 pixels")
    if seed < 0:
        raise ConfigError(f"seed={seed}: must be 0 or more")
