"""Latency of the untrained LightNet family beside stock nano detectors, deployed and exported to ONNX, on this CPU.

Run it with ``python benchmarks/model_latency.py imgsz=224 threads=1``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from kd_yolo.export import export

from kd_yolo.bench import benchmark
from kd_yolo.config import parse_pairs
from kd_yolo.files import write_json, write_text
from kd_yolo.nn.lightnet import build_model

MODELS = ("lightnet-n", "lightnet-s", "lightnet-m", "yolo26n.yaml", "yolo11n.yaml", "yolov8n.yaml")


def main() -> None:
    """Build, export and time; write ``model_latency.json`` and ``.md`` beside this script."""
    values: dict[str, Any] = {"imgsz": 224, "threads": 1, **parse_pairs(sys.argv[1:])}
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name in MODELS:
            torch.manual_seed(0)
            path = Path(folder) / f"{name.removesuffix('.yaml')}.pt"
            arguments = {"imgsz": values["imgsz"], "task": "detect"}
            model = build_model(name, nc=6)
            torch.save({"epoch": -1, "model": model.eval(), "ema": None, "train_args": arguments}, path)
            files.append(str(export(path, imgsz=int(values["imgsz"])).path))
        report = benchmark(files, imgsz=int(values["imgsz"]), threads=int(values["threads"]))
    target = Path(__file__).with_suffix(".json")
    write_json(target, report.to_dict())
    write_text(target.with_suffix(".md"), report.to_markdown() + "\n")
    print(report.to_markdown())


if __name__ == "__main__":
    main()
