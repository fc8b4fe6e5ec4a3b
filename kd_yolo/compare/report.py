"""The report of a comparison: a row a student and method, with its verdict, its cost, and how it was measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kd_yolo.compare.cells import TEACHER, Cell
from kd_yolo.compare.job import JobResult
from kd_yolo.compare.statistics import Paired, compare_pairs, judge_all
from kd_yolo.compare.task import task_of_figures
from kd_yolo.tables import markdown_table

HEADER = ("gain", "t interval", "bootstrap", "p (Holm)", "verdict")
COST_HEADER = ("pairs to tell", "h a run", "step ms", "memory MB")


@dataclass(frozen=True)
class Row:
    """One student with one method.

    Attributes:
        student: Label.
        method: Label.
        values: Points of each metric on the validation split, by run, in the order of seeds and folds.
        places: Seed and fold of each value.
        gain: Paired comparison with the baseline in the report's metric; None for the baseline and without pairs.
        differences: The single differences behind ``gain``, points.
        gain_other: Mean paired difference of the other metric, points.
        cost: Means over the runs: ``hours``, ``unit`` (CPU or GPU), ``step_ms``, ``memory_mb``; None where unknown.
        test: Points of each metric on the test split, by run; empty when it was not judged.
    """

    student: str
    method: str
    values: dict[str, list[float]]
    places: list[tuple[int, int | None]]
    gain: Paired | None = None
    differences: list[float] = field(default_factory=list)
    gain_other: float | None = None
    cost: dict[str, Any] = field(default_factory=dict)
    test: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class CompareReport:
    """A whole comparison.

    Attributes:
        setting: How it was measured.
        rows: Students and methods, the baseline first.
        runs: Records of all finished runs.
        failed: Name, reason and log of every run that failed.
        notes: What the reader must know.
        files: Files written.
    """

    setting: dict[str, Any]
    rows: list[Row]
    runs: list[dict[str, Any]]
    failed: list[dict[str, str]]
    notes: list[str]
    files: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; what is not known is None."""
        return _without_nan(asdict(self))

    def to_markdown(self) -> str:
        """Return the tables, the setting and the notes."""
        metrics = task_of_figures(self.rows[0].values if self.rows else ()).shown
        head = ["student", "method", "runs", *metrics, *HEADER, *COST_HEADER]
        parts = [markdown_table(head, [self._cells(row) for row in self.rows])]
        tested = [row for row in self.rows if row.test]
        if tested:
            head = ["test split, judged once", *metrics, "gain"]
            parts.append(markdown_table(head, [self._test_cells(row) for row in tested]))
        lines = ["; ".join(f"{name} {value}" for name, value in self.setting["shown"].items()), *self.notes]
        return "\n\n".join([*parts, "\n".join(f"- {line}" for line in lines)])

    def failure_line(self) -> str:
        """Return one line that says which runs failed and where their logs are; empty when none did."""
        if not self.failed:
            return ""
        first = self.failed[0]
        more = f" (and {len(self.failed) - 1} more: {', '.join(one['name'] for one in self.failed[1:])})"
        return (
            f"{first['name']} failed: {first['reason']}; see {first['log']}{more if len(self.failed) > 1 else ''}. "
            "The report has all others; the same command tries again"
        )

    def _cells(self, row: Row) -> list[str]:
        gain, cost = row.gain, row.cost
        means = [spread(values) for values in row.values.values()]
        told: list[str] = ["", "", "", "", "baseline" if row.method == self.setting["baseline"] else "cannot tell", ""]
        if gain is not None:
            told = [
                f"{gain.mean:+.2f}",
                interval(gain.t_low, gain.t_high),
                interval(gain.boot_low, gain.boot_high),
                "" if math.isnan(gain.p_holm) else f"{gain.p_holm:.3f}",
                gain.verdict,
                _needed(gain),
            ]
        hours = f"{cost['hours']:.3f} {cost['unit']}" if cost.get("hours") is not None else ""
        shown = [hours, *("" if cost.get(key) is None else f"{cost[key]:.0f}" for key in ("step_ms", "memory_mb"))]
        return [row.student, row.method, str(len(row.places)), *means, *told, *shown]

    def _test_cells(self, row: Row) -> list[str]:
        base = next((r for r in self.rows if (r.student, r.method) == (row.student, self.setting["baseline"])), None)
        gain = ""
        metric = self.setting["metric"]
        if base is not None and base is not row and base.test and base.places == row.places:
            gain = f"{_mean(row.test[metric]) - _mean(base.test[metric]):+.2f} {metric}"
        return [f"{row.student} {row.method}", *(spread(row.test[m]) for m in row.values), gain]


def make_rows(
    cells: Sequence[Cell],
    results: Mapping[str, JobResult],
    baseline: str,
    metric: str,
    confidence: float,
    min_gain: float,
    folds: int | None,
) -> list[Row]:
    """Return a row a student and method, compared with the student's baseline pair by pair.

    Args:
        cells: All runs' places.
        results: What came of them, by name.
        baseline: Label of the method to compare with.
        metric: What gains are measured in.
        confidence: Of the intervals.
        min_gain: Smallest gain that matters, points.
        folds: Number of folds, or None; pairs of folds share training data, which widens the intervals.
    """
    overlap = 1 / (folds - 1) if folds else 0.0
    done = [cell for cell in cells if cell.method != TEACHER and results[cell.job.name].status == "done"]
    rows = []
    for student, method in dict.fromkeys((cell.student, cell.method) for cell in done):
        mine = sorted(
            (cell for cell in done if (cell.student, cell.method) == (student, method)),
            key=lambda one: (one.seed, one.fold or 0),
        )
        other = {
            (cell.seed, cell.fold): _points(results[cell.job.name], "metrics")
            for cell in done
            if (cell.student, cell.method) == (student, baseline)
        }
        row = _row(student, method, mine, results)
        rows.append(row if method == baseline else _with_gain(row, other, metric, confidence, min_gain, overlap))
    compared = [row.gain for row in rows if row.gain is not None]
    verdicts = dict(zip(map(id, compared), judge_all(compared, confidence, min_gain, overlap), strict=True))
    return [row if row.gain is None else _replaced(row, verdicts[id(row.gain)]) for row in rows]


def mean_cost(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean cost of runs: hours of what they ran on, step time and memory; None where one is unknown."""
    costs = [record["cost"] for record in records]
    on_gpu = any(cost["gpu_s"] for cost in costs)
    seconds = [cost["gpu_s"] if on_gpu else cost["cpu_s"] for cost in costs]
    unit = "GPU" if on_gpu else "CPU"
    if None in seconds:  # put into place from outside: the wall time is all that is known
        seconds, unit = [cost["wall_s"] for cost in costs], "wall"
    step, memory = ([cost[key] for cost in costs] for key in ("step_ms", "peak_rss_mb"))
    return {
        "hours": _mean(seconds) / 3600 if seconds else None,
        "unit": unit,
        "step_ms": None if None in step or not step else _mean(step),
        "memory_mb": None if None in memory or not memory else _mean(memory),
    }


def spread(values: Sequence[float]) -> str:
    """Return ``mean ± sd``."""
    if not values:
        return ""
    return f"{_mean(values):.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def interval(low: float, high: float) -> str:
    """Return ``low to high`` with signs."""
    return "" if math.isnan(low) else f"{low:+.2f} to {high:+.2f}"


def _row(student: str, method: str, cells: Sequence[Cell], results: Mapping[str, JobResult]) -> Row:
    found = [results[cell.job.name] for cell in cells]
    metrics = task_of_figures(found[0].record["metrics"]).shown
    points = [_points(one, "metrics") for one in found]
    tested = [_points(one, "test") for one in found if one.record.get("test")]
    return Row(
        student,
        method,
        {metric: [one[metric] for one in points] for metric in metrics},
        [(cell.seed, cell.fold) for cell in cells],
        cost=mean_cost([one.record for one in found]),
        test={metric: [one[metric] for one in tested] for metric in metrics} if len(tested) == len(found) else {},
    )


def _with_gain(
    row: Row,
    baseline: Mapping[tuple[int, int | None], Mapping[str, float]],
    metric: str,
    confidence: float,
    min_gain: float,
    overlap: float,
) -> Row:
    other = next(name for name in row.values if name != metric)
    paired = [index for index, place in enumerate(row.places) if place in baseline]
    if not paired:
        return row
    mine, theirs = ([row.values[name][i] for i in paired] for name in (metric, other))
    base, base_other = ([baseline[row.places[i]][name] for i in paired] for name in (metric, other))
    gain = compare_pairs(mine, base, confidence, min_gain, overlap)
    differences = [a - b for a, b in zip(mine, base, strict=True)]
    return _replaced(row, gain, differences=differences, gain_other=_mean(theirs) - _mean(base_other))


def _replaced(row: Row, gain: Paired, **more: Any) -> Row:
    return Row(**{**row.__dict__, "gain": gain, **more})


def _points(result: JobResult, key: str) -> dict[str, float]:
    metrics = task_of_figures(result.record["metrics"]).shown
    return {metric: 100 * float(result.record[key].get(metric, math.nan)) for metric in metrics}


def _needed(gain: Paired) -> str:
    if gain.verdict != "cannot tell":
        return ""
    return "more than 10000" if gain.pairs_needed is None else str(gain.pairs_needed)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(one) for key, one in value.items()}
    return [_without_nan(one) for one in value] if isinstance(value, (list, tuple)) else value
