"""What the export of an anomaly model reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_yolo.export.anomaly_gate import AnomalyParity

from kd_yolo.tables import PairReport


@dataclass(frozen=True)
class AnomalyExportReport(PairReport):
    """What was exported and how it was proven.

    Attributes:
        path: The exported file or folder.
        parity_path: The JSON file beside it, which holds this report.
        format: ``onnx``, ``openvino``, ``engine`` or ``bundle``.
        task: ``anomaly``.
        precision: ``fp32``.
        source: The checkpoint.
        source_sha256: Its hash.
        sha256: Hash of the exported file or folder.
        canvas: Height and width in pixels.
        batch: Images per call (the largest one of a dynamic engine).
        dynamic: Whether batch and canvas are free.
        target: Name of the GPU that an engine was built for without it, or None.
        facts: What is known about the graph, by name.
        size_mb: Size of the file or folder in 10^6 bytes.
        thresholds: Thresholds, score range and kind of score, as the file carries them.
        names: Class names.
        stride: Sides of a canvas are multiples of it, in pixels.
        checked: What the gate ran, in words.
        runtime: Runtime that ran it.
        parity: The gate's result.
        versions: Versions of what made and checked the file.
        created: Local time, ISO 8601.
    """

    path: Path
    parity_path: Path
    format: str
    task: str
    precision: str
    source: Path
    source_sha256: str
    sha256: str
    canvas: tuple[int, int]
    batch: int
    dynamic: bool
    target: str | None
    facts: dict[str, Any]
    size_mb: float
    thresholds: dict[str, Any]
    names: dict[int, str]
    stride: int
    checked: str
    runtime: str
    parity: AnomalyParity
    versions: dict[str, str]
    created: str

    @property
    def passed(self) -> bool:
        """Return whether the gate passed; without that there is no report."""
        return self.parity.passed

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; ``passed`` says at once whether the artifact is proven."""
        return {"passed": self.passed, **super().to_dict()}

    def rows(self) -> list[tuple[str, str]]:
        """Return what people want to know first."""
        height, width = self.canvas
        shape = "any batch and canvas" if self.dynamic else f"batch {self.batch}, {height}x{width}"
        built_for = [f"for {self.target}"] if self.target else []
        known = [f"{self.facts[name]} {name}" for name in ("nodes", "operations", "convolutions") if name in self.facts]
        told = self.thresholds
        rows = [
            ("exported", str(self.path)),
            ("format", ", ".join([self.format, self.precision, *built_for, shape])),
            ("graph", ", ".join([*known, f"{self.size_mb:.2f} MB"])),
            (
                "thresholds",
                f"image {told['threshold_image']:.6g}, pixel {told['threshold_pixel']:.6g} ({told['score']})",
            ),
        ]
        if "engine" in self.facts:
            built = self.facts["engine"]
            rows.append(
                ("engine", f"{built['runtime']} {built['tensorrt']}, compute capability {built['compute_capability']}")
            )
        return [*rows, ("checked", f"{self.checked} ({self.runtime})"), ("parity", self.parity.describe())]
