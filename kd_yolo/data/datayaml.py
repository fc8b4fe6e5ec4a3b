"""Read a data YAML in Ultralytics' form, strictly: every path found, every name known, or one line that says why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from kd_yolo.config import validate
from kd_yolo.data.layout import IMAGE_SUFFIXES, SPLITS, files_under
from kd_yolo.errors import DataError, nearest
from kd_yolo.resources import load_yaml


class _Keys(BaseModel):
    """The keys that matter here; others are the user's own and travel on untouched."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    path: str | None = None
    train: str | list[str] = Field(description="folder of training images, or a text file that lists them")
    val: str | list[str] = Field(description="folder of validation images, or a text file that lists them")
    test: str | list[str] | None = None
    minival: str | list[str] | None = None
    names: list[Any] | dict[Any, Any] | None = None
    nc: int | None = None
    channels: int = Field(default=3, ge=1, le=64)
    download: Any = None
    kpt_shape: list[int] | None = None


_KNOWN_KEYS = (*_Keys.model_fields, "validation", "flip_idx", "kpt_names", "masks_dir", "depth_scale", "label_mapping")


@dataclass(frozen=True)
class DataYaml:
    """A data YAML whose paths all exist.

    Attributes:
        file: The YAML file.
        path: Absolute root of the data set.
        splits: Absolute folders or list files of each split that is there.
        names: Class names in the order of their ids.
        extra: All other keys, as found; ``download`` left out.
        ready: Whether stock Ultralytics reads the file as it stands exactly as it was read here.
    """

    file: Path
    path: Path
    splits: dict[str, list[Path]]
    names: list[str]
    extra: dict[str, Any]
    ready: bool

    def images(self, split: str) -> list[Path]:
        """Return the image files of a split, sorted, as Ultralytics would find them.

        Raises:
            DataError: A list file cannot be read.
        """
        found: list[Path] = []
        for place in self.splits.get(split, []):
            if place.is_dir():
                found += files_under(place, IMAGE_SUFFIXES)
            else:
                found += _listed(place)
        return sorted(found)

    def content(self) -> dict[str, Any]:
        """Return the mapping of a ready data YAML: absolute path and splits, names, no download."""
        splits = {name: [str(p) for p in places] for name, places in self.splits.items()}
        flat = {name: places[0] if len(places) == 1 else places for name, places in splits.items()}
        return {"path": str(self.path), **flat, "names": dict(enumerate(self.names)), **self.extra}


def load_data_yaml(file: Path, extra_roots: tuple[Path, ...] = ()) -> DataYaml:
    """Read and check a data YAML.

    A relative ``path`` is tried, as Ultralytics does, against the working folder, then against the folder of the YAML
    file, then against ``extra_roots``; the first place that holds every split is taken.

    Args:
        file: The YAML file.
        extra_roots: More folders in which a relative ``path`` may lie.

    Raises:
        ConfigError: Not YAML, empty, a key missing or of the wrong type.
        DataError: Class names inconsistent, or a folder missing; the line names the places that were looked at.
    """
    raw = load_yaml(file)
    if "val" not in raw and "validation" in raw:
        raw["val"] = raw.pop("validation")
    for key in raw:
        hint = nearest(str(key), _KNOWN_KEYS)
        if key not in _KNOWN_KEYS and hint:
            raise DataError(f"{file}: unknown key '{key}'{hint}")
    keys = validate(_Keys, raw, str(file))
    names = _names(file, keys)
    wanted = {split: getattr(keys, split) for split in (*SPLITS, "minival") if getattr(keys, split)}
    for split in ("train", "val"):
        if not wanted.get(split):
            raise DataError(f"{file}: '{split}' is empty; give the folder of its images")
    root, splits = _locate(file, keys.path, wanted, extra_roots)
    known = {"path", *SPLITS, "minival", "names", "nc", "download"}
    extra = {key: value for key, value in raw.items() if key not in known}
    written = {key: value for key, value in raw.items() if key in SPLITS}
    ready = (
        keys.path == str(root) and keys.download is None and keys.names is not None and list(written) == list(splits)
    )
    ready = ready and all((root / place).exists() for value in wanted.values() for place in _as_list(value))
    return DataYaml(file, root, splits, names, extra, ready)


def label_path(image: Path) -> Path:
    """Return the label file of an image: the last ``images`` folder becomes ``labels``, the suffix ``.txt``."""
    parts = list(image.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _names(file: Path, keys: _Keys) -> list[str]:
    if keys.names is None:
        if not keys.nc or keys.nc < 1:
            raise DataError(f"{file}: 'names' is missing; list the class names in the order of their ids")
        return [f"class_{i}" for i in range(keys.nc)]
    found = dict(enumerate(keys.names)) if isinstance(keys.names, list) else keys.names
    try:
        by_id = {int(key): str(name).strip() for key, name in found.items()}
    except (TypeError, ValueError) as error:
        raise DataError(f"{file}: 'names' needs whole numbers as keys (0: crack); {error}") from error
    if sorted(by_id) != list(range(len(found))) or not by_id:
        raise DataError(f"{file}: 'names' has ids {sorted(by_id)}, but they must be 0, 1, 2 ... without a gap")
    names = [by_id[i] for i in range(len(by_id))]
    if any(isinstance(name, (list, dict)) or name is None or str(name).strip() == "" for name in found.values()):
        raise DataError(f"{file}: 'names' holds something that is not a class name; give one text each id")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{file}: 'names' lists '{twice[0]}' twice; every class needs its own name")
    if keys.nc is not None and keys.nc != len(names):
        raise DataError(f"{file}: 'nc' is {keys.nc} but 'names' lists {len(names)} classes; make them agree")
    return names


def _locate(
    file: Path, path: str | None, wanted: dict[str, str | list[str]], extra_roots: tuple[Path, ...]
) -> tuple[Path, dict[str, list[Path]]]:
    """Find the root under which every split exists."""
    home = file.absolute().parent
    given = Path(path).expanduser() if path else home
    tried = [given] if given.is_absolute() else [base / given for base in (Path.cwd(), home, *extra_roots)]
    missing: list[tuple[str, Path]] = []
    for root in dict.fromkeys(place.resolve() for place in tried):
        splits = {split: [_below(root, place) for place in _as_list(value)] for split, value in wanted.items()}
        gone = [(split, place) for split, places in splits.items() for place in places if not place.exists()]
        if not gone:
            return root, splits
        missing.append(gone[0])
    key, _ = missing[0]
    looked = ", ".join(str(place) for _, place in missing)
    raise DataError(f"{file}: the '{key}' images are not there (looked for {looked}); correct 'path' or '{key}'")


def _below(root: Path, place: str) -> Path:
    found = (root / Path(place).expanduser()).resolve()
    if not found.exists() and place.startswith("../"):  # Roboflow's habit, which Ultralytics also forgives
        return (root / place[3:]).resolve()
    return found


def _listed(file: Path) -> list[Path]:
    """Read a list of images, one a line; ``./`` means beside the list."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as a list of images ({error})") from error
    places = (
        Path(str(file.parent / line[2:]) if line.startswith("./") else line) for line in map(str.strip, lines) if line
    )
    return [place for place in places if place.suffix.lower() in IMAGE_SUFFIXES]
