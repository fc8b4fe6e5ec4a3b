"""Accuracy against latency: stock yolo26n and both default students at several canvases, deployed, one picture.

    python benchmarks/canvas_front.py weights=yolo26n.pt teacher=yolo26n-neu.pt data=neu canvases=128,160,224,320

``weights`` is the pretrained file, ``teacher`` the detector of ``neu_table.py`` (trained at 128 px). For every canvas
the teacher is trained on at that canvas for ``teacher_epochs`` with Ultralytics' recipe, and is shown itself; stock
yolo26n (Ultralytics' recipe, from ``weights``), LightNet-n and LightNet-s (default recipe under that teacher, from that
teacher) are trained for ``epochs``. All are merged, exported to ONNX with the parity check, judged on the test split at
that canvas and timed in one interleaved benchmark. Runs are kept by content: the same command goes on.

Writes ``canvas_front.json``, ``.md`` and ``.png`` beside this script. Other keys: seed=, batch=, jobs=, rounds=, out=.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_yolo.export import export
from single_runs import run_of, train

from kd_yolo.bench import benchmark
from kd_yolo.bench.accuracy import judge
from kd_yolo.bench.timing import WHOLE
from kd_yolo.compare.job import Job
from kd_yolo.config import parse_pairs, refuse_unknown
from kd_yolo.data.datasets import resolve_dataset
from kd_yolo.errors import ConfigError, KDYoloError
from kd_yolo.files import write_json, write_text, written_aside
from kd_yolo.tables import markdown_table

HERE = Path(__file__).resolve().parent
KEYS: dict[str, Any] = {
    "data": "neu",
    "weights": "yolo26n.pt",
    "teacher": "yolo26n-neu.pt",
    "canvases": "128,160,224,320",
    "epochs": 8,
    "teacher_epochs": 8,
    "batch": 32,
    "seed": 0,
    "device": "cpu",
    "jobs": 2,
    "rounds": 20,
    "out": "runs/canvas-front",
}
STUDENTS = ("yolo26n", "lightnet-n", "lightnet-s")
COLORS = {"yolo26n": "grey", "teacher": "silver"}
LABELS = {
    "teacher": "the teacher, a yolo26n",
    "yolo26n": "stock yolo26n",
    "lightnet-n": "LightNet-n",
    "lightnet-s": "LightNet-s",
}


def main() -> None:
    """Train what is missing, then export, judge, time and draw."""
    given = parse_pairs(sys.argv[1:])
    refuse_unknown(given, KEYS, "canvas_front.py")
    keys = {**KEYS, **given}
    for name in ("weights", "teacher"):
        file = Path(str(keys[name])).absolute()
        if not file.is_file():
            raise ConfigError(f"{name}={keys[name]}: no such file")
        keys[name] = str(file)
    keys["data"], out = str(resolve_dataset(str(keys["data"]))), Path(str(keys["out"])).resolve()
    canvases = numbers(keys["canvases"])
    teachers = {side: teacher_job(side, keys, out) for side in canvases}
    train(list(teachers.values()), int(keys["jobs"]))
    jobs = {
        (name, side): student_job(name, side, teachers[side].checkpoint, keys, out)
        for side in canvases
        for name in STUDENTS
    }
    train(list(jobs.values()), int(keys["jobs"]))
    points = measured(jobs | {("teacher", side): job for side, job in teachers.items()}, keys)
    setting = {key: keys[key] for key in ("epochs", "teacher_epochs", "batch", "seed", "rounds")}
    write_json(HERE / "canvas_front.json", {"setting": {**setting, "split": "test"}, "points": points})
    write_text(HERE / "canvas_front.md", table(points) + "\n")
    title = f"{Path(str(keys['data'])).parent.name}, test split; seed {keys['seed']}; canvases in pixels"
    draw(points, HERE / "canvas_front.png", title)
    print(table(points))


def teacher_job(side: int, keys: Mapping[str, Any], out: Path) -> Job:
    """Return the run that trains the teacher on at a canvas."""
    plain = {"model": keys["teacher"], "teacher": "none", "method": "none", "epochs": keys["teacher_epochs"]}
    return job_of(f"teacher-{side}", side, plain, keys, out)


def student_job(name: str, side: int, teacher: Path, keys: Mapping[str, Any], out: Path) -> Job:
    """Return the run of a model at a canvas."""
    stock = {"model": keys["weights"], "teacher": "none", "method": "none"}
    arguments = stock if name == "yolo26n" else {"model": name, "teacher": str(teacher)}
    return job_of(f"{name}-{side}", side, {**arguments, "epochs": keys["epochs"]}, keys, out)


def job_of(name: str, side: int, given: Mapping[str, Any], keys: Mapping[str, Any], out: Path) -> Job:
    """Return a run at a canvas."""
    common = {key: keys[key] for key in ("data", "batch", "seed", "device")}
    return run_of(name, {**common, "close_mosaic": 2, **given, "imgsz": side}, out)


def measured(jobs: Mapping[tuple[str, int], Job], keys: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Export, judge and time every run; all files of a canvas in one interleaved benchmark."""
    points = []
    for side in sorted({side for _, side in jobs}):
        files = {name: exported(job, side) for (name, one), job in jobs.items() if one == side}
        report = benchmark(list(files.values()), imgsz=side, threads=1, rounds=int(keys["rounds"]), iterations=20)
        for (name, file), row in zip(files.items(), report.rows, strict=True):
            accuracy = judge(file, str(keys["data"]), "test", side)
            points.append(
                {
                    "model": name,
                    "imgsz": side,
                    "latency_ms_p50": row.latency_ms["inference"].p50,
                    "total_ms_p50": row.latency_ms[WHOLE].p50,
                    "map50_95": accuracy.map50_95,
                    "map50": accuracy.map50,
                }
            )
    return points


def exported(job: Job, side: int) -> Path:
    """Return the run's merged ONNX file, made and checked once."""
    file = job.checkpoint.with_name(f"{job.name}.onnx")
    return file if file.is_file() else Path(export(job.checkpoint, format="onnx", imgsz=side, out=file).path)


def table(points: Sequence[Mapping[str, Any]]) -> str:
    """Return all points as a Markdown table."""
    header = ["model", "canvas", "inference p50, ms", "with pre- and post-processing, ms", "mAP50-95", "mAP50"]
    rows = [
        [
            LABELS[point["model"]],
            str(point["imgsz"]),
            f"{point['latency_ms_p50']:.2f}",
            f"{point['total_ms_p50']:.2f}",
            f"{100 * point['map50_95']:.1f}",
            f"{100 * point['map50']:.1f}",
        ]
        for point in points
    ]
    return markdown_table(header, rows)


def draw(points: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw one line a model over the canvases."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name in dict.fromkeys(point["model"] for point in points):
        line = [point for point in points if point["model"] == name]
        x, y = [point["total_ms_p50"] for point in line], [100 * point["map50_95"] for point in line]
        axes.plot(x, y, marker="o", label=LABELS[name], color=COLORS.get(name))
        for point, left, low in zip(line, x, y, strict=True):
            axes.annotate(str(point["imgsz"]), (left, low), textcoords="offset points", xytext=(4, -10), fontsize=8)
    axes.set_xlabel("milliseconds an image, p50, one CPU thread, ONNX Runtime, pre- and post-processing included")
    axes.set_ylabel("mAP50-95, test split")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    with written_aside(path) as aside, aside.open("wb") as stream:
        figure.savefig(stream, format="png")


def numbers(value: Any) -> list[int]:
    """Return the whole numbers of ``a,b,c``.

    Raises:
        ConfigError: One is none.
    """
    parts = [str(part).strip() for part in (value if isinstance(value, list) else str(value).split(","))]
    if not all(part.isdigit() for part in parts):
        raise ConfigError(f"canvases={value}: whole numbers are needed, for example canvases=128,160")
    return [int(part) for part in parts]


if __name__ == "__main__":
    try:
        main()
    except KDYoloError as error:
        sys.exit(f"canvas_front.py: {error}")
