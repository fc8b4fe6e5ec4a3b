"""Accuracy against latency: stock yolo26n and both default students at several canvases, deployed, one picture.

    python benchmarks/canvas_front.py weights=yolo26n.pt teacher=yolo26n-neu.pt data=neu canvases=128,160,224,320

``weights`` is the pretrained file, ``teacher`` the detector of ``neu_table.py`` (trained at 128 px). For every canvas
the teacher is trained on at that canvas for ``teacher_epochs`` in our recipe, and is shown itself; stock yolo26n
(Ultralytics' recipe, from ``weights``), LightNet-n and LightNet-s (default recipe under that teacher, from that
teacher) are trained for ``epochs``. ``cross=128:224`` adds both students on 128 px, started from that canvas' teacher
but taught by the one on 224 px. All are merged, exported to ONNX with the parity check, judged on the test split at
that canvas, and the first seed's files are timed in one interleaved benchmark a canvas. Runs are kept by content: the
same command, or one with more seeds, goes on.

Writes ``canvas_front.json``, ``.md`` and ``.png`` beside this script; ``pages=docs/recipe.md`` writes the table there,
too. Other keys: seeds=, batch=, jobs=, rounds=, out=.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kd_yolo.export import export
from pages import pages_of, spread, write_block
from single_runs import run_of, teacher_keys, train

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
    "cross": "",
    "epochs": 8,
    "teacher_epochs": 8,
    "batch": 32,
    "seeds": "0",
    "device": "cpu",
    "jobs": 2,
    "rounds": 20,
    "out": "runs/canvas-front",
    "pages": "",
}
OURS = ("lightnet-n", "lightnet-s")
STUDENTS = ("yolo26n", *OURS)
COLORS = {"teacher": "silver", "yolo26n": "grey", "lightnet-n": "tab:blue", "lightnet-s": "tab:orange"}
LABELS = {
    "teacher": "the teacher, a yolo26n",
    "yolo26n": "stock yolo26n",
    "lightnet-n": "LightNet-n",
    "lightnet-s": "LightNet-s",
}


class Spot(NamedTuple):
    """A point of the picture: a model on a canvas, and the canvas of its teacher where that is another one."""

    model: str
    side: int
    taught_on: int | None = None


def main() -> None:
    """Train what is missing, then export, judge, time and draw."""
    keys = checked(parse_pairs(sys.argv[1:]))
    out, workers = Path(str(keys["out"])).resolve(), int(keys["jobs"])
    sides = sorted({*keys["canvases"], *(side for pair in keys["cross"] for side in pair)})
    teachers = {(side, seed): teacher_job(side, seed, keys, out) for side in sides for seed in keys["seeds"]}
    train(list(teachers.values()), workers)
    spots = [Spot(name, side) for side in keys["canvases"] for name in STUDENTS]
    spots += [Spot(name, side, larger) for side, larger in keys["cross"] for name in OURS]
    files = {place: job.checkpoint for place, job in teachers.items()}
    jobs = {spot: [student_job(spot, seed, files, keys, out) for seed in keys["seeds"]] for spot in spots}
    train([job for row in jobs.values() for job in row], workers)
    jobs |= {Spot("teacher", side): [teachers[side, seed] for seed in keys["seeds"]] for side in keys["canvases"]}
    points = measured(jobs, keys)
    setting = {key: keys[key] for key in ("epochs", "teacher_epochs", "batch", "seeds", "rounds")}
    write_json(HERE / "canvas_front.json", {"setting": {**setting, "split": "test"}, "points": points})
    write_text(HERE / "canvas_front.md", table(points) + "\n")
    seeds = f"mean of {len(keys['seeds'])} seeds" if len(keys["seeds"]) > 1 else f"seed {keys['seeds'][0]}"
    title = f"{Path(str(keys['data'])).parent.name}, test split; {seeds}; canvases in pixels"
    draw(points, HERE / "canvas_front.png", title)
    for page in keys["pages"]:
        write_block(page, "canvas_front", table(points))
    print(table(points))


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all keys, files and data set resolved, lists as lists.

    Raises:
        KDYoloError: An unknown key, a wrong value, or a file or a page's marks that are not there.
    """
    refuse_unknown(given, KEYS, "canvas_front.py")
    keys = {**KEYS, **given}
    for name in ("weights", "teacher"):
        file = Path(str(keys[name])).absolute()
        if not file.is_file():
            raise ConfigError(f"{name}={keys[name]}: no such file")
        keys[name] = str(file)
    for key, example in (("canvases", "128,160"), ("seeds", "0,1,2")):
        keys[key] = numbers(key, keys[key], example)
    pairs = [part for part in str(keys["cross"]).split(",") if part]
    keys["cross"] = [tuple(numbers("cross", pair.replace(":", ","), "128:224")) for pair in pairs]
    if any(len(pair) != 2 or pair[0] >= pair[1] for pair in keys["cross"]):
        raise ConfigError(f"cross={given['cross']}: a canvas and a larger one are needed, for example cross=128:224")
    keys["pages"] = pages_of(keys["pages"], "canvas_front")
    keys["data"] = str(resolve_dataset(str(keys["data"])))
    return keys


def teacher_job(side: int, seed: int, keys: Mapping[str, Any], out: Path) -> Job:
    """Return the run that trains the teacher on at a canvas."""
    given = teacher_keys(keys["teacher"], keys["data"], int(keys["teacher_epochs"]))
    return job_of(f"teacher-{side}", side, seed, given, keys, out)


def student_job(
    spot: Spot, seed: int, teachers: Mapping[tuple[int, int], Path], keys: Mapping[str, Any], out: Path
) -> Job:
    """Return the run of a student; ``teachers`` are checkpoints by canvas and seed."""
    name, start = f"{spot.model}-{spot.side}", teachers[spot.side, seed]
    if spot.model == "yolo26n":
        arguments = {"model": keys["weights"], "teacher": "none", "method": "none"}
    elif spot.taught_on is None:
        arguments = {"model": spot.model, "teacher": str(start)}
    else:
        name += f"-under-{spot.taught_on}"
        larger = {"teacher": str(teachers[spot.taught_on, seed]), "teacher_imgsz": spot.taught_on}
        arguments = {"model": spot.model, "pretrained": str(start), **larger}
    return job_of(name, spot.side, seed, {**arguments, "epochs": keys["epochs"]}, keys, out)


def job_of(name: str, side: int, seed: int, given: Mapping[str, Any], keys: Mapping[str, Any], out: Path) -> Job:
    """Return a run at a canvas."""
    common = {key: keys[key] for key in ("data", "batch", "device")}
    return run_of(name, {**common, "seed": seed, "close_mosaic": 2, **given, "imgsz": side}, out)


def measured(jobs: Mapping[Spot, Sequence[Job]], keys: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Export and judge every run; time the first seed's files, all of a canvas in one interleaved benchmark."""
    points = []
    for side in sorted({spot.side for spot in jobs}):
        files = {spot: [exported(job, side) for job in row] for spot, row in jobs.items() if spot.side == side}
        first = [row[0] for row in files.values()]
        report = benchmark(first, imgsz=side, threads=1, rounds=int(keys["rounds"]), iterations=20)
        for (spot, row), times in zip(files.items(), report.rows, strict=True):
            found = [judge(file, str(keys["data"]), "test", side) for file in row]
            points.append(
                {
                    "model": spot.model,
                    "imgsz": side,
                    "taught_on": spot.taught_on,
                    "latency_ms_p50": times.latency_ms["inference"].p50,
                    "total_ms_p50": times.latency_ms[WHOLE].p50,
                    "map50_95": [one.map50_95 for one in found],
                    "map50": [one.map50 for one in found],
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
            label(point),
            str(point["imgsz"]),
            f"{point['latency_ms_p50']:.2f}",
            f"{point['total_ms_p50']:.2f}",
            spread([100 * one for one in point["map50_95"]]),
            spread([100 * one for one in point["map50"]]),
        ]
        for point in points
    ]
    return markdown_table(header, rows)


def label(point: Mapping[str, Any]) -> str:
    """Return how a point's line is called."""
    larger = point["taught_on"]
    return LABELS[point["model"]] + (f", taught on {larger} px" if larger else "")


def draw(points: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw one line a model over the canvases; what was taught on a larger canvas has hollow marks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name in dict.fromkeys(label(point) for point in points):
        line = [point for point in points if label(point) == name]
        x, y = [point["total_ms_p50"] for point in line], [100 * statistics.mean(point["map50_95"]) for point in line]
        marker, face, style = ("D", "none", "") if line[0]["taught_on"] else ("o", None, "-")
        color = COLORS[line[0]["model"]]
        axes.plot(x, y, marker=marker, markerfacecolor=face, linestyle=style, label=name, color=color)
        for point, left, low in zip(line, x, y, strict=True):
            axes.annotate(str(point["imgsz"]), (left, low), textcoords="offset points", xytext=(4, -10), fontsize=8)
    axes.set_xlabel("milliseconds an image, p50, one CPU thread, ONNX Runtime, pre- and post-processing included")
    axes.set_ylabel("mAP50-95, test split")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    with written_aside(path) as aside, aside.open("wb") as stream:
        figure.savefig(stream, format="png")


def numbers(key: str, value: Any, example: str) -> list[int]:
    """Return the whole numbers of ``a,b,c``.

    Raises:
        ConfigError: One is none.
    """
    parts = [str(part).strip() for part in (value if isinstance(value, list) else str(value).split(","))]
    if not all(part.isdigit() for part in parts):
        raise ConfigError(f"{key}={value}: whole numbers are needed, for example {key}={example}")
    return [int(part) for part in parts]


if __name__ == "__main__":
    try:
        main()
    except KDYoloError as error:
        sys.exit(f"canvas_front.py: {error}")
