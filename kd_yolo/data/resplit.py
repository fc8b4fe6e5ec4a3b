"""Split a data set that is already in YOLO form again, by list files: no image is moved or copied."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml as yaml_format

from kd_yolo.data.datayaml import label_path, load_data_yaml
from kd_yolo.data.grouping import Item
from kd_yolo.data.labels import read_labels
from kd_yolo.data.layout import MARKER, SPLITS, built_aside
from kd_yolo.data.splits import SplitSpec, assign
from kd_yolo.data.validate import keypoint_columns
from kd_yolo.errors import DataError
from kd_yolo.files import sha256, write_json, write_text


def make_split(yaml: Path, out: Path, spec: SplitSpec) -> list[Path]:
    """Write list files and data YAMLs for a new split of all images of a data set.

    With ``method="kfold"`` every fold is written: ``out/fold0/data.yaml``, ``out/fold1/data.yaml`` ...; otherwise
    ``out/data.yaml``. The lists hold absolute image paths, so labels are found where they are.

    Args:
        yaml: The data YAML to split again; all its splits are pooled.
        out: Folder to write; replaced when this package wrote it.
        spec: How to split; ``auto`` means at random.

    Returns:
        The data YAMLs written.

    Raises:
        ConfigError: The YAML or the group expression is malformed.
        DataError: An image is missing, a list does not fit, or a part would be empty.
        OutputError: ``out`` cannot be written.
    """
    data = load_data_yaml(yaml)
    items: dict[str, Item] = {}
    for split in data.splits:
        for image in data.images(split):
            boxes = read_labels(label_path(image), len(data.names), keypoint_columns(data)).boxes
            labels = frozenset(data.names[box[0]] for box in boxes)
            items[str(image)] = Item(str(image), image.stem, labels, _digest(image), split, image)
    specs = [spec]
    if spec.method == "kfold":
        specs = [replace(spec, fold=fold) for fold in range(spec.folds)]
    elif spec.method == "auto" and spec.lists is None:
        specs = [replace(spec, method="random")]
    folders = [f"fold{one.fold}" if spec.method == "kfold" else "." for one in specs]
    head = {key: value for key, value in data.content().items() if key not in (*SPLITS, "minival")}
    with built_aside(out) as aside:
        decisions = []
        for one, name in zip(specs, folders, strict=True):
            chosen = assign(list(items.values()), one)
            decisions += [f"{name}: {decision}" for decision in chosen.decisions]
            _write(aside / name, out.absolute() / name, chosen.split, head)
        write_json(aside / MARKER, {"source": str(yaml), "spec": asdict(spec), "decisions": decisions})
    return [(out.absolute() / name / "data.yaml").resolve() for name in folders]


def _digest(image: Path) -> str:
    try:
        return sha256(image)
    except OSError as error:
        raise DataError(f"{image}: cannot be read ({error.strerror}); take it out of the data set") from error


def _write(folder: Path, home: Path, split_of: dict[str, str], head: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = dict(head)
    for split in SPLITS:
        images = sorted(image for image, part in split_of.items() if part == split)
        if images:
            write_text(folder / f"{split}.txt", "".join(f"{image}\n" for image in images))
            content[split] = str(home / f"{split}.txt")
    names = content.pop("names")
    text = yaml_format.safe_dump({**content, "names": names}, sort_keys=False, allow_unicode=True)
    write_text(folder / "data.yaml", text)
