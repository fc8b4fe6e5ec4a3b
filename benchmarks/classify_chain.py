"""Does a chain of classifiers help: teacher, assistant, student alone, student directly, student through the chain.

    python benchmarks/classify_chain.py data=neu epochs=12 imgsz=96 method=hflkd

Each seed is one ``kd-yolo train task=classify chain=...``, which holds the direct run, and one run of the last student
with labels only; all with the same epochs, data, augmentation and random start. Finished runs are not repeated, stopped
ones go on. top-1 is that of the best epoch on validation.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_yolo.classify.data import resolve_class_data
from kd_yolo.compare.statistics import compare_pairs, judge_all
from kd_yolo.config import parse_pairs
from kd_yolo.files import write_json, write_text
from kd_yolo.resources import load_yaml
from kd_yolo.tables import markdown_table

HERE = Path(__file__).resolve().parent / "classify_chain"
"""Results lie in a folder for each data set."""
KNOWN = ("data", "chain", "method", "epochs", "imgsz", "batch", "seeds", "project", "out")
ALONE = "student alone"
NAMES = {"first": "teacher alone", "assistant": "assistant", "direct": "student, direct", "last": "student, chain"}
METRIC = "metrics/accuracy_top1"
Row = dict[str, Any]


def main(words: Sequence[str]) -> int:
    """Train what is missing, then write the table."""
    keys: dict[str, Any] = {
        "data": "neu",
        "chain": ["yolo26s-cls.yaml", "yolo26n-cls.yaml", "lightnet-n-cls"],
        "method": "hflkd",
        "epochs": 12,
        "imgsz": 96,
        "batch": 32,
        "seeds": "0,1,2",
        "project": "runs/classify-chain",
        "out": str(HERE),
        **parse_pairs(words),
    }
    unknown = [key for key in keys if key not in KNOWN]
    if unknown:
        print(f"{__doc__}\nunknown: {', '.join(unknown)}", file=sys.stderr)
        return 2
    chain = _list(keys["chain"])
    rows = []
    for seed in map(int, _list(keys["seeds"])):
        alone = _run(keys, f"alone-s{seed}", [f"model={chain[-1]}", "method=none", f"seed={seed}"])
        linked = _run(keys, f"chain-s{seed}", [f"chain={','.join(chain)}", f"method={keys['method']}", f"seed={seed}"])
        if alone is None or linked is None:
            return 1
        rows.append({"seed": seed, ALONE: alone["phases"][-1], **_stages(linked["phases"])})
    out = Path(str(keys["out"])) / Path(str(keys["data"])).name
    settings = {key: value for key, value in keys.items() if key not in {"project", "out"}}
    write_json(out / "runs.json", {"keys": settings, "rows": rows})
    write_text(out / "table.md", _table(rows) + "\n")
    print(_table(rows))
    return 0


def _run(keys: dict[str, Any], name: str, own: list[str]) -> dict[str, Any] | None:
    """Return the report of one run, which is trained or taken up unless it is done."""
    folder = Path(str(keys["project"])) / name
    report = folder / "report.json"
    if (folder / "run.yaml").is_file() and (other := _other_settings(folder, keys)):
        print(f"{folder}: holds a run with {other}; give another project=", file=sys.stderr)
        return None
    if not report.is_file():
        program = [sys.executable, "-m", "kd_yolo", "train", "task=classify"]
        common = [f"{key}={keys[key]}" for key in ("data", "epochs", "imgsz", "batch")]
        common += [f"project={folder.parent}", f"name={name}", "plots=false", "device=cpu", "workers=0"]
        given = [f"resume={folder}"] if (folder / "run.yaml").is_file() else [*own, *common]
        print(" ".join(["kd-yolo", *program[3:], *given]), flush=True)
        done = subprocess.run([*program, *given], check=False)
        if done.returncode:
            print(f"{name}: ended with {done.returncode}", file=sys.stderr)
            return None
    return dict(json.loads(report.read_text(encoding="utf-8")))


def _other_settings(folder: Path, keys: dict[str, Any]) -> str:
    """Return the first setting in which a run that is there differs from what is asked for, or an empty text."""
    plan = load_yaml(folder / "run.yaml")
    asked = {key: keys[key] for key in ("epochs", "imgsz", "batch")}
    found = {key: plan["stock"].get(key) for key in asked}
    if folder.name.startswith("chain"):
        asked |= {"chain": _list(keys["chain"]), "method": str(keys["method"])}
        found |= {"chain": _list(plan["config"]["chain"]), "method": plan["method"]["name"]}
    asked["data"] = str(resolve_class_data(str(keys["data"])))
    found["data"] = plan["config"]["data"]
    return next((f"{key}={found[key]}" for key in asked if found[key] != asked[key]), "")


def _stages(phases: list[Row]) -> dict[str, Row]:
    """Return the phases of a chain by what they are in the table."""
    direct = next(phase for phase in phases if phase["name"] == "direct")
    stages = [phase for phase in phases if phase["name"].startswith("stage")]
    stages.sort(key=lambda phase: phase["name"])
    found = {NAMES["first"]: stages[0], NAMES["direct"]: direct, NAMES["last"]: stages[-1]}
    for number, phase in enumerate(stages[1:-1], 1):
        found[NAMES["assistant"] + (f" {number}" if len(stages) > 3 else "")] = phase
    return found


def _table(rows: Sequence[Row]) -> str:
    """Return top-1 of every row, and the paired gain over the student alone for the distilled students."""
    base = [100 * row[ALONE]["top1"] for row in rows]
    order = [NAMES["first"], *(key for key in rows[0] if key.startswith(NAMES["assistant"]))]
    judged = [NAMES["direct"], NAMES["last"]]
    gains = []
    for name in judged:
        values = [100 * row[name]["top1"] for row in rows]
        gains.append(compare_pairs(values, base, 0.95, 0.5))
    chained, directly = ([100 * row[name]["top1"] for row in rows] for name in (NAMES["last"], NAMES["direct"]))
    gains.append(compare_pairs(chained, directly, 0.95, 0.5))  # whether the assistant was worth it
    verdicts = dict(zip([*judged, "chain"], judge_all(gains, 0.95, 0.5), strict=True))
    body = []
    for name in [*order, ALONE, *judged]:
        values = [100 * row[name]["top1"] for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        cells = ["", ""]
        if name in verdicts:
            one = verdicts[name]
            cells = [f"{one.mean:+.1f} ({one.t_low:+.1f} to {one.t_high:+.1f})", one.verdict]
        body.append([name, f"{statistics.mean(values):.1f} ± {spread:.1f}", *cells])
    one = verdicts["chain"]
    body.append(["chain against direct", "", f"{one.mean:+.1f} ({one.t_low:+.1f} to {one.t_high:+.1f})", one.verdict])
    return markdown_table(["", "top-1", "gain over the student alone, 95 %", "verdict"], body)


def _list(value: Any) -> list[str]:
    return [str(one).strip() for one in (value if isinstance(value, list) else str(value).split(","))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
