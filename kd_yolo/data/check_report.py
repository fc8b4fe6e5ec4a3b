"""What the data set doctor found, as text and as plain data."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Severity = Literal["error", "warning"]

COCO_SMALL, COCO_MEDIUM = 32.0, 96.0
"""COCO calls a box small below 32x32 pixels of area and medium below 96x96."""
PERCENTILES = (5, 25, 50, 75, 95)
SHOWN = 5
"""Problems of one kind that the text shows; the data holds all."""


@dataclass(frozen=True)
class Problem:
    """One finding: how bad, of what kind, in which file, and the particulars."""

    severity: Severity
    kind: str
    file: str
    detail: str


@dataclass
class BoxSizes:
    """Box sizes on the network's canvas, pixels.

    Attributes:
        small: Boxes of less than 32x32 pixels of area.
        medium: Less than 96x96.
        large: The others.
        width_px: Percentile to width.
        height_px: Percentile to height.
        root_area_px: Percentile to the square root of the area.
    """

    small: int = 0
    medium: int = 0
    large: int = 0
    width_px: dict[str, float] = field(default_factory=dict)
    height_px: dict[str, float] = field(default_factory=dict)
    root_area_px: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, sides: NDArray[np.float64]) -> BoxSizes:
        """Summarise widths and heights, shape (N, 2), pixels."""
        if not len(sides):
            return cls()
        root = np.sqrt(sides.prod(1))
        small, below_large = int((root < COCO_SMALL).sum()), int((root < COCO_MEDIUM).sum())
        columns = (sides[:, 0], sides[:, 1], root)
        width, height, area = ({f"p{p}": round(float(np.percentile(c, p)), 1) for p in PERCENTILES} for c in columns)
        return cls(small, below_large - small, len(sides) - below_large, width, height, area)


@dataclass
class DataReport:
    """The doctor's findings.

    Attributes:
        yaml: The data YAML.
        imgsz: Canvas side for which sizes are given, pixels.
        names: Class names.
        images: Images in each split.
        background: Images without a box in each split.
        boxes: Boxes of each class in each split.
        sizes: Box sizes of all splits together.
        problems: Findings, in the order they were made.
    """

    yaml: Path
    imgsz: int
    names: list[str]
    images: dict[str, int] = field(default_factory=dict)
    background: dict[str, int] = field(default_factory=dict)
    boxes: dict[str, list[int]] = field(default_factory=dict)
    sizes: BoxSizes = field(default_factory=BoxSizes)
    problems: list[Problem] = field(default_factory=list)

    def add(self, severity: Severity, kind: str, file: Path, detail: str) -> None:
        """Note a finding."""
        self.problems.append(Problem(severity, kind, str(file), detail))

    @property
    def errors(self) -> list[Problem]:
        """Findings that are wrong for certain."""
        return [problem for problem in self.problems if problem.severity == "error"]

    @property
    def ok(self) -> bool:
        """Whether there is no error; warnings may remain."""
        return not self.errors

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types."""
        boxes = {split: dict(zip(self.names, counts, strict=True)) for split, counts in self.boxes.items()}
        counts = Counter(problem.severity for problem in self.problems)
        summary = {"ok": self.ok, "errors": counts["error"], "warnings": counts["warning"]}
        return {**summary, **asdict(self), "yaml": str(self.yaml), "boxes": boxes}

    def to_text(self) -> str:
        """Return the report as lines for a terminal."""
        lines = [f"{self.yaml}", *self._counts(), *self._size_lines(), *self._problem_lines()]
        warnings = len(self.problems) - len(self.errors)
        lines.append(f"{len(self.errors)} errors, {warnings} warnings: " + ("fine to train" if self.ok else "not fine"))
        return "\n".join(lines)

    def _counts(self) -> list[str]:
        splits = list(self.images)
        width = max(len(name) for name in (*self.names, "background")) + 2
        rows = [("images", self.images), ("background", self.background)]
        rows += [(name, {split: self.boxes[split][i] for split in splits}) for i, name in enumerate(self.names)]
        rows.append(("all boxes", {split: sum(self.boxes[split]) for split in splits}))
        head = "".ljust(width) + "".join(f"{split:>9}" for split in (*splits, "all"))
        body = [
            name.ljust(width) + "".join(f"{value:>9}" for value in (*(row[s] for s in splits), sum(row.values())))
            for name, row in rows
        ]
        return [head, *body]

    def _size_lines(self) -> list[str]:
        sizes, total = self.sizes, self.sizes.small + self.sizes.medium + self.sizes.large
        if not total:
            return []
        groups = (("small (<32x32)", sizes.small), ("medium (<96x96)", sizes.medium), ("large", sizes.large))
        lines = [f"box sizes at imgsz {self.imgsz}:"]
        for name, count in groups:
            share = count / total
            lines.append(f"  {name:<16}{count:>7} {share:6.1%} {'#' * round(40 * share)}")
        for name, row in (("width", sizes.width_px), ("height", sizes.height_px), ("root area", sizes.root_area_px)):
            lines.append(f"  {name:<16}" + "  ".join(f"{key} {value:g}" for key, value in row.items()) + " px")
        return lines

    def _problem_lines(self) -> list[str]:
        kinds = Counter((problem.severity, problem.kind) for problem in self.problems)
        lines = []
        for (severity, kind), count in sorted(kinds.items()):
            lines.append(f"{severity}: {kind}: {count}")
            shown = [p for p in self.problems if (p.severity, p.kind) == (severity, kind)][:SHOWN]
            lines += [f"  {problem.file}: {problem.detail}" for problem in shown]
            if count > SHOWN:
                lines.append(f"  ... and {count - SHOWN} more (json=true lists all)")
        return lines
