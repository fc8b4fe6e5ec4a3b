"""The rows of ``neu_table.py`` as text: against stock, and what distillation adds."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from pages import spread

from kd_yolo.bench.accuracy import judge
from kd_yolo.compare.outcome import read_json
from kd_yolo.compare.report import CompareReport, Row
from kd_yolo.compare.statistics import compare_pairs
from kd_yolo.data.datasets import resolve_dataset
from kd_yolo.tables import markdown_table

HERE = Path(__file__).resolve().parent
BASELINE = ("stock", "none")
METRICS = ("mAP50-95", "mAP50")
LEGEND = (
    "Start: COCO, the pretrained file; teacher, the weights of the teacher. Method: none, labels only; score-l2, "
    "Ultralytics' own distillation loss; kd-lightnet, ours. CPU time: of the deployed network over yolo26n's, "
    "OpenVINO, 224 px, one thread."
)
STOCK_LOSS = "score-l2"  # Ultralytics' own distillation
LIKE_STOCK = ("our recipe", "surgery")  # the same network from the same start, so compared with stock's distillation


def markdown(reports: dict[str, CompareReport], split: str, budget: tuple[int, int]) -> str:
    """Return the table: every row against stock, by seed.

    Args:
        reports: By part.
        split: Whose figures are shown.
        budget: Epochs of a student and of the teacher.
    """
    rows = [(part, row) for part, report in reports.items() for row in report.rows]
    base = next((row for part, row in rows if (part, row.method) == BASELINE), None)
    header = ["student", "start", "method", "epochs on labels", "CPU time", "seeds", *METRICS]
    known = [[*described(part, row), epochs(part, row, budget), cpu_time(part, row)] for part, row in rows]
    found = [[*figures(row, split), *(against(row, base, split) if base else [])] for _, row in rows]
    lines = [[*one, *other] for one, other in zip(known, found, strict=True)]
    return markdown_table([*header, *([f"against stock, {budget[0]} epochs", "95 % interval"] if base else [])], lines)


def epochs(part: str, row: Row, budget: tuple[int, int]) -> str:
    """Return for how many epochs a row's weights were trained on the labels, and its teacher's."""
    student, teacher = budget
    if part == "stock long":
        return str(student + teacher)
    if start_of(part) == "teacher":
        return f"{teacher} + {student}"
    return str(student) if row.method == "none" else f"{student}, teacher {teacher}"


def cpu_time(part: str, row: Row) -> str:
    """Return a deployed student's inference time over yolo26n's: OpenVINO, 224 px, one thread; merged surgery is 1."""
    name = row.student if row.student.startswith("lightnet") else part if part == "yolo11n" else "yolo26n"
    report = next(r for r in read_json(HERE / "model_latency.json")["reports"] if is_cpu_time(r))
    rounds = {Path(one["artifact"]).name.rsplit("-", 1)[0]: one["rounds_ms"]["inference"] for one in report["rows"]}
    return f"{statistics.median(a / b for a, b in zip(rounds[name], rounds['yolo26n'], strict=True)):.2f}"


def is_cpu_time(report: dict[str, Any]) -> bool:
    """Tell whether a latency report is the one that the table quotes."""
    return bool(report["format"] == "openvino" and report["canvas"][0] == 224)


def start_of(part: str) -> str:
    """Return where a part's students start."""
    return "teacher" if part in {"lightnet", "more epochs"} else "COCO"


def caption(teacher: str, values: dict[str, Any], split: str) -> str:
    """Return what the columns mean and what the teacher itself reaches."""
    data = str(resolve_dataset(str(values["data"])))
    found = judge(Path(teacher), data, split, int(values["imgsz"]))
    return (
        f"{Path(data).parent.name}, {split} split, canvas {values['imgsz']}, batch {values['batch']}; mean ± sd over "
        f"seeds; differences paired by seed, t intervals. {LEGEND} The teacher itself: {100 * found.map50_95:.1f} "
        f"mAP50-95, {100 * found.map50:.1f} mAP50."
    )


def differences(reports: dict[str, CompareReport], split: str) -> str:
    """Return what distillation adds, by seed: against the rows above it of the same part, and against stock's.

    Of the test split, the validation split's follow. Empty without such rows.
    """
    stock = next((row for row in rows_of(reports, "stock") if row.method == STOCK_LOSS), None)
    pairs = [
        (part, row, base.method, base)
        for part in reports
        for above, row in enumerate(rows_of(reports, part))
        for base in rows_of(reports, part)[:above]
        if base.student == row.student
    ]
    if stock:
        fair = [part for part in reports if part in LIKE_STOCK]
        pairs += [(part, row, f"stock, {STOCK_LOSS}", stock) for part in fair for row in rows_of(reports, part)]
    splits = [split, "val"] if split == "test" else [split]
    header = ["student", "start", "method", "against", *(f for one in splits for f in (one, "95 % interval"))]
    lines = [
        [*described(part, row), named, *(figure for one in splits for figure in against(row, base, one))]
        for part, row, named, base in pairs
    ]
    return markdown_table(header, lines) if lines else ""


def rows_of(reports: dict[str, CompareReport], part: str) -> list[Row]:
    """Return a part's rows; none where it is not asked for."""
    return reports[part].rows if part in reports else []


def described(part: str, row: Row) -> list[str]:
    """Return what a row is, in words."""
    named = {"stock": "yolo26n", "surgery": "yolo26n, qarep", "yolo11n": "yolo11n", "stock long": "yolo26n"}
    named["more epochs"] = named["our recipe"] = "yolo26n, our recipe"
    return [named.get(part, row.student), start_of(part), row.method]


def results(row: Row, metric: str, split: str) -> list[float]:
    """Return a row's points on a split, by seed."""
    return (row.test if split == "test" else row.values).get(metric, [])


def figures(row: Row, split: str) -> list[str]:
    """Return the number of runs, and mean and deviation of each metric."""
    return [str(len(results(row, METRICS[0], split))), *(spread(results(row, metric, split)) for metric in METRICS)]


def against(row: Row, base: Row | None, split: str) -> list[str]:
    """Return the mean difference from the baseline, paired by seed, and its t interval."""
    if base is None or row is base:
        return ["", ""]
    by_seed = dict(zip([place[0] for place in base.places], results(base, METRICS[0], split), strict=False))
    pairs = [
        (value, by_seed[place[0]])
        for place, value in zip(row.places, results(row, METRICS[0], split), strict=False)
        if place[0] in by_seed
    ]
    if len(pairs) < 2:
        return [f"{pairs[0][0] - pairs[0][1]:+.1f}" if pairs else "", ""]
    found = compare_pairs([a for a, _ in pairs], [b for _, b in pairs], 0.95, 0.5)
    return [f"{found.mean:+.1f}", f"{found.t_low:+.1f} to {found.t_high:+.1f}"]
