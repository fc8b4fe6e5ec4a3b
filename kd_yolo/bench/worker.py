"""One artifact in one process, driven by lines of JSON: ``python -m kd_yolo.bench.worker``.

Runtimes disturb each other inside a process: ONNX Runtime's waiting threads spin and slow a neighbour several times. So
every artifact gets its own process, and while one is being timed the others wait for input and do nothing.

Commands on stdin, one answer each on stdout: ``{"do": "open", ...}``, ``{"do": "warm"}``, ``{"do": "round", ...}``,
``{"do": "stream", ...}``, ``{"do": "memory"}``, ``{"do": "layers"}``, ``{"do": "accuracy", ...}``. The end of stdin
ends the process. What libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from kd_yolo.errors import KDYoloError

RUNTIME_PACKAGES = ("onnxruntime", "openvino", "ncnn", "tensorrt", "tensorrt_rtx")


class Worker:
    """Answers commands about one artifact."""

    def __init__(self) -> None:
        self.commands: dict[str, Callable[..., dict[str, Any]]] = {
            "open": self.open,
            "warm": self.warm,
            "round": self.round,
            "stream": self.stream,
            "layers": self.layers,
            "memory": self.memory,
            "accuracy": self.accuracy,
        }

    def open(self, artifact: str, runtime: str | None, cores: list[int] | None, **spec: Any) -> dict[str, Any]:
        """Bind to cores, import, load and describe.

        Args:
            artifact: Path.
            runtime: How to run it; None for the default.
            cores: Cores to bind to, or None.
            spec: ``imgsz``, ``batch``, ``device``, ``threads`` and ``trust`` as ``open_runner`` takes them, ``images``
                (files, decoded here, so that reading them is not timed) and ``synthetic`` (how many).
        """
        from kd_yolo.bench.affinity import bind

        bind(cores)  # before anything starts a thread
        import cv2
        import torch

        threads = spec["threads"]
        torch.set_num_threads(threads)
        torch.set_num_interop_threads(1)
        cv2.setNumThreads(threads)
        from kd_yolo.bench.runners import Choice, open_runner
        from kd_yolo.bench.timing import StageTimer
        from kd_yolo.images import read_image, textured_images

        self.before_mb = memory_mb()[0]
        self.path, self.batch, self.device = Path(artifact), spec["batch"], spec["device"]
        keys = ("imgsz", "batch", "device", "threads", "trust")
        self.runner = open_runner(Choice(self.path, runtime), **{key: spec[key] for key in keys})
        pictures = [read_image(Path(image)) for image in spec["images"]] + textured_images(spec["synthetic"])
        self.timer = StageTimer(self.runner.stages(pictures, self.batch), self.runner.sync, time.perf_counter)
        self.timer.call()  # fails now, not in the middle of a round
        return self.describe()

    def describe(self) -> dict[str, Any]:
        """Return what the artifact is."""
        from kd_yolo.files import size_mb

        names = ("runtime", "precision", "head", "params", "gflops", "source")
        return {
            **{name: getattr(self.runner, name) for name in names},
            "canvas": list(self.runner.canvas),
            "names": list(self.runner.names),
            "size_mb": size_mb(self.path),
            "environment": environment(self.device),
        }

    def warm(self) -> dict[str, Any]:
        """Call until the time is stable."""
        return asdict(self.timer.warm_up())

    def round(self, calls: int) -> dict[str, Any]:
        """Time some calls."""
        return {"calls": self.timer.round(calls)}

    def stream(self, images: int) -> dict[str, Any]:
        """Push images through on end; return the wall-clock rate and the energy of it."""
        from kd_yolo.bench.energy import open_meter
        from kd_yolo.devices import parse_device

        meter = open_meter(parse_device(self.device))
        calls = -(-images // self.batch)
        before = meter.start()
        seconds = self.timer.stream(calls)
        joules = meter.since(before)
        return {
            "fps": calls * self.batch / seconds,
            "stream_images": calls * self.batch,
            "energy_mj_per_image": None if joules is None else 1e3 * joules / (calls * self.batch),
            "energy_note": meter.name,
        }

    def layers(self) -> dict[str, Any]:
        """Return the layers of the network, or None where the format hides them."""
        found = self.runner.layers(self.batch)
        return {"layers": None if found is None else [asdict(layer) for layer in found]}

    def memory(self) -> dict[str, Any]:
        """Return the largest memory of this process, and what of it came after the imports."""
        peak = memory_mb()[1]
        return {
            "peak_memory_mb": peak,
            "model_memory_mb": max(0.0, peak - self.before_mb),
            "peak_device_memory_mb": self.runner.peak_device_memory_mb(),
        }

    def accuracy(self, data: str, split: str, category: str | None = None) -> dict[str, Any]:
        """Validate the artifact."""
        if self.runner.head == "map":
            from kd_yolo.bench.anomaly_runner import AnomalyRunner, judge_anomaly

            if isinstance(self.runner, AnomalyRunner):
                return judge_anomaly(self.runner, data, category)
        from kd_yolo.bench.accuracy import evaluate

        return asdict(evaluate(self.path, self.runner, data, split, self.device))


def memory_mb() -> tuple[float, float]:
    """Return the memory that this process holds now and held at most, in 10^6 bytes.

    Linux counts the peak for this program alone in /proc; ``getrusage`` there includes the parent it was forked from.
    """
    import psutil

    info = psutil.Process().memory_info()
    now = info.rss / 1e6
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return now, int(line.split()[1]) * 1024 / 1e6
    if sys.platform == "win32":
        return now, info.peak_wset / 1e6
    import resource

    return now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS counts bytes


def environment(device: str) -> dict[str, Any]:
    """Return what the numbers depend on: hardware, threads, versions."""
    import platform

    import cv2
    import psutil
    import torch

    from kd_yolo.devices import parse_device
    from kd_yolo.provenance import versions

    found = {**versions(), "opencv": cv2.__version__}
    loaded = [name for name in RUNTIME_PACKAGES if name in sys.modules]
    for name in loaded:
        found[name] = str(getattr(sys.modules[name], "__version__", "?")).split("-")[0]  # OpenVINO adds its commit
    chosen = parse_device(device)
    affinity = psutil.Process().cpu_affinity() if hasattr(psutil.Process, "cpu_affinity") else None
    return {
        "cpu": cpu_name(),
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_usable": len(affinity) if affinity else psutil.cpu_count(),
        "gpu": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else None,
        "cuda": torch.version.cuda if chosen.type == "cuda" else None,
        "tf32": bool(torch.backends.cudnn.allow_tf32) if chosen.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "affinity": affinity,
        "versions": found,
    }


def cpu_name() -> str:
    """Return the processor's name."""
    import platform

    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def serve(commands: TextIO, answers: TextIO) -> None:
    """Answer commands until there are no more; an error is an answer too."""
    worker = Worker()
    for line in commands:
        request = json.loads(line)
        try:
            answer = worker.commands[request.pop("do")](**request)
        except KDYoloError as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        except Exception as error:  # anything a runtime raises must reach the parent as one line, not as a hang
            text = (str(error).strip().splitlines() or [""])[0]
            answer = {"error": f"{type(error).__name__}: {text}", "kind": "KDYoloError"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


@contextmanager
def own_stdout() -> Iterator[TextIO]:
    """Keep stdout for answers; whatever else writes to it, C libraries included, goes to stderr."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        yield answers


if __name__ == "__main__":
    with suppress(BrokenPipeError), own_stdout() as stream:  # the parent may have been killed
        serve(sys.stdin, stream)
