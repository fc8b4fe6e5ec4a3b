"""Latency of HKT and HKT+ in OpenVINO on this CPU, beside their own teacher and student and beside other detectors.

    python benchmarks/anomaly_latency.py files=efficientad-s.onnx,stfpm.onnx

HKT is to cost at most 1.2 times what its teacher and its student cost alone, each exported by itself. All graphs are
timed in interleaved rounds, float32, batch 1, so that ratios hold on a machine that wavers. Weights are random where no
training is needed; they do not change the time. Writes ``anomaly_latency/table.json`` and ``table.md`` beside this
script. Other keys: models=, imgsz=, threads=, rounds=, iterations=.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kd_yolo.export.stock import quiet
from numpy.typing import NDArray
from torch import Tensor, nn

from kd_yolo.anomaly.dataset import stretched
from kd_yolo.anomaly.merging import deployed
from kd_yolo.anomaly.model import AnomalyModel
from kd_yolo.anomaly.spec import load_spec
from kd_yolo.bench.complexity import onnx_complexity
from kd_yolo.bench.timing import StageTimer, percentile, summarize
from kd_yolo.bench.worker import environment
from kd_yolo.config import parse_pairs, refuse_unknown
from kd_yolo.errors import ConfigError, KDYoloError
from kd_yolo.files import write_json, write_text
from kd_yolo.images import textured_images
from kd_yolo.runtimes.telemetry import no_telemetry
from kd_yolo.tables import markdown_table

BAR = 1.2
OPSET = 18
SETTLE = 2
PARTS = ("whole", "teacher", "student")
KINDS = ("wall_ms", "cpu_ms")
DEFAULTS: dict[str, Any] = {
    "models": "hkt,hkt-plus",
    "files": "",
    "imgsz": 256,
    "threads": 1,
    "rounds": 30,
    "iterations": 20,
}


@dataclass(frozen=True)
class Call:
    """Milliseconds of one call.

    Attributes:
        wall_ms: By the clock.
        cpu_ms: That this process computed, all threads together.
    """

    wall_ms: float
    cpu_ms: float


@dataclass(frozen=True)
class Timed:
    """One graph and its timer.

    Attributes:
        name: For example ``hkt teacher``.
        timer: Runs it.
        params: Weights and biases of its convolutions and matrix products.
        gflops: 10^9 operations for one image, two per multiply-add of the convolutions.
    """

    name: str
    timer: StageTimer
    params: int
    gflops: float

    def call(self) -> Call:
        """Run once."""
        wall, cpu = time.perf_counter(), time.process_time()
        for stage in self.timer.stages:
            stage(None)
        return Call((time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3)


class Part(nn.Module):
    """The teacher or the student of an anomaly model alone, its maps as a tuple."""

    def __init__(self, network: nn.Module) -> None:
        """Take a network that returns maps by stride."""
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the maps that the whole model uses."""
        return tuple(self.network(images).values())


def main() -> None:
    """Build, export and time; write the tables."""
    given = parse_pairs(sys.argv[1:])
    refuse_unknown(given, DEFAULTS, "anomaly_latency.py")
    values = {**DEFAULTS, **given}
    side, threads, rounds, calls = (int(values[key]) for key in ("imgsz", "threads", "rounds", "iterations"))
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="kd-yolo-latency-") as folder:
        graphs: dict[str, Path] = {}
        for name in words(values["models"]):
            graphs |= export_parts(name, side, Path(folder))
        graphs |= {Path(file).stem: Path(file) for file in words(values["files"])}
        timed = [open_graph(name, file, side, threads) for name, file in graphs.items()]
        samples = interleaved(timed, rounds, calls)
    report = summarized(timed, samples, words(values["models"]))
    report |= {"imgsz": side, "threads": threads, "rounds": rounds, "iterations": calls, "bar": BAR}
    report |= {"environment": environment("cpu"), "load_average": os.getloadavg()[0]}
    target = Path(__file__).parent / "anomaly_latency" / "table.json"
    target.parent.mkdir(exist_ok=True)
    write_json(target, report)
    text = to_markdown(report)
    write_text(target.with_suffix(".md"), text + "\n")
    print(text)


def export_parts(name: str, side: int, folder: Path) -> dict[str, Path]:
    """Return ONNX files of a built-in anomaly model, of its teacher alone and of its student alone, all deployed."""
    torch.manual_seed(0)
    model = deployed(AnomalyModel(load_spec(name, {"imgsz": side})).eval())
    networks = {"whole": model, "teacher": Part(model.teacher), "student": Part(model.student)}
    return {f"{name} {part}": export_graph(networks[part], side, folder / f"{name}-{part}.onnx") for part in PARTS}


def export_graph(network: nn.Module, side: int, path: Path) -> Path:
    """Write a static ONNX file for one image, simplified."""
    import onnx
    import onnxslim

    with quiet(), torch.no_grad():
        torch.onnx.export(
            network.eval(), (torch.zeros(1, 3, side, side),), str(path), opset_version=OPSET, dynamo=False
        )
        onnx.save(onnxslim.slim(onnx.load(path)), path)
    return path


def open_graph(name: str, file: Path, side: int, threads: int) -> Timed:
    """Compile an ONNX file for one image of the canvas.

    Raises:
        ConfigError: The file is missing, or takes another canvas.
    """
    with no_telemetry():
        import openvino
    if not file.is_file():
        raise ConfigError(f"files={file}: no such file")
    core = openvino.Core()
    graph = core.read_model(str(file))
    shape = graph.input(0).get_partial_shape()
    if not shape.compatible(openvino.PartialShape([1, 3, side, side])):
        raise ConfigError(f"files={file}: takes {shape}, not one image of {side}x{side} pixels")
    graph.reshape([1, 3, side, side])
    properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    properties["INFERENCE_PRECISION_HINT"] = openvino.Type.f32
    request = core.compile_model(graph, "CPU", properties).create_infer_request()
    image = picture(side)
    timer = StageTimer([lambda _: request.infer([image])], lambda: None, time.perf_counter)
    return Timed(name, timer, *onnx_complexity(file, (side, side)))


def picture(side: int) -> NDArray[np.float32]:
    """Return one textured image as the graphs read it."""
    image = stretched(textured_images(1)[0], (side, side))
    return np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1)[None], np.float32) / np.float32(255)


def interleaved(timed: Sequence[Timed], rounds: int, calls: int) -> dict[str, list[list[Call]]]:
    """Return by graph and round what every call took; each round begins with another graph."""
    for one in timed:
        one.timer.warm_up()
    samples: dict[str, list[list[Call]]] = {one.name: [] for one in timed}
    for turn in range(rounds):
        for offset in range(len(timed)):
            one = timed[(turn + offset) % len(timed)]
            one.timer.round(SETTLE)  # another graph had the caches
            samples[one.name].append([one.call() for _ in range(calls)])
    return samples


def summarized(
    timed: Sequence[Timed], samples: Mapping[str, list[list[Call]]], models: Sequence[str]
) -> dict[str, Any]:
    """Return plain data: a row for each graph, a ratio for each model."""
    rows = []
    for one in timed:
        calls = [call for part in samples[one.name] for call in part]
        wall, cpu = (summarize([getattr(call, kind) for call in calls]).to_dict() for kind in KINDS)
        rows.append({"name": one.name, "params": one.params, "gflops": one.gflops, "latency_ms": wall, "cpu_ms": cpu})
    return {"rows": rows, "ratios": {name: ratios_of(name, samples) for name in models}}


def ratios_of(name: str, samples: Mapping[str, list[list[Call]]]) -> dict[str, Any]:
    """Return whole / (teacher + student) of the rounds' medians, of wall and of CPU time, over the rounds."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        parts = [
            [statistics.median(getattr(call, kind) for call in calls) for calls in samples[f"{name} {part}"]]
            for part in PARTS
        ]
        ratios = [whole / (teacher + student) for whole, teacher, student in zip(*parts, strict=True)]
        found[kind] = {share: percentile(ratios, share / 100) for share in (10, 50, 90)}
    return {**found, "holds": all(found[kind][50] <= BAR for kind in KINDS)}


def to_markdown(report: Mapping[str, Any]) -> str:
    """Return both tables and what they hold for."""
    body = []
    for row in report["rows"]:
        wall, cpu = row["latency_ms"], row["cpu_ms"]
        times = [wall["p50"], wall["p90"], wall["fastest"], cpu["p50"]]
        body.append([row["name"], f"{row['params'] / 1e6:.2f}", f"{row['gflops']:.2f}", *(f"{ms:.2f}" for ms in times)])
    header = ["graph", "M params", "GFLOPs", "p50 ms", "p90 ms", "fastest ms", "CPU p50 ms"]
    lines = [markdown_table(header, body), ""]
    ratios = []
    for name, one in report["ratios"].items():
        cells = [f"{one[kind][50]:.3f} ({one[kind][10]:.3f}-{one[kind][90]:.3f})" for kind in KINDS]
        ratios.append([name, *cells, "yes" if one["holds"] else "no"])
    header = ["model", "whole / (teacher + student)", "the same of CPU time", f"both <= {report['bar']:g}"]
    lines += [markdown_table(header, ratios), ""]
    found, side = report["environment"], report["imgsz"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return "\n".join(
        [
            *lines,
            f"Milliseconds an image at {side}x{side}, float32, OpenVINO, {report['threads']} threads, "
            f"{report['rounds']} interleaved rounds of {report['iterations']} calls, nothing left out. "
            "Ratios: medians of the rounds' "
            "ratios (10th to 90th percentile). CPU time is what the process itself computed: on a machine that does "
            "other things too, wall time holds their turns as well, and a longer graph meets more of them.",
            f"{found['cpu']}, {found['cores_usable']} usable cores, load average {report['load_average']:.1f}. "
            f"{versions}.",
        ]
    )


def words(value: Any) -> list[str]:
    """Return the parts of ``a,b,c``."""
    parts = value if isinstance(value, list) else str(value).split(",")
    return [str(part).strip() for part in parts if str(part).strip()]


if __name__ == "__main__":
    try:
        main()
    except KDYoloError as error:
        sys.exit(str(error))
