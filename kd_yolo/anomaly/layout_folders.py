"""Read MVTec AD, BTAD and plain folders: train/good, test/good, test/DEFECT and ground_truth/DEFECT.

MVTec AD: P. Bergmann et al., "MVTec AD", CVPR 2019 (masks are ``NAME_mask.png``). BTAD: P. Mishra et al., "VT-ADL",
ISIE 2021 (folders ``ok`` and ``ko``; masks ``NAME.png`` of images ``NAME.bmp``). A mask belongs to the image of the
same defect folder and stem, ``_mask`` taken off: numbers repeat across folders, so the order of files says nothing.
"""

from __future__ import annotations

from pathlib import Path

from kd_yolo.anomaly.layout_parts import NORMAL, AnomalySample, Parts, inspected
from kd_yolo.anomaly.layout_source import Source, images_in, is_normal, subfolders
from kd_yolo.errors import DataError, nearest

TRUTH = "ground_truth"
MASK_SUFFIX = "_mask"


def categories_of(source: Source) -> dict[str, Path]:
    """Return the categories of a folder by name: itself when it holds ``train``, else its folders that do.

    Raises:
        DataError: There is none.
    """
    if (source.root / "train").is_dir():
        return {source.root.name: source.root}
    found = {folder.name: folder for folder in subfolders(source.root) if (folder / "train").is_dir()}
    if not found:
        raise DataError(f"{source.root}: neither it nor a folder in it holds train/good; put the normal images there")
    return found


def read_category(source: Source, folder: Path) -> Parts:
    """Read one category.

    Args:
        source: The data set.
        folder: The category's folder.

    Raises:
        DataError: No normal images, a mask without an image, and what ``layout_parts.inspected`` refuses.
    """
    parts = Parts()
    normal = _normal_folder(source, folder)
    parts.train = [AnomalySample(file, 0, NORMAL) for file in images_in(normal)]
    if not parts.train:
        raise DataError(f"{normal}: no images; put the normal images to train on there")
    for other in subfolders(folder / "train"):
        if other != normal and images_in(other):
            parts.warnings.append(f"{other}: {len(images_in(other))} images not used, training sees normal ones only")
    test = folder / "test"
    parts.test = _labelled(source, test, [folder / TRUTH, test / TRUTH]) if test.is_dir() else []
    parts.warnings += _not_read(test)
    if parts.test and all(sample.label for sample in parts.test):
        usual = source.normal or "good, ok or normal"
        parts.warnings.append(f"{test}: no folder of normal images ({usual}), so every image there counts as anomalous")
    if source.val is not None:
        parts.val = read_validation(source, folder)
    if not any(sample.label for sample in parts.test):
        parts.warnings.append(f"{test}: no anomalous images, so nothing can be measured; scores and maps still work")
    parts = inspected(parts, folder)
    if source.val is not None:
        _check_validation(Path(source.val), parts.val)
    return parts


def read_validation(source: Source, folder: Path) -> list[AnomalySample]:
    """Read the labelled validation folder that the user's YAML names; masks in its ``ground_truth``, if any.

    Raises:
        DataError: It is not there.
    """
    places = list(dict.fromkeys(base / Path(source.val or "").expanduser() for base in (folder, source.root)))
    place = next((found for found in places if found.is_dir()), None)
    if place is None:
        raise DataError(f"val={source.val}: no such folder (looked for {', '.join(map(str, places))}); correct the key")
    return _labelled(source, place, [place / TRUTH])


def _not_read(test: Path) -> list[str]:
    """Return a line for each place with images that the layout does not look at."""
    deeper = [inner for folder in subfolders(test) if folder.name != TRUTH for inner in subfolders(folder)]
    places = {place: len(images_in(place)) for place in (test, *deeper)}
    return [f"{place}: {count} images not used, images lie in test/KIND/" for place, count in places.items() if count]


def _check_validation(place: Path, samples: list[AnomalySample]) -> None:
    """Refuse a validation folder of one label, which cannot give thresholds."""
    labels = {sample.label for sample in samples}
    if 1 not in labels:
        raise DataError(
            f"val={place}: this validation folder holds no anomalous images, so it cannot give thresholds; add a "
            f"folder of them, or leave out val: the thresholds then come from held-out normal images"
        )
    if 0 not in labels:
        raise DataError(f"val={place}: this validation folder holds no normal images (good, ok or normal); add some")


def _normal_folder(source: Source, folder: Path) -> Path:
    found = subfolders(folder / "train")
    fitting = [path for path in found if is_normal(path.name, source.normal)]
    if len(fitting) == 1:
        return fitting[0]
    there = ", ".join(path.name for path in found) or "none"
    if fitting:
        raise DataError(
            f"{folder / 'train'}: which folder holds normal images is not clear ({there}); give normal=NAME"
        )
    wanted = source.normal or "good, ok or normal"
    hint = nearest(source.normal, [path.name for path in found]) if source.normal else ""
    raise DataError(
        f"{folder / 'train'}: no folder of normal images ({wanted}; folders there: {there}); put them in "
        f"{folder / 'train' / (source.normal or 'good')}, or name their folder with the key normal{hint}"
    )


def _labelled(source: Source, place: Path, truths: list[Path]) -> list[AnomalySample]:
    """Read GOOD and DEFECT folders and the masks of the first of ``truths`` that is there; normal images first."""
    truth = next((folder for folder in truths if folder.is_dir()), None)
    folders = [folder for folder in subfolders(place) if folder.name != TRUTH]
    folders.sort(key=lambda path: (not is_normal(path.name, source.normal), path.name))
    samples: list[AnomalySample] = []
    for folder in folders:
        usual = is_normal(folder.name, source.normal)
        masks = _masks(truth / folder.name) if truth is not None else {}
        for file in images_in(folder):
            mask = masks.get(file.stem)
            name = NORMAL if usual else folder.name
            samples.append(AnomalySample(file, 0 if usual else 1, name, mask, source.min_area))
        _no_mask_alone(masks, folder)
    for extra in subfolders(truth) if truth is not None else []:
        lone = images_in(extra)
        if lone and not (place / extra.name).is_dir():
            raise DataError(
                f"{lone[0]}: mask without an image, there is no folder {place / extra.name}; remove the mask"
            )
    return samples


def _masks(folder: Path) -> dict[str, Path]:
    """Return the masks of a folder by the stem of the image each belongs to."""
    masks: dict[str, Path] = {}
    for file in images_in(folder):
        stem = file.stem.removesuffix(MASK_SUFFIX)
        if stem in masks:
            raise DataError(f"{file}: second mask of the image '{stem}' beside {masks[stem].name}; remove one")
        masks[stem] = file
    return masks


def _no_mask_alone(masks: dict[str, Path], folder: Path) -> None:
    stems = {file.stem for file in images_in(folder)}
    for stem, mask in masks.items():
        if stem not in stems:
            raise DataError(f"{mask}: mask without an image, {folder} holds no '{stem}.*'; remove it or add the image")
