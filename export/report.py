"""What an export reports, whatever its format."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kd_yolo.export.parity import ParityReport

from kd_yolo.tables import markdown_table, text_pairs


@dataclass(frozen=True)
class ExportReport:
    """What was exported and how it was proven.

    Attributes:
        path: The exported file.
        parity_path: The JSON file beside it, which holds this report.
        format: Name of the format, for example ``onnx``.
        precision: ``fp32`` or ``fp16``.
        source: The checkpoint.
        source_sha256: Its hash.
        sha256: Hash of the exported file.
        head: ``nms`` or ``nms-free``.
        nms_inside: Whether the graph holds the NMS itself.
        canvas: Height and width in pixels.
        batch: Images per call (the largest one when dynamic).
        dynamic: Whether batch and canvas are free.
        opset: ONNX operator set of the file.
        nodes: Nodes of the graph.
        convolutions: Convolutions of the graph.
        size_mb: File size in 10^6 bytes.
        names: Class names.
        stride: Largest stride in pixels.
        recipe: The distillation recipe of the run, or None.
        parity: The gate's result.
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
    opset: int
    nodes: int
    convolutions: int
    size_mb: float
    names: dict[int, str]
    stride: int
    recipe: dict[str, Any] | None
    parity: ParityReport
    versions: dict[str, str]
    created: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self) | {key: str(getattr(self, key)) for key in ("path", "parity_path", "source")}

    def to_markdown(self) -> str:
        """Return a table of two columns."""
        head, *rows = self._rows()
        return markdown_table(head, rows)

    def to_text(self) -> str:
        """Return aligned lines for a terminal."""
        return text_pairs(self._rows())

    def _rows(self) -> list[tuple[str, str]]:
        height, width = self.canvas
        shape = "any batch and canvas" if self.dynamic else f"batch {self.batch}, {height}x{width}"
        return [
            ("exported", str(self.path)),
            ("format", f"{self.format}, {self.precision}, opset {self.opset}, {shape}"),
            ("head", self.head + (", NMS inside" if self.nms_inside else "")),
            ("graph", f"{self.nodes} nodes, {self.convolutions} convolutions, {self.size_mb:.2f} MB"),
            ("parity", self.parity.describe()),
        ]
