"""Engines of TensorRT 10 and 11 for the GPU at hand, and of TensorRT for RTX for a GPU that need not be there.

Every precision stands in the ONNX file, none in builder flags: the network is strongly typed, so that TensorRT 10.x,
11.x and TensorRT for RTX compute the same. A float16 file has its casts inside (inputs and outputs stay float32), an
INT8 file holds QuantizeLinear and DequantizeLinear nodes.

What these nodes must be (tried with TensorRT for RTX 1.7.1 on graphs of onnxruntime.quantization, opset 18):

- Activations and weights ``QInt8`` and symmetric (``ActivationSymmetric``, ``WeightSymmetric``), weights per channel. A
  zero point other than 0 is refused by the parser. Unsigned activations with zero point 0 are *taken as signed* with
  only a warning, which computes something else; ``prepare_qdq`` refuses them before that.
- No int32 bias behind a DequantizeLinear (``QuantizeBias=False``), which is refused, and no quantized constants but
  weights: the build fails on the one in yolo26n's attention. ``prepare_qdq``, which ``build_engine`` calls, turns both
  into float constants without changing a bit of what the graph computes.
- Before convolutions only (``op_types_to_quantize=["Conv"]``, ``OpTypesToExcludeOutputQuantization=["Conv"]``): a pair
  between a convolution and its activation stays a rounding in the engine, which costs accuracy and nothing else gains.
- TensorRT for RTX 1.7 fuses a float16 convolution with the SiLU behind it, but makes two kernels of an INT8 one;
  whether INT8 is faster is to be measured on the GPU.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import torch
from kd_yolo.export.tensorrt_plan import inspect_engine, is_readable
from kd_yolo.export.tensorrt_precision import graph_precision, prepare_qdq

from kd_yolo.errors import ConfigError, ExportError
from kd_yolo.runtimes.base import METADATA_KEY
from kd_yolo.runtimes.tensorrt_package import dtype_name, load_package, shared_logger

if TYPE_CHECKING:
    from kd_yolo.targets import Target

__all__ = ["build_engine", "check_target", "inspect_engine", "prepare_qdq", "supported_capabilities"]

PRECISIONS = {"float32": "fp32", "float16": "fp16"}
NMS_NODES = frozenset({"NonMaxSuppression", "NonZero"})
PIXELS_PER_ANCHOR = 1 / (1 / 8**2 + 1 / 16**2 + 1 / 32**2)
"""Of a detector with strides 8, 16 and 32."""


def build_engine(
    onnx_path: Path,
    out: Path,
    target: Target | None,
    metadata: Mapping[str, Any],
    dynamic: bool,
    batch: int,
    canvas: tuple[int, int],
) -> dict[str, Any]:
    """Build an engine from an ONNX file and write it behind a header with the metadata.

    Args:
        onnx_path: float32, float16 or Q/DQ graph with one input (B, C, H, W); its precision is the engine's.
        out: Where to write, under whatever name; the caller renames.
        target: Build with TensorRT for RTX for this GPU, which need not be there; None: with TensorRT for the GPU here.
        metadata: Ultralytics' metadata with our entry ``kd_yolo``, to which ``runtime``, ``tensorrt``,
            ``compute_capability``, ``inputs``, ``outputs``, ``profile`` and ``tf32`` are added.
        dynamic: Batch and canvas are free in the graph.
        batch: Images per call; with ``dynamic`` the largest number.
        canvas: Height and width; with ``dynamic`` those it is tuned for, while all from one stride (for an NMS-free
            head: from where it has as many anchors as rows) to twice as much are taken.

    Returns:
        ``runtime``, ``tensorrt`` (its version), ``compute_capability``, ``inputs`` and ``outputs`` (name -> ``shape``
        with -1 where it is free, ``dtype``), ``profile`` (``min``, ``opt`` and ``max`` shape, or None), ``tf32``
        (whether float32 parts may multiply with 10 bits of mantissa), ``layers`` of the network, ``convolutions`` by
        precision, ``weight_bytes`` by type and ``kernels`` by kind (where the engine could be read), ``build_s``.

    Raises:
        ConfigError: As ``check_target``; there is neither a GPU nor a target; NMS is inside and the target takes none.
        BackendMissingError: The package is missing.
        ExportError: The graph is damaged or not what the arguments say, or TensorRT refuses it.
        ModelError: The engine that was written is not what was to be built.
    """
    runtime = "tensorrt" if target is None else "tensorrt-rtx"
    capability = _local_capability() if target is None else check_target(target)
    trt = load_package(runtime, "format=engine")
    model, precision = _load(onnx_path, metadata, nms=target is None)
    started = time.perf_counter()
    log = shared_logger(trt)
    builder = trt.Builder(log)
    network = _parse(trt, builder, log, model, onnx_path.name)
    config = _config(trt, builder, None if target is None else capability, precision)
    profile = _set_profile(builder, config, network, (batch, *canvas), int(metadata["stride"]) if dynamic else None)
    plan = _serialized(builder, network, config, log, onnx_path.name)
    facts: dict[str, Any] = {"runtime": runtime, "tensorrt": str(trt.__version__), "compute_capability": capability}
    facts |= {**_ends(network), "profile": profile, "tf32": precision != "fp32"}
    _write(out, metadata, facts | {"precision": precision}, plan)
    counted = {"layers": int(network.num_layers), "convolutions": _convolutions(trt, network)}
    return facts | {"build_s": round(time.perf_counter() - started, 3)} | counted | _read_back(out, facts)


def check_target(target: Target) -> str:
    """Return the compute capability of a target that TensorRT for RTX builds for.

    Raises:
        ConfigError: It is a CPU, or has another compute capability.
        BackendMissingError: TensorRT for RTX is not installed.
    """
    known = supported_capabilities()
    if target.compute_capability in known:
        return str(target.compute_capability)
    what = "is no GPU" if target.compute_capability is None else f"has compute capability {target.compute_capability}"
    instead = "use format=onnx or format=openvino" if target.compute_capability is None else "leave target= out there"
    raise ConfigError(
        f"target={target.name}: {target.title} {what}, and TensorRT for RTX builds for {', '.join(known)} alone; "
        f"{instead}"
    )


def supported_capabilities() -> list[str]:
    """Return the compute capabilities that the installed TensorRT for RTX builds for, such as ``8.6``.

    Raises:
        BackendMissingError: It is not installed.
    """
    return list(_capabilities(load_package("tensorrt-rtx", "format=engine target=...")))


def _capabilities(trt: Any) -> dict[str, Any]:
    """Return the members of ``ComputeCapability`` by their usual name: SM86 is 8.6, SM120 is 12.0."""
    members = ((re.fullmatch(r"SM(\d+)(\d)", name), item) for name, item in trt.ComputeCapability.__members__.items())
    found = {f"{match[1]}.{match[2]}": item for match, item in members if match}
    return dict(sorted(found.items(), key=lambda pair: float(pair[0])))


def _local_capability() -> str:
    if not torch.cuda.is_available():
        raise ConfigError(
            "format=engine: PyTorch sees no CUDA GPU here; either run this on the machine that has the GPU, or name it "
            "(target=rtx3070ti and so on, see kd-yolo targets), which builds for TensorRT for RTX without any GPU"
        )
    return ".".join(map(str, torch.cuda.get_device_capability()))


def _network_flags(trt: Any) -> int:
    """Ask TensorRT 10 for a strongly typed network; 11 makes no other, and keeps the flag or not."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _load(path: Path, metadata: Mapping[str, Any], nms: bool) -> tuple[onnx.ModelProto, str]:
    """Read a graph, fit for TensorRT if it is quantized, and the precision that it computes in."""
    try:
        model = onnx.load(path)
    except OSError as error:
        raise ExportError(f"{path.name}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # protobuf's class, which it does not export
        raise ExportError(f"{path.name}: is no ONNX file, or a damaged one ({str(error).splitlines()[0]})") from error
    if not model.graph.node:
        raise ExportError(f"{path.name}: is no ONNX file, or a damaged one (there is no graph in it)")
    if not nms and any(node.op_type in NMS_NODES for node in model.graph.node):
        raise ConfigError(
            "nms=true: TensorRT for RTX takes no NMS inside of the graph; leave it out, or use nms_free=true with a "
            "model that has such a head"
        )
    precision = graph_precision(model)
    wanted = _own_entry(metadata).get("precision", precision)
    if wanted != precision:
        raise ExportError(f"{path.name}: was to be {wanted}, but its graph computes in {precision}")
    return (prepare_qdq(model) if precision == "int8" else model), precision


def _parse(trt: Any, builder: Any, log: Any, model: onnx.ModelProto, name: str) -> Any:
    """Return the network of a graph."""
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model.SerializeToString()):
        reasons = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        reason = " ".join(reasons[0].split())[:300] if reasons else log.first_error()
        raise ExportError(f"{name}: TensorRT does not take this graph ({reason})")
    if network.num_inputs != 1 or len(tuple(network.get_input(0).shape)) != 4:
        raise ExportError(f"{name}: is not a detector with one image input")
    return network


def _config(trt: Any, builder: Any, capability: str | None, precision: str) -> Any:
    """Return the builder's settings: the GPU to build for (None: the one here), and no TF32 in a float32 engine."""
    config = builder.create_builder_config()
    if capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(_capabilities(trt)[capability], 0)
    if precision == "fp32":
        # TF32 multiplies with 10 bits of mantissa, which is not what float32 says, and no parity gate lets through.
        config.clear_flag(trt.BuilderFlag.TF32)
    return config


def _serialized(builder: Any, network: Any, config: Any, log: Any, name: str) -> bytes:
    """Return the built engine."""
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"{name}: TensorRT cannot build an engine from it ({log.first_error()})")
    return bytes(plan)


def _set_profile(
    builder: Any, config: Any, network: Any, shape: tuple[int, int, int], stride: int | None
) -> dict[str, list[int]] | None:
    """Say which shapes an engine must take, and which it is tuned for.

    Args:
        builder: ``IBuilder``.
        config: ``IBuilderConfig``.
        network: The parsed graph.
        shape: Batch, height and width.
        stride: Of a dynamic graph, in pixels; None where all is fixed.
    """
    entry, (batch, height, width) = network.get_input(0), shape
    given, wanted = tuple(entry.shape), (batch, entry.shape[1], height, width)
    if (-1 in given) != (stride is not None) or any(a not in (-1, b) for a, b in zip(given, wanted, strict=True)):
        word = "dynamic" if stride is not None else "fixed"
        raise ExportError(f"the graph takes {given}, which is not {word} with batch {batch} at {height}x{width}")
    if stride is None:
        return None
    rows = tuple(network.get_output(0).shape)[1] if tuple(network.get_output(0).shape)[2] == 6 else 0
    side = max(1, math.ceil(math.sqrt(rows * PIXELS_PER_ANCHOR) / stride)) * stride
    least, most = (1, given[1], min(side, height), min(side, width)), (batch, given[1], 2 * height, 2 * width)
    low, high = (
        [edge if item == -1 else int(item) for item, edge in zip(given, edges, strict=True)] for edges in (least, most)
    )
    profile = builder.create_optimization_profile()
    profile.set_shape(entry.name, tuple(low), wanted, tuple(high))
    if config.add_optimization_profile(profile) < 0:
        raise ExportError(f"TensorRT does not take the shapes {low} to {high}")
    return {"min": low, "opt": [int(item) for item in wanted], "max": high}


def _write(out: Path, metadata: Mapping[str, Any], facts: Mapping[str, Any], plan: bytes) -> None:
    """Write length (4 bytes, little-endian), metadata as JSON and engine, as Ultralytics reads them."""
    header = json.dumps({**metadata, METADATA_KEY: {**_own_entry(metadata), **facts}}, default=str).encode()
    with out.open("wb") as stream:
        stream.write(len(header).to_bytes(4, "little"))
        stream.write(header)
        stream.write(plan)


def _read_back(out: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Prove that the file holds the engine that was asked for, where that can be seen, and return what is in it."""
    if facts["runtime"] == "tensorrt-rtx" and not is_readable(facts["tensorrt"]):
        return {}
    found = inspect_engine(out)
    return {key: found[key] for key in ("weight_bytes", "kernels") if found[key] is not None}


def _own_entry(metadata: Mapping[str, Any]) -> dict[str, Any]:
    own = metadata.get(METADATA_KEY) or {}
    return json.loads(own) if isinstance(own, str) else dict(own)


def _ends(network: Any) -> dict[str, Any]:
    """Return shape and type of the inputs and outputs of a network."""
    return {
        "inputs": _tensors(network.get_input(index) for index in range(network.num_inputs)),
        "outputs": _tensors(network.get_output(index) for index in range(network.num_outputs)),
    }


def _tensors(items: Iterable[Any]) -> dict[str, Any]:
    return {item.name: {"shape": [int(n) for n in item.shape], "dtype": dtype_name(item.dtype)} for item in items}


def _convolutions(trt: Any, network: Any) -> dict[str, int]:
    """Return the number of convolutions by what they multiply: int8 if both sides come from a dequantization."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    quantized = {layer.get_output(0).name for layer in layers if layer.type == trt.LayerType.DEQUANTIZE}
    found: Counter[str] = Counter()
    for layer in layers:
        if layer.type == trt.LayerType.CONVOLUTION:
            sides = [layer.get_input(index) for index in range(layer.num_inputs)]
            both = sum(side is not None and side.name in quantized for side in sides) == 2
            dtype = dtype_name(sides[0].dtype)
            found["int8" if both else PRECISIONS.get(dtype, dtype)] += 1
    return dict(found)
