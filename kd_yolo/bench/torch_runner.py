"""Checkpoints in their deployed form in PyTorch: eager, compiled, or recorded as a CUDA graph."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import get_flops

from kd_yolo.bench.layers import Layer
from kd_yolo.bench.runners import Runner
from kd_yolo.bench.torch_layers import torch_layers
from kd_yolo.checkpoints import load_model
from kd_yolo.devices import parse_device
from kd_yolo.errors import BackendMissingError, ConfigError
from kd_yolo.files import sha256
from kd_yolo.images import Image, to_bytes
from kd_yolo.inference import channels_of, check_canvas, count_parameters, deployed_form, head_of, max_stride, uses_nms
from kd_yolo.provenance import head_name

Forward = Callable[[Tensor], Tensor]
RUNTIME_NAMES = {"eager": "torch eager", "compile": "torch compiled", "cudagraph": "torch CUDA graph"}


class TorchRunner(Runner):
    """A checkpoint in its deployed form, fused."""

    def __init__(self, model: DetectionModel, deployed: DetectionModel, canvas: tuple[int, int], mode: str) -> None:
        """Take a fused model on its device, and the same not fused; see ``open_torch``."""
        parameter = next(model.parameters())
        self.model, self.deployed, self.canvas = model, deployed, canvas
        self.device, self.dtype = parameter.device, parameter.dtype
        self.precision = "fp16" if self.dtype is torch.float16 else "fp32"
        self.head = head_name(uses_nms(model))
        self.channels = channels_of(model)
        self.names = [str(model.names[key]) for key in sorted(model.names)]
        self.params = count_parameters(model)
        self.runtime = RUNTIME_NAMES[mode]
        self.forward: Forward = {"compile": self._compiled, "cudagraph": self._graph}.get(mode, lambda: self._eager)()

    def preprocess(self, images: list[Image]) -> Tensor:
        """Letterbox decoded images, copy their bytes to the device and scale them there."""
        pixels = to_bytes(images, self.canvas, self.channels).to(self.device)
        return pixels.to(self.dtype).div_(255)

    @torch.inference_mode()
    def infer(self, pixels: Tensor) -> Tensor:
        """Run the network."""
        return self.forward(pixels).float()

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

    def layers(self, batch: int) -> list[Layer]:
        """Return the layers of the fused model."""
        return torch_layers(self.model, self.canvas, batch, self.channels)

    def _eager(self, pixels: Tensor) -> Tensor:
        output: Tensor = self.model(pixels)[0]
        return output

    def _compiled(self) -> Forward:
        """Compile the whole network as one graph; a part left to the interpreter would be a silent fallback."""
        compiled = torch.compile(self._eager, fullgraph=True, dynamic=False)
        started: list[bool] = []

        def forward(pixels: Tensor) -> Tensor:
            if started:
                return compiled(pixels)
            try:
                self._eager(pixels)  # the head makes its anchors, which are constants of the graph
                result = compiled(pixels)
            except Exception as error:  # the compiler's classes share no public base
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                raise BackendMissingError(
                    f"torch.compile cannot compile it ({reason}); it needs a C++ compiler on a CPU, Triton on a GPU, "
                    "or use @eager"
                ) from error
            started.append(True)
            return result

        return forward

    def _graph(self) -> Forward:
        """Record the network once and replay it: no launch is decided by the CPU any more."""
        held: dict[str, Tensor] = {}
        graph = torch.cuda.CUDAGraph()

        def record(pixels: Tensor) -> None:
            held["in"] = pixels.clone()
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):  # kernels are chosen and anchors made outside of the recording
                for _ in range(3):
                    self._eager(held["in"])
            torch.cuda.current_stream(self.device).wait_stream(side)
            with torch.cuda.graph(graph):
                held["out"] = self._eager(held["in"])

        def forward(pixels: Tensor) -> Tensor:
            with torch.cuda.device(self.device):
                if not held:
                    record(pixels)
                held["in"].copy_(pixels)
                graph.replay()
            return held["out"]

        return forward


def open_torch(path: Path, runtime: str, imgsz: int | Sequence[int] | None, device: str, trust: bool) -> TorchRunner:
    """Load, merge and fuse a checkpoint.

    Args:
        path: The checkpoint.
        runtime: A name of ``RUNTIMES["pt"]``.
        imgsz: Canvas, or None for the one it was trained at.
        device: ``cpu``, ``cuda`` or a CUDA number.
        trust: Load foreign classes.

    Raises:
        CheckpointError: The file cannot be loaded.
        ConfigError: The canvas or the device cannot be had, or the runtime needs a GPU.
    """
    mode, _, precision = runtime.partition("-")
    chosen = parse_device(device)
    if chosen.type != "cuda" and (mode == "cudagraph" or precision):
        raise ConfigError(f"{path}@{runtime}: needs a CUDA GPU; give device=0, or use @eager or @compile")
    source, _ = load_model(path, trust=trust)
    canvas = check_canvas(source.args["imgsz"] if imgsz is None else imgsz, max_stride(source))
    deployed, _ = deployed_form(source, head_of(source).cv2 is not None, str(path))
    model = copy.deepcopy(deployed).fuse(verbose=False).eval().requires_grad_(False)
    gflops = float(get_flops(model, list(canvas)))
    model = model.to(chosen)
    # What Ultralytics' own predictor does on these devices.
    if chosen.type == "cuda" or (chosen.type == "cpu" and platform.machine() in {"AMD64", "x86_64"}):
        model = model.to(memory_format=torch.channels_last)
    runner = TorchRunner(model.half() if precision else model, deployed, canvas, mode)
    runner.gflops, runner.source = gflops, sha256(path)
    return runner
