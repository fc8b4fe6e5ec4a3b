"""The data set doctor: everything that is wrong, suspicious or worth knowing about a data set, in one report."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from kd_yolo.data.check_report import BoxSizes, DataReport, Problem, Severity
from kd_yolo.data.datayaml import DataYaml, label_path, load_data_yaml
from kd_yolo.data.labels import read_labels
from kd_yolo.data.pixels import BadImageError, ImageFacts, examine, in_threads, similar_pairs
from kd_yolo.data.progress import Progress, silent
from kd_yolo.data.validate import keypoint_columns
from kd_yolo.errors import ConfigError

IMBALANCE = 10.0
"""Ratio of the most to the least frequent class that deserves a warning."""
ERROR_KINDS = frozenset({"degenerate box"})
"""Faults that do not stop training but are wrong all the same."""
NOT_LABELS = frozenset({"classes.txt", "labels.txt", "notes.txt", "readme.txt"})

Boxes = list[tuple[int, float, float, float, float]]


def check_dataset(yaml: Path, imgsz: int = 640, progress: Progress = silent) -> DataReport:
    """Examine a data set.

    Looked for: label files with wrong columns, text, class ids out of range, coordinates not normalised; duplicate,
    degenerate and outside boxes; unreadable, truncated and corrupt images; images without a label file and the reverse;
    empty splits; the same image in two splits (by bytes and by pixels; near duplicates as a warning); class balance;
    box sizes as the network will see them.

    Args:
        yaml: A data YAML.
        imgsz: Side of the square canvas the images will be letterboxed to, pixels.
        progress: Called with (images done, all images).

    Raises:
        ConfigError: The YAML is malformed or ``imgsz`` is no size.
        DataError: A folder that the YAML names is missing.
    """
    if imgsz < 1:
        raise ConfigError(f"imgsz={imgsz}: must be above 0")
    data = load_data_yaml(yaml)
    report = DataReport(yaml=yaml, imgsz=imgsz, names=data.names)
    images = {split: data.images(split) for split in data.splits}
    facts: dict[Path, ImageFacts] = {}
    total = sum(len(files) for files in images.values())
    for files in images.values():
        for file, result in in_threads(examine, files):
            if isinstance(result, BadImageError):
                report.add("error", "bad image", file, str(result))
            else:
                facts[file] = result
                if result.warning:
                    report.add("warning", "image will be rewritten", file, result.warning)
            progress(len(facts), total)
    sides: list[tuple[float, float]] = []
    for split, files in images.items():
        sides += _check_split(report, data, split, files, facts)
    _check_stray_labels(report, images)
    _check_leakage(report, images, facts)
    _check_balance(report)
    report.sizes = _sizes(sides)
    return report


def _check_split(
    report: DataReport, data: DataYaml, split: str, files: list[Path], facts: dict[Path, ImageFacts]
) -> list[tuple[float, float]]:
    """Check the labels of one split; return the boxes' widths and heights on the canvas, pixels."""
    nc = len(data.names)
    counts: Counter[int] = Counter()
    sides: list[tuple[float, float]] = []
    background, missing = 0, 0
    for image in files:
        file = label_path(image)
        labels = read_labels(file, nc, keypoint_columns(data))
        for fault in labels.faults:
            severity: Severity = "error" if fault.fatal or fault.kind in ERROR_KINDS else "warning"
            where = f"line {fault.line}: " if fault.line else ""
            report.add(severity, fault.kind, file, where + fault.detail)
        if not labels.exists:
            missing += 1
            report.add("warning", "image without label file", image, f"counts as background (looked for {file})")
        background += not labels.boxes
        counts.update(box[0] for box in labels.boxes)
        if image in facts:
            sides += _on_canvas(report, file, labels.boxes, facts[image])
    report.images[split] = len(files)
    report.background[split] = background
    report.boxes[split] = [counts[i] for i in range(nc)]
    if not files:
        report.add("error", "empty split", report.yaml, f"'{split}' holds no image")
    elif not sum(counts.values()):
        reason = "no label file was found" if missing == len(files) else "all label files are empty"
        report.add("error", "no boxes", report.yaml, f"'{split}' has {len(files)} images but no box: {reason}")
    return sides


def _on_canvas(report: DataReport, file: Path, boxes: Boxes, facts: ImageFacts) -> list[tuple[float, float]]:
    """Return box sides after letterboxing, pixels, and report boxes under one pixel of the image."""
    scale = report.imgsz / max(facts.width, facts.height)
    sides = []
    for _, _, _, w, h in boxes:
        if w * facts.width < 1 or h * facts.height < 1:
            detail = f"{w * facts.width:.2f} x {h * facts.height:.2f} pixels: under one pixel of the image"
            report.add("warning", "tiny box", file, detail)
        sides.append((w * facts.width * scale, h * facts.height * scale))
    return sides


def _check_stray_labels(report: DataReport, images: dict[str, list[Path]]) -> None:
    expected = {label_path(image) for files in images.values() for image in files}
    for folder in sorted({file.parent for file in expected}):
        if folder.is_dir():
            for file in sorted(folder.glob("*.txt")):
                if file not in expected and file.name.lower() not in NOT_LABELS:
                    report.add(
                        "warning", "label without image", file, "no image of this name in any split; it is not used"
                    )


def _check_leakage(report: DataReport, images: dict[str, list[Path]], facts: dict[Path, ImageFacts]) -> None:
    """Report images that occur twice: across splits as errors, within one as warnings, look-alikes as warnings."""
    rows = [(split, file) for split, files in images.items() for file in files if file in facts]
    same: set[frozenset[Path]] = set()
    for digest_name, how in (("bytes_digest", "byte for byte"), ("pixels_digest", "pixel for pixel")):
        groups: dict[str, list[tuple[str, Path]]] = defaultdict(list)
        for split, file in rows:
            groups[getattr(facts[file], digest_name)].append((split, file))
        for group in groups.values():
            _report_same(report, group, how, same)
    if not rows:
        return
    for i, j, correlation in similar_pairs(np.stack([facts[file].look for _, file in rows])):
        (split_a, a), (split_b, b) = rows[i], rows[j]
        if split_a != split_b and frozenset((a, b)) not in same:
            detail = f"looks like {b} in {split_b} (correlation {correlation:.3f}): the same part photographed twice?"
            report.add("warning", "near duplicate across splits", a, detail)


def _report_same(report: DataReport, group: list[tuple[str, Path]], how: str, same: set[frozenset[Path]]) -> None:
    """Report one group of equal images, each against the first; pairs already reported are passed over."""
    for number, (split, file) in enumerate(group):
        for other_split, other in group[:number]:
            if frozenset((file, other)) in same:
                continue
            same.add(frozenset((file, other)))
            if split == other_split:
                report.add("warning", "duplicate image", file, f"equals {other} {how}")
            else:
                report.add("error", "leakage", file, f"in {split}, equals {other} in {other_split} {how}")


def _check_balance(report: DataReport) -> None:
    """Report classes that a split lacks and strong imbalance in train."""
    for split, counts in report.boxes.items():
        for name, count in zip(report.names, counts, strict=True):
            if not count and any(counts):
                report.add("warning", "class missing", report.yaml, f"'{split}' has no box of class '{name}'")
    train = [count for count in report.boxes.get("train", []) if count]
    if train and max(train) > IMBALANCE * min(train):
        detail = f"the most frequent class has {max(train)} boxes in train, the least {min(train)}"
        report.add("warning", "class imbalance", report.yaml, detail)


def _sizes(sides: list[tuple[float, float]]) -> BoxSizes:
    return BoxSizes.of(np.asarray(sides, dtype=np.float64).reshape(-1, 2))


__all__ = ["DataReport", "Problem", "check_dataset"]
