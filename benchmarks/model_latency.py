"""Latency of the untrained LightNet family beside stock nano detectors, in ONNX Runtime and OpenVINO, on this CPU.

    python benchmarks/model_latency.py imgsz=224,640 threads=1

All models of a canvas and runtime are timed in one interleaved benchmark, so that the ratios to yolo26n hold on a
machine that wavers. Writes ``model_latency.json`` and ``.md`` beside this script. Other keys: models=, formats=,
rounds=, iterations=, stream=.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from kd_yolo.export import export

from kd_yolo.bench import BenchReport, benchmark
from kd_yolo.bench.writing import public
from kd_yolo.config import parse_pairs, refuse_unknown
from kd_yolo.errors import KDYoloError
from kd_yolo.files import write_json, write_text
from kd_yolo.nn.lightnet import build_model
from kd_yolo.tables import markdown_table

BASELINE = "yolo26n"
BARS = {"lightnet-n": 0.67, "lightnet-s": 1.0}
DEFAULTS: dict[str, Any] = {
    "imgsz": "224,640",
    "threads": 1,
    "models": "lightnet-n,lightnet-s,lightnet-m,yolo26n,yolo11n,yolov8n",
    "formats": "onnx,openvino",
    "rounds": 20,
    "iterations": 20,
    "stream": 100,
}


def main() -> None:
    """Build, export and time; write the tables."""
    given = parse_pairs(sys.argv[1:])
    refuse_unknown(given, DEFAULTS, "model_latency.py")
    values = {**DEFAULTS, **given}
    counts: dict[str, Any] = {key: int(values[key]) for key in ("threads", "rounds", "iterations", "stream")}
    reports = []
    with tempfile.TemporaryDirectory(prefix="kd-yolo-latency-") as folder:
        for side in map(int, words(values["imgsz"])):
            for form in words(values["formats"]):
                files = [export_untrained(name, side, form, Path(folder)) for name in words(values["models"])]
                reports.append((form, public(benchmark(files, imgsz=side, **counts))))
    target = Path(__file__).with_suffix(".json")
    write_json(target, {"reports": [{"format": form, **report.to_dict()} for form, report in reports]})
    text = "\n\n".join([ratios(reports), *(report.to_markdown() for _, report in reports)])
    write_text(target.with_suffix(".md"), text + "\n")
    print(text)


def export_untrained(name: str, side: int, form: str, folder: Path, **keys: Any) -> Path:
    """Return the exported file of a model with random weights."""
    return Path(export(save_untrained(name, side, folder), format=form, imgsz=side, **keys).path)


def save_untrained(name: str, side: int, folder: Path) -> Path:
    """Return the checkpoint of a model with random weights, the same for every call."""
    torch.manual_seed(0)
    path = folder / f"{name}-{side}.pt"
    model = build_model(name if name.startswith("lightnet") else f"{name}.yaml", nc=6)
    arguments = {"imgsz": side, "task": "detect"}
    torch.save({"epoch": -1, "model": model.eval(), "ema": None, "train_args": arguments}, path)
    return path


def ratios(reports: Sequence[tuple[str, BenchReport]]) -> str:
    """Return every model's median inference time over that of the baseline: median and range over the rounds."""
    header = ["model", *(f"{form} {report.canvas[0]}" for form, report in reports), "wanted"]
    names = [Path(row.artifact).name.rsplit("-", 1)[0] for row in reports[0][1].rows]
    lines = []
    for index, name in enumerate(names):
        cells = [ratio(report, index, names.index(BASELINE)) for _, report in reports] if BASELINE in names else []
        lines.append([name, *cells, f"<= {BARS[name]:g}" if name in BARS else ""])
    note = f"Inference time over that of {BASELINE}: median of the rounds' ratios (10th to 90th percentile)."
    return f"{markdown_table(header, lines)}\n\n{note}"


def ratio(report: BenchReport, index: int, baseline: int) -> str:
    """Return a row's time over the baseline's, round by round: both were measured within the same moments."""
    mine, theirs = (report.rows[number].rounds_ms["inference"] for number in (index, baseline))
    found = sorted(one / other for one, other in zip(mine, theirs, strict=True))
    low, high = found[len(found) // 10], found[-1 - len(found) // 10]
    return f"{statistics.median(found):.2f} ({low:.2f}-{high:.2f})"


def words(value: Any) -> list[str]:
    """Return the parts of ``a,b,c``."""
    parts = value if isinstance(value, list) else str(value).split(",")
    return [str(part).strip() for part in parts if str(part).strip()]


if __name__ == "__main__":
    try:
        main()
    except KDYoloError as error:
        sys.exit(str(error))
