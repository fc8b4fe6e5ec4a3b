"""Read COCO JSON (annotations/*.json beside image folders, or a JSON file inside each split's folder)."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from kd_yolo.data.layout import MARKER, files_under
from kd_yolo.data.samples import SPLIT_WORDS, RawBox, Reading, Sample, images_under, split_of
from kd_yolo.errors import DataError


def read_coco(src: Path) -> Reading:
    """Read every COCO detection file of a folder; crowd regions are left out and counted.

    Raises:
        DataError: No COCO JSON, a malformed one, or none of its images found.
    """
    files = [path for path in files_under(src, {".json"}) if path.name != MARKER]
    reading = Reading()
    index: dict[str, list[Path]] = defaultdict(list)
    for image in images_under(src):
        index[image.name].append(image)
    used: set[Path] = set()
    crowds = read = 0
    for file in files:
        content = _load(file)
        if content is None:
            continue
        read += 1
        crowds += _add(reading, src, file, content, index, used)
    if not read:
        raise DataError(f"{src}: no COCO file ('images', 'annotations' and 'categories' in a .json) here or below")
    if not reading.samples:
        raise DataError(f"{src}: {read} COCO files but none of their images found; put the images beside them")
    reading.decisions += [
        "box coordinates are continuous (COCO x, y, width, height)",
        f"crowd regions dropped: {crowds}",
    ]
    return reading


def _load(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not readable as JSON ({error}); correct or remove it") from error
    is_coco = isinstance(content, dict) and all(isinstance(content.get(k), list) for k in ("images", "categories"))
    return content if is_coco and isinstance(content.get("annotations"), list) else None


def _add(
    reading: Reading, src: Path, file: Path, content: dict[str, Any], index: dict[str, list[Path]], used: set[Path]
) -> int:
    """Add one file's images; return the number of crowd regions left out."""
    crowds = 0
    by_image: dict[Any, list[RawBox]] = defaultdict(list)
    try:
        names = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
        for note in content["annotations"]:
            if note.get("iscrowd"):
                crowds += 1
                continue
            x, y, w, h = (float(value) for value in note["bbox"])
            by_image[note["image_id"]].append(RawBox(names[note["category_id"]], x, y, x + w, y + h))
        entries = [(entry["id"], str(entry["file_name"])) for entry in content["images"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: malformed COCO entry ({type(error).__name__}: {error}); export it again") from error
    split = _split(src, file)
    for image_id, file_name in entries:
        image = _find(src, file, file_name, index, split)
        if image is None or image in used:
            reading.problem("annotation without image", f"{file.relative_to(src).as_posix()}: {file_name}")
            continue
        used.add(image)
        reading.samples.append(Sample(image, by_image.get(image_id, []), split))
    return crowds


def _split(src: Path, file: Path) -> str | None:
    """Return the split a file stands for by its folder or by a word of its name (instances_val2017)."""
    words = re.findall(r"[a-z]+", file.stem.lower())
    return split_of(file.relative_to(src)) or next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def _find(src: Path, file: Path, name: str, index: dict[str, list[Path]], split: str | None) -> Path | None:
    for base in (file.parent, src, src / "images", file.parent.parent, file.parent.parent / "images"):
        if (base / name).is_file():
            return base / name
    found = index.get(Path(name).name, [])
    same = [path for path in found if split and split in path.relative_to(src).as_posix().lower()]
    ranked = same or found
    return ranked[0] if len(ranked) == 1 else None
