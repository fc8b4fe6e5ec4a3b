"""Turn a published data set into Ultralytics form: images/SPLIT, labels/SPLIT, data.yaml and conversion.json."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from kd_yolo import __version__
from kd_yolo.data.builtin import fixed_splits
from kd_yolo.data.convert_coco import read_coco
from kd_yolo.data.convert_deeppcb import TYPES, read_deeppcb
from kd_yolo.data.convert_masks import read_masks
from kd_yolo.data.convert_voc import Origin, read_voc
from kd_yolo.data.grouping import Item
from kd_yolo.data.layout import (
    MARKER,
    SPLITS,
    built_aside,
    check_replaceable,
    place_image,
    write_data_yaml,
    write_labels,
)
from kd_yolo.data.pixels import BadImageError
from kd_yolo.data.progress import Progress, silent
from kd_yolo.data.samples import Reading, Sample, clean, image_size
from kd_yolo.data.splits import SplitSpec, assign, expand_stems
from kd_yolo.errors import ConfigError, DataError, nearest
from kd_yolo.files import sha256, write_json

VERSION = 1
"""Raised whenever the same raw folder would be converted differently, so that cached copies are made anew."""

FORMATS = ("voc", "masks", "coco", "deeppcb")
Mode = Literal["copy", "link"]


@dataclass
class ConversionReport:
    """What a conversion did.

    Attributes:
        out: The folder written.
        yaml: Its data.yaml.
        format: Which reader was used.
        source: The raw folder.
        images: Images in each split.
        background: Images without any box in each split.
        boxes: Boxes of each class in each split.
        dropped: Boxes ``duplicate``, ``degenerate``, ``outside`` (left out) and ``clipped`` (kept, cut to the image).
        decisions: How coordinates, classes and split were read.
        problems: Files that could not be used, by kind.
        lists_sha256: Digest of each split's sorted stems, one a line.
        seconds: How long it took.
    """

    out: Path
    yaml: Path
    format: str
    source: Path
    images: dict[str, int] = field(default_factory=dict)
    background: dict[str, int] = field(default_factory=dict)
    boxes: dict[str, dict[str, int]] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    decisions: list[str] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)
    lists_sha256: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types."""
        plain = asdict(self)
        plain.update(out=str(self.out), yaml=str(self.yaml), source=str(self.source), seconds=round(self.seconds, 2))
        return {**plain, "kd_yolo": __version__, "converter": VERSION}

    def to_text(self) -> str:
        """Return the report as lines for a terminal."""
        splits = list(self.images)
        width = max(len("images"), *(len(name) for name in self.boxes), len("background")) + 2
        lines = [f"{self.source} ({self.format}) -> {self.out} in {self.seconds:.1f} s"]
        lines.append("".ljust(width) + "".join(f"{split:>9}" for split in (*splits, "all")))
        rows = {"images": self.images, "background": self.background, **self.boxes}
        for name, row in rows.items():
            values = [row.get(split, 0) for split in splits]
            lines.append(name.ljust(width) + "".join(f"{value:>9}" for value in (*values, sum(values))))
        lines.append("boxes dropped: " + (", ".join(f"{k} {v}" for k, v in self.dropped.items()) or "none"))
        lines += [f"- {decision}" for decision in self.decisions]
        for kind, files in self.problems.items():
            shown = "; ".join(files[:3]) + (f" and {len(files) - 3} more in {MARKER}" if len(files) > 3 else "")
            lines.append(f"! {kind}: {len(files)} ({shown})")
        return "\n".join(lines)


def convert(
    from_: str,
    src: Path,
    out: Path,
    *,
    split: SplitSpec | None = None,
    names: Sequence[str] | None = None,
    origin: Origin = "auto",
    min_area: int = 10,
    threshold: int = 127,
    mode: Mode = "copy",
    resolved_from: str | None = None,
    progress: Progress = silent,
) -> ConversionReport:
    """Convert a raw folder.

    Args:
        from_: ``voc``, ``masks``, ``coco`` or ``deeppcb``.
        src: The published folder.
        out: Folder to write; replaced when this package wrote it, refused when it holds anything else.
        split: By default lists in ``src/splits``, else NEU-DET's fixed split, else the published, else a random one.
        names: Class names in the order of their ids; by default those found, sorted.
        origin: VOC only: see ``convert_voc``.
        min_area: Masks only: smallest component, pixels.
        threshold: Masks only: grey value above which a pixel is a defect.
        mode: ``copy`` the images byte for byte, or ``link`` to them.
        resolved_from: Fingerprint of the raw folder, kept in conversion.json when a built-in name asked for this.
        progress: Called with (images done, all images).

    Raises:
        ConfigError: An argument is not known or out of range.
        DataError: The folder is missing, not of this format, or holds a class that ``names`` lacks.
        OutputError: ``out`` cannot be written.
    """
    start = time.perf_counter()
    _check_arguments(from_, src, out, mode, origin)
    reading = _read(from_, src, origin, min_area, threshold)
    order = _class_order(from_, reading, names, src)
    sizes = _sizes(reading, src)
    items = _items(reading.samples, src)
    chosen = assign(items, _completed(split or SplitSpec(), src, from_, {item.stem for item in items}))
    for key in chosen.left_out:
        reading.problem("image in no split list (left out)", key)
    report = ConversionReport(out.absolute(), out.absolute() / "data.yaml", from_, src.absolute())
    report.decisions, report.problems = [*reading.decisions, *chosen.decisions], reading.problems
    with built_aside(out) as folder:
        _write(folder, report, reading.samples, items, chosen.split, order, sizes, mode, progress)
        report.seconds = time.perf_counter() - start
        write_json(folder / MARKER, {**report.to_dict(), "resolved_from": resolved_from})
    return report


def _check_arguments(from_: str, src: Path, out: Path, mode: str, origin: str) -> None:
    if from_ not in FORMATS:
        raise ConfigError(f"from={from_}: not known; use one of {', '.join(FORMATS)}{nearest(from_, FORMATS)}")
    if mode not in {"copy", "link"}:
        raise ConfigError(f"mode={mode}: not known; use copy or link")
    if origin not in {"auto", "0", "1"}:
        raise ConfigError(f"origin={origin}: not known; use auto, 0 (continuous edges) or 1 (pixels counted from 1)")
    if not src.is_dir():
        raise DataError(f"src={src}: no such folder; give the folder that holds the raw data")
    if out.resolve().is_relative_to(src.resolve()):
        raise ConfigError(f"out={out}: lies inside src={src}; choose a folder outside it")
    if src.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"out={out}: holds src={src}, which would be replaced; choose another folder")
    check_replaceable(out)


def _completed(spec: SplitSpec, src: Path, from_: str, stems: set[str]) -> SplitSpec:
    """Let ``auto`` use the lists that lie beside the raw data, else the fixed split of the data set it recognises."""
    if spec.method != "auto" or spec.lists is not None:
        return spec
    if (src / "splits" / "train.txt").is_file():
        return replace(spec, lists=src / "splits")
    known = (split for split in fixed_splits(from_).values() if _named(split) <= stems)
    return replace(spec, fixed=spec.fixed or next(known, None))


def _named(split: dict[str, str]) -> set[str]:
    return {stem for text in split.values() for stem in expand_stems(text)}


def _read(from_: str, src: Path, origin: Origin, min_area: int, threshold: int) -> Reading:
    readers: dict[str, Callable[[], Reading]] = {
        "voc": lambda: read_voc(src, origin),
        "masks": lambda: read_masks(src, min_area, threshold),
        "coco": lambda: read_coco(src),
        "deeppcb": lambda: read_deeppcb(src),
    }
    return readers[from_]()


def _class_order(from_: str, reading: Reading, names: Sequence[str] | None, src: Path) -> list[str]:
    found = sorted({box.name for sample in reading.samples for box in sample.boxes})
    if names is None:
        names = list(TYPES.values()) if from_ == "deeppcb" else found
    if not names:
        raise DataError(f"{src}: no box in any of {len(reading.samples)} images; nothing to learn from")
    for name in found:
        if name not in names:
            raise DataError(f"{src}: class '{name}' is not one of {', '.join(names)}{nearest(name, names)}")
    return list(names)


def _sizes(reading: Reading, src: Path) -> dict[Path, tuple[int, int]]:
    """Read every image's size; leave out images that cannot be read, as a problem."""
    sizes: dict[Path, tuple[int, int]] = {}
    for sample in reading.samples:
        size = _size_or_reason(sample.image)
        if isinstance(size, str):
            reading.problem("unreadable image (left out)", f"{sample.image.relative_to(src).as_posix()}: {size}")
        else:
            sizes[sample.image] = size
    reading.samples = [sample for sample in reading.samples if sample.image in sizes]
    return sizes


def _size_or_reason(image: Path) -> tuple[int, int] | str:
    try:
        return image_size(image)
    except BadImageError as error:
        return str(error)


def _items(samples: Sequence[Sample], src: Path) -> list[Item]:
    """Give every image a key that is unique in any folder: its stem, or its path when two share a stem."""
    stems = Counter(sample.image.stem.lower() for sample in samples)
    items = []
    for sample in samples:
        stem = sample.image.stem
        relative = sample.image.relative_to(src).with_suffix("")
        key = stem if stems[stem.lower()] == 1 else "_".join(relative.parts)
        labels = frozenset(box.name for box in sample.boxes)
        items.append(Item(key, stem, labels, sha256(sample.image), sample.split, sample.image))
    twice = [key for key, count in Counter(item.key.lower() for item in items).items() if count > 1]
    if twice:
        raise DataError(f"{src}: two images would both be called '{twice[0]}'; rename one of them")
    return items


def _write(
    folder: Path,
    report: ConversionReport,
    samples: Sequence[Sample],
    items: Sequence[Item],
    split_of: dict[str, str],
    order: list[str],
    sizes: dict[Path, tuple[int, int]],
    mode: Mode,
    progress: Progress,
) -> None:
    dropped: Counter[str] = Counter()
    splits = [split for split in SPLITS if split in split_of.values()]
    for split in splits:
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
    report.images = {split: sum(value == split for value in split_of.values()) for split in splits}
    report.background = dict.fromkeys(splits, 0)
    report.boxes = {name: dict.fromkeys(splits, 0) for name in order}
    jobs = [(sample, item) for sample, item in zip(samples, items, strict=True) if item.key in split_of]
    progress(0, len(jobs))
    for done, (sample, item) in enumerate(jobs, 1):
        split = split_of[item.key]
        width, height = sizes[sample.image]
        boxes, counts = clean(sample.boxes, width, height)
        dropped += counts
        place_image(sample.image, folder / "images" / split / f"{item.key}{sample.image.suffix}", mode == "link")
        rows = [
            (order.index(b.name), (b.x0 + b.x1) / 2 / width, (b.y0 + b.y1) / 2 / height, (b.x1 - b.x0) / width,
             (b.y1 - b.y0) / height)
            for b in boxes
        ]  # fmt: skip
        write_labels(folder / "labels" / split / f"{item.key}.txt", rows)
        report.background[split] += not rows
        for row in rows:
            report.boxes[order[row[0]]][split] += 1
        progress(done, len(jobs))
    report.dropped = dict(sorted(dropped.items()))
    for split in splits:
        keys = sorted(item.key for _, item in jobs if split_of[item.key] == split)
        report.lists_sha256[split] = hashlib.sha256("".join(f"{key}\n" for key in keys).encode()).hexdigest()
    write_data_yaml(folder, report.out, order, splits)
