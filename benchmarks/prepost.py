"""Cost of everything around the network: letterbox, normalisation, selection, boxes back in image pixels, on one core.

    python benchmarks/prepost.py

Process CPU time of one image, so that other work on the machine does not count: the median of many blocks, beside the
same steps as Ultralytics' predictor takes them. The output of the network is made up: ``objects`` defects, each seen by
several anchors. Writes ``prepost.json`` and ``.md`` beside this script. Keys: objects=20 anchors=8 blocks=60.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from ultralytics.data.augment import LetterBox
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import scale_boxes

from kd_yolo.bench.worker import cpu_name
from kd_yolo.config import parse_pairs, refuse_unknown
from kd_yolo.errors import KDYoloError
from kd_yolo.files import write_json, write_text
from kd_yolo.images import Image, textured_images, to_canvas
from kd_yolo.inference import CONFIDENCE, NMS_IOU, postprocess
from kd_yolo.provenance import versions
from kd_yolo.tables import markdown_table

CLASSES = 6
CASES = ((224, (200, 200)), (224, (480, 640)), (640, (640, 640)), (640, (480, 640)), (640, (1080, 1920)))
BARS_MS = {224: 1.0, 640: 3.0}
DEFAULTS = {"objects": 20, "anchors": 8, "blocks": 60}


def main() -> None:
    """Measure and write the table."""
    given = parse_pairs(sys.argv[1:])
    refuse_unknown(given, DEFAULTS, "prepost.py")
    values = {key: int(value) for key, value in {**DEFAULTS, **given}.items()}
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rows = [measure(side, shape, values) for side, shape in CASES]
    header = ["canvas", "image", "pre ms", "post ms", "both ms", "wanted", "as the predictor: pre ms", "post ms"]
    lines = [
        [
            str(row["canvas"]),
            "{1}x{0}".format(*row["image"]),
            *(f"{row[key]:.2f}" for key in ("pre_ms", "post_ms", "both_ms")),
            f"<= {row['wanted_ms']:g}",
            *(f"{row[key]:.2f}" for key in ("stock_pre_ms", "stock_post_ms")),
        ]
        for row in rows
    ]
    note = (
        f"{cpu_name()}, one thread, process CPU time of one image, median of {values['blocks']} blocks; "
        f"{values['objects']} objects seen by {values['anchors']} anchors each; the same bits as the predictor's."
    )
    text = f"{markdown_table(header, lines)}\n\n{note}"
    target = Path(__file__).with_suffix(".json")
    write_json(target, {"cpu": cpu_name(), "versions": versions(), **values, "rows": rows})
    write_text(target.with_suffix(".md"), text + "\n")
    print(text)


def measure(side: int, shape: tuple[int, int], values: dict[str, int]) -> dict[str, Any]:
    """Return one row; raises AssertionError if the results are not those of Ultralytics' steps."""
    image, canvas = textured_images(1, shape)[0], (side, side)
    output = made_up(side, values["objects"], values["anchors"])
    steps: dict[str, Callable[[], Any]] = {
        "pre_ms": lambda: to_canvas([image], canvas),
        "post_ms": lambda: postprocess(output, [shape], canvas, nms=True),
        "stock_pre_ms": lambda: stock_pre(image, canvas),
        "stock_post_ms": lambda: stock_post(output, shape, canvas),
    }
    if not torch.equal(steps["pre_ms"](), steps["stock_pre_ms"]()):
        raise AssertionError("pre-processing is not Ultralytics'")
    if not torch.equal(steps["post_ms"]()[0], steps["stock_post_ms"]()):
        raise AssertionError("post-processing is not Ultralytics'")
    times = {name: cpu_ms(step, values["blocks"]) for name, step in steps.items()}
    both = times["pre_ms"] + times["post_ms"]
    return {"canvas": side, "image": shape, **times, "both_ms": both, "wanted_ms": BARS_MS[side]}


def made_up(side: int, objects: int, anchors: int) -> Tensor:
    """Return an output (1, 4 + K, A) in which some objects are seen by several anchors each."""
    generator = torch.Generator().manual_seed(0)
    total = sum((side // stride) ** 2 for stride in (8, 16, 32))
    output = torch.zeros(1, 4 + CLASSES, total)
    output[:, 4:] = 0.1 * torch.rand(CLASSES, total, generator=generator)
    places = torch.randperm(total, generator=generator)[: objects * anchors]
    boxes = (side * (0.1 + 0.8 * torch.rand(objects, 4, generator=generator))).repeat_interleave(anchors, 0)
    boxes[:, 2:] *= 0.25
    boxes += 0.02 * boxes[:, 2:].repeat(1, 2) * torch.randn(boxes.shape, generator=generator)
    output[0, :4, places] = boxes.T
    classes = torch.arange(objects).repeat_interleave(anchors) % CLASSES
    output[0, 4 + classes, places] = 0.3 + 0.6 * torch.rand(len(places), generator=generator)
    return output


def stock_pre(image: Image, canvas: tuple[int, int]) -> Tensor:
    """Pre-process as ``ultralytics.engine.predictor.BasePredictor.preprocess`` does."""
    batch = np.stack([LetterBox(canvas, auto=False)(image=image)])
    pixels = torch.from_numpy(np.ascontiguousarray(batch[..., ::-1].transpose((0, 3, 1, 2)))).float()
    pixels /= 255
    return pixels


def stock_post(output: Tensor, shape: tuple[int, int], canvas: tuple[int, int]) -> Tensor:
    """Post-process as ``ultralytics.models.yolo.detect.DetectionPredictor`` does."""
    found: Tensor = non_max_suppression(output, CONFIDENCE, NMS_IOU, max_det=300)[0]
    found[:, :4] = scale_boxes(canvas, found[:, :4], shape)
    return found


def cpu_ms(step: Callable[[], Any], blocks: int, calls: int = 20) -> float:
    """Return the median over blocks of the milliseconds of process CPU time that one call takes."""
    times = []
    for block in range(blocks + 2):
        start = time.process_time()
        for _ in range(calls):
            step()
        if block >= 2:  # the first two warm up
            times.append((time.process_time() - start) / calls * 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    try:
        main()
    except KDYoloError as error:
        sys.exit(str(error))
