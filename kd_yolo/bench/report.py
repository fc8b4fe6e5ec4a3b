"""One table for all artifacts, in every form it is read in."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kd_yolo.bench.timing import STAGES, WHOLE, Summary
from kd_yolo.files import write_json, write_text, written_aside
from kd_yolo.tables import markdown_table

PERCENTILES = ("p50", "p90", "p99")


@dataclass(frozen=True)
class BenchRow:
    """One artifact.

    Attributes:
        artifact: Path as given.
        runtime: What ran it.
        precision: ``fp32`` or ``fp16``.
        head: ``nms``, ``nms-free`` or ``nms inside``.
        latency_ms: Summary of pre-processing, inference, post-processing and the whole, per batch.
        fps: Images per second over all timed calls, the whole included.
        samples: Timed calls.
        warmup_calls: Untimed calls before the first round.
        warmup_stable: False when the time still drifted after the longest warm-up.
        round_spread: (Slowest - fastest) / median of the rounds' medians: how much the machine wavered.
        size_mb: File size in 10^6 bytes.
        params: Weights that run.
        gflops: 10^9 operations for one image, two per multiply-add.
        peak_memory_mb: Largest memory of the process, libraries included.
        model_memory_mb: What of it came after the imports.
        peak_device_memory_mb: Largest device memory, or None on the CPU.
        map50: mAP at IoU 0.5, or None without data.
        map50_95: mAP over IoU 0.5 to 0.95, or None.
    """

    artifact: str
    runtime: str
    precision: str
    head: str
    latency_ms: dict[str, Summary]
    fps: float
    samples: int
    warmup_calls: int
    warmup_stable: bool
    round_spread: float
    size_mb: float
    params: int
    gflops: float
    peak_memory_mb: float
    model_memory_mb: float
    peak_device_memory_mb: float | None
    map50: float | None = None
    map50_95: float | None = None

    def flat(self) -> dict[str, Any]:
        """Return one level of columns, as in the CSV file."""
        row = {key: value for key, value in asdict(self).items() if key != "latency_ms"}
        for stage in (*STAGES, WHOLE):
            for key, value in self.latency_ms[stage].to_dict().items():
                row[f"{stage}_ms_{key}"] = value
        return row


@dataclass(frozen=True)
class BenchReport:
    """All artifacts and the conditions they share.

    Attributes:
        rows: In the order given.
        canvas: Height and width in pixels, the same for all.
        batch: Images per call.
        device: As asked for.
        threads: Threads of every runtime.
        rounds: Interleaved rounds.
        iterations: Timed calls a round.
        images: What was shown.
        data: Data set of the accuracy, or None.
        split: Its split.
        confidence: Lowest score of a detection in post-processing.
        iou: Overlap bound of NMS.
        environment: Hardware, usable cores, versions.
        load_average: The machine's load over one minute when timing began, or None where there is no such thing.
        created: Local time, ISO 8601.
        files: What was written.
    """

    rows: list[BenchRow]
    canvas: tuple[int, int]
    batch: int
    device: str
    threads: int
    rounds: int
    iterations: int
    images: str
    data: str | None
    split: str
    confidence: float
    iou: float
    environment: dict[str, Any]
    load_average: float | None
    created: str
    files: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """Return the table and the conditions under it."""
        judged = any(row.map50 is not None for row in self.rows)
        header = ["artifact", "runtime", "head", *(("mAP50", "mAP50-95") if judged else ())]
        header += ["MB", "M params", "GFLOPs", "pre ms", "infer ms", "post ms", "whole ms", "FPS", "peak MB"]
        return "\n".join(
            [markdown_table(header, [self._cells(row, judged) for row in self.rows]), "", *self.conditions()]
        )

    def conditions(self) -> list[str]:
        """Return what the numbers hold for, in sentences."""
        height, width = self.canvas
        found = self.environment
        where = found["gpu"] if self.device != "cpu" and found.get("gpu") else found["cpu"]
        wavered = max(row.round_spread for row in self.rows)
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        lines = [
            f"Milliseconds per batch of {self.batch} at {height}x{width}: p50 / p90 / p99 of {self.rows[0].samples} "
            f"calls in {self.rounds} interleaved rounds, nothing left out; {self.images} images; "
            f"confidence {self.confidence:g}, IoU {self.iou:g}.",
            f"{where}, {self.threads} threads ({found['cores_usable']} usable cores); rounds differed by up to "
            f"{wavered:.0%}; decoding images is not timed. FPS counts the whole.",
        ]
        if self.data:
            lines.append(f"mAP on the {self.split} split of {self.data}, the same canvas, no rectangular batches.")
        drifting = [row.artifact for row in self.rows if not row.warmup_stable]
        if drifting:
            lines.append(f"Still drifting after the warm-up: {', '.join(drifting)}.")
        return [*lines, f"{versions}."]

    def to_csv(self) -> str:
        """Return one line an artifact, every number in its own column."""
        shared: dict[str, Any] = {"height": self.canvas[0], "width": self.canvas[1], "batch": self.batch}
        shared |= {"device": self.device, "threads": self.threads}
        rows = [row.flat() | shared for row in self.rows]
        stream = io.StringIO()
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return stream.getvalue()

    def _cells(self, row: BenchRow, judged: bool) -> list[str]:
        accuracy = [_number(row.map50, 3), _number(row.map50_95, 3)] if judged else []
        times = [
            "/".join(_short(getattr(row.latency_ms[stage], key)) for key in PERCENTILES) for stage in (*STAGES, WHOLE)
        ]
        size = [f"{row.size_mb:.1f}", f"{row.params / 1e6:.2f}", f"{row.gflops:.2f}"]
        name = f"{Path(row.artifact).name} ({row.precision})"
        return [name, row.runtime, row.head, *accuracy, *size, *times, f"{row.fps:.1f}", f"{row.peak_memory_mb:.0f}"]


def save(report: BenchReport, folder: Path) -> BenchReport:
    """Write ``benchmark.json``, ``.csv`` and ``.md``, and ``.png`` when there is accuracy to plot.

    Raises:
        OutputError: The folder cannot be written to.
    """
    names = ["benchmark.json", "benchmark.csv", "benchmark.md"]
    plotted = any(row.map50_95 is not None for row in report.rows)
    files = [str(folder / name) for name in [*names, *(["benchmark.png"] if plotted else [])]]
    report = BenchReport(**{**vars(report), "files": files})
    write_text(folder / names[1], report.to_csv())
    write_text(folder / names[2], report.to_markdown() + "\n")
    if plotted:
        plot(report, folder / "benchmark.png")
    write_json(folder / names[0], report.to_dict())
    return report


def plot(report: BenchReport, path: Path) -> None:
    """Draw accuracy against latency: a point an artifact at p50, a line to p99."""
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
        label = f"{Path(row.artifact).name} ({row.runtime}, {row.params / 1e6:.2f} M)"
        axes.scatter([whole.p50], [row.map50_95], s=55, color=color, label=label, zorder=3)
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


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _short(value: float) -> str:
    """Return milliseconds with about three figures."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
