"""Read one folder for each class, every defect image beside a PNG mask of its name (magnetic tile data set).

No split is published, so the normal images are divided here: images that look alike (one tile under several exposures)
stay on one side, and a normal image that looks like a defective one is tested, never trained on.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path

from kd_yolo.anomaly.layout_parts import NORMAL, AnomalySample, Parts, inspected
from kd_yolo.anomaly.layout_source import FREE_NAMES, PREFIX, Source, is_normal, subfolders
from kd_yolo.data.grouping import SIMILAR_GROUP, Item, group_items
from kd_yolo.data.samples import images_under
from kd_yolo.data.splits import stratify
from kd_yolo.errors import DataError


def read_masks_layout(source: Source) -> Parts:
    """Read CLASS/[Imgs/]NAME.jpg + NAME.png and divide the normal images.

    Raises:
        DataError: No normal images or too few of them, a mask without an image, a validation folder was asked for, and
            what ``layout_parts.inspected`` refuses.
    """
    if source.val is not None:
        raise DataError(
            f"{source.root}: val={source.val} is not read in this layout; leave it out, or use train/ + test/"
        )
    samples: list[AnomalySample] = []
    for folder in subfolders(source.root):
        samples += _class_folder(source, folder)
    if not any(sample.label == 0 for sample in samples):
        wanted = source.normal or "MT_Free, free, good, ok or normal"
        raise DataError(
            f"{source.root}: no normal images (folder {wanted}); add them, or name their folder with normal"
        )
    looked_at = inspected(Parts(test=samples), source.root)
    return _divided(source, looked_at)


def _class_folder(source: Source, folder: Path) -> list[AnomalySample]:
    files = images_under(folder)
    masks = {file for file in files if file.suffix.lower() == ".png"}
    if len(masks) == len(files):  # images in PNG form: no mask can be told from them
        masks = set()
    usual = is_normal(folder.name, source.normal, FREE_NAMES)
    name = NORMAL if usual else folder.name.removeprefix(PREFIX)
    samples = []
    for file in [file for file in files if file not in masks]:
        mask = next((found for found in (file.with_suffix(".png"), file.with_suffix(".PNG")) if found in masks), None)
        masks.discard(mask or file)
        samples.append(AnomalySample(file, 0 if usual else 1, name, mask, source.min_area))
    if masks:
        lone = min(masks)
        raise DataError(f"{lone}: mask without an image, no '{lone.stem}.jpg' beside it; remove it or add the image")
    return samples


def _divided(source: Source, found: Parts) -> Parts:
    """Give whole groups of look-alike normal images to training until it has its share."""
    samples = found.test
    items = [Item(str(s.image), s.image.stem, frozenset({s.defect}), _digest(s.image), None, s.image) for s in samples]
    members: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(group_items(items, SIMILAR_GROUP)):
        members[group].append(index)
    free = [rows for rows in members.values() if not any(samples[row].label for row in rows)]
    flat = [(row, group) for group, rows in enumerate(free) for row in rows]
    shares = (source.train_share, 1 - source.train_share)
    sides = stratify([frozenset({NORMAL})] * len(flat), [group for _, group in flat], shares, source.seed)
    chosen = {row for (row, _), side in zip(flat, sides, strict=True) if side == 0}
    train = [sample for row, sample in enumerate(samples) if row in chosen]
    test = sorted((sample for row, sample in enumerate(samples) if row not in chosen), key=lambda s: s.label)
    normal = len(test) - sum(sample.label for sample in test)
    if not train or not normal:
        raise DataError(
            f"{source.root}: {len(train) + normal} normal images in {len(free)} groups of look-alikes are too few to "
            f"divide into training and test; add normal images"
        )
    note = (
        f"{source.root}: {len(train)} normal images to train on, {normal} to test ({source.train_share:g} of them, "
        f"look-alikes on one side, seed {source.seed}; look-alikes of defective images are tested)"
    )
    return Parts(train, test, [], [*found.notes, note], found.warnings)


def _digest(file: Path) -> str:
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
