"""k-fold parts of a data set's train and val images; its test images stay out of it.

Each fold is a small data set of links, with label files of its own: Ultralytics keeps one label cache a label folder,
which runs on different folds would otherwise overwrite in each other's hands.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import yaml as yaml_format

from kd_yolo.data.datayaml import DataYaml, label_path, load_data_yaml
from kd_yolo.data.grouping import Item, group_items
from kd_yolo.data.labels import read_labels
from kd_yolo.data.lock import locked
from kd_yolo.data.splits import stratify
from kd_yolo.data.validate import keypoint_columns
from kd_yolo.errors import ConfigError
from kd_yolo.files import folder_aside, sha256, write_text

SEED = 0  # folds are the same in every comparison, so that their runs can be shared


def make_folds(yaml: Path, folds: int, home: Path) -> list[Path]:
    """Write the folds of a data set unless they are there.

    Every image of train and val is validated on in exactly one fold. Classes are shared out evenly, byte-identical
    images stay together, and the result depends on the data and ``folds`` alone.

    Args:
        yaml: The data YAML.
        folds: Number of folds.
        home: Folder for them: ``home/fold0/data.yaml``, ``home/fold1/data.yaml`` ...

    Raises:
        ConfigError: There are fewer images than folds.
        DataError: Images or labels cannot be read.
        OutputError: The folder cannot be written to.
    """
    files = [home / f"fold{fold}" / "data.yaml" for fold in range(folds)]
    with locked(home.parent / f"{home.name}.lock"):
        if all(file.is_file() for file in files):
            return files
        data = load_data_yaml(yaml)
        images = [image for split in ("train", "val") for image in data.images(split)]
        if len(images) < 2 * folds:
            raise ConfigError(f"folds={folds}: {yaml} has {len(images)} images in train and val; use fewer folds")
        parts = fold_of(data, images, folds)
        for fold, file in enumerate(files):
            _write_fold(data, images, [part == fold for part in parts], file.parent)
    return files


def fold_of(data: DataYaml, images: list[Path], folds: int) -> list[int]:
    """Return the fold in which each image is validated on."""
    items = []
    for image in images:
        boxes = read_labels(label_path(image), len(data.names), keypoint_columns(data)).boxes
        items.append(Item(str(image), image.stem, frozenset(data.names[box[0]] for box in boxes), sha256(image)))
    return stratify([item.labels for item in items], group_items(items, None), [1 / folds] * folds, SEED)


def _write_fold(data: DataYaml, images: list[Path], held_out: list[bool], home: Path) -> None:
    with folder_aside(home) as aside:
        for number, (image, is_val) in enumerate(zip(images, held_out, strict=True)):
            split, name = "val" if is_val else "train", f"{number:06d}-{image.name}"  # names may repeat over splits
            labels = label_path(image)
            _link(image, aside / "images" / split / name)
            if labels.is_file():
                target = (aside / "labels" / split / name).with_suffix(".txt")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(labels, target)
        content = {
            key: value for key, value in data.content().items() if key not in {"path", "train", "val", "minival"}
        }
        content = {"path": str(home), "train": "images/train", "val": "images/val", **content}
        write_text(aside / "data.yaml", yaml_format.safe_dump(content, sort_keys=False, allow_unicode=True))


def _link(image: Path, target: Path) -> None:
    """Link an image; copy it where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(image.resolve())
    except OSError:
        try:
            os.link(image, target)
        except OSError:
            shutil.copyfile(image, target)
