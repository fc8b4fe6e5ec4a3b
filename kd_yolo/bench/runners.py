"""Run an artifact the way its user would: letterbox, network, selection, boxes back in image pixels."""

from __future__ import annotations

import ast
import contextlib
import copy
import itertools
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import scale_boxes
from ultralytics.utils.torch_utils import get_flops

from kd_yolo.bench.complexity import onnx_complexity
from kd_yolo.checkpoints import load_model
from kd_yolo.errors import BackendMissingError, ConfigError, ModelError
from kd_yolo.images import Image, to_canvas
from kd_yolo.inference import (
    CONFIDENCE,
    MAX_DETECTIONS,
    NMS_IOU,
    channels_of,
    check_canvas,
    count_parameters,
    deployed_form,
    head_of,
    max_stride,
    uses_nms,
)
from kd_yolo.provenance import head_name

SUFFIXES = (".pt", ".onnx")


class Runner(ABC):
    """One artifact, opened and ready.

    Attributes:
        runtime: For example ``torch eager`` or ``onnxruntime CPUExecutionProvider``.
        precision: ``fp32`` or ``fp16``.
        head: ``nms`` or ``nms-free``; with `` inside`` when the file holds the NMS.
        canvas: Height and width in pixels.
        params: Weights that run.
        gflops: Operations for one image, in 10^9, two per multiply-add.
    """

    runtime: str
    precision: str
    head: str
    canvas: tuple[int, int]
    params: int
    gflops: float
    channels: int = 3

    @abstractmethod
    def infer(self, pixels: Tensor) -> Tensor:
        """Run the network on (B, C, H, W) and return its decoded output."""

    def preprocess(self, images: list[Image]) -> Tensor:
        """Letterbox decoded images onto the canvas."""
        return to_canvas(images, self.canvas, self.channels)

    def postprocess(self, output: Tensor, images: list[Image]) -> list[Tensor]:
        """Select detections and return them in pixels of the images, (n, 6) each."""
        found = non_max_suppression(
            output,
            CONFIDENCE,
            NMS_IOU,
            max_det=MAX_DETECTIONS,
            end2end=self.head != "nms",
            max_time_img=1e6,  # its default gives up on a slow machine and would time something else
        )
        for rows, image in zip(found, images, strict=True):
            rows[:, :4] = scale_boxes(self.canvas, rows[:, :4], image.shape)
        return list(found)

    def sync(self) -> None:
        """Wait until the device is idle."""
        return

    def peak_device_memory_mb(self) -> float | None:
        """Return the device memory used at most, in 10^6 bytes, or None without a device of its own."""
        return None

    def stages(self, images: list[Image], batch: int) -> list[Callable[[Any], Any]]:
        """Return pre-processing, inference and post-processing over an endless stream of batches of the images."""
        endless = itertools.cycle(images)
        current: list[Image] = []

        def first(_: Any) -> Tensor:
            current[:] = itertools.islice(endless, batch)
            return self.preprocess(current)

        return [first, self.infer, lambda output: self.postprocess(output, current)]


class TorchRunner(Runner):
    """A checkpoint in its deployed form, fused, in PyTorch's eager mode."""

    def __init__(self, path: Path, imgsz: int | None, batch: int, device: torch.device, trust: bool) -> None:
        """Load, merge and fuse; see ``open_runner``."""
        source, _ = load_model(path, trust=trust)
        self.canvas = check_canvas(source.args["imgsz"] if imgsz is None else imgsz, max_stride(source))
        nms = head_of(source).cv2 is not None
        self.deployed, _ = deployed_form(source, nms, str(path))
        model = copy.deepcopy(self.deployed).fuse(verbose=False).eval().requires_grad_(False).to(device)
        # What Ultralytics' own predictor does on these devices.
        if device.type == "cuda" or (device.type == "cpu" and platform.machine() in {"AMD64", "x86_64"}):
            model = model.to(memory_format=torch.channels_last)
        self.model, self.device = model, device
        self.runtime, self.precision = "torch eager", "fp32"
        self.head = head_name(uses_nms(model))
        self.channels = channels_of(model)
        self.params = count_parameters(model)
        self.gflops = float(get_flops(model, list(self.canvas)))

    def preprocess(self, images: list[Image]) -> Tensor:
        """Letterbox decoded images and copy them to the device."""
        return super().preprocess(images).to(self.device)

    @torch.inference_mode()
    def infer(self, pixels: Tensor) -> Tensor:
        """Run the network."""
        output: Tensor = self.model(pixels)[0]
        return output

    @torch.inference_mode()
    def postprocess(self, output: Tensor, images: list[Image]) -> list[Tensor]:
        """Select detections on the device."""
        return super().postprocess(output, images)

    def sync(self) -> None:
        """Wait for CUDA."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_device_memory_mb(self) -> float | None:
        """Return what PyTorch's allocator held at most."""
        return torch.cuda.max_memory_allocated(self.device) / 1e6 if self.device.type == "cuda" else None


class OnnxRunner(Runner):
    """An ONNX file in ONNX Runtime."""

    def __init__(self, path: Path, imgsz: int | None, batch: int, device: torch.device) -> None:
        """Open a session on exactly the wanted provider; see ``open_runner``."""
        self.session = onnx_session(path, device)
        self.runtime = f"onnxruntime {self.session.get_providers()[0]}"
        entry = self.session.get_inputs()[0]
        meta = self.session.get_modelmeta().custom_metadata_map
        if meta.get("task", "detect") != "detect" or len(entry.shape) != 4:
            raise ModelError(
                f"{path}: is not a detector that Ultralytics or kd-yolo exported (task {meta.get('task')})"
            )
        self.entry, self.dtype = entry.name, torch.float16 if "float16" in entry.type else torch.float32
        arguments = _literal(meta.get("args"), {})
        self.precision = "fp16" if self.dtype is torch.float16 or arguments.get("quantize") == 16 else "fp32"
        inside = bool(arguments.get("nms"))
        free = str(meta.get("end2end", "False")) == "True"
        self.head = "nms inside" if inside else head_name(not free)
        self.channels = int(meta.get("channels", 3))
        fixed_batch, _, height, width = entry.shape
        own = (height, width) if isinstance(height, int) and isinstance(width, int) else None
        recorded = _literal(meta.get("imgsz"), None)
        wanted = imgsz if imgsz is not None else own or recorded or 640
        self.canvas = check_canvas(wanted, int(meta.get("stride", 32)))
        if own is not None and self.canvas != own:
            raise ConfigError(
                f"{path}: its canvas is fixed at {own[0]}x{own[1]}; use imgsz={own[0]} or export it again"
            )
        if isinstance(fixed_batch, int) and fixed_batch != batch:
            raise ConfigError(
                f"{path}: its batch is fixed at {fixed_batch}; use batch={fixed_batch} or export it again"
            )
        self.params, self.gflops = onnx_complexity(path, self.canvas)

    def infer(self, pixels: Tensor) -> Tensor:
        """Run the graph."""
        result = self.session.run(None, {self.entry: pixels.to(self.dtype).numpy()})[0]
        return torch.from_numpy(result)


def open_runner(path: Path, imgsz: int | None, batch: int, device: str, trust: bool = False) -> Runner:
    """Open an artifact by its suffix.

    Args:
        path: ``.pt`` or ``.onnx``.
        imgsz: Side of the canvas, or None for the artifact's own.
        batch: Images per call.
        device: ``cpu``, ``cuda`` or a CUDA number.
        trust: Load foreign classes from a checkpoint.

    Raises:
        ModelError: Not a file that can be benchmarked.
        ConfigError: A canvas, batch or device that cannot be had.
        BackendMissingError: The runtime, or the wanted provider of it, is missing.
    """
    chosen = parse_device(device)
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    if path.suffix == ".pt":
        return TorchRunner(path, imgsz, batch, chosen, trust)
    if path.suffix == ".onnx":
        return OnnxRunner(path, imgsz, batch, chosen)
    raise ModelError(f"{path}: cannot be benchmarked (known: {', '.join(SUFFIXES)})")


def parse_device(device: str) -> torch.device:
    """Return a device.

    Raises:
        ConfigError: It is unknown, or not there.
    """
    name = str(device).strip().lower()
    if name == "cpu":
        return torch.device("cpu")
    number = name.removeprefix("cuda").removeprefix(":") or "0"
    if not number.isdigit():
        raise ConfigError(f"device={device}: unknown; use cpu, or a CUDA number such as 0")
    if not torch.cuda.is_available() or int(number) >= torch.cuda.device_count():
        raise ConfigError(f"device={device}: PyTorch sees {torch.cuda.device_count()} CUDA devices; use device=cpu")
    return torch.device("cuda", int(number))


def onnx_session(path: Path, device: torch.device) -> Any:
    """Open a session that runs on the wanted provider or not at all.

    Raises:
        BackendMissingError: ONNX Runtime or the provider is missing, or the session fell back to another one.
        ModelError: The file cannot be opened.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendMissingError(f"{path}: needs onnxruntime; run: pip install 'kd-yolo[onnx]'") from error
    wanted = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        raise BackendMissingError(
            f"{path}: this ONNX Runtime has no {wanted} (it has {', '.join(onnxruntime.get_available_providers())}); "
            "install onnxruntime-gpu, or use device=cpu"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    providers: list[Any] = [(wanted, {"device_id": device.index})] if device.type == "cuda" else [wanted]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's classes share no public base
        raise ModelError(f"{path}: ONNX Runtime cannot open it ({str(error).splitlines()[0][:200]})") from error
    session.disable_fallback()
    active = session.get_providers()[0]
    if active != wanted:
        raise BackendMissingError(f"{path}: {wanted} was asked for, but ONNX Runtime fell back to {active}")
    return session


def _literal(text: str | None, default: Any) -> Any:
    """Read a metadata value as Ultralytics wrote it."""
    if text is None:
        return default
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    return default
