"""The report: pairs, verdicts, cost, what is shown, and what other programs read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from compare_factory import cell_and_result

from kd_yolo.compare.plots import plot
from kd_yolo.compare.report import CompareReport, Row, make_rows, mean_cost, spread
from kd_yolo.compare.run import save
from kd_yolo.compare.tracking import scalars

POINTS = {
    "none": [10.0, 12.0, 9.0, 11.0],
    "cwd": [12.0, 14.1, 10.9, 13.0],
    "mgd": [9.0, 13.5, 9.6, 10.0],
    "bad": [7.0, 9.1, 5.9, 8.0],
}


def rows_of(points: dict[str, list[float]], folds: int | None = None, **given: Any) -> list[Row]:
    made = [
        cell_and_result(m, seed, value, **given) for m, values in points.items() for seed, value in enumerate(values)
    ]
    cells = [cell for cell, _ in made]
    return make_rows(cells, {r.name: r for _, r in made}, "none", "mAP50-95", 0.95, 0.5, folds)


def report_of(rows: list[Row], failed: list[dict[str, str]] | None = None) -> CompareReport:
    setting = {"baseline": "none", "metric": "mAP50-95", "confidence": 0.95, "min_gain": 0.5, "shown": {"data": "neu"}}
    return CompareReport(setting, rows, [], failed or [], ["a note"])


def test_make_rows__verdicts() -> None:
    rows = {row.method: row for row in rows_of(POINTS)}
    assert rows["none"].gain is None
    found = {name: row.gain.verdict for name, row in rows.items() if row.gain is not None}
    assert found == {"cwd": "helped", "mgd": "cannot tell", "bad": "did not help"}
    cwd = rows["cwd"]
    assert cwd.gain is not None
    assert cwd.gain.mean == pytest.approx(2.0)
    assert cwd.differences == pytest.approx([2.0, 2.1, 1.9, 2.0])
    assert cwd.gain_other == pytest.approx(4.0)  # mAP50 is twice as large here


def test_make_rows__only_whole_pairs_count() -> None:
    points = {"none": [10.0, 12.0, 9.0], "cwd": [12.0, 14.0, 11.5]}
    made = [cell_and_result(m, s, v) for m, values in points.items() for s, v in enumerate(values)]
    made += [cell_and_result("cwd", 3, 99.0), cell_and_result("none", 3, 0.0, status="failed")]
    cells, results = [cell for cell, _ in made], {r.name: r for _, r in made}
    cwd = make_rows(cells, results, "none", "mAP50-95", 0.95, 0.5, None)[1]
    assert cwd.gain is not None
    assert (cwd.gain.pairs, len(cwd.places)) == (3, 4)
    assert cwd.gain.mean == pytest.approx((2 + 2 + 2.5) / 3)


def test_make_rows__order_of_the_runs_does_not_matter() -> None:
    made = [cell_and_result(m, s, v) for m, values in POINTS.items() for s, v in enumerate(values)]
    results = {r.name: r for _, r in made}
    forward = make_rows([c for c, _ in made], results, "none", "mAP50-95", 0.95, 0.5, None)
    backward = make_rows([c for c, _ in reversed(made)], results, "none", "mAP50-95", 0.95, 0.5, None)
    assert {r.method: r for r in forward} == {r.method: r for r in backward}


def test_make_rows__students_have_their_own_baselines() -> None:
    made = [cell_and_result("none", s, 10.0 + s, "a") for s in range(3)]
    made += [cell_and_result("cwd", s, 12.0 + s + s % 2, "a") for s in range(3)]
    made += [cell_and_result("none", s, 40.0 + s, "b") for s in range(3)]
    made += [cell_and_result("cwd", s, 41.0 + s - s % 2, "b") for s in range(3)]
    rows = make_rows([c for c, _ in made], {r.name: r for _, r in made}, "none", "mAP50-95", 0.95, 0.5, None)
    gains = {row.student: round(row.gain.mean, 3) for row in rows if row.gain is not None}
    assert gains == {"a": pytest.approx(2.333), "b": pytest.approx(0.667)}


def test_make_rows__folds_are_less_sure_than_seeds() -> None:
    seeds, folds = (
        next(row.gain for row in rows_of(POINTS, folds=k) if row.method == "mgd" and row.gain) for k in (None, 4)
    )
    assert folds.t_high - folds.t_low > seeds.t_high - seeds.t_low


def test_make_rows__one_seed() -> None:
    rows = rows_of({"none": [10.0], "cwd": [12.0]})
    assert rows[1].gain is not None
    assert rows[1].gain.verdict == "cannot tell (one seed)"
    text = report_of(rows).to_markdown()
    assert "+2.00" in text
    assert "nan" not in text


def test_mean_cost__unknown_stays_unknown() -> None:
    known = {"cpu_s": 3600.0, "gpu_s": 0.0, "wall_s": 7200.0, "step_ms": 10.0, "peak_rss_mb": 800.0}
    records = [{"cost": known}, {"cost": {**known, "step_ms": 30.0}}]
    assert mean_cost(records) == {"hours": 1.0, "unit": "CPU", "step_ms": 20.0, "memory_mb": 800.0}
    foreign = {"cost": {**known, "cpu_s": None, "peak_rss_mb": None}}
    assert mean_cost([records[0], foreign]) == {"hours": 2.0, "unit": "wall", "step_ms": 10.0, "memory_mb": None}
    assert mean_cost([{"cost": {**known, "gpu_s": 1800.0}}])["unit"] == "GPU"


def test_to_markdown__one_row_each_and_every_cell(tmp_path: Path) -> None:
    text = report_of(rows_of(POINTS)).to_markdown()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4
    assert len({line.count("|") for line in table}) == 1
    assert "10.50 ± 1.29" in table[2]
    assert "baseline" in table[2]
    assert "helped" in table[3]
    assert "| 4 |" in table[2]  # runs
    assert "0.014 CPU" in table[2]  # 50 s
    assert "- data neu" in text


def test_to_dict__is_strict_json_without_nan() -> None:
    content = report_of(rows_of({"none": [10.0], "cwd": [12.0]})).to_dict()
    assert json.loads(json.dumps(content, allow_nan=False))["rows"][1]["gain"]["sd"] is None


def test_failure_line__says_which_and_where() -> None:
    assert report_of([]).failure_line() == ""
    failed = [{"name": f"run{i}", "reason": "broke", "log": f"run{i}.log"} for i in range(3)]
    line = report_of([], failed).failure_line()
    assert line.startswith("run0 failed: broke; see run0.log (and 2 more: run1, run2)")
    assert "\n" not in line


def test_save__three_files(tmp_path: Path) -> None:
    report = save(report_of(rows_of(POINTS)), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(report.files)
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["files"] == report.files


def test_plot__nothing_to_draw(tmp_path: Path) -> None:
    assert plot(report_of(rows_of({"none": [10.0, 11.0]})), tmp_path / "x.png") is False
    assert not (tmp_path / "x.png").exists()
    assert plot(report_of(rows_of({"none": [10.0], "cwd": [11.0]})), tmp_path / "x.png") is True


def test_scalars__finite_and_named() -> None:
    found = scalars(report_of(rows_of({"none": [10.0], "cwd": [12.0]})))
    assert found["s/cwd/gain"] == pytest.approx(2.0)
    assert found["s/none/mAP50"] == pytest.approx(20.0)
    assert all(math.isfinite(value) for value in found.values())


def test_spread__forms() -> None:
    assert (spread([]), spread([1.0]), spread([1.0, 3.0])) == ("", "1.00", "2.00 ± 1.41")
