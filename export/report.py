"""What an export reports, whatever its format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_yolo.export.int8 import Int8Report
from kd_yolo.export.parity import ParityReport

from kd_yolo.tables import PairReport


@dataclass(frozen=True)
class ExportReport(PairReport):
    """What was exported and how it was proven.

    Attributes:
        path: The exported file or folder.
        parity_path: The JSON file beside it, which holds this report.
        format: Name of the format, for example ``onnx``.
        precision: ``fp32``, ``fp16`` or ``int8``.
        source: The checkpoint.
        source_sha256: Its hash.
        sha256: Hash of the exported file or folder.
        head: ``nms`` or ``nms-free``.
        nms_inside: Whether the graph holds the NMS itself.
        canvas: Height and width in pixels.
        batch: Images per call (the largest one when dynamic).
        dynamic: Whether batch and canvas are free.
        target: Name of the GPU that an engine was built for without it, or None.
        facts: What is known about the graph, by name: opset, nodes, convolutions and what the format adds.
        size_mb: Size of the file or folder in 10^6 bytes.
        names: Class names.
        stride: Largest stride in pixels.
        recipe: The distillation recipe of the run, or None.
        recipe_sha256: Hash of its canonical JSON, or None.
        checked: What the gate ran, in words, or why it could not.
        runtime: Runtime that ran it, or None.
        parity: The gate's result, or None where nothing here can run the format.
        int8: The quantization's report, or None.
        versions: Versions of what made and checked the file.
        created: Local time, ISO 8601.
    """

    path: Path
    parity_path: Path
    format: str
    precision: str
    source: Path
    source_sha256: str
    sha256: str
    head: str
    nms_inside: bool
    canvas: tuple[int, int]
    batch: int
    dynamic: bool
    target: str | None
    facts: dict[str, Any]
    size_mb: float
    names: dict[int, str]
    stride: int
    recipe: dict[str, Any] | None
    recipe_sha256: str | None
    checked: str
    runtime: str | None
    parity: ParityReport | None
    int8: Int8Report | None
    versions: dict[str, str]
    created: str

    @property
    def passed(self) -> bool | None:
        """Return whether the gate passed; None where it could not run."""
        return None if self.parity is None else self.parity.passed

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; ``passed`` says at once whether the artifact is proven."""
        content = {"passed": self.passed, **super().to_dict()}
        if self.parity is None:
            content["parity"] = {"passed": None, "reason": self.checked}
        return content if self.int8 is None else content | {"int8": self.int8.to_dict()}

    def rows(self) -> list[tuple[str, str]]:
        """Return what people want to know first."""
        height, width = self.canvas
        shape = "any batch and canvas" if self.dynamic else f"batch {self.batch}, {height}x{width}"
        built_for = [f"for {self.target}"] if self.target else []
        known = [f"{value} {name}" for name, value in self.facts.items() if name in SHOWN and value]
        rows = [
            ("exported", str(self.path)),
            ("format", ", ".join([self.format, self.precision, *built_for, shape])),
            ("head", self.head + (", NMS inside" if self.nms_inside else "")),
            ("graph", ", ".join([*known, f"{self.size_mb:.2f} MB"])),
        ]
        if "engine" in self.facts:
            built = self.facts["engine"]
            rows.append(
                ("engine", f"{built['runtime']} {built['tensorrt']}, compute capability {built['compute_capability']}")
            )
        if self.int8 is not None:
            rows.append(("int8", self.int8.describe()))
        if self.parity is None:
            return [*rows, ("parity", self.checked)]
        return [*rows, ("checked", f"{self.checked} ({self.runtime})"), ("parity", self.parity.describe())]


SHOWN = ("nodes", "operations", "layers", "convolutions")
