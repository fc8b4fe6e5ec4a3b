"""Which training images calibrate an int8 artifact, and their pixels."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from ultralytics.data.utils import img2label_paths

from kd_yolo.data.labels import read_labels
from kd_yolo.errors import ConfigError, DataError
from kd_yolo.images import dataset_files, dataset_names, read_image, to_canvas

CALIBRATION_IMAGES = 300
"""Images to calibrate with unless another number is asked for; docs/quantization.md has what fewer gave."""
MIN_IMAGES = 8
"""Fewer say too little about the ranges of a network's tensors."""


@dataclass(frozen=True)
class Calibration(Sequence[Path]):
    """Images chosen to calibrate with; a sequence of their files, sorted.

    Attributes:
        files: The images, sorted by path.
        per_class: Chosen images that show a class, by its name, in the order of the data set.
        background: Chosen images without any box.
        available: Images of the training split.
        sha256: Hash over the chosen images' names and bytes.
        seed: Seed of the choice.
        source: The data set.
    """

    files: tuple[Path, ...]
    per_class: dict[str, int]
    background: int
    available: int
    sha256: str
    seed: int
    source: str

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Path, ...]: ...

    def __getitem__(self, index: int | slice) -> Path | tuple[Path, ...]:
        return self.files[index]

    def to_dict(self) -> dict[str, Any]:
        """Return what a report says about the images; the files themselves stay out."""
        return {
            "images": len(self.files),
            "of": self.available,
            "per_class": self.per_class,
            "background": self.background,
            "sha256": self.sha256,
            "seed": self.seed,
            "source": self.source,
        }


def calibration_files(data: str | Path, count: int = CALIBRATION_IMAGES, seed: int = 0) -> Calibration:
    """Choose calibration images from the training split, every class as evenly as its images allow.

    Images without boxes are taken in their share of the split. The rest is filled one by one with an image of the class
    that the fewest chosen images show. The same seed and split give the same list.

    Args:
        data: A data YAML, or what ``resolve_dataset`` knows.
        count: Number of images; all when the split has fewer.
        seed: Seed of the order in which the images of a class are taken.

    Raises:
        ConfigError: ``count`` is too small to calibrate with.
        DataError: The split is missing, empty, or has too few images.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < MIN_IMAGES:
        raise ConfigError(f"calibration_images={count}: must be a whole number of at least {MIN_IMAGES}")
    files = dataset_files(data, "train")
    if len(files) < MIN_IMAGES:
        raise DataError(
            f"{data}: its training split has {len(files)} images, and int8 needs at least {MIN_IMAGES} to calibrate "
            "with; add images, or export without quantize=8"
        )
    names = dataset_names(data)
    classes = {file: _classes(file, len(names)) for file in files}
    chosen = sorted(_choose(classes, min(count, len(files)), seed))
    counts = Counter(label for file in chosen for label in classes[file])
    return Calibration(
        files=tuple(chosen),
        per_class={name: counts[index] for index, name in enumerate(names)},
        background=sum(not classes[file] for file in chosen),
        available=len(files),
        sha256=_hash(chosen),
        seed=seed,
        source=str(data),
    )


def calibration_pixels(
    files: Sequence[Path], canvas: tuple[int, int], channels: int = 3, batch: int = 1
) -> Iterator[NDArray[np.float32]]:
    """Yield the images as a graph reads them, one batch after the other.

    Args:
        files: Image files.
        canvas: Height and width in pixels.
        channels: 3 for RGB, 1 for grey.
        batch: Images per call; the first images fill up the last batch.

    Yields:
        (batch, channels, H, W), float32 in 0..1.

    Raises:
        DataError: No files, or one that cannot be read; the message names it.
    """
    if not files:
        raise DataError("there are no images to calibrate with; give a data set with data=")
    for start in range(0, len(files), batch):
        portion = [files[index % len(files)] for index in range(start, start + batch)]
        yield to_canvas([read_image(file) for file in portion], canvas, channels).numpy()


def calibration_record(files: Sequence[Path]) -> dict[str, Any]:
    """Return what a report says about calibration images, however they were chosen."""
    return files.to_dict() if isinstance(files, Calibration) else {"images": len(files)}


def _classes(file: Path, nc: int) -> frozenset[int]:
    """Return the classes that an image shows."""
    labels = read_labels(Path(img2label_paths([str(file)])[0]), nc)
    return frozenset(int(box[0]) for box in labels.boxes)


def _choose(classes: dict[Path, frozenset[int]], count: int, seed: int) -> list[Path]:
    """Return ``count`` of the images, in the order of choice."""
    order = sorted(classes)
    random.Random(seed).shuffle(order)
    background = [file for file in order if not classes[file]]
    chosen = background[: round(count * len(background) / len(order))]
    queues = {
        label: [f for f in reversed(order) if label in classes[f]] for label in sorted(set().union(*classes.values()))
    }
    shown: Counter[int] = Counter()
    taken: set[Path] = set()
    while len(chosen) < count and queues:
        label = min(queues, key=lambda key: (shown[key], key))
        while queues[label] and queues[label][-1] in taken:
            queues[label].pop()
        if not queues[label]:
            del queues[label]
            continue
        file = queues[label].pop()
        taken.add(file)
        chosen.append(file)
        shown.update(classes[file])
    return chosen


def _hash(files: Sequence[Path]) -> str:
    """Return a hash that the same images give on every machine."""
    digest = hashlib.sha256()
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror}); check the file") from error
        digest.update(f"{file.name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()
