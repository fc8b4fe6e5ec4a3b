"""Tiny made-up copies of the layouts that data sets are published in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import yaml
from numpy.typing import NDArray

Box = tuple[str, float, float, float, float]
NEU = ("crazing", "inclusion", "patches", "pitted_surface", "rolled-in_scale", "scratches")


def write_image(path: Path, seed: int, width: int = 40, height: int = 30) -> Path:
    """Write a grey texture that no other seed gives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    done, code = cv2.imencode(path.suffix, pixels)
    assert done
    path.write_bytes(code.tobytes())
    return path


def read_pixels(path: Path, flags: int = cv2.IMREAD_COLOR) -> NDArray[np.uint8]:
    """Read an image that must be readable."""
    pixels = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), flags)
    assert pixels is not None
    return np.asarray(pixels, dtype=np.uint8)


def voc_text(boxes: Sequence[Box], width: int = 40, height: int = 30, filename: str = "any.jpg") -> str:
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x0:g}</xmin><ymin>{y0:g}</ymin>"
        f"<xmax>{x1:g}</xmax><ymax>{y1:g}</ymax></bndbox></object>"
        for name, x0, y0, x1, y1 in boxes
    )
    size = f"<size><width>{width}</width><height>{height}</height><depth>1</depth></size>"
    return f"<annotation><filename>{filename}</filename>{size}{objects}</annotation>"


def write_voc(image: Path, annotation: Path, seed: int, boxes: Sequence[Box]) -> None:
    write_image(image, seed)
    annotation.parent.mkdir(parents=True, exist_ok=True)
    annotation.write_text(voc_text(boxes, filename=image.name), encoding="utf-8")


def neu_published(root: Path, each: int = 10, splits: bool = False) -> Path:
    """IMAGES/ + ANNOTATIONS/, one box an image, class by <name>."""
    stems = []
    for number, name in enumerate(NEU):
        for index in range(1, each + 1):
            stem = f"{name}_{index}"
            stems.append(stem)
            seed = 1000 * number + index
            box = (name, 1 + index % 5, 2, 20 + index % 7, 25)
            write_voc(root / "IMAGES" / f"{stem}.jpg", root / "ANNOTATIONS" / f"{stem}.xml", seed, [box])
    if splits:
        (root / "splits").mkdir()
        parts = {"test": stems[::10], "val": stems[1::10]}
        parts["train"] = [stem for stem in stems if stem not in parts["test"] + parts["val"]]
        for split, listed in parts.items():
            (root / "splits" / f"{split}.txt").write_text("\n".join(listed) + "\n", encoding="utf-8")
    return root


def yolo_set(root: Path, train: int = 6, val: int = 3, test: int = 0, names: Sequence[str] = ("a", "b")) -> Path:
    """A healthy data set in Ultralytics form; return its data.yaml."""
    seed = 0
    content: dict[str, object] = {"path": str(root)}
    for split, count in (("train", train), ("val", val), ("test", test)):
        if not count:
            continue
        (root / "labels" / split).mkdir(parents=True, exist_ok=True)
        content[split] = f"images/{split}"
        for index in range(count):
            write_image(root / "images" / split / f"{split}_{index}.png", seed := seed + 1)
            line = f"{index % len(names)} 0.5 0.5 0.{2 + index % 7} 0.4\n"
            (root / "labels" / split / f"{split}_{index}.txt").write_text(line, encoding="utf-8")
    content["names"] = dict(enumerate(names))
    (root / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return root / "data.yaml"


def label_rows(folder: Path) -> dict[str, list[list[float]]]:
    """Every label file below a folder: stem to rows of numbers."""
    return {
        file.stem: [[float(value) for value in line.split()] for line in file.read_text().splitlines()]
        for file in sorted(folder.rglob("*.txt"))
    }
