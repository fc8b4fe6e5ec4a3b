"""A classification data set on disk, SPLIT/CLASS/IMAGE, read strictly: nothing is split or left out silently."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from ultralytics.utils import LOGGER

from kd_yolo.data.layout import IMAGE_SUFFIXES, SPLITS, files_under
from kd_yolo.data.pixels import BadImageError, decode, in_threads
from kd_yolo.errors import DataError
from kd_yolo.files import sha256

VAL_NAMES = ("val", "validation", "valid")
SHOWN = 4


@dataclass(frozen=True)
class ClassFolder:
    """A classification data set.

    Attributes:
        path: Its absolute folder.
        names: Class names by number, in the order Ultralytics gives them (sorted folder names of train).
        images: Images by split and class name.
    """

    path: Path
    names: dict[int, str]
    images: dict[str, dict[str, list[Path]]]

    def count(self, split: str) -> int:
        """Return the number of images of a split."""
        return sum(map(len, self.images.get(split, {}).values()))

    def commonest_share(self, split: str) -> float:
        """Return the share of the largest class of a split: what naming always that class reaches, 0 to 1."""
        return max(map(len, self.images[split].values())) / self.count(split)


def read_class_folder(folder: Path, check_images: bool = False) -> ClassFolder:
    """Read a classification folder.

    Args:
        folder: Folder with ``train/CLASS/...``, ``val/CLASS/...`` (or ``validation``, ``valid``) and perhaps ``test``.
        check_images: Also decode every image of train and val, and warn of equal files in two splits.

    Raises:
        DataError: No such folder or split, images in no class folder, an empty class folder, a class that a split lacks
            or has in addition, fewer than two classes, or an image that cannot be read; one line.
    """
    folder = folder.expanduser().absolute()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; classification data is a folder with train/CLASS/ and val/CLASS/")
    places = _splits(folder)
    images = {split: _classes(place) for split, place in places.items()}
    names = sorted(images["train"])
    if len(names) < 2:
        raise DataError(f"{places['train']}: holds {len(names)} class folder(s); at least two classes are needed")
    if names[0].startswith("n0"):  # Ultralytics takes a first name like this for an ImageNet code
        raise DataError(f"{places['train'] / names[0]}: rename it; class names that begin with n0 stand for ImageNet's")
    for split in places:
        _check_same_classes(places[split], names, images[split])
    found = ClassFolder(folder, dict(enumerate(names)), images)
    if check_images:
        _check_images(found)
        _warn_of_leaks(found)
    return found


def _splits(folder: Path) -> dict[str, Path]:
    if (folder / "data.yaml").is_file() and (folder / "labels").is_dir():
        raise DataError(
            f"{folder}: is a detection data set; make a classification folder of it: kd-yolo data convert "
            f"from=classes src={folder} out={folder.name}-cls"
        )
    if not (folder / "train").is_dir():
        raise DataError(
            f"{folder}: has no 'train' folder; classification data is train/CLASS/, val/CLASS/; a folder of class "
            f"folders is split by: kd-yolo data convert from=classes src={folder} out=FOLDER"
        )
    val = next((folder / name for name in VAL_NAMES if (folder / name).is_dir()), None)
    if val is None:
        raise DataError(
            f"{folder}: has no 'val' folder; the best checkpoint is chosen there, never on test; make one of train: "
            f"kd-yolo data convert from=classes src={folder / 'train'} out=FOLDER split=0.85/0.15/0"
        )
    places = {"train": folder / "train", "val": val}
    return {**places, "test": folder / "test"} if (folder / "test").is_dir() else places


def _classes(place: Path) -> dict[str, list[Path]]:
    loose = [path for path in sorted(place.iterdir()) if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES]
    if loose:
        raise DataError(
            f"{loose[0]}: this image is in no class folder ({len(loose)} such images in {place}); move them into "
            f"{place.name}/CLASS/"
        )
    folders = [path for path in sorted(place.iterdir()) if path.is_dir()]
    hidden = [path for path in folders if path.name.startswith(".")]
    if hidden:
        raise DataError(f"{hidden[0]}: Ultralytics takes this hidden folder for a class; remove it")
    found = {path.name: files_under(path, IMAGE_SUFFIXES) for path in folders}
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise DataError(f"{place / empty[0]}: this class folder holds no image; fill it or remove the class everywhere")
    return found


def _check_same_classes(place: Path, names: list[str], found: dict[str, list[Path]]) -> None:
    more = [name for name in found if name not in names]
    if more:
        raise DataError(f"{place / more[0]}: train has no class '{more[0]}'; rename the folder, or add it to train")
    less = [name for name in names if name not in found]
    if less and place.name == "test":
        LOGGER.warning(f"{place}: has no images of the class '{less[0]}', so it is not judged there")
    elif less:
        raise DataError(f"{place}: has no images of the class '{less[0]}', so it would never be judged; add some")


def _check_images(folder: ClassFolder) -> None:
    files = [path for split in ("train", "val") for group in folder.images[split].values() for path in group]
    bad = [f"{path} {result}" for path, result in in_threads(decode, files) if isinstance(result, BadImageError)]
    if bad:
        more = f" ({len(bad)} such images)" if len(bad) > 1 else ""
        raise DataError(f"{bad[0]}{more}; repair or remove it")


def _warn_of_leaks(folder: ClassFolder) -> None:
    """Warn of byte-identical files in two splits; only files of equal size are read."""
    sizes: dict[int, list[tuple[str, Path]]] = defaultdict(list)
    for split in SPLITS:
        for group in folder.images.get(split, {}).values():
            for path in group:
                sizes[path.stat().st_size].append((split, path))
    same: dict[str, Counter[str]] = defaultdict(Counter)
    first: dict[str, Path] = {}
    for members in sizes.values():
        if len({split for split, _ in members}) > 1:
            for split, path in members:
                digest = sha256(path)
                same[digest][split] += 1
                first.setdefault(digest, path)
    leaks = [first[digest] for digest, splits in same.items() if len(splits) > 1]
    if leaks:
        shown = ", ".join(path.name for path in leaks[:SHOWN])
        LOGGER.warning(
            f"{folder.path}: {len(leaks)} images are in two splits byte for byte ({shown}); figures on val or test are "
            "too good by them"
        )
