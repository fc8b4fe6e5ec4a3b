"""Data of ``task=anomaly``: MVTec AD, BTAD, plain folders and magnetic tile, as lists of images with their truth."""

from __future__ import annotations

from pathlib import Path

from ultralytics.utils import LOGGER

from kd_yolo.anomaly.layout_folders import categories_of, read_category
from kd_yolo.anomaly.layout_masks import read_masks_layout
from kd_yolo.anomaly.layout_parts import AnomalyData, AnomalySample
from kd_yolo.anomaly.layout_source import Source, describe_anomaly_datasets, find_source
from kd_yolo.errors import DataError, nearest

__all__ = [
    "AnomalyData",
    "AnomalySample",
    "categories",
    "describe_anomaly_datasets",
    "read_anomaly_data",
    "same_category",
]

ALL = "all"
_SAID: set[str] = set()
"""Warnings already given in this process: a run reads its data several times."""


def categories(data: str | Path, root: Path | None = None) -> list[str]:
    """Return the names of all categories that are there, sorted; this is what ``category=all`` stands for.

    Args:
        data: A built-in name, a YAML file or a folder; see ``layout_source.find_source``.
        root: Folder of data sets; see ``kd_yolo.data.datasets.data_root``.

    Raises:
        DataError: The data is not there or has no known layout.
        ConfigError: A key of the YAML file is unknown, missing or of the wrong type.
    """
    return sorted(_places(find_source(str(data), root)))


def read_anomaly_data(data: str | Path, category: str | int | None = None, root: Path | None = None) -> AnomalyData:
    """Read one category: every image header and every mask is looked at; what the user should hear is said once.

    Args:
        data: A built-in name (``mvtec``, ``btad``, ``magnetic-tile`` or ``tile``, ``surface-synth``), the user's YAML
            file {path, format, category, normal, val, ...} or a folder, whose layout is then found out.
        category: Which category; may be left out when there is one, or when the YAML file names it.
        root: Folder of data sets; see ``kd_yolo.data.datasets.data_root``.

    Raises:
        DataError: The data or the category is not there, or the files contradict each other; one line that names the
            file and the remedy.
        ConfigError: A key of the YAML file is unknown, missing or of the wrong type.
    """
    source = find_source(str(data), root)
    places = _places(source)
    name = _chosen(source, sorted(places), source.category if category is None else str(category))
    parts = read_masks_layout(source) if source.format == "masks" else read_category(source, places[name])
    found = AnomalyData(source.name, name, **vars(parts), root=places[name], format=source.format)
    for line in found.warnings:
        if line not in _SAID:
            _SAID.add(line)
            LOGGER.warning(line)
    return found


def same_category(name: str, wanted: str) -> bool:
    """Tell whether a category is the one that is meant: 01 of a YAML file arrives as the number 1."""
    return name.lower() == wanted.lower() or (name.isdigit() and wanted.isdigit() and int(name) == int(wanted))


def _places(source: Source) -> dict[str, Path]:
    if source.format == "masks":
        return {source.name: source.root}
    return categories_of(source)


def _chosen(source: Source, known: list[str], wanted: str | None) -> str:
    shown = ", ".join(known)
    if wanted is None or wanted == ALL:
        if len(known) == 1:
            return known[0]
        rest = ", or category=all to train and val every one" if wanted is None else "; here one at a time is read"
        raise DataError(f"{source.root}: holds {len(known)} categories ({shown}); give category=NAME{rest}")
    for name in known:
        if same_category(name, wanted):
            return name
    raise DataError(f"category={wanted}: not in {source.root} (there: {shown}){nearest(wanted, known)}")
