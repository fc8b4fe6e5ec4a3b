"""What the making of a classification folder reports, and what it refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kd_yolo.data.layout import SPLITS
from kd_yolo.errors import DataError


@dataclass(frozen=True)
class Placed:
    """One image of the new data set."""

    image: Path
    split: str
    label: str
    digest: str


@dataclass
class ClassDataReport:
    """What was made.

    Attributes:
        out: The classification folder.
        kind: How classes were found: ``class``, ``defect`` or ``folder``.
        names: Class names in their order.
        images: Number of images by split and class.
        decisions: What was decided on the way, a sentence each.
    """

    out: Path
    kind: str
    names: list[str]
    images: dict[str, dict[str, int]] = field(default_factory=dict)
    decisions: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "out": str(self.out)}

    def to_text(self) -> str:
        """Return a few lines for people."""
        lines = [
            f"{split}: {sum(found.values())} images ({', '.join(f'{n} {name}' for name, n in found.items())})"
            for split, found in self.images.items()
        ]
        return "\n".join([*lines, *self.decisions, f"use it with task=classify data={self.out}"])


def counted(report: ClassDataReport, placed: Sequence[Placed], src: str | Path) -> ClassDataReport:
    """Fill in the numbers; refuse what could not be trained or judged."""
    if len(report.names) < 2:
        raise DataError(f"{src}: all images are '{''.join(report.names)}'; at least two classes are needed")
    for split in (split for split in SPLITS if any(one.split == split for one in placed)):
        counts = Counter(one.label for one in placed if one.split == split)
        report.images[split] = {name: counts[name] for name in report.names}
        for name in report.names:
            if not counts[name]:
                raise DataError(
                    f"{src}: the '{split}' part would have no image of the class '{name}'; add images (about 8 a class "
                    "are needed for three parts), or give split=0.7/0.3/0"
                )
    for split in ("train", "val"):
        if split not in report.images:
            raise DataError(f"{src}: has no '{split}' part; split it with kd-yolo data split first")
    return report
