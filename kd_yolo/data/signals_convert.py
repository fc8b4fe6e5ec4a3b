"""Turn folders of recordings into pictures of their spectra for ``task=classify``: train|val|test/CLASS/NAME.png."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from kd_yolo.data.grouping import Item, group_items
from kd_yolo.data.layout import MARKER, SPLITS, built_aside, check_replaceable
from kd_yolo.data.progress import Progress, silent
from kd_yolo.data.signals import SIGNALS_YAML, SignalsKeys, length_in, read_keys
from kd_yolo.data.signals_reader import Picture, SetReader
from kd_yolo.data.signals_report import SignalsReport
from kd_yolo.data.signals_spectra import to_grey
from kd_yolo.data.signals_split import find_sources, loose_sources, part_pattern, split_by_part
from kd_yolo.data.splits import Assignment, parse_split
from kd_yolo.errors import ConfigError, DataError
from kd_yolo.files import write_json, write_text

REFERENCE_PERCENTILE = 99.0
"""Of the training pictures' peaks: one loud click must not darken all others."""

_ABOUT = """\
# How these pictures were made. Draw other recordings in the same way with: like=THIS_FILE
# sampling_rate_hz, low_hz, high_hz in Hz; window_s, hop_s, segment_s in s; imgsz in px; segment_s null: not cut
# reference_db: level of grey value 255, dB re amplitude 1 (full scale of a WAV file of integers); null: its own peak
# dynamic_range_db: grey value 0 is this many dB below it
"""


def convert_signals(
    src: Path, out: Path, *, progress: Progress = silent, resolved_from: str | None = None, **params: Any
) -> SignalsReport:
    """Convert folders of recordings into spectrum or spectrogram pictures.

    Every file is read and checked before anything is written; then read again and drawn, so that memory holds one file
    at a time.

    Args:
        src: ``CLASS/...`` folders (or ``train|val|test/CLASS/...``) with WAV, CSV, NPY or MAT files.
        out: Folder to write; replaced when this package wrote it, refused when it holds anything else.
        progress: Called with (files done, all): every file counts twice, checked and drawn.
        resolved_from: What a built-in name asked for; kept in conversion.json.
        **params: See ``SignalsKeys``.

    Raises:
        ConfigError: A parameter is unknown, out of range or contradicts another.
        DataError: The folder or a file does not fit; one line with the file and the remedy.
        BackendMissingError: A MAT file without SciPy.
        OutputError: ``out`` cannot be written, or holds something else.
    """
    start = time.perf_counter()
    keys = read_keys({**params, "src": str(src), "out": str(out)})
    _check_places(src, out)
    found = loose_sources(src) if keys.like else find_sources(src)
    report = SignalsReport(out.absolute(), src.absolute(), problems=found.problems, resolved_from=resolved_from)
    pattern = part_pattern(found.sources, keys.group, keys.signals_per_part)
    reader = SetReader(keys, 2 * len(found.sources), progress)
    if keys.like and (length_s := length_in(keys.like)) is not None and keys.sampling_rate_hz is not None:
        reader.first = (Path(keys.like), round(length_s * keys.sampling_rate_hz))
    pictures = [picture for source in found.sources for picture in reader.examine(source)]
    report.dropped_s = round(reader.dropped_s, 3)
    _check_names(pictures)
    if keys.like:
        folders = [picture.source.label for picture in pictures]
        report.decisions = [f"drawn as {keys.like} says, not split"]
        report.images = {label: {"all": count} for label, count in sorted(Counter(folders).items())}
    else:
        folders = _share_out(keys, pictures, pattern, report)
    reference_db = _reference(keys, pictures, folders, report)
    report.parameters = reader.parameters(reference_db)
    with built_aside(out) as folder:
        _draw(folder, reader, pictures, folders, reference_db)
        _write_yaml(folder / SIGNALS_YAML, report, reader.length_s)
        report.seconds = time.perf_counter() - start
        write_json(folder / MARKER, report.to_dict())
    return report


def _check_places(src: Path, out: Path) -> None:
    if not src.is_dir():
        raise DataError(f"src={src}: no such folder; give the folder that holds the class folders")
    if out.resolve().is_relative_to(src.resolve()):
        raise ConfigError(f"out={out}: lies inside src={src}; choose a folder outside it")
    if src.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"out={out}: holds src={src}, which would be replaced; choose another folder")
    check_replaceable(out)


def _share_out(keys: SignalsKeys, pictures: Sequence[Picture], pattern: str, report: SignalsReport) -> list[str]:
    """Return the folder of each picture, SPLIT/CLASS, and count them in the report."""
    items = [
        Item(f"{p.source.label}/{p.name}", p.part, frozenset({p.source.label}), p.digest, p.source.published)
        for p in pictures
    ]
    _check_labels(items)
    chosen = split_by_part(items, replace(parse_split(keys.split, keys.seed), group=pattern))
    report.decisions = [_parts_text(keys), *chosen.decisions]
    _count(report, items, group_items(items, pattern), chosen)
    return [f"{chosen.split[item.key]}/{picture.source.label}" for item, picture in zip(items, pictures, strict=True)]


def _draw(
    folder: Path, reader: SetReader, pictures: Sequence[Picture], folders: Sequence[str], reference_db: float | None
) -> None:
    """Draw every picture into its folder, file by file."""
    place = dict(zip(pictures, folders, strict=True))
    by_source: dict[Path, list[Picture]] = defaultdict(list)
    for picture in pictures:
        by_source[picture.source.file].append(picture)
    for name in sorted(set(folders)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for own in by_source.values():
        for picture, levels in reader.levels(own):
            white = picture.peak_db if reference_db is None else reference_db
            done, code = cv2.imencode(".png", to_grey(levels, white, reader.keys.dynamic_range_db))
            if not done:
                raise DataError("OpenCV could not encode a PNG image; reinstall opencv-python")
            (folder / place[picture] / f"{picture.name}.png").write_bytes(code.tobytes())


def _write_yaml(file: Path, report: SignalsReport, length_s: float | None) -> None:
    content: dict[str, Any] = {"parameters": report.parameters}
    if length_s is not None:
        content["length_s"] = length_s
    if report.parameters["kind"] == "spectrogram":
        content["axes"] = "time to the right, frequency upwards: low_hz at the bottom, high_hz at the top"
    else:
        content["axes"] = "frequency to the right, low_hz to high_hz; all rows alike"
    content["classes"] = list(report.images)
    write_text(file, _ABOUT + yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _check_names(pictures: Sequence[Picture]) -> None:
    seen: dict[str, Picture] = {}
    for picture in pictures:
        other = seen.setdefault(f"{picture.source.label}/{picture.name}".lower(), picture)
        if other is not picture:
            raise DataError(
                f"{picture.source.file} and {other.source.file}: their pictures would have one name; rename one"
            )


def _check_labels(items: Sequence[Item]) -> None:
    """Refuse one signal under two classes: one of the labels is wrong."""
    seen: dict[str, Item] = {}
    for item in items:
        other = seen.setdefault(item.digest, item)
        if other.labels != item.labels:
            raise DataError(f"{other.key} and {item.key}: the same signal under two classes; remove the wrong one")


def _parts_text(keys: SignalsKeys) -> str:
    if keys.signals_per_part is not None:
        return f"a part is {keys.signals_per_part} signal(s) of a file in a row, as given"
    if keys.group is not None:
        return f"a part is what group={keys.group} finds in a file's path below its class folder"
    return "a part is a sub-folder of a class, else a file; equal names in two classes and equal signals are one part"


def _reference(
    keys: SignalsKeys, pictures: Sequence[Picture], folders: Sequence[str], report: SignalsReport
) -> float | None:
    """Return the level of white, dB; None when every picture has its own."""
    if keys.per_image:
        report.decisions.append("white is the peak of each picture (per_image=true): loudness is lost")
        return None
    reference_db = keys.reference_db
    if reference_db is None:
        peaks = [picture.peak_db for picture, name in zip(pictures, folders, strict=True) if name.startswith("train/")]
        reference_db = round(float(np.percentile(peaks, REFERENCE_PERCENTILE)), 1)
        how = f"{REFERENCE_PERCENTILE:g} % of the training pictures peak below"
    else:
        how = "as given"
    report.decisions.append(
        f"white is {reference_db:g} dB re amplitude 1 in every picture ({how}), "
        f"black {keys.dynamic_range_db:g} dB below"
    )
    dark = sum(picture.peak_db < reference_db - keys.dynamic_range_db for picture in pictures)
    if dark:
        report.decisions.append(f"WARNING: {dark} pictures are all black; raise dynamic_range_db or lower reference_db")
    return reference_db


def _count(report: SignalsReport, items: Sequence[Item], groups: Sequence[int], chosen: Assignment) -> None:
    images: dict[str, Counter[str]] = defaultdict(Counter)
    parts: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for item, group in zip(items, groups, strict=True):
        (label,) = item.labels
        images[label][chosen.split[item.key]] += 1
        parts[label][chosen.split[item.key]].add(group)
    for label in sorted(images):
        report.images[label] = {split: images[label][split] for split in SPLITS if split in chosen.split.values()}
        report.parts[label] = {split: len(parts[label][split]) for split in report.images[label]}
