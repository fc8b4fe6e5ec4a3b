"""Does prepared self-distillation help LightNet on NEU-DET? Teacher, student, honest control, and stock peers.

Every row has the same budget of epochs, canvas, batch, augmentation and seeds; validation picks checkpoints, the test
split is read once per finished run. Runs are resumable: call again with the same arguments and only the rest is done.

    python benchmarks/neu_self_distillation.py weights=yolo26n.pt out=runs/neu-study imgsz=128 epochs=8 seeds=0,1,2

Rows, for ``epochs=E``:
    teacher      lightnet-s, labels only, E epochs
    student      lightnet-s, E epochs under the teacher (kd-lightnet); 2 E epochs in all
    control      lightnet-s, labels only, 2 E epochs
    yolo26n      stock yolo26n fine-tuned from ``weights``, 2 E epochs
    surgery      yolo26n + reparam=qarep from the same weights, 2 E epochs

Mosaic is off in the last E/4 epochs of every run; all else is Ultralytics' default (``optimizer=auto``).
``only=yolo26n,surgery`` runs a part of the rows.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kd_yolo.config import parse_pairs
from kd_yolo.files import write_json, write_text

METRICS = {"metrics/mAP50(B)": "mAP50", "metrics/mAP50-95(B)": "mAP50-95"}


@dataclass(frozen=True)
class Job:
    """One training command and the checkpoints of it that are judged, by row name."""

    name: str
    arguments: dict[str, Any]
    judged: dict[str, str]


def main() -> None:
    """Run what is missing, then write the table."""
    values: dict[str, Any] = {"imgsz": 128, "epochs": 8, "batch": 32, "seeds": "0,1,2", "jobs": 2, "data": "neu"}
    values = {**values, "out": "runs/neu-study", **parse_pairs(sys.argv[1:])}
    out = Path(str(values["out"])).resolve()
    seeds = [int(s) for s in str(values["seeds"]).strip("[]").split(",")]
    only = str(values.get("only", "")).split(",")
    jobs = [job for seed in seeds for job in plan(values, seed) if only == [""] or job.name.split("-")[0] in only]
    with ThreadPoolExecutor(int(values["jobs"])) as pool:
        futures = {job.name: pool.submit(run, job, values, out) for job in jobs}
    for name, future in futures.items():  # one failed run must not cost the others
        if future.exception() is not None:
            print(f"{name}: failed ({future.exception()}); see {out / name}.log and call again", file=sys.stderr)
    write_table(values, seeds, out)


def plan(values: dict[str, Any], seed: int) -> list[Job]:
    """Return one seed's jobs."""
    epochs, weights = int(values["epochs"]), str(Path(str(values["weights"])).resolve())
    common = {
        "data": values["data"],
        "imgsz": values["imgsz"],
        "batch": values["batch"],
        "seed": seed,
        "cache": "ram",
        "close_mosaic": epochs // 4,
    }
    common |= {"plots": False, "export": "none", "benchmark": False, "device": "cpu"}
    light = {"model": "lightnet-s", "pretrained": weights}
    both = {"teacher": "teacher/weights/best.pt", "student": "student/weights/best.pt"}
    last = "student/weights/best.pt"
    return [
        Job(f"self-s{seed}", {**common, **light, "epochs": epochs, "teacher": "self"}, both),
        Job(f"control-s{seed}", {**common, **light, "epochs": 2 * epochs, "teacher": "none"}, {"control": last}),
        Job(
            f"yolo26n-s{seed}", {**common, "model": weights, "epochs": 2 * epochs, "teacher": "none"}, {"yolo26n": last}
        ),
        Job(
            f"surgery-s{seed}",
            {**common, "model": weights, "reparam": "qarep", "epochs": 2 * epochs, "teacher": "none"},
            {"surgery": last},
        ),
    ]


def run(job: Job, values: dict[str, Any], out: Path) -> None:
    """Train a job unless it is done, then judge its checkpoints on the test split."""
    folder, started = out / job.name, time.time()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "YOLO_OFFLINE": "1"}
    if not (folder / "report.json").is_file():
        fresh = {**job.arguments, "project": out, "name": job.name}
        given = {"resume": folder} if (folder / "run.yaml").is_file() else fresh
        words = [f"{k}={v}" for k, v in given.items()]
        with (out / f"{job.name}.log").open("a") if out.is_dir() else _open(out, job) as log:
            command = [sys.executable, "-m", "kd_yolo", "train", *words]
            subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)
        print(f"{job.name}: trained in {time.time() - started:.0f} s", flush=True)
    for row, checkpoint in job.judged.items():
        result = folder / f"test-{row}.json"
        if not result.is_file():
            keys = {"model": folder / checkpoint, "data": values["data"], "imgsz": values["imgsz"], "split": "test"}
            words = [f"{k}={v}" for k, v in {**keys, "batch": 16, "device": "cpu", "json": "true"}.items()]
            done = subprocess.run(
                [sys.executable, "-m", "kd_yolo", "val", *words],
                check=True,
                env=environment,
                capture_output=True,
                text=True,
            )
            write_json(result, json.loads(done.stdout.splitlines()[-1]))


def write_table(values: dict[str, Any], seeds: list[int], out: Path) -> None:
    """Write ``neu_self_distillation.json`` and ``.md`` beside this script."""
    rows: dict[str, dict[str, list[float]]] = {}
    for path in sorted(out.glob("*/test-*.json")):
        content = json.loads(path.read_text())
        row = rows.setdefault(path.stem.removeprefix("test-"), {name: [] for name in METRICS.values()})
        for key, name in METRICS.items():
            row[name].append(float(content[key]))
    lines = ["| row | mAP50 | mAP50-95 | seeds |", "|---|---|---|---|"]
    for name in ("teacher", "student", "control", "yolo26n", "surgery"):
        if name in rows:
            cells = [f"{_mean(v):.2f} ± {_sd(v):.2f}" for v in rows[name].values()]
            lines.append(f"| {name} | {cells[0]} | {cells[1]} | {len(rows[name]['mAP50'])} |")
    setting = {k: values[k] for k in ("imgsz", "epochs", "batch", "data")}
    setting |= {"machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread a run", "split": "test"}
    setting |= {name: version(name) for name in ("ultralytics", "torch")}
    target = Path(__file__).with_suffix(".json")
    write_json(
        target, {"command": " ".join(["python", *_public(sys.argv)]), "setting": setting, "seeds": seeds, "rows": rows}
    )
    write_text(target.with_suffix(".md"), "\n".join(lines) + "\n")
    print("\n".join(lines))


def _open(out: Path, job: Job) -> Any:
    out.mkdir(parents=True, exist_ok=True)
    return (out / f"{job.name}.log").open("a")


def _public(words: list[str]) -> list[str]:
    return [w.split("=")[0] + "=" + Path(w.split("=")[1]).name if "=/" in w else w for w in words]


def _mean(values: list[float]) -> float:
    return 100 * statistics.fmean(values)


def _sd(values: list[float]) -> float:
    return 100 * statistics.stdev(values) if len(values) > 1 else float("nan")


if __name__ == "__main__":
    main()
