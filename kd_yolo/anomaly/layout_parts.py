"""What every layout reader returns, and how a reader pairs images with masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from kd_yolo.anomaly.layout_checks import MaskFacts, headers_of, leak_note, masks_of, mode_note
from kd_yolo.errors import DataError

NORMAL = "good"
"""The defect name of a normal image, in every layout."""


@dataclass(frozen=True)
class AnomalySample:
    """One image and what is known of it.

    Attributes:
        image: The image file.
        label: 0 normal, 1 anomalous.
        defect: Kind of defect, ``good`` for a normal image.
        mask: Truth mask; None for a normal image (nothing to mark) and for a defect whose place is not known.
        min_area: Regions of the mask with fewer pixels (of the mask file) do not count.
    """

    image: Path
    label: Literal[0, 1]
    defect: str
    mask: Path | None = None
    min_area: int = 1

    @property
    def has_truth(self) -> bool:
        """Whether it is known which pixels are defective: always for a normal image."""
        return self.label == 0 or self.mask is not None


@dataclass(frozen=True)
class AnomalyData:
    """One category: what to train on and what to test on.

    Attributes:
        name: Name of the data set.
        category: Name of the category.
        train: Normal images.
        test: Normal and anomalous images; may be empty.
        val: Labelled validation images for thresholds, where the user gave them; with at least one of each label.
        notes: What was decided or left out, a line each.
        warnings: Those of them that the user should hear of.
        root: Folder of the category.
        format: Layout that it was read by.
    """

    name: str
    category: str
    train: list[AnomalySample]
    test: list[AnomalySample]
    val: list[AnomalySample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    root: Path = Path()
    format: str = "folder"

    def describe(self) -> str:
        """Return one line: how many images of which kind."""
        anomalies = sum(sample.label for sample in self.test)
        text = f"{self.name}/{self.category}: {len(self.train)} normal images to train on, test: "
        text += f"{len(self.test) - anomalies} normal and {anomalies} anomalous"
        return text + (f", validation: {len(self.val)}" if self.val else "")


@dataclass
class Parts:
    """What a reader gathers before the files are looked at."""

    train: list[AnomalySample] = field(default_factory=list)
    test: list[AnomalySample] = field(default_factory=list)
    val: list[AnomalySample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def inspected(parts: Parts, where: Path) -> Parts:
    """Look at every image header and mask; leave out defect images whose masks show nothing.

    Args:
        parts: What was found; normal samples may carry a mask file here, which must be empty.
        where: The category's folder, for messages.

    Raises:
        DataError: An image or mask is unreadable, a mask has another size than its image, a normal image has a defect
            mask, or all masks are empty.
    """
    everything = [*parts.train, *parts.test, *parts.val]
    headers = headers_of([sample.image for sample in everything])
    pairs = [(sample.mask, sample.image) for sample in everything if sample.mask is not None]
    facts = masks_of(pairs, headers, max((sample.min_area for sample in everything), default=1))
    warnings = list(parts.warnings)
    files = [[sample.image for sample in group] for group in (parts.train, parts.test)]
    warnings += [note for note in (mode_note(where, headers), leak_note(where, *files)) if note]
    train, test, val = (_truthful(group, facts) for group in (parts.train, parts.test, parts.val))
    warnings += _empty_note(where, everything, facts)
    warnings += _missing_note(where, parts.test) + _missing_note(where, parts.val)
    return Parts(train, test, val, parts.notes, warnings)


def _truthful(samples: Sequence[AnomalySample], facts: dict[Path, MaskFacts]) -> list[AnomalySample]:
    """Drop the mask files of normal images after a look at them, and defect images with empty masks."""
    kept = []
    for sample in samples:
        pixels = facts[sample.mask].pixels if sample.mask is not None else None
        if sample.label == 0 and pixels:
            raise DataError(
                f"{sample.mask}: marks {pixels} pixels in a normal image ({sample.image}); move the image to a defect "
                f"folder or remove the mask"
            )
        if sample.label == 0:
            kept.append(replace(sample, mask=None))
        elif pixels != 0:
            kept.append(sample)
    return kept


def _empty_note(where: Path, samples: Sequence[AnomalySample], facts: dict[Path, MaskFacts]) -> list[str]:
    masked = [sample for sample in samples if sample.label and sample.mask is not None]
    empty = [sample for sample in masked if sample.mask is not None and facts[sample.mask].pixels == 0]
    if not empty:
        return []
    found = [(sample.mask, facts[sample.mask]) for sample in empty if sample.mask is not None]
    found.sort(key=lambda pair: pair[1].specks > 0)  # those without any mark say most about what is wrong
    first, look = found[0]
    if len(empty) == len(masked):
        raise DataError(
            f"{first}: this mask and all {len(masked)} of {where} show no defect (highest value {look.highest}); write "
            f"defect pixels as 255, or remove the masks for image-level truth only"
        )
    specks = sum(one.specks > 0 for _, one in found)
    small = f"; {specks} more hold only regions under {empty[0].min_area} pixels" if specks else ""
    return [
        f"{where}: {len(empty)} of {len(masked)} defect images left out: {len(empty) - specks} have an empty mask"
        f"{small} (first: {first}); correct the masks, or remove them to keep the images"
    ]


def _missing_note(where: Path, samples: Sequence[AnomalySample]) -> list[str]:
    defects = [sample for sample in samples if sample.label]
    bare = [sample for sample in defects if sample.mask is None]
    if not bare:
        return []
    if len(bare) == len(defects):
        return [f"{where}: no defect image has a mask; only image-level metrics are reported"]
    return [
        f"{where}: {len(bare)} of {len(defects)} defect images have no mask (first: {bare[0].image}); they count in "
        f"the image-level metrics only"
    ]
