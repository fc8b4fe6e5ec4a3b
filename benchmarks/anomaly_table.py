"""HKT and HKT+ against a same-layer student (as STFPM), over categories and seeds: one table, resumable.

    python benchmarks/anomaly_table.py data=mvtec category=transistor epochs=40
    python benchmarks/anomaly_table.py data=mvtec category=screw epochs=30 tag=varied \
        extra="flips=true brightness=0.15 kd.floor=1"
    python benchmarks/anomaly_table.py data=magnetic-tile category=all epochs=12
    python benchmarks/anomaly_table.py table

Every run is a plain ``kd-yolo train task=anomaly`` in ``project``, with the words of ``extra`` added; a run that is
finished is not repeated. The test images are judged once a run and choose nothing in it: checkpoint and thresholds come
from held-out normal images. Each call adds its runs to ``runs.json`` in ``out``; ``table`` only writes the table again.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kd_yolo.config import parse_pairs
from kd_yolo.files import write_json, write_text
from kd_yolo.resources import load_yaml
from kd_yolo.tables import markdown_table

HERE = Path(__file__).resolve().parent / "anomaly_table"
METRICS = {
    "image AUROC": "metrics/image_auroc",
    "pixel AUROC": "metrics/pixel_auroc",
    "AUPRO@0.3": "metrics/aupro",
}
KNOWN = ("data", "category", "epochs", "models", "seeds", "project", "out", "imgsz", "batch", "tag", "extra")
IDENTITY = ("data", "category", "model", "epochs", "extra", "seed")
ORDER = ("data", "category", "extra", "epochs", "model", "seed")
Row = dict[str, Any]


def main(words: Sequence[str]) -> int:
    """Train what is missing, then write the table."""
    words, only = [word for word in words if word != "table"], "table" in words
    keys = {
        "models": "same-layer,hkt,hkt-plus",
        "seeds": "0,1,2",
        "project": "runs/anomaly-table",
        "out": str(HERE),
        "imgsz": 256,
        "batch": 16,
        "tag": "",
        "extra": "",
        **parse_pairs(words),
    }
    unknown = [key for key in keys if key not in KNOWN]
    if unknown or bool(keys["extra"]) != bool(keys["tag"]) or not (only or {"data", "category", "epochs"} <= set(keys)):
        print(__doc__, f"unknown: {unknown}" if unknown else "", file=sys.stderr)
        return 2
    out = Path(str(keys["out"]))
    known = json.loads((out / "runs.json").read_text(encoding="utf-8")) if (out / "runs.json").is_file() else []
    found = {tuple(row[name] for name in IDENTITY): row for row in known}
    for row in [] if only else filter(None, (_run(keys, *one) for one in _grid(keys))):
        found[tuple(row[name] for name in IDENTITY)] = row
    rows = sorted(found.values(), key=lambda row: [str(row[name]) for name in ORDER])
    write_json(out / "runs.json", rows)
    write_text(out / "table.md", _table(rows) + "\n")
    print(_table(rows))
    return 0


def _grid(keys: dict[str, Any]) -> Iterator[tuple[str, str, int, str, int]]:
    places = list(zip(*(_list(keys[name]) for name in ("data", "category", "epochs")), strict=True))
    for data, category, epochs in places:
        for seed in _list(keys["seeds"]):
            for model in _list(keys["models"]):
                yield data, category, int(epochs), model, int(seed)


def _run(keys: dict[str, Any], data: str, category: str, epochs: int, model: str, seed: int) -> Row | None:
    """Return the row of one run, which is trained unless it is there."""
    tag = f"-{keys['tag']}" if keys["tag"] else ""
    name = f"{data}-{category}-{model}{tag}-e{epochs}-s{seed}"
    folder = Path(str(keys["project"])) / name
    if (folder / "run.yaml").is_file():
        stock = load_yaml(folder / "run.yaml")["stock"]
        other = [f"{key}={stock[key]}" for key in ("imgsz", "batch") if stock[key] != keys[key]]
        if other:
            print(f"{folder}: holds a run with {other[0]}; give another project=", file=sys.stderr)
            return None
    if not (folder / "report.json").is_file():
        program = [sys.executable, "-m", "kd_yolo", "train", "task=anomaly"]
        if (folder / "run.yaml").is_file():
            given = [f"resume={folder}"]
        else:
            given = [f"data={data}", f"category={category}", f"model={model}", f"epochs={epochs}", f"seed={seed}"]
            given += [f"imgsz={keys['imgsz']}", f"batch={keys['batch']}", f"project={folder.parent}", f"name={name}"]
            given += str(keys["extra"]).split()
        print(" ".join(["kd-yolo", *program[3:], *given]), flush=True)
        done = subprocess.run([*program, *given, "verbose=false"] if "resume" not in given[0] else [*program, *given])
        if done.returncode:
            print(f"{name}: ended with {done.returncode}", file=sys.stderr)
            return None
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    if len(report["categories"]) != 1:
        print(f"{folder}: {len(report['categories'])} categories; name one in category=", file=sys.stderr)
        return None
    (result,) = report["categories"].values()
    row: Row = {"data": data, "category": result["category"], "model": model, "seed": seed, "epochs": epochs}
    row["extra"] = str(keys["extra"])
    return {**row, "imgsz": keys["imgsz"], "train_s": result["seconds"], **result["metrics"]}


def _table(rows: Sequence[Row]) -> str:
    groups: dict[tuple[str, str, str, int], list[Row]] = {}
    for row in rows:
        key = (str(row["category"]), str(row["model"]), row["extra"], int(row["epochs"]))
        groups.setdefault(key, []).append(row)
    body = []
    for (category, model, extra, epochs), members in groups.items():
        cells = [_mean(members, key, 100) for key in METRICS.values()]
        minutes = statistics.median(row["train_s"] for row in members) / 60
        body.append([category, model, extra, str(epochs), str(len(members)), *cells, f"{minutes:.1f}"])
    return markdown_table(["category", "model", "settings", "epochs", "seeds", *METRICS, "minutes a run"], body)


def _mean(rows: Sequence[Row], key: str, scale: float) -> str:
    values = [scale * row[key] for row in rows]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _list(value: Any) -> list[str]:
    return [str(one).strip() for one in (value if isinstance(value, list) else str(value).split(","))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
