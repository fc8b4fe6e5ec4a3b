"""From what the user wrote as ``data=`` to a folder of images and the way to read it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from kd_yolo.config import Strict, validate
from kd_yolo.data.datasets import SHARED_VARIABLE, data_root
from kd_yolo.data.layout import IMAGE_SUFFIXES
from kd_yolo.errors import DataError, nearest
from kd_yolo.resources import builtin_names, builtin_root, load_yaml

Format = Literal["mvtec", "btad", "folder", "masks"]
KIND = "datasets/anomaly"
ALIASES = {"tile": "magnetic-tile", "mvtec-ad": "mvtec", "magnetic_tile": "magnetic-tile"}
NORMAL_NAMES = ("good", "ok", "normal")
"""Folder names of normal images, any case."""
FREE_NAMES = (*NORMAL_NAMES, "free")
"""The same where every class has one folder, with or without ``MT_``."""
PREFIX = "MT_"
SMALLEST_REGION: dict[Format, int] = {"mvtec": 1, "btad": 1, "folder": 1, "masks": 10}
"""Default of ``min_area``: masks of magnetic tile hold specks (``kd_yolo.data.convert_masks`` has the same default)."""
LAYOUTS = (
    "train/good + test/good + test/DEFECT [+ ground_truth/DEFECT/NAME_mask.png] in it or in folders of it (normal "
    "images may be called good, ok or normal), or MT_Free + MT_DEFECT with NAME.jpg and NAME.png"
)


class AnomalyYaml(Strict):
    """The user's description of a data set for ``task=anomaly``."""

    path: str = Field(min_length=1, description="folder of the images, relative to this file or absolute")
    format: Literal["auto", "mvtec", "btad", "folder", "masks"] = "auto"
    category: str | int | None = Field(default=None, description="which category, where the folder holds several")
    normal: str | None = Field(default=None, min_length=1, description="folder name of the normal images")
    val: str | None = Field(default=None, min_length=1, description="labelled validation folder, for thresholds")
    train_share: float = Field(default=0.7, gt=0, lt=1, description="masks: share of the normal images to train on")
    seed: int = Field(default=0, ge=0, description="masks: seed of that split")
    min_area: int | None = Field(
        default=None, ge=1, description="smallest truth region kept, pixels of the mask file; masks: 10, else 1"
    )


class AnomalyBuiltin(Strict):
    """A YAML file of ``cfg/datasets/anomaly``."""

    kd_yolo: Literal[1]
    title: str
    origin: str = Field(description="where the data comes from and on what terms")
    format: Format
    folders: list[str] = Field(default_factory=list, description="names under which the published folder is kept")
    holds: list[str] = Field(default_factory=list, description="patterns of which one must match inside")
    normal: str | None = None
    train_share: float = Field(default=0.7, gt=0, lt=1)
    seed: int = Field(default=0, ge=0)
    min_area: int = Field(default=1, ge=1)
    make: dict[str, int] | None = Field(default=None, description="arguments of the generator, for made data")


@dataclass(frozen=True)
class Source:
    """Where the images lie and how to read them.

    Attributes:
        name: Name of the data set.
        root: Absolute folder.
        format: Layout of the folder.
        normal: Folder name of the normal images, or None to find it.
        category: Category that the user's YAML names.
        val: Labelled validation folder that it names.
        train_share: Layout ``masks``: share of the normal images to train on.
        seed: Seed of that split.
        min_area: Smallest truth region kept, pixels of the mask file.
    """

    name: str
    root: Path
    format: Format
    normal: str | None = None
    category: str | None = None
    val: str | None = None
    train_share: float = 0.7
    seed: int = 0
    min_area: int = 1


def describe_anomaly_datasets() -> dict[str, str]:
    """Return the built-in anomaly data sets: name to title."""
    return {name: _builtin(builtin_root() / KIND / f"{name}.yaml").title for name in builtin_names(KIND)}


def find_source(data: str, root: Path | None = None) -> Source:
    """Return where the images are.

    Args:
        data: A built-in name with or without ``.yaml`` (``mvtec``, ``btad``, ``magnetic-tile`` or ``tile``,
            ``surface-synth``), a YAML file of the keys of ``AnomalyYaml``, or a folder.
        root: Folder of data sets; see ``kd_yolo.data.datasets.data_root``.

    Raises:
        DataError: Nothing was found, or the folder has no known layout.
        ConfigError: The YAML file is not YAML, or a key is unknown, missing or of the wrong type.
    """
    place = data_root(root)
    given = Path(data).expanduser()
    is_yaml = given.suffix in {".yaml", ".yml"}
    if is_yaml and given.is_file():
        content = load_yaml(given)
        if content.get("kd_yolo") is not None:
            return _from_builtin(given.stem, given, place)
        return _from_user(given.absolute(), content, place)
    stem = given.stem if is_yaml else given.name
    stem = ALIASES.get(stem.lower(), stem)
    if str(given.parent) == "." and stem in builtin_names(KIND):
        return _from_builtin(stem, builtin_root() / KIND / f"{stem}.yaml", place)
    if given.is_dir():
        folder = given.absolute()
        found = detect_format(folder, None)
        return Source(folder.name, folder, found, min_area=SMALLEST_REGION[found])
    known = [*builtin_names(KIND), *ALIASES]
    raise DataError(
        f"data={data}: not found (looked for {given.absolute()} and a built-in of that name; "
        f"built-in: {', '.join(builtin_names(KIND))}){nearest(stem, known)}"
    )


def detect_format(root: Path, normal: str | None) -> Format:
    """Return the layout of a folder.

    Args:
        root: Folder of one or of several categories.
        normal: Folder name of normal images, if it is none of the usual ones.

    Raises:
        DataError: It has no known layout.
    """
    if not (trained := [folder for folder in (root, *subfolders(root)) if (folder / "train").is_dir()]):
        free = [folder for folder in subfolders(root) if is_normal(folder.name, normal, FREE_NAMES)]
        if free and len(subfolders(root)) > 1:
            return "masks"
        raise DataError(f"{root}: no known layout of an anomaly data set; needed: {LAYOUTS}")
    names = {folder.name for place in trained for folder in subfolders(place / "train")}
    return "mvtec" if "good" in names else "btad" if "ok" in names else "folder"


def subfolders(folder: Path) -> list[Path]:
    """Return the visible folders in a folder, sorted by name; none when it is not there."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def images_in(folder: Path) -> list[Path]:
    """Return the visible image files directly in a folder, sorted by name; none when it is not there."""
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )


def is_normal(name: str, normal: str | None, usual: tuple[str, ...] = NORMAL_NAMES) -> bool:
    """Tell whether a folder of that name holds normal images."""
    if normal is not None:
        return name == normal
    return name.removeprefix(PREFIX).lower() in usual


def _builtin(file: Path) -> AnomalyBuiltin:
    return validate(AnomalyBuiltin, load_yaml(file), str(file))


def _from_user(file: Path, content: dict[str, Any], place: Path) -> Source:
    keys = validate(AnomalyYaml, content, str(file))
    given = Path(keys.path).expanduser()
    places = list(dict.fromkeys(base / given for base in (file.parent, Path.cwd(), place)))
    folder = next((found for found in places if found.is_dir()), None)
    if folder is None:
        raise DataError(f"{file}: path={keys.path} is not a folder (looked for {', '.join(map(str, places))})")
    folder = folder.resolve()
    found = detect_format(folder, keys.normal) if keys.format == "auto" else keys.format
    category = None if keys.category is None else str(keys.category)
    own = {"train_share": keys.train_share, "seed": keys.seed, "min_area": keys.min_area or SMALLEST_REGION[found]}
    return Source(file.stem, folder, found, keys.normal, category, keys.val, **own)  # type: ignore[arg-type]


def _from_builtin(name: str, file: Path, place: Path) -> Source:
    spec = _builtin(file)
    own = {"train_share": spec.train_share, "seed": spec.seed, "min_area": spec.min_area}
    if spec.make is not None:
        from kd_yolo.anomaly.synthetic import ensure_surface_synth

        home = ensure_surface_synth(place / name, spec.make)
        return Source(name, home, spec.format, spec.normal, **own)  # type: ignore[arg-type]
    bases = [place, Path.cwd()]
    if os.environ.get(SHARED_VARIABLE):
        bases.append(Path(os.environ[SHARED_VARIABLE]).expanduser().absolute() / "datasets")
    looked = list(dict.fromkeys(base / folder for base in bases for folder in spec.folders))
    for found in looked:
        if found.is_dir() and any(next(found.glob(pattern), None) for pattern in spec.holds):
            return Source(name, found.resolve(), spec.format, spec.normal, **own)  # type: ignore[arg-type]
    raise DataError(
        f"data={name}: {spec.title} is not there (looked for {', '.join(map(str, looked))}); put the published folder "
        f"at one of these places, or give its folder as data=FOLDER"
    )
