"""From what the user wrote as ``data=`` to a data YAML that is ready for training."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import yaml

from kd_yolo.data.builtin import Builtin, Raw, describe_datasets, load_builtin
from kd_yolo.data.datayaml import load_data_yaml
from kd_yolo.data.layout import MARKER, files_under
from kd_yolo.data.lock import locked
from kd_yolo.data.progress import stderr_progress
from kd_yolo.data.validate import validate_for_training
from kd_yolo.errors import DataError, nearest
from kd_yolo.files import write_text
from kd_yolo.resources import builtin_names, find, load_yaml

__all__ = ["data_root", "describe_datasets", "load_builtin", "resolve_dataset", "validate_for_training"]

ROOT_VARIABLE = "KD_YOLO_DATA"
SHARED_VARIABLE = "KD_YOLO_SHARED"


def data_root(root: Path | None = None) -> Path:
    """Return the folder that converted data sets live in: ``root``, else $KD_YOLO_DATA, else ./datasets."""
    chosen = root or Path(os.environ.get(ROOT_VARIABLE) or "datasets")
    return chosen.expanduser().absolute()


def resolve_dataset(data: str, root: Path | None = None) -> Path:
    """Return the absolute path of a data YAML that Ultralytics can train on.

    A user's YAML is checked strictly and returned as it is when nothing in it depends on the working folder; otherwise
    a resolved copy is written to ``<root>/.kd-yolo/`` and returned. A built-in name stands for the converted folder
    ``<root>/<name>``; when that is missing but the published raw folder is found, it is converted once (progress on
    stderr) and reused from then on. ``steel-synth`` is made on first use.

    Args:
        data: A YAML file, a folder with a ``data.yaml``, or a built-in name with or without ``.yaml``.
        root: Folder of converted data sets; see ``data_root``.

    Raises:
        DataError: Nothing was found, or the data is malformed; one line with the places and the remedy.
        ConfigError: The YAML file is empty, not YAML, or a key is missing or of the wrong type.
        OutputError: The data root cannot be written to.
    """
    place = data_root(root)
    given = Path(data).expanduser()
    if given.suffix in {".yaml", ".yml"} and given.is_file():
        if load_yaml(given).get("kd_yolo") is not None:
            return _resolve_builtin(given.stem, given, place)
        return _resolve_user(given.absolute(), place)
    stem = given.stem if given.suffix in {".yaml", ".yml"} else given.name
    if str(given.parent) == "." and stem in builtin_names("datasets"):
        return _resolve_builtin(stem, find("datasets", stem), place)
    if given.is_dir():
        for name in ("data.yaml", "data.yml", "dataset.yaml"):
            if (given / name).is_file():
                return _resolve_user((given / name).absolute(), place)
        raise DataError(
            f"data={data}: this folder holds no data.yaml; if it is raw data, convert it with: "
            f"kd-yolo data convert from=voc src={data} out=datasets/{given.name.lower()}"
        )
    known = builtin_names("datasets")
    raise DataError(
        f"data={data}: not found (looked for the file {given.absolute()} and a built-in of that name; "
        f"built-in: {', '.join(known)}){nearest(stem, known)}"
    )


def _resolve_user(file: Path, root: Path) -> Path:
    found = load_data_yaml(file, (root,))
    if found.ready:
        return file
    text = yaml.safe_dump(found.content(), sort_keys=False, allow_unicode=True)
    digest = hashlib.sha256(f"{file}\n{text}".encode()).hexdigest()[:10]
    copy = root / ".kd-yolo" / f"{file.stem}-{digest}.yaml"
    if not copy.is_file():
        write_text(copy, f"# Resolved copy of {file}\n{text}")
    return copy


def _resolve_builtin(name: str, file: Path, root: Path) -> Path:
    spec = load_builtin(file)
    home = root / name
    if spec.make is not None:
        if not _is_made(home, spec.make):
            with locked(root / ".kd-yolo" / f"{name}.lock"):
                _make(home, spec.make)
        return _at_home(home)
    if spec.raw is None:
        raise DataError(f"{file}: neither 'raw' nor 'make' is given; one is needed")
    if (home / "data.yaml").is_file() and not (home / MARKER).is_file():
        return _resolve_user(home / "data.yaml", root)  # converted by other means: the user's own
    raw = _find_raw(spec.raw, root)
    if raw is not None and home.exists() and raw.samefile(home):
        home = root / f"{name}-yolo"  # the published folder has the name that the converted one would get
    if _is_done(home, spec.raw, raw):
        return _at_home(home)
    if raw is None:
        group = f" group='{spec.raw.group}'" if spec.raw.group else ""
        looked = ", ".join(str(place) for place in (home, *_candidates(spec.raw, root)))
        raise DataError(
            f"data={name}: {spec.title} is not there (looked for {looked}); with the published data at hand run: "
            f"kd-yolo data convert from={spec.raw.format} src=FOLDER out={_short(home)}{group}"
        )
    with locked(root / ".kd-yolo" / f"{name}.lock"):
        if not _is_done(home, spec.raw, raw):  # another process may have finished while this one waited
            _convert(name, spec, spec.raw, raw, home)
    return _at_home(home)


def _short(home: Path) -> str:
    """Return a path as the user would type it."""
    here = Path.cwd()
    return str(home.relative_to(here)) if home.is_relative_to(here) else str(home)


def _candidates(raw: Raw, root: Path) -> list[Path]:
    bases = [root, Path.cwd()]
    if os.environ.get(SHARED_VARIABLE):
        bases.append(Path(os.environ[SHARED_VARIABLE]).expanduser().absolute() / "datasets")
    return list(dict.fromkeys(base / folder for base in bases for folder in raw.folders))


def _find_raw(raw: Raw, root: Path) -> Path | None:
    for place in _candidates(raw, root):
        if place.is_dir() and any((place / inside).exists() for inside in raw.holds):
            return place
    return None


def _conversion(home: Path) -> dict[str, Any] | None:
    """Return the record of an earlier conversion, or None when there is none that can be used."""
    try:
        record = json.loads((home / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and (home / "data.yaml").is_file() else None


def _is_done(home: Path, raw: Raw, source: Path | None) -> bool:
    """Tell whether a conversion is there and still stands: one that the user made by hand always does."""
    done = _conversion(home)
    if done is None:
        return False
    mark = done.get("resolved_from")
    return source is None or mark is None or mark == _fingerprint(raw, source)


def _fingerprint(raw: Raw, source: Path) -> str:
    """Return a digest of the raw files' names and sizes, the reader's settings and the converter's version."""
    from kd_yolo.data.convert import VERSION

    digest = hashlib.sha256(f"{VERSION}\n{raw.model_dump_json(exclude={'folders', 'holds'})}\n".encode())
    files = ((path.relative_to(source).as_posix(), path.stat().st_size) for path in files_under(source))
    for name, size in sorted(files):
        digest.update(f"{name}\t{size}\n".encode())
    return digest.hexdigest()


def _at_home(home: Path) -> Path:
    """Return the folder's data.yaml, its ``path`` corrected when the folder was moved."""
    file = home / "data.yaml"
    content = load_yaml(file)
    if content.get("path") != str(home):
        content["path"] = str(home)
        write_text(file, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    load_data_yaml(file)
    return file


def _convert(name: str, spec: Builtin, settings: Raw, raw: Path, home: Path) -> None:
    from kd_yolo.data.convert import convert
    from kd_yolo.data.splits import SplitSpec

    convert(
        settings.format,
        raw,
        home,
        split=SplitSpec(group=settings.group, fixed=spec.split),
        names=[spec.names[i] for i in range(len(spec.names))],
        min_area=settings.min_area,
        resolved_from=_fingerprint(settings, raw),
        progress=stderr_progress(f"{name}: converting {raw} once, to {home}"),
    )


def _is_made(home: Path, arguments: dict[str, int]) -> bool:
    from kd_yolo.data.synthetic import VERSION

    done = _conversion(home)
    return done is not None and done.get("version") == VERSION and done.get("arguments") == arguments


def _make(home: Path, arguments: dict[str, int]) -> None:
    from kd_yolo.data.synthetic import make_steel_synth

    if not _is_made(home, arguments):  # another process may have finished while this one waited
        make_steel_synth(home, **arguments, progress=stderr_progress(f"steel-synth: making images in {home}"))
