"""The whole line on built-in data: make, check, train teacher and student, deploy, export, time, draw."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from kd_yolo.config import split_train_keys
from kd_yolo.data.contact_sheet import draw_contact_sheet
from kd_yolo.data.datasets import resolve_dataset

# What two CPU cores finish in a few minutes. So short a run needs a higher learning rate and no gradient accumulation.
DEFAULTS = {"epochs": 36, "imgsz": 128, "batch": 16, "model": "lightnet-n"}
SHORT_RUN = {"optimizer": "AdamW", "lr0": 0.003, "momentum": 0.9, "nbs": 16, "warmup_epochs": 1, "warmup_bias_lr": 0.0}


def run_demo(project: str = "runs/demo", **given: Any) -> tuple[str, dict[str, Any]]:
    """Run the demo.

    Args:
        project: Folder for the results; a new run folder is made in it each time.
        **given: ``epochs`` of teacher and student each, ``imgsz`` in pixels, ``model``.

    Returns:
        The closing text with the table, and plain data.
    """
    from kd_yolo.api import KDYOLO
    from kd_yolo.nn.student import student_spec
    from kd_yolo.tasks.peer import inherits
    from kd_yolo.training import train

    started = time.time()
    data = resolve_dataset("steel-synth")
    keys = {**DEFAULTS, **SHORT_RUN, **given, "data": str(data), "project": project, "name": "steel-synth"}
    if inherits(student_spec(str(keys["model"])).cfg) is not None:
        keys |= {"teacher_model": "yolo26n.yaml"}  # the wide network, from random weights; the student takes it over
    keys |= {"cache": "ram", "close_mosaic": 2 * int(keys["epochs"]) // 5, "device": "cpu", "teacher": "self"}
    config, stock, groups = split_train_keys(keys)
    report = train(config, stock, groups)
    picture = _draw_detections(KDYOLO(report.artifacts["deployed"]), data, int(keys["imgsz"]), report.run_dir)
    labels = draw_contact_sheet(data, report.run_dir / "labels.png", "val", 12)
    rows = [f"{p.name:<8} mAP50 {p.metrics['metrics/mAP50(B)']:.3f}  mAP50-95 {p.fitness:.3f}" for p in report.phases]
    table = (report.run_dir / "benchmark" / "benchmark.md").read_text() if report.benchmark else ""
    lines = ["", "validation, by phase:", *rows, "", table.rstrip(), ""]
    lines += [f"detections: {picture}", f"true boxes: {labels}", f"all files:  {report.run_dir}"]
    lines += [f"{time.time() - started:.0f} s. Now your own data: kd-yolo train data=YOUR.yaml"]
    return "\n".join(lines), {**report.to_dict(), "detections": str(picture), "seconds": time.time() - started}


def _draw_detections(model: Any, data: Path, imgsz: int, folder: Path, columns: int = 4, rows: int = 3) -> Path:
    """Write one picture of the student's detections on validation images."""
    import cv2
    import numpy as np

    from kd_yolo.data.datayaml import load_data_yaml

    images = load_data_yaml(data).images("val")[: columns * rows]
    cells = [
        result.plot(line_width=1, font_size=7)
        for result in model.predict([str(i) for i in images], imgsz=imgsz, verbose=False)
    ]
    grid = [np.hstack(cells[i : i + columns]) for i in range(0, len(cells) - columns + 1, columns)]
    target = folder / "detections.png"
    cv2.imwrite(str(target), np.vstack(grid))
    return target
