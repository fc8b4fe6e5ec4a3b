"""Read Pascal VOC XML in the layouts in circulation.

Understood: IMAGES/ + ANNOTATIONS/ (NEU-DET as published), train/ and validation/ folders with images/CLASS/ and
annotations/ (its common mirror), Annotations/CLASS/ + images/CLASS/ (PKU-Market-PCB), JPEGImages/ + Annotations/ +
ImageSets/Main/ (Pascal VOC), and everything in one folder. Classes come from ``<name>``, never from a file or folder.

Pixel origin. Pascal VOC counts pixels from 1, both ends included, so its boxes become edges by subtracting 1 from xmin
and ymin. labelImg, with which most industrial sets were drawn, writes continuous edges from 0 and lifts a 0 to 1.
NEU-DET is of the second kind. Its boxes crowd at the borders: at the left 493 have xmin 1 and 101 have 2; at the right
258 have xmax 200, 186 have 199 and 123 have 198. Read as edges with 0 lifted to 1, both sides agree: 493 stands
against 258 + 186 = 444, and 101 against 123. Read as pixels from 1, 493 would stand against 258 and 101 against 186.
Also, every one of the 1507 boxes marked ``truncated`` touches a border, which is what labelImg means by it. So the
numbers are taken as edges. ``origin`` forces a reading; ``auto`` takes pixels from 1 only for a folder with Pascal
VOC's own JPEGImages/ and ImageSets/ in which no coordinate is 0.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Literal

from kd_yolo.data.layout import files_under
from kd_yolo.data.pixels import BadImageError
from kd_yolo.data.samples import SPLIT_WORDS, RawBox, Reading, Sample, image_size, images_under, split_of
from kd_yolo.errors import DataError

Origin = Literal["auto", "0", "1"]

_EDGES = ("xmin", "ymin", "xmax", "ymax")


def read_voc(src: Path, origin: Origin = "auto") -> Reading:
    """Read a folder of images and VOC XML files.

    Args:
        src: The published folder.
        origin: ``0`` takes coordinates as continuous edges, ``1`` as pixels from 1, ``auto`` decides (see above).

    Returns:
        Samples with their published split if there is one; images without XML and XML without image as problems.

    Raises:
        DataError: The folder holds no VOC XML, or none that belongs to an image.
    """
    files = files_under(src, {".xml"})
    if not files:
        raise DataError(f"{src}: no .xml file in this folder or below; from=voc needs Pascal VOC annotations")
    reading = Reading()
    images = images_under(src)
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        by_stem[image.stem].append(image)
    used: set[Path] = set()
    for file in files:
        parsed = _parse(file, src, reading)
        if parsed is None:
            continue
        boxes, size, filename = parsed
        found = _image_of(file, src, by_stem, filename)
        if found is None or found in used:
            reading.problem("annotation without image", file.relative_to(src).as_posix())
            continue
        used.add(found)
        reading.samples.append(Sample(found, boxes, split_of(found.relative_to(src))))
        _compare_size(reading, found, size, src)
    for image in images:
        if image not in used:
            reading.problem("image without annotation", image.relative_to(src).as_posix())
    if not reading.samples:
        raise DataError(f"{src}: {len(files)} .xml files but none belongs to an image (same file name needed)")
    _read_image_sets(src, reading)
    _settle_origin(src, reading, origin)
    return reading


def _parse(file: Path, src: Path, reading: Reading) -> tuple[list[RawBox], tuple[int, int], str] | None:
    """Return boxes as written, the stated size and the stated file name, or None when the file is no VOC annotation."""
    shown = file.relative_to(src).as_posix()
    try:
        tree = ElementTree.parse(file).getroot()
    except (OSError, ElementTree.ParseError) as error:
        reading.problem("unreadable annotation", f"{shown}: {error}")
        return None
    if tree.tag != "annotation":
        reading.problem("unreadable annotation", f"{shown}: root element is <{tree.tag}>, not <annotation>")
        return None
    boxes = []
    for number, entry in enumerate(tree.iter("object"), 1):
        name = (entry.findtext("name") or "").strip()
        try:
            edges = [float(entry.findtext(f"bndbox/{edge}") or "") for edge in _EDGES]
        except ValueError:
            edges = []
        if not name or not edges:
            reading.problem("unusable object", f"{shown}: object {number} has no <name> or no numeric <bndbox>")
            continue
        boxes.append(RawBox(name, *edges))
    size = tuple(int(float(tree.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    return boxes, (size[0], size[1]), (tree.findtext("filename") or "").strip()


def _image_of(file: Path, src: Path, by_stem: dict[str, list[Path]], filename: str) -> Path | None:
    """Return the image of an annotation: same stem, else the stated file name; the nearest in the tree when several."""
    found = by_stem.get(file.stem) or by_stem.get(Path(filename).stem) or []
    if len(found) < 2:
        return found[0] if found else None
    own = [part.lower() for part in file.relative_to(src).parts[:-1]]

    def shared(image: Path) -> int:
        parts = [part.lower() for part in image.relative_to(src).parts[:-1]]
        return sum(part in own for part in parts)

    ranked = sorted(found, key=lambda image: (-shared(image), str(image)))
    return ranked[0]


def _compare_size(reading: Reading, image: Path, stated: tuple[int, int], src: Path) -> None:
    try:
        real = image_size(image)
    except BadImageError:
        return  # the converter lists unreadable images itself
    if all(stated) and stated != real:
        shown = image.relative_to(src).as_posix()
        detail = f"{shown}: XML says {stated[0]}x{stated[1]}, the image is {real[0]}x{real[1]}"
        reading.problem("size in annotation differs", detail)


def _read_image_sets(src: Path, reading: Reading) -> None:
    """Take the split from ImageSets/Main of a Pascal VOC folder."""
    folder = next((path for path in sorted(src.rglob("ImageSets")) if path.is_dir()), None)
    if folder is None:
        return
    main = folder / "Main" if (folder / "Main").is_dir() else folder
    by_stem: dict[str, str] = {}
    for word in ("trainval", "train", "val", "test"):  # the finer list wins over trainval
        if (main / f"{word}.txt").is_file():
            for line in (main / f"{word}.txt").read_text(encoding="utf-8-sig").splitlines():
                if line.strip():
                    by_stem[Path(line.split()[0]).name.removesuffix(".jpg")] = SPLIT_WORDS[word]
    if by_stem:
        for sample in reading.samples:
            sample.split = by_stem.get(sample.image.stem, sample.split)
        reading.decisions.append(f"split read from {main.relative_to(src).as_posix()}")


def _settle_origin(src: Path, reading: Reading, origin: Origin) -> None:
    """Turn pixels counted from 1 into edges where that is what the file means."""
    lowest = min((min(box.x0, box.y0) for s in reading.samples for box in s.boxes), default=0.0)
    official = any(src.rglob("JPEGImages")) and any(src.rglob("ImageSets"))
    from_one = origin == "1" or (origin == "auto" and official and lowest >= 1)
    if from_one:
        for sample in reading.samples:
            sample.boxes = [replace(box, x0=box.x0 - 1, y0=box.y0 - 1) for box in sample.boxes]
    how = "pixels counted from 1, ends included" if from_one else "continuous edges from 0"
    why = (
        f"origin={origin}"
        if origin != "auto"
        else f"lowest coordinate {lowest:g}" + (", Pascal VOC folders" if official else ", no Pascal VOC folders")
    )
    reading.decisions.append(f"box coordinates read as {how} ({why})")
    reading.decisions.append("classes taken from <name>; file and folder names ignored")
