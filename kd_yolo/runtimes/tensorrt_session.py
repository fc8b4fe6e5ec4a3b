"""Engines of TensorRT and of TensorRT for RTX on a CUDA device; their header is read without any of both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_yolo.devices import parse_device
from kd_yolo.errors import ConfigError, ModelError
from kd_yolo.runtimes.base import METADATA_KEY, Description, Session, check_signature, description_of
from kd_yolo.runtimes.tensorrt_header import read_header
from kd_yolo.runtimes.tensorrt_package import PACKAGES, deserialize, dtype_name, load_package

FORMATS = {"tensorrt": "engine", "tensorrt-rtx": "rtx"}
CUDA_GRAPH = "cuda-graph"


@dataclass(frozen=True)
class Loaded:
    """An engine on a device.

    Attributes:
        trt: The module ``tensorrt`` or ``tensorrt_rtx``.
        runtime: ``tensorrt`` or ``tensorrt-rtx``.
        engine: ``ICudaEngine``.
        context: Its ``IExecutionContext``.
        device: Where it is.
        free_bytes: Memory of the device that was free before.
        graph: Whether a CUDA graph is replayed.
        keep: What must live as long.
    """

    trt: Any
    runtime: str
    engine: Any
    context: Any
    device: torch.device
    free_bytes: int
    graph: bool
    keep: Any


class TensorRTSession(Session):
    """An engine on a CUDA device: its own stream, buffers that stay, optionally replayed from one CUDA graph."""

    def __init__(self, loaded: Loaded, description: Description, canvas: tuple[int, int]) -> None:
        """Take a loaded engine; see ``open_session``."""
        self.loaded, self.description, self.canvas = loaded, description, canvas
        self.engine, self.context, self.device = loaded.engine, loaded.context, loaded.device
        self.runtime = f"{loaded.runtime} {loaded.trt.__version__}" + (f" {CUDA_GRAPH}" if loaded.graph else "")
        inputs, outputs = _names(loaded.trt, loaded.engine)
        self.entry, self.exit = inputs[0], outputs[0]
        self.stream = torch.cuda.Stream(self.device)
        self.buffers: dict[str, Tensor] = {}
        # TensorRT for RTX captures by itself; plain TensorRT is recorded here, once per shape.
        self.records = loaded.graph and loaded.runtime == "tensorrt"
        self.graph: Any = None

    @torch.inference_mode()
    def infer(self, pixels: Tensor) -> Tensor:
        """Run the engine; see ``Session.infer``.

        A dynamic engine takes more images than it was built for in portions. The result lies where the pixels lie.
        """
        most = self.description.batch
        if self.description.dynamic and len(pixels) > most:
            return torch.cat([self.infer(part) for part in pixels.split(most)])
        with torch.cuda.device(self.device):
            if not self.buffers or self.buffers[self.entry].shape != pixels.shape:
                self._bind(tuple(pixels.shape))
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.buffers[self.entry].copy_(pixels, non_blocking=True)
                if self.graph is None:
                    self._enqueue()
                else:
                    self.graph.replay()
                # A copy: the next call writes to the same buffer. To the CPU it waits until the engine is done.
                result = self.buffers[self.exit].to(pixels.device, torch.float32, copy=True)
            torch.cuda.current_stream().wait_stream(self.stream)
            if result.is_cuda:
                result.record_stream(torch.cuda.current_stream())
        return result

    def sync(self) -> None:
        """Wait until the device is idle."""
        torch.cuda.synchronize(self.device)

    def peak_device_memory_mb(self) -> float | None:
        """Return what the device has less free since the engine came: weights, activations and buffers stay."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(0.0, (self.loaded.free_bytes - free) / 1e6)

    def _bind(self, shape: tuple[int, ...]) -> None:
        """Make the buffers of an input shape, and record its CUDA graph if one is wanted."""
        self.graph = None
        if not self.context.set_input_shape(self.entry, shape):
            raise ConfigError(
                f"{self.runtime}: the engine does not take an input of {'x'.join(map(str, shape))}; it was built for "
                f"{self._accepted()}"
            )
        for name in (self.entry, self.exit):
            dtype = getattr(torch, dtype_name(self.engine.get_tensor_dtype(name)))
            lengths = tuple(self.context.get_tensor_shape(name))
            self.buffers[name] = torch.empty(lengths, dtype=dtype, device=self.device)
            self.context.set_tensor_address(name, self.buffers[name].data_ptr())
        if not self.records:
            return
        with torch.cuda.stream(self.stream):
            self._enqueue()  # the first run allocates, which a recording must not
            self.stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                self._enqueue()
        self.graph = graph

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise ModelError(f"{self.runtime}: the engine could not be run; is the device out of memory?")

    def _accepted(self) -> str:
        low, _, high = self.engine.get_tensor_profile_shape(self.entry, 0)
        shapes = ["x".join(map(str, tuple(item))) for item in (low, high)]
        return shapes[0] if shapes[0] == shapes[1] else " to ".join(shapes)


def describe(path: Path, task: str | None = "detect") -> Description:
    """Read the metadata of an engine; neither a GPU nor TensorRT is needed.

    Raises:
        ModelError: As ``read_header`` and ``description_of``, or it is for a runtime that is unknown here.
    """
    return _describe(path, task)[1]


def open_session(
    path: Path,
    imgsz: Any,
    batch: int | None,
    device: str,
    threads: int | None,
    provider: str | None,
    task: str | None = "detect",
) -> TensorRTSession:
    """Open an engine; see ``kd_yolo.runtimes.open_session``.

    Args:
        path: An ``.engine`` file.
        imgsz: Canvas of the calls to come; default the file's own.
        batch: Images per call; default the file's own.
        device: ``cuda`` or a CUDA number.
        threads: Of no use to an engine.
        provider: ``cuda-graph`` replays one recorded CUDA graph instead of starting kernel after kernel; default None.
        task: See ``kd_yolo.runtimes.open_session``.

    Raises:
        ModelError: The header is damaged, or the engine is for another GPU or another version of TensorRT.
        ConfigError: There is no CUDA device, or it cannot take that canvas or batch.
        BackendMissingError: The package that runs it is missing.
    """
    if provider not in {None, CUDA_GRAPH}:
        raise ConfigError(f"provider={provider}: an engine is its own provider; leave it out, or use {CUDA_GRAPH}")
    offset, description = _describe(path, task)
    canvas = description.check(path, imgsz, batch)
    _check_profile(path, description, canvas)
    chosen = _cuda_device(path, device)
    _check_capability(path, description, chosen)
    name = _runtime(description.own, path)
    trt = load_package(name, str(path))
    _check_version(path, description, trt)
    with torch.cuda.device(chosen):
        torch.cuda.current_stream()  # creates the context of the device, which is no memory of the engine
        free_bytes, _ = torch.cuda.mem_get_info(chosen)
        engine, keep = deserialize(trt, path.read_bytes()[offset:], path)
        _check_shapes(path, description, trt, engine)
        graph = provider == CUDA_GRAPH
        context = _context(trt, engine, name, graph)
    if context is None:
        raise ModelError(f"{path}: {name} {trt.__version__} cannot run it ({keep[1].first_error()})")
    return TensorRTSession(Loaded(trt, name, engine, context, chosen, free_bytes, graph, keep), description, canvas)


def _describe(path: Path, task: str | None) -> tuple[int, Description]:
    offset, metadata = read_header(path)
    own = metadata.get(METADATA_KEY) or {}
    return offset, description_of(FORMATS[_runtime(own, path)], metadata, path, task)


def _runtime(own: dict[str, Any], path: Path) -> str:
    """Return the runtime of an engine; what Ultralytics wrote is for TensorRT itself."""
    name = str(own.get("runtime", "tensorrt"))
    if name not in PACKAGES:
        raise ModelError(f"{path}: is for the runtime '{name}', unknown here (known: {', '.join(PACKAGES)})")
    return name


def _cuda_device(path: Path, device: str) -> torch.device:
    if not torch.cuda.is_available():
        raise ConfigError(
            f"{path}: an engine runs on an NVIDIA GPU alone, and PyTorch sees none here; use format=onnx or "
            "format=openvino on this machine"
        )
    chosen = parse_device(device)
    if chosen.type != "cuda":
        raise ConfigError(f"{path}: device={device}: an engine runs on an NVIDIA GPU alone; use device=0")
    return chosen


def _check_capability(path: Path, description: Description, device: torch.device) -> None:
    built = description.own.get("compute_capability")
    here = ".".join(map(str, torch.cuda.get_device_capability(device)))
    if built is not None and str(built) != here:
        raise ModelError(
            f"{path}: was built for compute capability {built}, but {torch.cuda.get_device_name(device)} has {here}; "
            "export it again for this GPU"
        )


def _check_version(path: Path, description: Description, trt: Any) -> None:
    """Refuse an engine of another release: TensorRT reads only its own, and says so less clearly."""
    wrote, ours = description.own.get("tensorrt"), str(trt.__version__)
    if wrote is not None and str(wrote).split(".")[:3] != ours.split(".")[:3]:
        raise ModelError(
            f"{path}: was built with {trt.__name__} {wrote}, but {ours} is installed, which cannot read it; export it "
            f"again, or install {trt.__name__} {wrote}"
        )


def _check_profile(path: Path, description: Description, canvas: tuple[int, int]) -> None:
    """Refuse a canvas that a dynamic engine was not built for."""
    profile = description.own.get("profile")
    if not description.dynamic or not profile:
        return
    low, high = profile["min"][2:], profile["max"][2:]
    if any(not least <= side <= most for least, side, most in zip(low, canvas, high, strict=True)):
        raise ConfigError(
            f"{path}: takes a canvas from {low[0]}x{low[1]} to {high[0]}x{high[1]}, not {canvas[0]}x{canvas[1]}; "
            "export it again for that one"
        )


def _check_shapes(path: Path, description: Description, trt: Any, engine: Any) -> None:
    """Compare the engine's own shapes with the metadata before it."""
    inputs, outputs = (
        [[None if side < 0 else int(side) for side in engine.get_tensor_shape(name)] for name in names]
        for names in _names(trt, engine)
    )
    check_signature(description, inputs, outputs, path)


def _names(trt: Any, engine: Any) -> tuple[list[str], list[str]]:
    """Return the names of inputs and of outputs."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    return inputs, [name for name in names if name not in inputs]


def _context(trt: Any, engine: Any, runtime: str, graph: bool) -> Any:
    """Return an execution context, or None when there is not enough memory."""
    if runtime != "tensorrt-rtx":
        return engine.create_execution_context()
    config = engine.create_runtime_config()
    # By default a new shape first runs on slower kernels while its own are compiled, at a time nobody can foresee.
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    if graph:
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return engine.create_execution_context(config)
