"""A detector that never saw two kinds of defects, fused with an anomaly model: the picture and the counts.

    python benchmarks/anomaly_fusion_picture.py prepare=runs/fusion-data
    yolo detect train model=yolo26n.pt data=runs/fusion-data/known.yaml imgsz=160 epochs=14 freeze=10 batch=16 \
        optimizer=AdamW lr0=0.002 cos_lr=true warmup_epochs=1 close_mosaic=5 project=runs name=known
    kd-yolo train task=anomaly data=magnetic-tile model=hkt-plus imgsz=256 epochs=10 project=runs/anomaly name=tile
    python benchmarks/anomaly_fusion_picture.py model=runs/known/weights/best.pt \
        anomaly=runs/anomaly/tile/weights/best.pt

``prepare`` lists the magnetic tile images for a detector of Blowhole, Break and Crack alone: no image with Fray or
Uneven, and 19 free tiles. The split is that of kd-yolo's ``magnetic-tile``, which keeps exposures of one tile
together. The picture in ``docs/images`` is from the commands above: yolo26n with COCO weights and a frozen backbone,
mAP50 0.49 on the 26 validation images of the three classes; HKT+ trained on free tiles for 10 epochs. Both are short
trainings on one CPU core, to show what fusion does, not how good either can become.

Only images are judged that neither model trained on: of the detector's validation and test split, and of the anomaly
data set's test images. Shown is of every class the image whose anomaly score is the median of its class.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from kd_yolo import KDYOLO
from kd_yolo.anomaly.layouts import read_anomaly_data
from kd_yolo.config import parse_pairs
from kd_yolo.data.datasets import resolve_dataset
from kd_yolo.errors import ConfigError
from kd_yolo.files import write_text, written_aside
from kd_yolo.inspection.fusion import FusionPredictor, fusion_keys
from kd_yolo.inspection.fusion_result import FusedResult
from kd_yolo.tables import markdown_table

KNOWN = ("Blowhole", "Break", "Crack")
LEFT_OUT = ("Fray", "Uneven")
FREE = "free"
FREE_TILES = 19
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "anomaly-fusion.png"
WIDEST = 320  # pixels of a tile in the picture


def main(words: Sequence[str]) -> int:
    """Prepare the detector's data, or draw the picture and print the counts."""
    keys = parse_pairs(words)
    if "prepare" in keys:
        print(prepare(Path(str(keys["prepare"]))))
        return 0
    out = Path(str(keys.pop("out", PICTURE)))
    files = judged_images()
    given = {"conf": 0.25, "imgsz": 160, "save": False, "save_json": False, "verbose": False, **keys}
    parsed = fusion_keys({**given, "source": [str(file) for file in files]})
    predictor = FusionPredictor(parsed, KDYOLO(parsed.model))
    found: dict[str, list[FusedResult]] = {}
    for result in predictor:
        found.setdefault(files[Path(result.path)], []).append(result)
    print(counts(found))
    print(predictor.report.to_text())
    draw(out, {name: median(found[name]) for name in (*KNOWN, *LEFT_OUT, FREE)})
    print(out)
    return 0


def prepare(folder: Path) -> Path:
    """Write the lists of images and ``known.yaml`` for a detector of the known classes."""
    home = resolve_dataset("magnetic-tile").parent
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        files = sorted((home / "images" / split).iterdir())
        known = [file for file in files if classes(file) and max(classes(file)) < len(KNOWN)]
        free = [file for file in files if not classes(file)]
        free = random.Random(0).sample(free, FREE_TILES) if split == "train" else free[:20]
        write_text(folder / f"{split}.txt", "".join(f"{file}\n" for file in (*known, *free)))
    content = {"path": str(folder.resolve()), "train": "train.txt", "val": "val.txt", "names": dict(enumerate(KNOWN))}
    write_text(folder / "known.yaml", yaml.safe_dump(content, sort_keys=False))
    return folder / "known.yaml"


def classes(image: Path) -> set[int]:
    """Return the class numbers in the label file of an image of the converted data set."""
    label = image.parents[2] / "labels" / image.parent.name / f"{image.stem}.txt"
    lines = label.read_text(encoding="utf-8").splitlines() if label.is_file() else []
    return {int(line.split()[0]) for line in lines}


def judged_images() -> dict[Path, str]:
    """Return the images that no model trained on, with their class; images of several classes are left out."""
    home = resolve_dataset("magnetic-tile").parent
    unseen = {sample.image.stem for sample in read_anomaly_data("magnetic-tile").test}
    names = (*KNOWN, *LEFT_OUT)
    found = {}
    for split in ("val", "test"):
        for image in sorted((home / "images" / split).iterdir()):
            present = classes(image)
            if image.stem in unseen and len(present) <= 1:
                found[image] = names[min(present)] if present else FREE
    if not found:
        raise ConfigError(f"{home}: no image that neither model trained on")
    return found


def counts(found: dict[str, list[FusedResult]]) -> str:
    """Return a table: how many images of each class have a detection, an unknown region, an anomalous score."""
    rows = []
    for name in (*KNOWN, *LEFT_OUT, FREE):
        results = found.get(name, [])
        hits = [
            sum(bool(result.detections) for result in results),
            sum(bool(result.unknown) for result in results),
            sum(result.anomaly.is_anomaly for result in results),
            sum(bool(result.detections) or bool(result.unknown) for result in results),
        ]
        rows.append([name, str(len(results)), *map(str, hits)])
    return markdown_table(
        ["class", "images", "with a detection", "with an unknown", "score above", "with either"], rows
    )


def median(results: list[FusedResult]) -> FusedResult:
    """Return the result whose anomaly score is the (upper) median."""
    return sorted(results, key=lambda result: result.anomaly.score)[len(results) // 2]


def draw(path: Path, shown: dict[str, FusedResult]) -> None:
    """Draw a column for each class: the image, the heat map, both models together."""
    figure = Figure(figsize=(2.1 * len(shown), 6.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(3, len(shown), squeeze=False)
    for column, (name, result) in enumerate(shown.items()):
        kind = "known" if name in KNOWN else ("not in the detector" if name in LEFT_OUT else "no defect")
        grid[0][column].set_title(f"{name}\n({kind})", fontsize=9)
        pictures = (result.orig_img, result.anomaly.plot(labels=False), result.plot(line_width=2, font_size=9))
        for row, picture in enumerate(pictures):
            grid[row][column].imshow(on_white(np.asarray(picture))[..., ::-1])
            grid[row][column].set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        figure.savefig(aside)


def on_white(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a picture in the middle of a white square."""
    scale = WIDEST / max(picture.shape[:2])
    size = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    square = np.full((WIDEST, WIDEST, 3), 255, np.uint8)
    top, left = (WIDEST - size[1]) // 2, (WIDEST - size[0]) // 2
    square[top : top + size[1], left : left + size[0]] = small
    return square


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
