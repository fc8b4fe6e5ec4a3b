"""The folder layout every converter writes: images/SPLIT, labels/SPLIT, data.yaml, conversion.json."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import psutil
import yaml

from kd_yolo.errors import OutputError
from kd_yolo.files import write_text

SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".dng", ".heic", ".heif", ".jp2", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp"}
)
"""What Ultralytics reads (ultralytics.data.utils.IMG_FORMATS)."""
MARKER = "conversion.json"
"""The file that says that a folder was written by this package and may be replaced by it."""


@contextlib.contextmanager
def built_aside(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``out``; rename it to ``out`` on success, remove it on failure.

    An existing ``out`` is replaced when it was written by this package or is empty.

    Raises:
        OutputError: ``out`` holds something else, or its parent cannot be written to.
    """
    check_replaceable(out)
    aside = out.with_name(f".{out.name}.{os.getpid()}.part")
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        aside.mkdir()
    except OSError as error:
        raise OutputError(f"{out}: cannot be created ({error.strerror}); choose another with out=FOLDER") from error
    try:
        yield aside
        if out.exists():
            out.rename(old)
        aside.rename(out)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned(out: Path) -> None:
    """Remove what killed processes left half done beside ``out``."""
    for folder in out.parent.glob(f".{out.name}.*.part"):
        number = folder.name.rsplit(".", 2)[-2]
        if number.isdigit() and (int(number) == os.getpid() or not psutil.pid_exists(int(number))):
            shutil.rmtree(folder, ignore_errors=True)


def check_replaceable(out: Path) -> None:
    """Make sure that writing ``out`` destroys nothing of the user's.

    Raises:
        OutputError: It is a file, or a folder that this package did not write.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"{out}: exists and is not a folder; choose another with out=FOLDER")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise OutputError(f"{out}: exists and was not made by kd-yolo; choose another with out=FOLDER or move it away")


def files_under(folder: Path, suffixes: Collection[str] | None = None) -> list[Path]:
    """Return the files below a folder, sorted; links are followed and hidden names passed over, as Ultralytics does.

    Args:
        folder: Where to look.
        suffixes: Lower-case suffixes to keep, with the dot; None keeps every file.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real not in seen:
            visible = (Path(place, name) for name in names if not name.startswith("."))
            found += (path for path in visible if suffixes is None or path.suffix.lower() in suffixes)
        seen.add(real)
    return sorted(found)


def place_image(source: Path, target: Path, link: bool) -> None:
    """Copy an image byte for byte, or link to it.

    Raises:
        OutputError: The disk is full, or links are not possible here.
    """
    try:
        if link:
            target.symlink_to(source.resolve())
        else:
            shutil.copyfile(source, target)
    except OSError as error:
        hint = "; use mode=copy" if link else ""
        raise OutputError(f"{target}: cannot be written ({error.strerror}){hint}") from error


def write_labels(path: Path, boxes: Iterable[tuple[int, float, float, float, float]]) -> None:
    """Write one label file: ``class x_center y_center width height`` normalised, 6 decimals, a line each box."""
    lines = (f"{class_id} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n" for class_id, x, y, w, h in boxes)
    path.write_text("".join(lines), encoding="utf-8")


def write_data_yaml(folder: Path, home: Path, names: Sequence[str], splits: Sequence[str]) -> None:
    """Write ``folder``/data.yaml for a data set that will live in ``home``.

    Args:
        folder: Where to write it.
        home: The folder's final name; its absolute path goes into ``path``.
        names: Class names in the order of their ids.
        splits: Which of train, val, test exist.
    """
    content: dict[str, object] = {"path": str(home.absolute())}
    content.update({split: f"images/{split}" for split in splits})
    content["names"] = dict(enumerate(names))
    write_text(folder / "data.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
