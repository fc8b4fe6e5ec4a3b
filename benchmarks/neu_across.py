"""What the recipe page says across tables of ``neu_table.py``, from their committed JSON files; NEU-DET's test split.

    python benchmarks/neu_across.py

LightNet under the default against stock for as long as teacher and student together: other machines, so unpaired, with
Welch's interval (Biometrika 1947). Distillation of ``qarep`` on both machines: pairs of one machine and seed, pooled.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from scipy.stats import ttest_ind

from kd_yolo.compare.outcome import read_json
from kd_yolo.compare.statistics import compare_pairs
from kd_yolo.tables import markdown_table

HERE = Path(__file__).resolve().parent
HEADER = ["row", "against", "runs", "mAP50-95", "95 % interval"]


def main() -> None:
    """Print the table."""
    print(markdown_table(HEADER, [*against_long_stock(), pooled_qarep()]))


def points(table: str, part: str, student: str, method: str) -> list[float]:
    """Return a row's mAP50-95 on the test split, by seed, in points."""
    rows = read_json(HERE / f"{table}.json")[part]["rows"]
    row = next(row for row in rows if (row["student"], row["method"]) == (student, method))
    return [float(value) for value in row["test"]["mAP50-95"]]


def against_long_stock() -> list[list[str]]:
    """Return the default students against stock of as many epochs on labels."""
    stock = points("neu_long", "stock long", "yolo26n", "none")
    lines = []
    for student in ("lightnet-n", "lightnet-s"):
        own = points("neu_table", "lightnet", student, "kd-lightnet")
        low, high = ttest_ind(own, stock, equal_var=False).confidence_interval(0.95)
        mean = statistics.mean(own) - statistics.mean(stock)
        runs = f"{len(own)} and {len(stock)}"
        lines.append([f"{student}, kd-lightnet", "stock long", runs, f"{mean:+.1f}", f"{low:+.1f} to {high:+.1f}"])
    return lines


def pooled_qarep() -> list[str]:
    """Return distillation of a yolo26n with branches over labels only, pairs of both machines."""
    tables = ("neu_table", "neu_coco")
    taught = [value for table in tables for value in points(table, "surgery", "yolo26n", "kd-lightnet")]
    plain = [value for table in tables for value in points(table, "surgery", "yolo26n", "none")]
    found = compare_pairs(taught, plain, 0.95, 0.5)
    interval = f"{found.t_low:+.1f} to {found.t_high:+.1f}"
    return ["yolo26n, qarep, kd-lightnet", "none", f"{found.pairs} pairs", f"{found.mean:+.1f}", interval]


if __name__ == "__main__":
    main()
