"""Make a classification folder, SPLIT/CLASS/IMAGE, of a detection data set or of a plain folder of class folders.

A detection data set keeps its split: where that was made with groups (magnetic tile: images that look alike), the
classification folder is as free of leaks. Byte-identical images never lie in two splits.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from kd_yolo.classify.data_report import ClassDataReport, Placed, counted
from kd_yolo.classify.folder import VAL_NAMES
from kd_yolo.classify.squares import place_squared
from kd_yolo.data.datasets import data_root, resolve_dataset
from kd_yolo.data.datayaml import DataYaml, label_path, load_data_yaml
from kd_yolo.data.grouping import Item
from kd_yolo.data.labels import read_labels
from kd_yolo.data.layout import IMAGE_SUFFIXES, MARKER, SPLITS, built_aside, files_under
from kd_yolo.data.lock import locked
from kd_yolo.data.progress import Progress, silent, stderr_progress
from kd_yolo.data.signals_builtin import SIGNALS_BUILTIN, resolve_signals_builtin
from kd_yolo.data.splits import SplitSpec, assign
from kd_yolo.data.validate import keypoint_columns
from kd_yolo.errors import ConfigError, DataError, nearest
from kd_yolo.files import sha256, write_json
from kd_yolo.resources import builtin_names

Kind = Literal["auto", "class", "defect", "folder"]
KINDS = ("auto", "class", "defect", "folder")
GOOD, DEFECTIVE = "good", "defective"
VERSION = 2


def resolve_class_data(data: str, root: Path | None = None) -> Path:
    """Return the absolute folder that ``data=`` of a classification run stands for.

    Args:
        data: A classification folder; or the name of a built-in detection data set (``neu``, ``magnetic-tile``), whose
            classification folder ``<data root>/<name>-cls`` is made once and used from then on; or of a built-in set
            of signals (``knock-synth``).
        root: Folder of converted data sets; see ``data_root``.

    Raises:
        DataError: There is neither.
    """
    folder = Path(data).expanduser()
    if folder.is_dir():
        return folder.absolute()
    known = [*builtin_names("datasets"), *SIGNALS_BUILTIN]
    name = folder.stem if folder.suffix in {".yaml", ".yml"} else folder.name
    if str(folder.parent) == "." and name in SIGNALS_BUILTIN:
        return resolve_signals_builtin(name, data_root(root))
    if str(folder.parent) != "." or name not in known:
        raise DataError(
            f"data={data}: no such folder; classification data is a folder with train/CLASS/ and val/CLASS/, or one of "
            f"{', '.join(known)}{nearest(name, known)}"
        )
    home = data_root(root) / f"{name}-cls"
    source = resolve_dataset(name, root)
    with locked(data_root(root) / ".kd-yolo" / f"{name}-cls.lock"):
        if not _is_made(home, source):
            to_classification(source, home, progress=stderr_progress(f"{name}: making {home} once"))
    return home


def to_classification(
    src: str | Path,
    out: str | Path,
    kind: Kind = "auto",
    split: SplitSpec | None = None,
    mode: Literal["copy", "link"] = "copy",
    progress: Progress = silent,
) -> ClassDataReport:
    """Write a classification folder.

    Args:
        src: A detection data set (name, YAML or folder), or for ``kind=folder`` a folder of class folders.
        out: Folder to write; replaced only if this package wrote it.
        kind: ``class``: each image has the class that its file name begins with, else the one with the largest share of
            its box area; images without a box are ``good``. ``defect``: images with a box are ``defective``, others
            ``good``. ``folder``: the class is the folder's name. ``auto``: ``folder`` for a folder without a detection
            data set, ``defect`` for a data set of which some images have no box, else ``class``.
        split: How to split, ``kind=folder`` only; a detection data set keeps its own split.
        mode: Copy images byte for byte, or link to them.
        progress: Called with (done, all).

    Raises:
        DataError: Nothing usable, or a class that a split would lack.
        ConfigError: Wrong kind, or ``split`` with a detection data set.
        OutputError: The folder cannot be written.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind={kind}: not one of {', '.join(KINDS)}{nearest(kind, KINDS)}")
    target = Path(out).expanduser().absolute()
    decisions: list[str] = []
    if kind == "folder" or (kind == "auto" and _is_plain_folder(Path(src).expanduser())):
        placed, used, origin = _from_folder(Path(src).expanduser(), split or SplitSpec(), decisions), "folder", None
    else:
        if split is not None:
            raise ConfigError("split: a detection data set keeps its own split; split it with kd-yolo data split first")
        origin = resolve_dataset(str(src))
        placed, used = _from_detection(load_data_yaml(origin), kind, decisions)
    if any(one.image.resolve().is_relative_to(target.resolve()) for one in placed):
        raise ConfigError(f"out={out}: holds the images of src={src} themselves; choose another folder")
    placed = _without_leaks(placed, decisions)
    report = counted(ClassDataReport(target, used, sorted({one.label for one in placed}), {}, decisions), placed, src)
    with built_aside(target) as aside:
        decisions += _write(aside, placed, mode == "link", progress)
        mark = {"origin": str(origin) if origin else str(Path(src).absolute()), "source": _mark(origin)}
        write_json(aside / MARKER, {"version": VERSION, **report.to_dict(), **mark})
    return report


def _from_detection(data: DataYaml, kind: Kind, decisions: list[str]) -> tuple[list[Placed], str]:
    """Return the images of a detection data set with their classes, and the kind in use."""
    rows = [(split, image, _areas(data, image)) for split in SPLITS for image in data.images(split)]
    background = sum(not areas for *_, areas in rows)
    used = ("defect" if background else "class") if kind == "auto" else kind
    if used == "defect" and not 0 < background < len(rows):
        raise DataError(f"{data.file}: kind=defect needs images with and without boxes; {background} have none")
    named = voted = 0
    placed = []
    for split, image, areas in rows:
        by_name = _class_in_name(image.stem, data.names)
        if used == "defect" or not areas:
            label = DEFECTIVE if areas else GOOD
        elif by_name is not None:
            label, named = by_name, named + 1
        else:
            label, voted = max(sorted(areas), key=lambda name: areas[name]), voted + (len(areas) > 1)
        placed.append(Placed(image, split, label, sha256(image)))
    decisions.append("split as in the detection data set")
    if used == "class":
        decisions.append(f"class: {named} images by file name, {len(rows) - named - background} by box area")
        if voted:
            decisions.append(f"{voted} images hold boxes of several classes: the one with the largest area was taken")
    if background:
        decisions.append(f"{background} images without a box are '{GOOD}'")
    return placed, used


def _areas(data: DataYaml, image: Path) -> Counter[str]:
    """Return the box area of each class in an image, as a share of the image."""
    found: Counter[str] = Counter()
    labels = label_path(image)
    if labels.is_file():
        for box in read_labels(labels, len(data.names), keypoint_columns(data)).boxes:
            found[data.names[int(box[0])]] += box[3] * box[4]  # type: ignore[assignment]
    return found


def _class_in_name(stem: str, names: Sequence[str]) -> str | None:
    """Return the class that a file name begins with: ``rolled-in_scale_7`` is ``rolled-in_scale``; else None."""
    fitting = [name for name in names if stem == name or stem.startswith((f"{name}_", f"{name}-"))]
    return max(fitting, key=len) if fitting else None


def _is_plain_folder(folder: Path) -> bool:
    return folder.is_dir() and not any((folder / name).is_file() for name in ("data.yaml", "data.yml", "dataset.yaml"))


def _from_folder(src: Path, split: SplitSpec, decisions: list[str]) -> list[Placed]:
    """Return the images of class folders, split."""
    if not src.is_dir():
        raise DataError(f"{src}: no such folder; kind=folder needs a folder of class folders")
    folders = [path for path in sorted(src.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    if any(path.name in {"train", *VAL_NAMES} for path in folders):
        raise DataError(f"{src}: is split already (it has {folders[0].name}/ ...); train on it with data={src}")
    loose = [path for path in sorted(src.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
    if loose:
        raise DataError(f"{loose[0]}: this image is in no class folder ({len(loose)} such images); move them")
    found = [(path.name, image) for path in folders for image in files_under(path, IMAGE_SUFFIXES)]
    empty = [path for path in folders if path.name not in {name for name, _ in found}]
    if empty:
        raise DataError(f"{empty[0]}: this class folder holds no image; fill it or remove it")
    items = [
        Item(f"{name}/{image.relative_to(src / name)}", image.stem, frozenset({name}), sha256(image), None, image)
        for name, image in found
    ]
    result = assign(items, split)
    decisions += result.decisions
    if result.left_out:
        decisions.append(f"{len(result.left_out)} images are in no list (left out)")
    return [
        Placed(image, result.split[item.key], name, item.digest)
        for (name, image), item in zip(found, items, strict=True)
        if item.key in result.split
    ]


def _without_leaks(placed: Sequence[Placed], decisions: list[str]) -> list[Placed]:
    """Drop copies: of one in several splits those that train or val have, of one with two classes all of them."""
    by_digest: dict[str, list[Placed]] = defaultdict(list)
    for one in placed:
        by_digest[one.digest].append(one)
    kept, copies, contradictions = [], 0, 0
    for one in placed:
        same = by_digest[one.digest]
        if len({other.label for other in same}) > 1:
            contradictions += 1
        elif SPLITS.index(one.split) < max(SPLITS.index(other.split) for other in same):
            copies += 1
        else:
            kept.append(one)
    if copies:
        decisions.append(f"{copies} images left out of an earlier split: a later one has the same bytes")
    if contradictions:
        decisions.append(f"{contradictions} images left out: the same bytes carry two classes")
    return kept


def _write(folder: Path, placed: Sequence[Placed], link: bool, progress: Progress) -> list[str]:
    """Place every image; return what is to be said of it: padding to squares is done where links are asked for, too."""
    taken: set[Path] = set()
    padded = 0
    progress(0, len(placed))
    for done, one in enumerate(placed, 1):
        place = folder / one.split / one.label
        place.mkdir(parents=True, exist_ok=True)
        target = place / one.image.name
        if target in taken:
            target = place / f"{one.digest[:12]}-{one.image.name}"
        taken.add(target)
        if place_squared(one.image, target, link):
            padded += 1
        progress(done, len(placed))
    if not padded:
        return []
    why = "Ultralytics' classifiers look at the middle square of an image only"
    return [f"{padded} images padded to squares by their border pixels, as PNG: {why}"]


def _mark(origin: Path | None) -> str:
    """Return what says whether a detection data set is still the one that a folder was made of."""
    if origin is None:
        return ""
    record = origin.parent / MARKER
    return sha256(record if record.is_file() else origin)


def _is_made(home: Path, source: Path) -> bool:
    try:
        record = json.loads((home / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("version") == VERSION and record.get("source") == _mark(source)
