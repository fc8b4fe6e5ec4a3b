"""Run an artifact the way its user would: letterbox, network, selection, boxes back in image pixels."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kd_yolo.bench.complexity import onnx_complexity
from kd_yolo.bench.layers import Layer, onnx_layers
from kd_yolo.errors import ConfigError, ModelError, nearest
from kd_yolo.images import Image, to_canvas
from kd_yolo.inference import postprocess
from kd_yolo.runtimes import Session, artifact_format, open_session
from kd_yolo.runtimes.anomaly_session import is_anomaly_file

TORCH_MODES = ("eager", "compile", "cudagraph")
RUNTIMES = {
    "pt": (*TORCH_MODES, *(f"{mode}-fp16" for mode in TORCH_MODES)),
    "onnx": ("cpu", "cuda", "tensorrt", "openvino"),
    "engine": ("cuda-graph",),
}
"""What may follow the @ behind a file of a format; the first is the default of a checkpoint."""
GPU_RUNTIMES = ("cuda", "tensorrt", "cuda-graph")


@dataclass(frozen=True)
class Choice:
    """A file and how it is run.

    Attributes:
        path: The file or folder.
        runtime: A name of ``RUNTIMES``, or None for the default.
    """

    path: Path
    runtime: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.runtime is None else f"{self.path}@{self.runtime}"


class Runner(ABC):
    """One artifact, opened and ready.

    Attributes:
        runtime: For example ``torch eager`` or ``onnxruntime CPUExecutionProvider``.
        precision: ``fp32``, ``fp16`` or ``int8``.
        head: ``nms``, ``nms-free`` or ``nms inside``; ``map`` of an anomaly model.
        canvas: Height and width in pixels.
        channels: Channels of an image.
        names: Class names in order.
        params: Weights that run, or None where the format hides them.
        gflops: Operations for one image, in 10^9, two per multiply-add, or None.
        source: SHA-256 of the checkpoint it was made from, or None when it does not say.
    """

    runtime: str
    precision: str
    head: str
    canvas: tuple[int, int]
    channels: int = 3
    names: Sequence[str] = ()
    params: int | None = None
    gflops: float | None = None
    source: str | None = None

    @abstractmethod
    def infer(self, pixels: Tensor) -> Tensor:
        """Run the network on (B, C, H, W) and return its decoded output."""

    def preprocess(self, images: list[Image]) -> Tensor:
        """Letterbox decoded images onto the canvas."""
        return to_canvas(images, self.canvas, self.channels)

    def postprocess(self, output: Tensor, images: list[Image]) -> list[Tensor]:
        """Select detections and return them in pixels of the images, (n, 6) each."""
        return postprocess(output, [image.shape[:2] for image in images], self.canvas, nms=self.head == "nms")

    def sync(self) -> None:
        """Wait until the device is idle."""
        return

    def peak_device_memory_mb(self) -> float | None:
        """Return the device memory used at most, in 10^6 bytes, or None without a device of its own."""
        return None

    def layers(self, batch: int) -> list[Layer] | None:
        """Return what the network computes and moves, or None where the format hides it."""
        return None

    def stages(self, images: list[Image], batch: int) -> list[Callable[[Any], Any]]:
        """Return pre-processing, inference and post-processing over an endless stream of batches of the images."""
        endless = itertools.cycle(images)
        current: list[Image] = []

        def first(_: Any) -> Tensor:
            current[:] = itertools.islice(endless, batch)
            return self.preprocess(current)

        return [first, self.infer, lambda output: self.postprocess(output, current)]


class SessionRunner(Runner):
    """An exported file in its runtime."""

    def __init__(self, path: Path, session: Session) -> None:
        """Take an opened session; see ``open_runner``."""
        description = session.description
        self.path, self.session, self.format = path, session, description.format
        self.runtime, self.precision, self.head = session.runtime, description.precision, description.head
        self.canvas, self.channels = session.canvas, description.channels
        self.names = [description.names[key] for key in sorted(description.names)]
        self.source = description.own.get("source_sha256")
        if self.format == "onnx":
            self.params, self.gflops = onnx_complexity(path, self.canvas)

    def infer(self, pixels: Tensor) -> Tensor:
        """Run the graph."""
        return self.session.infer(pixels)

    def sync(self) -> None:
        """Wait for the session's device."""
        self.session.sync()

    def peak_device_memory_mb(self) -> float | None:
        """Return what the session says."""
        return self.session.peak_device_memory_mb()

    def layers(self, batch: int) -> list[Layer] | None:
        """Return the layers of an ONNX graph."""
        return onnx_layers(self.path, self.canvas, batch) if self.format == "onnx" else None


def parse_choice(text: str | Path) -> Choice:
    """Read ``FILE`` or ``FILE@RUNTIME``.

    Raises:
        ModelError: There is no such file, or nothing can run it.
        ConfigError: A runtime that the file's format does not have; the nearest is named.
    """
    whole = Path(text).expanduser()
    name, sign, runtime = str(whole).rpartition("@")
    if whole.exists() or not sign or "/" in runtime:
        kind_of(whole)
        return Choice(whole)
    path = Path(name)
    known = RUNTIMES.get(kind_of(path), ())
    if runtime not in known:
        offered = f"known for it: {', '.join(known)}" if known else "a file of its format runs in one way only"
        raise ConfigError(f"{whole}: unknown runtime '{runtime}' ({offered}){nearest(runtime, known)}")
    return Choice(path, runtime)


def kind_of(path: Path) -> str:
    """Return ``pt`` or the format of an exported file.

    Raises:
        ModelError: There is nothing, or nothing that can be run.
    """
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder")
    return "pt" if path.suffix == ".pt" and path.is_file() else artifact_format(path)


def open_runner(
    choice: Choice,
    imgsz: int | Sequence[int] | None,
    batch: int,
    device: str,
    threads: int | None = None,
    trust: bool = False,
) -> Runner:
    """Open an artifact.

    Args:
        choice: The file, and the runtime if not the default.
        imgsz: Canvas, or None for the artifact's own.
        batch: Images per call.
        device: ``cpu``, ``cuda`` or a CUDA number.
        threads: CPU threads; default PyTorch's number.
        trust: Load foreign classes from a checkpoint.

    Raises:
        ModelError: Not a file that can be benchmarked.
        ConfigError: A canvas, batch, device or runtime that cannot be had.
        BackendMissingError: The runtime, or the wanted provider of it, is missing.
    """
    if is_anomaly_file(choice.path):
        return _open_anomaly(choice, imgsz, batch, device, threads)
    if kind_of(choice.path) == "pt":
        from kd_yolo.bench.torch_runner import open_torch

        return open_torch(choice.path, choice.runtime or TORCH_MODES[0], imgsz, device, trust)
    _check_device(choice, device)
    session = open_session(choice.path, _plain(imgsz), batch, device, threads, choice.runtime)
    return SessionRunner(choice.path, session)


def _open_anomaly(
    choice: Choice, imgsz: int | Sequence[int] | None, batch: int, device: str, threads: int | None
) -> Runner:
    """Open an anomaly checkpoint, eager, or an exported anomaly model."""
    from kd_yolo.bench.anomaly_runner import AnomalyRunner
    from kd_yolo.runtimes.anomaly_session import open_anomaly

    provider = choice.runtime
    if kind_of(choice.path) == "pt":
        if provider not in {None, TORCH_MODES[0]}:
            raise ConfigError(f"{choice}: an anomaly checkpoint runs in PyTorch @eager alone; export it for speed")
        provider = None
    else:
        _check_device(choice, device)
    return AnomalyRunner(choice.path, open_anomaly(choice.path, _plain(imgsz), batch, device, threads, provider))


def _check_device(choice: Choice, device: str) -> None:
    on_gpu = choice.runtime in GPU_RUNTIMES
    if choice.runtime is not None and on_gpu != (device.lower() != "cpu"):
        # Hardware, energy and estimates are recorded for the device of the benchmark.
        raise ConfigError(f"{choice}: runs on {'a GPU; give device=0' if on_gpu else 'the CPU; give device=cpu'}")


def _plain(imgsz: int | Sequence[int] | None) -> int | list[int] | None:
    return imgsz if imgsz is None or isinstance(imgsz, int) else list(imgsz)
