"""What every distillation method costs: step time and peak memory against plain training and stock ``distill_model``.

Same student, teacher, batch, canvas, weights and random batches; a step is forward, loss, backward and optimizer.
A row is one process in which ``none``, ``stock`` and the method take turns, each round starting with another one, so
that what else the machine does hits all alike; the figure is the median of the per-round ratios. Peak memory is that of
a fresh process that runs one of them alone for three steps (``none`` and ``stock`` too). CPU time is that of all
threads: it hardly notices other programs. A method that needs ``reg_max`` > 1 is measured on the pair ``bins=``.

    python benchmarks/method_cost.py imgsz=224,640 batch=16 rounds=15
    python benchmarks/method_cost.py imgsz=224 methods=cwd,tskd:intended     (the other rows stay as they are)

Rows are written as they are finished; called again with the same settings, only what is missing or whose source has
changed is measured.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import ultralytics
from ultralytics.cfg import get_cfg
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.config import parse_pairs
from kd_yolo.distill.base import DetectorSpec, DistillMethod, build_method, list_methods, load_method
from kd_yolo.distill.model import KDModel
from kd_yolo.distill.taps import common_strides, describe, detect_head, head_strides
from kd_yolo.distill.teacher import map_classes, prepare_teacher
from kd_yolo.distill.teachers.detect import DetectTeacher
from kd_yolo.errors import ConfigError, KDYoloError, TeacherError, nearest
from kd_yolo.files import write_json, write_text
from kd_yolo.nn.lightnet import build_model

DEFAULTS: dict[str, Any] = {
    "pair": "yolo26n.yaml,yolo26s.yaml",  # student, teacher
    "bins": "yolo11n.yaml,yolo11s.yaml",
    "imgsz": "224,640",
    "batch": 16,
    "rounds": 15,
    "threads": os.cpu_count() or 1,
}
CONTROL_KEYS = ("methods", "out", "again", "measure", "memory")
# Rows beside one per method file with its defaults: name and arguments by label.
EXTRA: dict[str, tuple[str, dict[str, Any]]] = {
    "cwd+bckd": ("cwd+bckd", {}),
    "tskd:published": ("tskd", {"variant": "published"}),
    "tskd:intended": ("tskd", {"variant": "intended"}),
}
VARIED = {name for name, args in EXTRA.values() if args}  # methods that have no row of their defaults
BARS = {"feature": 1.0, "logits": 0.9}  # of stock's step time
OWN_BARS = {"tskd:intended": 1.3}
BASE = "stock"  # the row that holds ``none`` too
WARM_UP = 2
COLUMNS = ["", "reads", "step ms", "/ none", "/ stock (quartiles)", "CPU time / stock", "bar", "verdict"]
COLUMNS += ["peak MB", "/ none", "/ stock"]
Row = dict[str, Any]


def main() -> None:
    """Measure what is missing and write ``method_cost.json`` and ``.md``; with ``measure=`` or ``memory=`` one part."""
    given = parse_pairs(sys.argv[1:])
    refuse(given, [*DEFAULTS, *CONTROL_KEYS], "key")
    values = {**DEFAULTS, **given}
    torch.set_num_threads(int(values["threads"]))
    if "measure" in values:
        print(json.dumps(measure(str(values["measure"]), values)))
    elif "memory" in values:
        print(json.dumps(peak_memory_mb(str(values["memory"]), values)))
    else:
        sys.exit(run_all(values))


def run_all(values: dict[str, Any]) -> int:
    """Measure every missing row in processes of their own; return the exit status."""
    target = Path(str(values.get("out", Path(__file__).with_suffix("")))).with_suffix(".json")
    rows: dict[str, Row] = json.loads(target.read_text(encoding="utf-8"))["rows"] if target.is_file() else {}
    failed = 0
    for imgsz in (int(word) for word in str(values["imgsz"]).strip("[]").split(",")):
        for label in [BASE, *labels(values)]:
            key = f"{label}@{imgsz}"
            try:
                now = fingerprint(label, pair_of(label, values), imgsz, values)
                if rows.get(key, {}).get("fingerprint") == now and not values.get("again"):
                    continue
                print(f"{key}: {now['pair']} ...", flush=True)
                rows[key] = {"fingerprint": now, **measured_apart(label, now, rows.get(f"{BASE}@{imgsz}"))}
                write_json(target, {"rows": rows})
                write_text(target.with_suffix(".md"), table(rows))
            except (KDYoloError, subprocess.CalledProcessError) as error:
                reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
                print(f"{key}: not measured: {reason}", file=sys.stderr)
                failed += 1
    print(table(rows))
    return 1 if failed else 0


def refuse(given: Iterable[str], known: list[str], what: str) -> None:
    """Raise for the first unknown word."""
    for word in given:
        if word not in known:
            raise ConfigError(f"unknown {what} '{word}'{nearest(word, known)} (known: {', '.join(known)})")


def labels(values: Mapping[str, Any]) -> list[str]:
    """Return the rows to measure: all, or those of ``methods=``."""
    known = sorted([*(name for name in list_methods() if name not in VARIED), *EXTRA])
    chosen = str(values.get("methods", ",".join(known))).split(",")
    refuse(chosen, known, "row")
    return chosen


def pair_of(label: str, values: Mapping[str, Any]) -> str:
    """Return the student and teacher a row is measured on: ``bins`` only where the method refuses ``pair``."""
    if label != BASE:
        try:
            build_for(label, *(spec(word) for word in str(values["pair"]).split(",")))
        except (ConfigError, TeacherError):
            build_for(label, *(spec(word) for word in str(values["bins"]).split(",")))
            return str(values["bins"])
    return str(values["pair"])


def build_for(label: str, student: DetectorSpec, teacher: DetectorSpec) -> DistillMethod:
    """Return a row's method."""
    return build_method(*EXTRA.get(label, (label, {})), student, teacher)


def fingerprint(label: str, pair: str, imgsz: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row's figures depend on: setting, versions, machine and the method's own source."""
    name, args = EXTRA.get(label, (label, {}))
    digest = hashlib.sha256()
    for part in [] if label == BASE else name.split("+"):
        source = importlib.import_module(load_method(part).__module__).__file__
        digest.update(Path(str(source)).read_bytes())
    return {
        "pair": pair,
        "imgsz": imgsz,
        **{key: values[key] for key in ("batch", "rounds", "threads")},
        "args": args,
        "source_sha256": digest.hexdigest(),
        "versions": f"torch {torch.__version__}, ultralytics {ultralytics.__version__}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def measured_apart(label: str, now: Mapping[str, Any], base: Row | None) -> Row:
    """Run a row's processes: one for the times, one for each peak memory that the base row has not measured yet."""
    keys = [key for key in DEFAULTS if key in now]

    def child(word: str) -> Any:
        command = [sys.executable, __file__, *(f"{key}={now[key]}" for key in keys), word]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    row: Row = child(f"measure={label}")
    usable = label != BASE and base is not None and all(base["fingerprint"][k] == now[k] for k in [*keys, "versions"])
    known: dict[str, float] = base["peak_memory_mb"] if usable and base else {}
    row["peak_memory_mb"] = {name: known.get(name) or child(f"memory={name}") for name in {"none", "stock", label}}
    return row


def measure(label: str, values: Mapping[str, Any]) -> Row:
    """Return wall and CPU milliseconds of every round of ``none``, ``stock`` and one method, in one process."""
    names = list(dict.fromkeys(["none", "stock", label]))
    made = {name: make_step(name, values) for name in names}
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for step, _ in made.values():
        for _ in range(WARM_UP):
            step()
    for turn in range(int(values["rounds"])):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start, start_cpu = time.perf_counter(), time.process_time()
            made[name][0]()
            wall[name].append(1e3 * (time.perf_counter() - start))
            cpu[name].append(1e3 * (time.process_time() - start_cpu))
    method = made[label][1]
    return {"reads": sorted(method.reads) if method else [], "step_ms": wall, "step_cpu_ms": cpu}


def peak_memory_mb(label: str, values: Mapping[str, Any]) -> float:
    """Return the peak resident set of this process after three steps."""
    step, _ = make_step(label, values)
    for _ in range(3):
        step()
    # not getrusage(): its maximum survives exec() and would be the parent's own
    return float(Path("/proc/self/status").read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) / 1024


def make_step(label: str, values: Mapping[str, Any]) -> tuple[Callable[[], None], DistillMethod | None]:
    """Return one training step (forward, loss, backward, optimizer) of a row and its method."""
    torch.manual_seed(0)
    student, teacher = (build(word) for word in str(values["pair"]).split(","))
    for module in teacher.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    for branch in detect_head(teacher).cv3:
        torch.nn.init.uniform_(branch[-1].bias, -6.0, 0.0)  # confident here and there, as a trained one is
    student.args = get_cfg(overrides={"imgsz": int(values["imgsz"])})
    method: DistillMethod | None = None
    model: Any = student
    if label == "stock":
        model = DistillationModel(teacher_model=teacher, student_model=student)
    elif label != "none":
        ready = DetectTeacher(prepare_teacher(teacher, map_classes(teacher.names, teacher.names)))
        strides = common_strides(head_strides(student), ready.strides)
        method = build_for(label, describe(student, strides), ready.describe(strides))
        ready.check_reads(label, method.reads)
        model = KDModel(ready, student, method)
    model.train()
    # A rate this small leaves the network where it is: drifting weights would change what the assigner does.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-9, momentum=0.9)
    batch = make_batch(int(values["batch"]), int(values["imgsz"]))

    def step() -> None:
        model.loss(dict(batch))[0].sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, method


def build(name: str) -> DetectionModel:
    """Return an untrained detector of six classes: a stock YAML or a LightNet."""
    model = build_model(name, nc=6)
    model.names = {i: f"class {i}" for i in range(6)}
    return model


@cache
def spec(name: str) -> DetectorSpec:
    """Return what a method is told of a model."""
    return describe(build(name))


def make_batch(images: int, imgsz: int) -> dict[str, torch.Tensor]:
    """Return seeded random images with two boxes each."""
    generator, count = torch.Generator().manual_seed(1), 2 * images
    return {
        "img": torch.rand(images, 3, imgsz, imgsz, generator=generator),
        "batch_idx": torch.arange(images, dtype=torch.float32).repeat_interleave(2),
        "cls": torch.randint(0, 6, (count, 1), generator=generator).float(),
        "bboxes": 0.3 + 0.3 * torch.rand(count, 4, generator=generator),
    }


def table(rows: Mapping[str, Row]) -> str:
    """Return the Markdown tables, one a canvas, slowest method last."""
    lines: list[str] = []
    for imgsz in sorted({row["fingerprint"]["imgsz"] for row in rows.values()}):
        chosen = {key.rsplit("@", 1)[0]: row for key, row in rows.items() if row["fingerprint"]["imgsz"] == imgsz}
        base = chosen.pop(BASE, None)
        lines += [f"## Canvas {imgsz}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [] if base is None else [line("none", base), line("stock", base)]
        lines += [line(label, chosen[label]) for label in sorted(chosen, key=lambda x: ratio(chosen[x], x)[1])]
        lines.append("")
    shown = ("pair", "batch", "rounds", "threads", "versions", "machine")
    settings = {", ".join(f"{key} {row['fingerprint'][key]}" for key in shown) for row in rows.values()}
    return "\n".join([*lines, *(f"- {setting}" for setting in sorted(settings))]) + "\n"


def line(label: str, row: Row) -> str:
    """Return one line of the table."""
    low, middle, high = ratio(row, label)
    kind = "feature" if {"neck", "head"} & set(row["reads"]) else "logits"
    bar = None if label in {"none", "stock"} else OWN_BARS.get(label, BARS[kind])
    verdict = "" if bar is None else ("meets" if middle <= bar else "MISSES")
    cpu, memory = f"{ratio(row, label, key='step_cpu_ms')[1]:.3f}", row["peak_memory_mb"]
    step_ms = statistics.median(row["step_ms"][label])
    cells = [label, ", ".join(row["reads"]), f"{step_ms:.0f}", f"{ratio(row, label, 'none')[1]:.2f}"]
    cells += [f"{middle:.3f} ({low:.3f} to {high:.3f})", cpu, "" if bar is None else f"<= {bar:.1f}", verdict]
    cells += [f"{memory[label]:.0f}", *(f"{memory[label] / memory[base]:.2f}" for base in ("none", "stock"))]
    return f"| {' | '.join(cells)} |"


def ratio(row: Row, label: str, base: str = "stock", key: str = "step_ms") -> tuple[float, float, float]:
    """Return quartiles of the per-round ratios of a row to ``none`` or ``stock``."""
    ratios = [a / b for a, b in zip(row[key][label], row[key][base], strict=True)]
    if len(ratios) == 1:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high


if __name__ == "__main__":
    main()
