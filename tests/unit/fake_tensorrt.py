"""Stand-ins for the module ``tensorrt`` of versions 10 and 11: they record what is asked of a builder, and run engines.

An engine of theirs is the ONNX file behind a mark. It runs in ONNX Runtime and reads and writes at the addresses that
it was given, as the real one does on a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto

MARK = b"FAKE"


class DataType(enum.Enum):
    FLOAT = TensorProto.FLOAT
    HALF = TensorProto.FLOAT16
    INT8 = TensorProto.INT8


class IOMode(enum.Enum):
    INPUT = 0
    OUTPUT = 1


class LayerType(enum.Enum):
    CONVOLUTION = "Conv"
    DEQUANTIZE = "DequantizeLinear"
    OTHER = ""


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class ILogger:
    Severity = Severity

    def log(self, severity: Any, message: str) -> None:
        raise NotImplementedError


class Tensor:
    def __init__(self, name: str, shape: tuple[int, ...], kind: int) -> None:
        self.name, self.shape, self.dtype = name, shape, DataType(kind)


class Network:
    def __init__(self, flags: int) -> None:
        self.flags, self.model = flags, onnx.ModelProto()
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.layers: list[Any] = []

    def fill(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.inputs, self.outputs = (
            [_tensor(item) for item in side] for side in (model.graph.input, model.graph.output)
        )
        for node in model.graph.node:
            kind = LayerType(node.op_type) if node.op_type in {"Conv", "DequantizeLinear"} else LayerType.OTHER
            ends = [[Tensor(name, (), TensorProto.FLOAT) for name in names] for names in (node.input, node.output)]
            layer = SimpleNamespace(type=kind, num_inputs=len(ends[0]))
            layer.get_input, layer.get_output = ends[0].__getitem__, ends[1].__getitem__
            self.layers.append(layer)

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))
    num_layers = property(lambda self: len(self.layers))

    def get_input(self, index: int) -> Tensor:
        return self.inputs[index]

    def get_output(self, index: int) -> Tensor:
        return self.outputs[index]

    def get_layer(self, index: int) -> Any:
        return self.layers[index]


class Config:
    def __init__(self) -> None:
        self.set: list[Any] = []
        self.cleared: list[Any] = []
        self.profiles: list[Any] = []

    def set_flag(self, flag: Any) -> None:
        self.set.append(flag)

    def clear_flag(self, flag: Any) -> None:
        self.cleared.append(flag)

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Any, ...]] = {}

    def set_shape(self, name: str, min: Any, opt: Any, max: Any) -> None:
        self.shapes[name] = (min, opt, max)


class Parser:
    def __init__(self, network: Network, logger: ILogger) -> None:
        self.network, self.num_errors = network, 0

    def parse(self, content: bytes) -> bool:
        self.network.fill(onnx.load_from_string(content))
        return True

    def get_error(self, index: int) -> Any:
        raise IndexError(index)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}
        self.runs = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        given = self.engine.network.inputs[0].shape
        fits = all(a in (-1, b) for a, b in zip(given, shape, strict=True))
        self.shape = tuple(shape) if fits else self.shape
        return fits

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name == self.engine.network.inputs[0].name:
            return self.shape
        outcome: tuple[int, ...] = self.engine.run(np.zeros(self.shape, np.float32)).shape
        return outcome

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.runs += 1
        count = int(np.prod(self.shape))
        entry, exit_ = self.engine.network.inputs[0].name, self.engine.network.outputs[0].name
        pixels = np.ctypeslib.as_array((ctypes.c_float * count).from_address(self.addresses[entry])).reshape(self.shape)
        result = self.engine.run(pixels.copy())
        ctypes.memmove(self.addresses[exit_], result.ctypes.data, result.nbytes)
        return True


class Engine:
    def __init__(self, content: bytes) -> None:
        self.network = Network(0)
        self.network.fill(onnx.load_from_string(content))
        self.session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        self.tensors = {item.name: item for item in (*self.network.inputs, *self.network.outputs)}
        self.num_io_tensors = len(self.tensors)
        self.context = Context(self)

    def run(self, pixels: Any) -> Any:
        return np.ascontiguousarray(self.session.run(None, {self.network.inputs[0].name: pixels})[0])

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> IOMode:
        return IOMode.INPUT if name == self.network.inputs[0].name else IOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.tensors[name].dtype

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def get_tensor_profile_shape(self, name: str, index: int) -> list[Any]:
        return [self.tensors[name].shape] * 3

    def create_execution_context(self) -> Context:
        return self.context


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        if not plan.startswith(MARK):
            self.logger.log(Severity.ERROR, "Serialization assertion failed.\n  magic tag")
            return None
        return Engine(plan.removeprefix(MARK))


def fake_tensorrt(version: str) -> Any:
    """Return a module of a version; ``built`` holds a (network, config) for every engine that was built."""
    built: list[tuple[Network, Config]] = []
    old = version.startswith("10.")
    flags = {"STRONGLY_TYPED": 1} if old else {}  # 11 knows no other networks

    class Builder:
        def __init__(self, logger: ILogger) -> None:
            self.create_network = Network
            self.create_builder_config = Config
            self.create_optimization_profile = Profile

        def build_serialized_network(self, network: Network, config: Config) -> bytes:
            built.append((network, config))
            content: bytes = network.model.SerializeToString()
            return MARK + content

    return SimpleNamespace(
        __name__="tensorrt",
        __version__=version,
        built=built,
        Builder=Builder,
        Runtime=Runtime,
        OnnxParser=Parser,
        ILogger=ILogger,
        LayerType=LayerType,
        TensorIOMode=IOMode,
        NetworkDefinitionCreationFlag=SimpleNamespace(**flags),
        BuilderFlag=enum.Enum("BuilderFlag", ["TF32", "FP16", "INT8"] if old else ["TF32"]),
    )


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (8, 6)) -> list[str]:
    """Let PyTorch say that there is a GPU, and take CPU memory for its memory; return a log of waits."""
    log: list[str] = []

    class Stream:
        cuda_stream = 7

        def __init__(self, device: Any = None) -> None:
            return

        def wait_stream(self, other: Any) -> None:
            log.append("wait")

        def synchronize(self) -> None:
            log.append("synchronize")

    @contextlib.contextmanager
    def nothing(*given: Any, **named: Any) -> Iterator[None]:
        yield

    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: "Pretended GPU",
        "mem_get_info": lambda device=None: (3_000_000, 8_000_000),
        "synchronize": lambda device=None: log.append("synchronize"),
        "current_stream": lambda device=None: Stream(),
        "Stream": Stream,
        "stream": nothing,
        "device": nothing,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return log


def _tensor(item: Any) -> Tensor:
    kind = item.type.tensor_type
    return Tensor(item.name, tuple(side.dim_value or -1 for side in kind.shape.dim), kind.elem_type)
