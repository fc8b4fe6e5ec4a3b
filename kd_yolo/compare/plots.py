"""A forest plot: the gain of every student and method with its intervals and its single pairs."""

from __future__ import annotations

import math
from pathlib import Path

from kd_yolo.compare.report import CompareReport, Row
from kd_yolo.files import written_aside

COLORS = {"helped": "tab:green", "did not help": "tab:red"}


def plot(report: CompareReport, path: Path) -> bool:
    """Draw the gains; return False, and write nothing, when there is no gain to draw.

    Raises:
        OutputError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in report.rows if row.gain is not None]
    if not rows:
        return False
    several = len({row.student for row in rows}) > 1
    figure = Figure(figsize=(7.5, 1.6 + 0.45 * len(rows)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for height, row in enumerate(reversed(rows)):
        _draw(axes, row, height)
    axes.set_yticks(range(len(rows)), [_label(row, several) for row in reversed(rows)], fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.axvline(0, color="black", linewidth=0.8)
    if report.setting["min_gain"]:
        axes.axvline(report.setting["min_gain"], color="grey", linewidth=0.8, linestyle=":")
    level = f"{100 * report.setting['confidence']:g} %"
    axes.set_xlabel(
        f"gain over {report.setting['baseline']} in points of {report.setting['metric']} (validation): mean, {level} t "
        f"interval,\nthin: bootstrap interval, crosses: single pairs, dotted: smallest gain that matters",
        fontsize=8,
    )
    axes.grid(axis="x", alpha=0.3)
    with written_aside(path) as aside:
        figure.savefig(aside)
    return True


def _draw(axes: object, row: Row, height: int) -> None:
    gain = row.gain
    assert gain is not None
    color = COLORS.get(gain.verdict, "tab:gray")
    draw: object = axes
    plot_line, scatter = draw.plot, draw.scatter  # type: ignore[attr-defined]
    if not math.isnan(gain.t_low):
        plot_line([gain.t_low, gain.t_high], [height, height], color=color, linewidth=3, solid_capstyle="butt")
        plot_line([gain.boot_low, gain.boot_high], [height - 0.18] * 2, color=color, linewidth=1)
    scatter(row.differences, [height + 0.18] * len(row.differences), marker="x", s=14, color=color, linewidths=0.8)
    scatter([gain.mean], [height], color=color, s=36, zorder=3)


def _label(row: Row, with_student: bool) -> str:
    assert row.gain is not None
    name = f"{row.student}\n{row.method}" if with_student else row.method
    return f"{name} ({row.gain.verdict})"
