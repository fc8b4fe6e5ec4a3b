"""Step time and peak memory of distillation here against Ultralytics' own ``distill_model``.

Same student, teacher, batch, canvas, weights and random batches; forward, loss and backward of one training step.
Rounds of all are interleaved in one process, so that what else the machine does hits all alike; the figure is the
median of the per-round ratios. ``kd-lightnet-one2many`` is ``kd.one2one=false``. Peak memory is the resident set of a
process that runs one of them alone.

    python benchmarks/step_time.py student=yolo26n.yaml teacher=yolo26s.yaml imgsz=224 batch=16 rounds=15
"""

from __future__ import annotations

import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import ultralytics
from ultralytics.cfg import get_cfg
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.config import parse_pairs
from kd_yolo.distill.base import build_method
from kd_yolo.distill.model import KDModel
from kd_yolo.distill.taps import common_strides, describe, head_strides
from kd_yolo.distill.teacher import map_classes, prepare_teacher
from kd_yolo.distill.teachers.detect import DetectTeacher
from kd_yolo.files import write_json, write_text

DEFAULTS = {"student": "yolo26n.yaml", "teacher": "yolo26s.yaml", "imgsz": 224, "batch": 16, "rounds": 25}
# Name: method and what differs from its shipped defaults; the first is Ultralytics' own.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "stock": ("", {}),
    "score-l2": ("score-l2", {}),
    "kd-lightnet": ("kd-lightnet", {}),
    "kd-lightnet-one2many": ("kd-lightnet", {"one2one": False}),
}
BARS = {"score-l2": 0.90, "kd-lightnet": 1.0}
Step = Callable[[], None]


def main() -> None:
    """Measure, print, write ``step_time.json`` and ``.md``; with ``only=`` run one variant for its memory."""
    values: dict[str, Any] = {**DEFAULTS, **parse_pairs(sys.argv[1:])}
    torch.set_num_threads(int(values.get("threads", os.cpu_count() or 1)))
    if "only" in values:
        step = make_step(str(values["only"]), values)
        for _ in range(3):
            step()
        # not getrusage(): its maximum survives exec() and would be this script's own
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        print(float(status.split("VmHWM:")[1].split()[0]) / 1024)
        return
    steps = {name: make_step(name, values) for name in VARIANTS}
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(int(values["rounds"])):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - start))
    memory = {name: peak_memory_mb(name, values) for name in VARIANTS}
    report(values, times, memory)


def make_step(variant: str, values: dict[str, Any]) -> Step:
    """Return one training step (forward, loss, backward) of a variant."""
    torch.manual_seed(0)
    names = {i: f"class {i}" for i in range(6)}
    teacher, student = (build(str(values[key]), names) for key in ("teacher", "student"))
    for module in teacher.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    student.args = get_cfg(overrides={"imgsz": values["imgsz"]})
    model: Any
    if variant == "stock":
        model = DistillationModel(teacher_model=copy.deepcopy(teacher), student_model=student)
    else:
        ready = DetectTeacher(prepare_teacher(teacher, map_classes(names, names)))
        strides = common_strides(head_strides(student), ready.strides)
        method = build_method(*VARIANTS[variant], describe(student, strides), ready.describe(strides))
        model = KDModel(ready, student, method)
    model.train()
    batch = make_batch(int(values["batch"]), int(values["imgsz"]))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model.loss(dict(batch))[0].sum().backward()

    return step


def build(name: str, names: dict[int, str]) -> DetectionModel:
    """Return an untrained detector of six classes."""
    model = DetectionModel(name, nc=len(names), verbose=False)
    model.names = names
    return model


def make_batch(images: int, imgsz: int) -> dict[str, torch.Tensor]:
    """Return seeded random images with two boxes each."""
    generator = torch.Generator().manual_seed(1)
    count = 2 * images
    return {
        "img": torch.rand(images, 3, imgsz, imgsz, generator=generator),
        "batch_idx": torch.arange(images, dtype=torch.float32).repeat_interleave(2),
        "cls": torch.randint(0, 6, (count, 1), generator=generator).float(),
        "bboxes": 0.3 + 0.3 * torch.rand(count, 4, generator=generator),
    }


def peak_memory_mb(variant: str, values: dict[str, Any]) -> float:
    """Return the peak resident memory of a process that runs three steps of one variant."""
    words = [f"{key}={value}" for key, value in values.items()]
    command = [sys.executable, __file__, *words, f"only={variant}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def report(values: dict[str, Any], times: dict[str, list[float]], memory: dict[str, float]) -> None:
    """Print and write the table."""
    ratios = {name: [a / b for a, b in zip(times[name], times["stock"], strict=True)] for name in VARIANTS}
    lines = ["| | step ms (median) | / stock (median, quartiles) | bar | peak memory MB |", "|---|---|---|---|---|"]
    for name in VARIANTS:
        low, middle, high = statistics.quantiles(ratios[name], n=4)
        bar = f"<= {BARS[name]:.2f}" if name in BARS else ""
        lines.append(
            f"| {name} | {statistics.median(times[name]):.1f} | {middle:.3f} ({low:.3f} to {high:.3f}) | {bar} "
            f"| {memory[name]:.0f} |"
        )
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, ultralytics {ultralytics.__version__}"
    setting = {**values, "machine": machine, "versions": versions}
    target = Path(__file__).with_suffix(".json")
    content = {"setting": setting, "step_ms": times, "peak_memory_mb": memory}
    write_json(target, json.loads(json.dumps(content)))
    write_text(target.with_suffix(".md"), "\n".join([*lines, "", f"{setting}"]) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
