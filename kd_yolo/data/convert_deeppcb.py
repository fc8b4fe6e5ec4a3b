"""Read DeepPCB: groupNNNNN/NNNNN/ID_test.jpg with groupNNNNN/NNNNN_not/ID.txt, each line ``x1 y1 x2 y2 type``."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from kd_yolo.data.layout import files_under
from kd_yolo.data.samples import SPLIT_WORDS, RawBox, Reading, Sample, images_under
from kd_yolo.errors import DataError

TYPES = {1: "open", 2: "short", 3: "mousebite", 4: "spur", 5: "copper", 6: "pin-hole"}
"""Defect types of the published annotation files; 0 is background and unused."""

_TESTED = "_test"


def read_deeppcb(src: Path) -> Reading:
    """Read the tested images (the ``_temp`` templates hold no defects and are left out).

    The published lists trainval.txt and test.txt give the split when they are there.

    Raises:
        DataError: No ``*_test`` image with a text file of its number was found.
    """
    reading = Reading()
    texts: dict[str, list[Path]] = defaultdict(list)
    for text in files_under(src, {".txt"}):
        texts[text.stem].append(text)
    images = [path for path in images_under(src) if path.stem.endswith(_TESTED)]
    splits = _lists(src)
    used: set[Path] = set()
    for image in images:
        number = image.stem.removesuffix(_TESTED)
        group = image.relative_to(src).parts[:-2]
        near = [text for text in texts.get(number, []) if text.relative_to(src).parts[: len(group)] == group]
        if not near:
            reading.problem("image without annotation", image.relative_to(src).as_posix())
            continue
        used.add(near[0])
        reading.samples.append(Sample(image, _parse(near[0], src, reading), splits.get(number)))
    for text in (path for paths in texts.values() for path in paths if path.parent.name.endswith("_not")):
        if text not in used:
            reading.problem("annotation without image", text.relative_to(src).as_posix())
    if not reading.samples:
        raise DataError(f"{src}: no NAME_test.jpg with a NAME.txt; from=deeppcb needs the folder PCBData as published")
    reading.decisions.append("box coordinates read as continuous edges from 0; templates (_temp) left out")
    return reading


def _parse(text: Path, src: Path, reading: Reading) -> list[RawBox]:
    boxes = []
    for number, line in enumerate(text.read_text(encoding="utf-8-sig").splitlines(), 1):
        values = re.split(r"[\s,]+", line.strip())
        if values == [""]:
            continue
        try:
            x0, y0, x1, y1, kind = (int(value) for value in values)
            boxes.append(RawBox(TYPES[kind], x0, y0, x1, y1))
        except (ValueError, KeyError):
            detail = (
                f"{text.relative_to(src).as_posix()} line {number}: '{line.strip()}' is not 'x1 y1 x2 y2 type(1-6)'"
            )
            reading.problem("unusable object", detail)
    return boxes


def _lists(src: Path) -> dict[str, str]:
    """Return the published split of each image number."""
    splits: dict[str, str] = {}
    for word in ("trainval", "test"):
        for file in src.rglob(f"{word}.txt"):
            for line in file.read_text(encoding="utf-8-sig").splitlines():
                if line.strip():
                    splits[Path(line.split()[0]).stem.removesuffix(_TESTED)] = SPLIT_WORDS[word]
    return splits
