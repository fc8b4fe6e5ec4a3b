"""What a pretraining reached, for people and for machines."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PretrainReport:
    """What a pretraining reached.

    Attributes:
        path: The checkpoint, for ``pretrained=`` of ``kd-yolo train``.
        model: The student's name.
        peer: The pretrained detector's file name.
        peer_sha256: Its hash.
        inherited: Share of the student's parameters that held pretrained values before the first step, 0 to 1; 1 for a
            student that went on from its own checkpoint.
        images: How many images it learned from.
        epochs: Passes over them.
        imgsz: Canvas, pixels.
        before: Each stage's error before the first step, on fixed views that no epoch shows, over the variance of the
            peer's map; 1 is knowing nothing, 0 a copy.
        after: The same at the end.
        seconds: Wall time of the last uninterrupted part, seconds.
    """

    path: Path
    model: str
    peer: str
    peer_sha256: str
    inherited: float
    images: int
    epochs: int
    imgsz: int
    before: dict[str, float]
    after: dict[str, float]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "path": str(self.path)}

    def provenance(self) -> dict[str, Any]:
        """Return what the checkpoint says of its origin: nothing that depends on the machine or its speed."""
        return {key: value for key, value in asdict(self).items() if key not in {"path", "seconds"}}

    def to_text(self) -> str:
        """Return what people want to know first."""
        lines = [
            f"{self.path}: {self.model} from {self.peer}, {100 * self.inherited:.0f} % inherited, "
            f"{self.images} images, {self.epochs} epochs at {self.imgsz} px, {self.seconds:.0f} s",
            "what is left of each stage's error (1 knows nothing, 0 is a copy):",
        ]
        lines += [f"  {name:<12} {self.before[name]:6.3f} -> {self.after[name]:.3f}" for name in self.after]
        return "\n".join([*lines, f"use it: kd-yolo train data=... model={self.model} pretrained={self.path}"])
