"""A real comparison on a two-node Ray cluster, with a worker killed in the middle, beside an undisturbed one.

Both are ``kd-yolo compare engine=ray``: a student, plain and distilled from itself, two seeds, on synthetic images. In
the first one the worker of a distilled run gets SIGKILL once that run has finished an epoch. Every run must be there at
the end, the killed one taken up where its last checkpoint was, and every number must be that of the undisturbed twin.

    python benchmarks/ray_recovery.py out=runs/ray-recovery epochs=3 imgsz=64
    python benchmarks/ray_recovery.py student=yolo26n.yaml weights=yolo26n.pt epochs=4 imgsz=128 train=96

Both nodes of the cluster are processes of this machine, with one processor each. A comparison that is done is not
repeated when the script is called again.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kd_yolo.checkpoints import load_model
from kd_yolo.compare.outcome import read_json
from kd_yolo.config import parse_pairs
from kd_yolo.data.synthetic import make_steel_synth
from kd_yolo.errors import ConfigError, nearest
from kd_yolo.files import write_json, write_text
from kd_yolo.tables import markdown_table

DEFAULTS: dict[str, Any] = {"out": "runs/ray-recovery", "student": "lightnet-n", "weights": None}
DEFAULTS |= {"epochs": 3, "imgsz": 64, "batch": 8, "train": 48}
METHOD = "kd-lightnet"
SEEDS = "0,1"
CLOCK = "time"  # the one column of results.csv that a repetition may change
POLL_S = 0.2
OBJECT_STORE_BYTES = 100 * 2**20


def main() -> None:
    """Run both comparisons and write ``ray_recovery.json`` and ``.md`` beside this script."""
    given = parse_pairs(sys.argv[1:])
    for key in given:
        if key not in DEFAULTS:
            raise ConfigError(f"unknown key '{key}'{nearest(key, DEFAULTS)}")
    values = {**DEFAULTS, **given}
    out = Path(str(values["out"])).expanduser().absolute()
    data = out / "data" / "data.yaml"
    if not data.is_file():
        make_steel_synth(out / "data", train=int(values["train"]), val=16, test=8, seed=0)
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    os.environ |= {"YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "false"}
    if not (out / "killed.json").is_file():
        compare(values, data, out, "disturbed", kill=True)
    if not (out / "undisturbed" / "compare.json").is_file():
        compare(values, data, out, "undisturbed", kill=False)
    write_report(values, out)


def compare(values: dict[str, Any], data: Path, out: Path, name: str, kill: bool) -> None:
    """Run one comparison on a cluster of its own; with ``kill`` one worker dies and ``killed.json`` says when."""
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        keys = {key: values[key] for key in ("epochs", "imgsz", "batch")}
        keys |= {
            "data": data,
            "students": values["student"],
            "methods": f"none,{METHOD}",
            "teacher": "self",
            "seeds": SEEDS,
        }
        keys |= {"engine": "ray", "address": cluster.address, "threads": 1, "device": "cpu", "workers": 0}
        keys |= {"project": out, "name": name, "allow_weak_teacher": True, "close_mosaic": 0, "verbose": False}
        keys |= {"pretrained": Path(str(values["weights"])).absolute()} if values["weights"] else {}
        command = [sys.executable, "-m", "kd_yolo", "compare", *(f"{key}={value}" for key, value in keys.items())]
        began = time.monotonic()
        with (out / f"{name}.log").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            killed = kill_worker(out / name / "runs", process, began) if kill else {}
            status = process.wait()
        if status != 0 or (kill and not killed):
            raise SystemExit(f"{name}: ended with status {status}, killed {killed}; see {out / name}.log")
        if kill:
            killed |= {"whole_s": time.monotonic() - began, "said": said(out / f"{name}.log")}
            write_json(out / "killed.json", killed)
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]


def kill_worker(runs: Path, process: subprocess.Popen[bytes], began: float) -> dict[str, Any]:
    """Wait until a distilled run has an epoch behind it, then kill its worker; return what was done."""
    while process.poll() is None:
        for claim in runs.glob(f"*{METHOD}*/claim.json"):
            holder, rows = read_json(claim), epoch_rows(claim.parent)
            if rows and (claim.parent / "student" / "weights" / "last.pt").is_file() and "child" in holder:
                os.kill(int(holder["pid"]), signal.SIGKILL)
                running = [one.parent.name for one in runs.glob("*/claim.json") if one != claim]
                done = [one.parent.name for one in runs.glob("*/result.json")]
                after_s = time.monotonic() - began
                return {
                    "run": claim.parent.name,
                    "epochs": len(rows),
                    "after_s": after_s,
                    "beside": running,
                    "done": done,
                }
        time.sleep(POLL_S)
    return {}


def epoch_rows(folder: Path) -> list[dict[str, str]]:
    """Return the epochs of a run without their clock."""
    file = folder / "student" / "results.csv"
    if not file.is_file():
        return []
    with file.open(encoding="utf-8") as stream:
        rows = [{str(key).strip(): str(cell) for key, cell in row.items()} for row in csv.DictReader(stream)]
    return [{key: cell for key, cell in row.items() if key != CLOCK} for row in rows]


def said(log: Path) -> list[str]:
    """Return the lines in which the command told of the loss."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return [line.strip() for line in text.splitlines() if "taken up again" in line]


def same_weights(*folders: Path) -> bool:
    """Return whether the best checkpoints of two runs hold the same tensors, bit for bit."""
    if not all((folder / "weights" / "best.pt").is_file() for folder in folders):
        return False
    one, other = (load_model(folder / "weights" / "best.pt")[0].state_dict() for folder in folders)
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def write_report(values: dict[str, Any], out: Path) -> None:
    """Compare both comparisons run by run; write the table."""
    killed = read_json(out / "killed.json")
    rows: list[dict[str, Any]] = []
    for result in sorted((out / "undisturbed" / "runs").glob("*/result.json")):
        twin, record = read_json(result), read_json(out / "disturbed" / "runs" / result.parent.name / "result.json")
        mine, other = (epoch_rows(out / which / "runs" / result.parent.name) for which in ("disturbed", "undisturbed"))
        rows.append(
            {
                "run": result.parent.name,
                "attempts": record["cost"]["attempts"] if record else 0,
                "metrics": record.get("metrics", {}),
                "metrics_undisturbed": twin["metrics"],
                "same_metrics": record.get("metrics") == twin["metrics"],
                "same_weights": same_weights(result.parent, out / "disturbed" / "runs" / result.parent.name),
                "same_epochs": mine == other and len(mine) == int(values["epochs"]),
            }
        )
    setting = {key: values[key] for key in DEFAULTS if key != "out"} | {"method": METHOD, "seeds": SEEDS}
    setting["weights"] = Path(str(values["weights"])).name if values["weights"] else "none"
    packages = ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "ultralytics"))
    setting["machine"] = f"{platform.machine()}, {os.cpu_count()} cores; {packages}"
    target = Path(__file__).with_suffix(".json")
    write_json(target, json.loads(json.dumps({"setting": setting, "killed": killed, "runs": rows})))
    write_text(target.with_suffix(".md"), text(setting, killed, rows))
    print(target.with_suffix(".md").read_text(encoding="utf-8"))


def text(setting: dict[str, Any], killed: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the report as Markdown."""
    head = ["run", "attempts", "mAP50-95", "undisturbed", "all metrics", "weights", "every epoch's losses"]
    cells = [
        [
            row["run"],
            str(row["attempts"]),
            *(f"{100 * row[key].get('mAP50-95', float('nan')):.4f}" for key in ("metrics", "metrics_undisturbed")),
            *("equal" if row[key] else "DIFFER" for key in ("same_metrics", "same_weights", "same_epochs")),
        ]
        for row in rows
    ]
    lines = [
        f"`kd-yolo compare engine=ray` on two nodes; the worker of `{killed['run']}` got SIGKILL "
        f"{killed['after_s']:.0f} s after the start, when {killed['epochs']} of {setting['epochs']} epochs were done.",
        f"Running beside it: {', '.join(killed['beside']) or 'nothing'}. Already done: {', '.join(killed['done'])}.",
        f"The command said: {' '.join(f'`{line}`' for line in killed['said'])}",
        f"It ended {killed['whole_s']:.0f} s after its start with status 0 and all {len(rows)} runs:",
    ]
    shown = ", ".join(f"{key} {value}" for key, value in setting.items())
    return "\n\n".join([*lines, markdown_table(head, cells), f"- {shown}"]) + "\n"


if __name__ == "__main__":
    main()
