"""Images without labels beside the training set: what is refused, what is left out, and how a trainer gets them."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import distributed as dist
from ultralytics.utils import LOGGER, colorstr

from kd_yolo.config import TrainConfig
from kd_yolo.data.layout import IMAGE_SUFFIXES, files_under
from kd_yolo.data.pixels import BadImageError, decode, in_threads
from kd_yolo.errors import ConfigError, DataError
from kd_yolo.images import dataset_files
from kd_yolo.tasks.unlabeled_stream import UnlabeledImages, UnlabeledStream, random_streams

if TYPE_CHECKING:
    from kd_yolo.tasks.detect import KDTrainer

RELATED_KEYS = ("unlabeled_ratio", "pseudo", "pseudo_conf", "pseudo_weight")


def check_unlabeled(config: TrainConfig, stock: dict[str, Any] | None = None) -> Path | None:
    """Refuse a run whose unlabeled images could not be used.

    Args:
        config: The command's own keys, as given.
        stock: The stock training arguments.

    Returns:
        The folder, or None when the run has none.

    Raises:
        ConfigError: Keys that have no effect, no teacher, or ``rect=true``.
        DataError: The folder is missing, is none, or holds no readable image.
    """
    if config.unlabeled is None:
        given = [key for key in RELATED_KEYS if key in config.model_fields_set]
        if given:
            raise ConfigError(f"{given[0]} has no effect without unlabeled=FOLDER; give the folder or drop the key")
        return None
    needed = {"teacher": config.teacher, "method": config.method}
    for key, value in needed.items():
        if value == "none":
            raise ConfigError(f"unlabeled={config.unlabeled}: only a teacher can use it; drop it or {key}=none")
    if (stock or {}).get("rect"):
        raise ConfigError("rect=true cannot be combined with unlabeled=; the two canvases would differ: drop rect")
    folder = Path(config.unlabeled).expanduser().resolve()
    found = image_files(folder)
    if not any(not isinstance(problem, BadImageError) for _, problem in in_threads(_digest, found[:64])):
        readable_images(found, folder)  # raises unless a later one is readable
    return folder


def image_files(folder: Path) -> list[Path]:
    """Return the files below a folder that look like images, sorted.

    Raises:
        DataError: The folder is missing, is a file, or holds none.
    """
    if not folder.exists():
        raise DataError(f"unlabeled={folder}: no such folder")
    if not folder.is_dir():
        raise DataError(f"unlabeled={folder}: is a file; give the folder that holds the images")
    files = files_under(folder, IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"unlabeled={folder}: no image in it (known: {' '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def readable_images(files: Sequence[Path], folder: Path, evaluation: Sequence[Path] = ()) -> list[Path]:
    """Return the images that decode completely and are in no evaluation split; log how many are left out.

    Args:
        files: Candidates.
        folder: Where they are, for messages.
        evaluation: Images of the validation and test splits: to train on them, even without their labels, would make
            the reported accuracy too good.

    Raises:
        DataError: None is left.
    """
    sizes = {_size(file) for file in files}
    secret = {_bytes_digest(file.read_bytes()) for file in evaluation if _size(file) in sizes}
    kept, bad, held_out = [], [], 0
    for file, found in in_threads(_digest, files):
        if isinstance(found, BadImageError):
            bad.append(f"{file} {found}")
        elif found in secret:
            held_out += 1
        else:
            kept.append(file)
    if bad:
        LOGGER.warning(f"unlabeled: {len(bad)} of {len(files)} images cannot be read and are left out, first: {bad[0]}")
    if held_out:
        LOGGER.warning(f"unlabeled: {held_out} images are of the validation or test split and are left out")
    if not kept:
        reason = bad[0] if bad else "all of them are of the validation or test split"
        raise DataError(f"unlabeled={folder}: no usable image among {len(files)}: {reason}")
    return kept


def open_stream(trainer: KDTrainer) -> UnlabeledStream | None:
    """Return the unlabeled images of a trainer whose training loader exists, or None when its recipe has none.

    Raises:
        DataError: See ``image_files`` and ``readable_images``.
    """
    recipe, loader, args = trainer.recipe, trainer.train_loader, trainer.args
    if recipe is None or recipe.unlabeled is None:
        return None
    if trainer.unlabeled is not None:  # Ultralytics builds its loaders again after running out of memory
        trainer.unlabeled.close()
    with random_streams():
        files = trainer.unlabeled.dataset.im_files if trainer.unlabeled else _files_of(trainer, Path(recipe.unlabeled))
        dataset = UnlabeledImages(
            [Path(file) for file in files],
            imgsz=args.imgsz,
            cache=args.cache or None,
            augment=True,
            hyp=args,
            prefix=colorstr("unlabeled: "),
            batch_size=loader.batch_size,
            stride=trainer.stride,
            single_cls=args.single_cls or False,
            data=trainer.data,
            task=args.task,
        )
    workers = 0 if trainer.device.type in {"cpu", "mps"} else round(args.workers * min(recipe.unlabeled_ratio, 1.0))
    stream = UnlabeledStream(
        dataset,
        recipe.unlabeled_ratio,
        batch=loader.batch_size,
        steps=len(loader),
        workers=min(workers, os.cpu_count() or 1, math.ceil(len(loader) / 2)),
        seed=args.seed,
        pin_memory=trainer.device.type == "cuda",
    )
    LOGGER.info(
        f"unlabeled: {len(files)} images of {recipe.unlabeled}, {stream.share_of(loader.batch_size)} join every batch "
        f"of {loader.batch_size}" + (", with the teacher's confident boxes as labels" if recipe.pseudo else "")
    )
    return stream


def _files_of(trainer: KDTrainer, folder: Path) -> list[str]:
    """Return the usable images; with several processes the first one looks and tells the others."""
    told: list[Any] = [None]
    shared = dist.is_available() and dist.is_initialized()
    if not shared or dist.get_rank() == 0:
        evaluation = [
            file
            for split in ("val", "test")
            if trainer.data.get(split)
            for file in dataset_files(trainer.args.data, split)
        ]
        told = [[str(file) for file in readable_images(image_files(folder), folder, evaluation)]]
    if shared:
        dist.broadcast_object_list(told, 0)
    return list(told[0])


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _digest(file: Path) -> str:
    return _bytes_digest(decode(file)[1])


def _bytes_digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
