"""What a conversion of recordings did, for the terminal and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kd_yolo import __version__
from kd_yolo.data.layout import MARKER

VERSION = 1
"""Raised whenever the same recordings would give other pictures, so that cached copies are made anew."""


@dataclass
class SignalsReport:
    """What a conversion did.

    Attributes:
        out: The folder written; give it as ``data=`` to ``task=classify``.
        source: The folder read.
        parameters: How recordings were drawn, with units in the names; the content of signals.yaml.
        images: Pictures of each class in each split.
        parts: Parts (what stays together) of each class in each split.
        decisions: How the scale, the parts and the split were chosen.
        problems: Files that were left out, by kind.
        dropped_s: Sound after the last whole segment of each recording, s in all.
        resolved_from: What a built-in name asked for, or None.
        seconds: How long it took.
    """

    out: Path
    source: Path
    parameters: dict[str, Any] = field(default_factory=dict)
    images: dict[str, dict[str, int]] = field(default_factory=dict)
    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    decisions: list[str] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)
    dropped_s: float = 0.0
    resolved_from: str | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types."""
        plain = asdict(self)
        plain.update(out=str(self.out), source=str(self.source), seconds=round(self.seconds, 2))
        return {**plain, "format": "signals", "kd_yolo": __version__, "converter": VERSION}

    def to_text(self) -> str:
        """Return the report as lines for a terminal."""
        splits = list(next(iter(self.images.values()), {}))
        head = "images (parts)" if self.parts else "images"
        width = max(len(head), *(len(name) for name in self.images)) + 2
        lines = [f"{self.source} (signals) -> {self.out} in {self.seconds:.1f} s"]
        lines.append(head.ljust(width) + "".join(f"{split:>14}" for split in splits))
        for name, row in self.images.items():
            parts = self.parts.get(name)
            cells = [f"{row[split]} ({parts[split]})" if parts else str(row[split]) for split in splits]
            lines.append(name.ljust(width) + "".join(f"{cell:>14}" for cell in cells))
        if self.dropped_s:
            lines.append(f"- {self.dropped_s:g} s after the last whole segment of each recording are not used")
        lines += [f"- {decision}" for decision in self.decisions]
        for kind, files in self.problems.items():
            shown = "; ".join(files[:3]) + (f" and {len(files) - 3} more in {MARKER}" if len(files) > 3 else "")
            lines.append(f"! {kind}: {len(files)} ({shown})")
        return "\n".join(lines)
