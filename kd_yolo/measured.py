"""What the methods cost and whether they helped, as measured by this project's own benchmarks.

The file is written by ``benchmarks/summarize_methods.py`` from the committed results; nobody types a number into it.
"""

from __future__ import annotations

from pydantic import Field

from kd_yolo.config import Strict, validate
from kd_yolo.resources import builtin_root, load_yaml


class Measured(Strict):
    """One method, or one form of it.

    Attributes:
        method: Name, as ``method=`` takes it.
        form: What was set, when it was not the method's defaults.
        step_of_stock: Step time over that of Ultralytics' own ``distill_model`` with the same teacher.
        step_of_none: Step time over that of plain training.
        memory_of_none: Peak memory over that of plain training.
        gain: Mean paired difference with plain training, points of mAP50-95 on validation.
        low: Lower end of its 95 % interval.
        high: Upper end.
        pairs: Number of paired runs.
        verdict: ``helped``, ``did not help`` or ``cannot tell``.
    """

    method: str
    form: str = ""
    step_of_stock: float | None = None
    step_of_none: float | None = None
    memory_of_none: float | None = None
    gain: float | None = None
    low: float | None = None
    high: float | None = None
    pairs: int | None = Field(default=None, ge=1)
    verdict: str | None = None

    def one_line(self) -> str:
        """Return cost and verdict as a sentence."""
        parts = []
        if self.step_of_none is not None:
            stock = "" if self.step_of_stock is None else f", {self.step_of_stock:.2f} x Ultralytics' distill_model"
            parts.append(f"step {self.step_of_none:.2f} x plain training{stock}")
        if self.gain is not None and self.low is not None and self.high is not None:
            shown = f"{self.gain:+.1f} points mAP50-95 [{self.low:+.1f}, {self.high:+.1f}]"
            parts.append(f"{self.verdict}: {shown}, {self.pairs} pairs")
        text = "; ".join(parts) or "not measured"
        return f"{self.form}: {text}" if self.form else text


class MeasuredMethods(Strict):
    """All of them, and how it was measured."""

    gain_setting: str
    cost_setting: str
    methods: list[Measured]

    def of(self, method: str) -> list[Measured]:
        """Return what was measured of a method, its defaults first."""
        return [row for row in self.methods if row.method == method]


def measured_methods() -> MeasuredMethods:
    """Read the packaged file.

    Raises:
        ConfigError: It is damaged.
    """
    path = builtin_root() / "measured" / "methods.yaml"
    return validate(MeasuredMethods, load_yaml(path), where=str(path))
