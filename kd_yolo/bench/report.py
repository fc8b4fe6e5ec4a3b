"""One table for all artifacts, in every form it is read in; changes and estimates in tables of their own."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kd_yolo.bench.against import Change
from kd_yolo.bench.roofline import Estimate
from kd_yolo.bench.tables import changes_notes, changes_table, estimates_notes, estimates_table
from kd_yolo.bench.timing import STAGES, WHOLE, Summary
from kd_yolo.tables import markdown_table

PERCENTILES = ("p50", "p90", "p99")
ACCURACY = {
    "map50": "mAP50",
    "map50_95": "mAP50-95",
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
}


@dataclass(frozen=True)
class BenchRow:
    """One artifact.

    Attributes:
        artifact: Path as given.
        runtime: What ran it.
        precision: ``fp32``, ``fp16`` or ``int8``.
        head: ``nms``, ``nms-free`` or ``nms inside``; ``map`` of an anomaly model.
        latency_ms: Summary of pre-processing, inference, post-processing and the whole, per batch.
        rounds_ms: Median of every round, of the same four.
        fps: Images per second of a continuous stream through the whole, by wall clock.
        stream_images: Images of that stream.
        samples: Timed calls.
        warmup_calls: Untimed calls before the first round.
        warmup_stable: False when the time still drifted after the longest warm-up.
        round_spread: (Slowest - fastest) / median of the rounds' medians: how much the machine wavered.
        size_mb: Size of the file or folder in 10^6 bytes.
        params: Weights that run, or None where the format hides them.
        gflops: 10^9 operations for one image, two per multiply-add, or None.
        peak_memory_mb: Largest memory of the process, libraries included.
        model_memory_mb: What of it came after the imports.
        peak_device_memory_mb: Largest device memory, or None on the CPU.
        energy_mj_per_image: Millijoules an image of the stream, or None without a counter.
        energy_note: What the counter counts, or why there is none.
        map50: mAP at IoU 0.5, or None without data.
        map50_95: mAP over IoU 0.5 to 0.95, or None.
        image_auroc: Area under the ROC curve of the image scores of an anomaly model, or None.
        pixel_auroc: The same of the pixels, or None.
    """

    artifact: str
    runtime: str
    precision: str
    head: str
    latency_ms: dict[str, Summary]
    rounds_ms: dict[str, list[float]]
    fps: float
    stream_images: int
    samples: int
    warmup_calls: int
    warmup_stable: bool
    round_spread: float
    size_mb: float
    params: int | None
    gflops: float | None
    peak_memory_mb: float
    model_memory_mb: float
    peak_device_memory_mb: float | None
    energy_mj_per_image: float | None
    energy_note: str
    map50: float | None = None
    map50_95: float | None = None
    image_auroc: float | None = None
    pixel_auroc: float | None = None

    def flat(self) -> dict[str, Any]:
        """Return one level of columns, as in the CSV file."""
        row = {key: value for key, value in asdict(self).items() if key not in {"latency_ms", "rounds_ms"}}
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
        affinity: Cores that every process was bound to, or None.
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
        estimates: Lower bounds on other processors; not measurements.
        against: File of the earlier benchmark, or None.
        changes: Change of every row since then.
        files: What was written.
    """

    rows: list[BenchRow]
    canvas: tuple[int, int]
    batch: int
    device: str
    threads: int
    affinity: list[int] | None
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
    estimates: list[Estimate] = field(default_factory=list)
    against: str | None = None
    changes: list[Change] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "estimates": [one.to_dict() for one in self.estimates]}

    def to_markdown(self) -> str:
        """Return the table and the conditions under it, then changes and estimates if there are any."""
        judged = [name for name in ACCURACY if any(getattr(row, name) is not None for row in self.rows)]
        header = ["artifact", "runtime", "head", *(ACCURACY[name] for name in judged)]
        header += ["MB", "M params", "GFLOPs", "pre ms", "infer ms", "post ms", "whole ms", "FPS", "peak MB", "mJ"]
        lines = [markdown_table(header, [self._cells(row, judged) for row in self.rows]), "", *self.conditions()]
        energy = sorted({row.energy_note for row in self.rows})
        lines.append(f"mJ: energy an image of the stream ({'; '.join(energy)}).")
        if self.changes:
            lines += ["", changes_table(self.changes), "", *changes_notes(str(self.against))]
        if self.estimates:
            lines += ["", estimates_table(self.estimates), "", *estimates_notes(self.estimates)]
        return "\n".join(lines)

    def conditions(self) -> list[str]:
        """Return what the numbers hold for, in sentences."""
        height, width = self.canvas
        found = self.environment
        where = found["gpu"] if self.device != "cpu" and found.get("gpu") else found["cpu"]
        wavered = max(row.round_spread for row in self.rows)
        bound = "not bound to cores" if self.affinity is None else f"bound to {len(self.affinity)} cores"
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        lines = [
            f"Milliseconds per batch of {self.batch} at {height}x{width}: p50 / p90 / p99 of {self.rows[0].samples} "
            f"calls in {self.rounds} interleaved rounds, nothing left out; {self.images} images; "
            f"confidence {self.confidence:g}, IoU {self.iou:g}.",
            f"{where}, {self.threads} threads, {bound} ({found['cores_usable']} usable); rounds differed by up to "
            f"{wavered:.0%}; decoding images is not timed. FPS: {self.rows[0].stream_images} images on end.",
        ]
        if self.data and any(row.image_auroc is not None for row in self.rows):
            lines.append(f"AUROC on the test images of {self.data}, the same canvas.")
        elif self.data:
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

    def _cells(self, row: BenchRow, judged: list[str]) -> list[str]:
        accuracy = [_number(getattr(row, name), 3) for name in judged]
        times = [
            "/".join(_short(getattr(row.latency_ms[stage], key)) for key in PERCENTILES) for stage in (*STAGES, WHOLE)
        ]
        millions = None if row.params is None else row.params / 1e6
        size = [f"{row.size_mb:.1f}", _number(millions, 2), _number(row.gflops, 2)]
        used = [f"{row.fps:.1f}", f"{row.peak_memory_mb:.0f}", _number(row.energy_mj_per_image, 1)]
        name = f"{Path(row.artifact).name} ({row.precision})"
        return [name, row.runtime, row.head, *accuracy, *size, *times, *used]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _short(value: float) -> str:
    """Return milliseconds with about three figures."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
