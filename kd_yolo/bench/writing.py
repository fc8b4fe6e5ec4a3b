"""Write a report to a folder: JSON, CSV, Markdown, and a picture when there is accuracy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from kd_yolo.bench.report import BenchReport
from kd_yolo.bench.timing import WHOLE
from kd_yolo.files import write_json, write_text, written_aside

MARKERS = {"fp32": "o", "fp16": "s", "int8": "^"}


def save(report: BenchReport, folder: Path) -> BenchReport:
    """Write ``benchmark.json``, ``.csv`` and ``.md``, and ``.png`` when there is accuracy to plot.

    Raises:
        OutputError: The folder cannot be written to.
    """
    names = ["benchmark.json", "benchmark.csv", "benchmark.md"]
    plotted = any(row.map50_95 is not None for row in report.rows)
    files = [str(folder / name) for name in [*names, *(["benchmark.png"] if plotted else [])]]
    report = replace(report, files=files)
    write_text(folder / names[1], report.to_csv())
    write_text(folder / names[2], report.to_markdown() + "\n")
    if plotted:
        plot(report, folder / "benchmark.png")
    write_json(folder / names[0], report.to_dict())
    return report


def public(report: BenchReport) -> BenchReport:
    """Return a report for publication: files by name, without the folders of the machine that made it."""
    rows = [replace(row, artifact=Path(row.artifact).name) for row in report.rows]
    bounds = [replace(one, artifact=Path(one.artifact).name) for one in report.estimates]
    moved = [replace(change, artifact=Path(change.artifact).name) for change in report.changes]
    given = {"data": report.data, "against": report.against}
    named: dict[str, Any] = {key: value and Path(value).name for key, value in given.items()}
    images = report.images if report.data is None else report.images.replace(report.data, str(named["data"]))
    return replace(report, rows=rows, estimates=bounds, changes=moved, images=images, files=[], **named)


def plot(report: BenchReport, path: Path) -> None:
    """Draw accuracy against latency: a point an artifact at p50, a line to p99, a shape for each precision."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = mpl.colormaps["tab10"]
    for index, row in enumerate(report.rows):
        if row.map50_95 is None:
            continue
        whole, color = row.latency_ms[WHOLE], colors(index % 10)
        axes.plot([whole.p50, whole.p99], [row.map50_95] * 2, color=color, alpha=0.4, linewidth=2)
        label = f"{Path(row.artifact).name} ({row.runtime}, {row.precision}, {row.size_mb:.1f} MB, {row.fps:.0f} FPS)"
        marker = MARKERS.get(row.precision, "x")
        axes.scatter([whole.p50], [row.map50_95], s=55, color=color, marker=marker, label=label, zorder=3)
    height, width = report.canvas
    axes.set_xlabel(f"whole latency in ms, batch {report.batch} at {height}x{width} (point: p50, line to p99)")
    axes.set_ylabel(f"mAP50-95 ({report.split})")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="best")
    device = report.environment.get("gpu") or report.environment["cpu"]
    axes.set_title(f"{device}, {report.threads} threads", fontsize=9)
    with written_aside(path) as aside:
        figure.savefig(aside)
