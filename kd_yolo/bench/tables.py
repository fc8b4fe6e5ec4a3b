"""Tables of changes and of estimates, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kd_yolo.bench.against import Change, Shift
from kd_yolo.bench.roofline import PRECISIONS, Estimate
from kd_yolo.tables import markdown_table


def changes_table(changes: Sequence[Change]) -> str:
    """Return one line a row: whole and inference before and now, change with its interval, noise, verdict, mAP."""
    header = [
        "artifact",
        "runtime",
        "whole ms",
        "change",
        "noise",
        "verdict",
        "infer ms",
        "change",
        "verdict",
        "mAP50-95",
    ]
    lines = []
    for change in changes:
        name = [Path(change.artifact).name, change.runtime]
        if change.whole is None or change.inference is None:
            lines.append([*name, *["-"] * 3, "new", *["-"] * 4])
            continue
        points = "-" if change.map50_95 is None else f"{change.map50_95:+.2f}"
        whole, inference = _shift(change.whole), _shift(change.inference)
        lines.append([*name, *whole, *inference[:2], inference[3], points])
    return markdown_table(header, lines)


def changes_notes(against: str) -> list[str]:
    """Return what the table of changes means."""
    return [
        f"Change against {against}: median of the rounds' medians, 95 % interval by bootstrap over the rounds of each "
        "run; noise: half of how far rounds were apart in the worse run. A change counts when the interval leaves 0 "
        "out and it is larger than the noise. mAP50-95 in points.",
    ]


def estimates_table(estimates: Sequence[Estimate]) -> str:
    """Return one line a network and target: the lower bound in each precision, and what was measured there."""
    header = [
        "estimate, lower bound in ms",
        "target",
        *(name.upper() for name in PRECISIONS),
        "limited by arithmetic",
        "measured",
    ]
    lines = []
    for artifact, target in dict.fromkeys((one.artifact, one.target) for one in estimates):
        mine = {one.precision: one for one in estimates if (one.artifact, one.target) == (artifact, target)}
        bounds = [f"{mine[name].bound_ms:.3f}" for name in PRECISIONS]
        limits = " / ".join(_limit(mine[name]) for name in PRECISIONS)
        measured = [
            f"{one.precision} {one.measured_ms:.2f} ({one.measured_by})"
            for one in mine.values()
            if one.measured_ms is not None
        ]
        title = mine[PRECISIONS[0]].title
        lines.append([Path(artifact).name, title, *bounds, limits, ", ".join(measured) or "-"])
    return markdown_table(header, lines)


def estimates_notes(estimates: Sequence[Estimate]) -> list[str]:
    """Return what the table of estimates means."""
    cores = max(one.cores for one in estimates)
    return [
        f"Estimates, not measurements: roofline of the network alone at batch {estimates[0].batch}; every layer takes "
        "its operations at peak arithmetic or its bytes at peak bandwidth, whichever is longer, and one launch; no "
        f"caches, no pre- or post-processing. CPU targets with {cores} cores. limited by arithmetic: share of the time "
        "in layers that it limits.",
    ]


def _shift(shift: Shift) -> list[str]:
    return [
        f"{shift.before_ms:.2f} -> {shift.now_ms:.2f}",
        f"{shift.change:+.1%} [{shift.low:+.1%}, {shift.high:+.1%}]",
        f"{shift.band:.1%}",
        shift.verdict,
    ]


def _limit(one: Estimate) -> str:
    return f"{one.compute_bound:.0%}"
