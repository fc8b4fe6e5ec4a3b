"""FP16 latency at batch 1 and throughput at batch 32 of the LightNet family and stock nano detectors on a CUDA GPU.

    python benchmarks/gpu_latency.py imgsz=640 device=0

Random weights, the same harness and canvas for all: PyTorch as a CUDA graph (channels last), ONNX Runtime on CUDA, and
TensorRT where the package ``tensorrt`` is installed. All models of a batch and runtime are timed in one interleaved
benchmark. Writes ``gpu_latency.json`` and ``.md`` beside this script, with the GPU's name. Other keys: models=, batch=,
runtimes=, rounds=, iterations=, stream=.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from model_latency import export_untrained, save_untrained, words

from kd_yolo.bench import BenchReport, benchmark
from kd_yolo.bench.writing import public
from kd_yolo.config import parse_pairs, refuse_unknown
from kd_yolo.errors import BackendMissingError, KDYoloError
from kd_yolo.files import write_json, write_text
from kd_yolo.tables import markdown_table

DEFAULTS: dict[str, Any] = {
    "imgsz": 640,
    "device": 0,
    "models": "lightnet-n,lightnet-s,lightnet-m,yolo26n,yolo11n,yolov8n,yolov6n",
    "batch": "1,32",
    "runtimes": "torch,onnxruntime,tensorrt",
    "rounds": 20,
    "iterations": 50,
    "stream": 640,
}


def main() -> None:
    """Build, export and time; write the tables."""
    given = parse_pairs(sys.argv[1:])
    refuse_unknown(given, DEFAULTS, "gpu_latency.py")
    values = {**DEFAULTS, **given}
    if not torch.cuda.is_available():
        raise BackendMissingError("gpu_latency.py needs a CUDA GPU, and PyTorch sees none here")
    runtimes, skipped = choose(words(values["runtimes"]))
    counts = {key: int(values[key]) for key in ("rounds", "iterations", "stream")}
    reports = []
    with tempfile.TemporaryDirectory(prefix="kd-yolo-gpu-") as folder:
        for batch in map(int, words(values["batch"])):
            for runtime in runtimes:
                place = Path(folder) / f"{runtime}-{batch}"
                place.mkdir()
                files = [prepare(name, values, runtime, batch, place) for name in words(values["models"])]
                keys: dict[str, Any] = {
                    "imgsz": int(values["imgsz"]),
                    "batch": batch,
                    "device": str(values["device"]),
                    **counts,
                }
                reports.append((runtime, public(benchmark(files, **keys))))
    write(reports, skipped)


def choose(wanted: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the runtimes that are here, and why the others are left out."""
    skipped: dict[str, str] = {}
    if importlib.util.find_spec("tensorrt") is None:
        skipped["tensorrt"] = "the package tensorrt is not installed"
    if importlib.util.find_spec("onnxruntime") is None:
        skipped["onnxruntime"] = "the package onnxruntime is not installed"
    else:
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            skipped["onnxruntime"] = "this ONNX Runtime has no CUDAExecutionProvider; install onnxruntime-gpu"
    return [name for name in wanted if name not in skipped], {name: skipped[name] for name in wanted if name in skipped}


def prepare(name: str, values: dict[str, Any], runtime: str, batch: int, folder: Path) -> str:
    """Return what to benchmark: a file made for this runtime and batch, and how it is run."""
    side = int(values["imgsz"])
    if runtime == "torch":
        return f"{save_untrained(name, side, folder)}@cudagraph-fp16"
    form = "engine" if runtime == "tensorrt" else "onnx"
    path = export_untrained(name, side, form, folder, quantize=16, batch=batch)
    return f"{path}@cuda" if runtime == "onnxruntime" else str(path)


def write(reports: Sequence[tuple[str, BenchReport]], skipped: dict[str, str]) -> None:
    """Write and print a short table, then the full ones."""
    if not reports:
        raise BackendMissingError(f"gpu_latency.py: nothing to run ({skipped})")
    gpu = reports[0][1].environment["gpu"]
    header = ["model", *(f"{runtime}, batch {report.batch}" for runtime, report in reports)]
    lines = []
    for index, row in enumerate(reports[0][1].rows):
        name = row.artifact.split("@")[0].rsplit("-", 1)[0]
        lines.append([name, *(cell(report, index) for _, report in reports)])
    notes = [f"{gpu}, FP16: milliseconds of the network p50 / p99, and images a second of the network at that batch."]
    notes += [f"Left out: {name} ({reason})." for name, reason in skipped.items()]
    full = [report.to_markdown() for _, report in reports]
    text = "\n\n".join([markdown_table(header, lines), "\n".join(notes), *full])
    target = Path(__file__).with_suffix(".json")
    content = [{"runtime": runtime, **report.to_dict()} for runtime, report in reports]
    write_json(target, {"gpu": gpu, "skipped": skipped, "reports": content})
    write_text(target.with_suffix(".md"), text + "\n")
    print(text)


def cell(report: BenchReport, index: int) -> str:
    """Return latency and throughput of one row's network."""
    inference = report.rows[index].latency_ms["inference"]
    return f"{inference.p50:.2f} / {inference.p99:.2f}, {report.batch / inference.p50 * 1e3:.0f} a second"


if __name__ == "__main__":
    try:
        main()
    except KDYoloError as error:
        sys.exit(str(error))
