"""Draw rolled-steel surfaces and six kinds of defects on them, from nothing but a random generator.

Everything works in place on a square float32 grey image of shape (n, n), values about 0..255. Sizes are given for a
200-pixel image and multiplied by ``n / 200``. A defect returns the mask of the pixels it really changed, from which its
box is taken, so that a box is true by construction.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]
Region = tuple[float, float, float, float]
"""x, y, width, height of the place a defect is drawn in, pixels; it may reach over the border."""

STYLES = ("rough", "smooth", "mottled", "oblique")


def field(rng: np.random.Generator, n: int, cell_x: float, cell_y: float) -> Image:
    """Return smooth noise of mean 0 and standard deviation 1, shape (n, n), with bumps of the given size in pixels."""
    cells_x, cells_y = int(np.ceil(n / cell_x)) + 3, int(np.ceil(n / cell_y)) + 3
    grid = rng.standard_normal((cells_y, cells_x), dtype=np.float32)
    size = (round(cells_x * cell_x), round(cells_y * cell_y))
    big = cv2.resize(grid, size, interpolation=cv2.INTER_CUBIC)
    left, top = int(rng.integers(size[0] - n + 1)), int(rng.integers(size[1] - n + 1))
    return _unit(big[top : top + n, left : left + n])


def grain(rng: np.random.Generator, n: int, sigma_x: float, sigma_y: float, degrees: float = 0.0) -> Image:
    """Return fine noise of mean 0 and standard deviation 1, shape (n, n), blurred along two axes and turned."""
    side = n if degrees == 0 else int(n * 1.5)
    noise = cv2.GaussianBlur(rng.standard_normal((side, side), dtype=np.float32), (0, 0), sigma_x, sigmaY=sigma_y)
    if degrees:
        turn = cv2.getRotationMatrix2D((side / 2, side / 2), degrees, 1.0)
        low = (side - n) // 2
        noise = cv2.warpAffine(noise, turn, (side, side), flags=cv2.INTER_LINEAR)[low : low + n, low : low + n]
    return _unit(noise)


def surface(rng: np.random.Generator, n: int, style: str) -> Image:
    """Return a defect-free steel surface of one of ``STYLES``, shape (n, n), lit unevenly, with rolling lines."""
    s = n / 200
    bands = field(rng, n, 14 * s, n)
    if style == "rough":
        mean, image = rng.uniform(95, 185), 0.75 * grain(rng, n, 0.8 * s, 0.6 * s) + 0.35 * field(rng, n, 5 * s, 4 * s)
        image = image * rng.uniform(17, 30) + bands * rng.uniform(3, 9)
    elif style == "smooth":
        mean = rng.uniform(65, 150)
        image = grain(rng, n, 0.7 * s, 1.5 * s) * rng.uniform(1.5, 4) + bands * rng.uniform(1, 4)
        image += field(rng, n, 6 * s, 60 * s) * rng.uniform(0.5, 2.5)
    elif style == "mottled":
        mean, image = rng.uniform(110, 215), grain(rng, n, 1.6 * s, 1.6 * s) * rng.uniform(3, 8)
        image += bands * rng.uniform(0.5, 3)
    else:
        mean = rng.uniform(80, 150)
        image = grain(rng, n, 3.5 * s, 0.8 * s, rng.uniform(-25, 25)) * rng.uniform(5, 9)
        image += grain(rng, n, 0.8 * s, 0.8 * s) * rng.uniform(3, 7) + bands * rng.uniform(1, 4)
    image += np.float32(mean) + _light(rng, n) * np.float32(rng.uniform(4, 26))
    image += field(rng, n, 3 * s, n) * np.float32(rng.uniform(0, 2.5))  # fine rolling lines
    return image.astype(np.float32)


def distract(rng: np.random.Generator, image: Image, depth: float) -> None:
    """Add one harmless mark that must not be reported: a smudge, lone specks, a stain edge, a soft band, a hairline."""
    n = image.shape[0]
    s, sign = n / 200, float(rng.choice((-1.0, 1.0)))
    kind = int(rng.integers(5))
    layer = np.zeros_like(image)
    if kind == 0:  # smudge: patch-sized, but without an edge
        center, axes = rng.uniform(0, n, 2), rng.uniform(15, 45, 2) * s
        cv2.ellipse(layer, _at(center), _at(axes), rng.uniform(0, 180), 0, 360, 1.0, -1)
        layer = cv2.GaussianBlur(layer, (0, 0), 14 * s)
        depth *= 1.2
    elif kind == 1:  # dust: single dark specks far apart
        for center in rng.uniform(0, n, (int(rng.integers(2, 7)), 2)):
            cv2.circle(layer, _at(center), round(rng.uniform(0.6, 2.4) * s), 1.0, -1, cv2.LINE_AA)
        sign = -1.0
    elif kind == 2:  # dried drop: a thin soft ring
        radius = rng.uniform(12, 60) * s
        cv2.circle(layer, _at(rng.uniform(0, n, 2)), round(radius), 1.0, max(1, round(2 * s)), cv2.LINE_AA)
        layer = cv2.GaussianBlur(layer, (0, 0), 2.2 * s)
    elif kind == 3:  # roll band: brighter or darker strip with soft edges over the full height
        left = rng.uniform(0, n)
        layer[:, round(left) : round(left + rng.uniform(8, 45) * s)] = 1.0
        layer = cv2.GaussianBlur(layer, (0, 0), 4 * s)
        depth *= 0.6
    else:  # hairline: one faint line, thinner and weaker than any scratch
        start = rng.uniform(0, n, 2)
        end = start + rng.uniform(-60, 60, 2) * s
        cv2.line(layer, _at(start), _at(end), 1.0, 1, cv2.LINE_AA)
        depth *= 0.45
    image += layer * np.float32(sign * depth)


def crazing(rng: np.random.Generator, image: Image, region: Region, depth: float) -> Mask:
    """Draw a web of fine dark cracks, mostly running across the strip."""
    x, y, w, h = region
    s = image.shape[0] / 200
    layer = np.zeros_like(image)
    heading = rng.choice((0.0, np.pi / 2), p=(0.8, 0.2))
    for _ in range(int(rng.integers(9, 18) * max(0.7, w * h / (110 * 70 * s * s)))):
        start = np.array([x, y]) + rng.uniform(0, 1, 2) * (w, h)
        for _ in range(int(rng.integers(1, 4))):  # a crack and its branches
            steps = int(rng.integers(4, 11))
            turns = heading + rng.choice((0.0, np.pi)) + rng.normal(0, 0.3) + np.cumsum(rng.normal(0, 0.5, steps))
            path = np.stack([np.cos(turns), np.sin(turns)], 1) * (rng.uniform(2, 5.5, steps) * s)[:, None]
            path = start + np.cumsum(path, 0)
            width = max(1, round(float(rng.choice((1, 1, 2))) * s))
            points = np.round(path * 8).astype(np.int32)
            cv2.polylines(layer, [points], False, rng.uniform(0.55, 1.0), width, cv2.LINE_AA, 3)
            start = path[int(rng.integers(steps))]
    layer[~_blob(rng, image.shape[0], region, (25 * s, 25 * s), 0.2, power=4)] = 0
    image -= cv2.GaussianBlur(layer, (0, 0), 0.5 * s) * np.float32(depth * 1.5)
    return np.asarray(layer > 0.3)


def inclusion(rng: np.random.Generator, image: Image, region: Region, depth: float) -> Mask:
    """Draw a dark ragged streak along the rolling direction."""
    s = image.shape[0] / 200
    mask = _blob(rng, image.shape[0], region, (4 * s, 18 * s), 0.5)
    image -= cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 0.8 * s) * np.float32(depth)
    return mask


def patches(rng: np.random.Generator, image: Image, region: Region, depth: float) -> Mask:
    """Draw a dark cloudy patch with an irregular outline, sometimes hollow."""
    n = image.shape[0]
    s = n / 200
    mask = _blob(rng, n, region, (12 * s, 12 * s), 0.4)
    soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), rng.uniform(1.0, 2.2) * s)
    body = 1 + 0.22 * grain(rng, n, 1.1 * s, 1.1 * s) - rng.uniform(0, 0.35) * cv2.GaussianBlur(soft, (0, 0), 8 * s)
    image -= soft * body * np.float32(depth)
    return mask


def pitted_surface(rng: np.random.Generator, image: Image, region: Region, depth: float) -> Mask:
    """Draw a wide field of small dark pits."""
    n = image.shape[0]
    s = n / 200
    pits = grain(rng, n, 1.5 * s, 1.5 * s) > rng.uniform(1.25, 1.9)
    mask = np.asarray(pits & _blob(rng, n, region, (30 * s, 30 * s), 0.12, power=6))
    image -= cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 0.7 * s) * np.float32(depth)
    return mask


def rolled_in_scale(rng: np.random.Generator, image: Image, region: Region, depth: float) -> Mask:
    """Draw a cluster of short dark flecks, each with a bright rim on one side."""
    n = image.shape[0]
    s = n / 200
    flecks = grain(rng, n, 3.0 * s, 1.4 * s, rng.uniform(-20, 20)) > rng.uniform(1.25, 1.75)
    mask = np.asarray(flecks & _blob(rng, n, region, (20 * s, 20 * s), 0.3))
    soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 0.7 * s)
    step = max(1, round(1.5 * s))
    rim = np.roll(soft, (step, step), (0, 1)) - soft
    image -= soft * np.float32(depth) - np.maximum(rim, 0) * np.float32(0.45 * depth)
    return mask


def scratches(rng: np.random.Generator, image: Image, region: Region, depth: float) -> Mask:
    """Draw one to four bright lines side by side along the longer side of the region, uneven along their length."""
    x, y, w, h = region
    n = image.shape[0]
    s = n / 200
    layer = np.zeros_like(image)
    diagonal = max(w, h) < 2.2 * min(w, h)
    flip = rng.random() < 0.5
    for _ in range(1 if diagonal else int(rng.integers(1, 5))):
        low, high = rng.uniform(0, 0.2), rng.uniform(0.8, 1.0)
        across, drift = rng.uniform(0.1, 0.9), rng.normal(0, 0.04)
        if diagonal:
            ends = np.array([[low, 1 - low if flip else low], [high, 1 - high if flip else high]])
        elif h >= w:
            ends = np.array([[across, low], [across + drift, high]])
        else:
            ends = np.array([[low, across], [high, across + drift]])
        points = np.round((ends * (w, h) + (x, y)) * 8).astype(np.int32)
        width = max(1, round(float(rng.choice((1, 1, 2, 4))) * s))
        cv2.line(layer, points[0].tolist(), points[1].tolist(), rng.uniform(0.6, 1.0), width, cv2.LINE_AA, 3)
    uneven = np.clip(0.8 + 0.35 * field(rng, n, 9 * s, 9 * s), 0.15, 1.4)
    layer = cv2.GaussianBlur(layer, (0, 0), 0.6 * s) * uneven.astype(np.float32)
    image += layer * np.float32(depth * 1.3)
    return np.asarray(layer > 0.18)


DRAW: dict[str, Callable[[np.random.Generator, Image, Region, float], Mask]] = {
    "crazing": crazing,
    "inclusion": inclusion,
    "patches": patches,
    "pitted_surface": pitted_surface,
    "rolled-in_scale": rolled_in_scale,
    "scratches": scratches,
}
"""Class name to the function that draws it, in the class order of NEU-DET."""


def _unit(values: NDArray[np.float32]) -> Image:
    spread = float(values.std()) or 1.0
    return np.asarray((values - values.mean()) / np.float32(spread), dtype=np.float32)


def _at(point: NDArray[np.float64]) -> tuple[int, int]:
    return round(float(point[0])), round(float(point[1]))


def _light(rng: np.random.Generator, n: int) -> Image:
    """Return uneven lighting: a tilted plane with a little curvature, standard deviation 1."""
    angle, bend = rng.uniform(0, 2 * np.pi), rng.uniform(-0.6, 0.6)
    axis = np.linspace(-1, 1, n, dtype=np.float32)
    plane = np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None]
    return _unit(plane + np.float32(bend) * (axis[None, :] ** 2 + axis[:, None] ** 2))


def _blob(
    rng: np.random.Generator, n: int, region: Region, cell: tuple[float, float], ragged: float, power: int = 2
) -> Mask:
    """Return an ellipse-like mask inside ``region`` with a noisy outline; a higher ``power`` is squarer."""
    x, y, w, h = region
    across = np.abs((np.arange(n, dtype=np.float32) + 0.5 - np.float32(x + w / 2)) / np.float32(w / 2))
    along = np.abs((np.arange(n, dtype=np.float32) + 0.5 - np.float32(y + h / 2)) / np.float32(h / 2))
    distance = across[None, :] ** power + along[:, None] ** power
    inside = (across[None, :] <= 1) & (along[:, None] <= 1)
    return np.asarray(inside & (distance < 0.9 + np.float32(ragged) * field(rng, n, *cell)))
