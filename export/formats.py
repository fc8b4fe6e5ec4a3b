"""The formats that an export can have: their names, precisions and the keys that each can honour."""

from __future__ import annotations

from dataclasses import dataclass

from kd_yolo.errors import ConfigError, nearest

DYNAMIC, NMS, NMS_FREE, OPSET, SIMPLIFY = "dynamic", "nms", "nms_free", "opset", "simplify"
SHAPE_KEYS = frozenset({DYNAMIC, NMS, NMS_FREE})
GRAPH_KEYS = SHAPE_KEYS | {OPSET, SIMPLIFY}


@dataclass(frozen=True)
class Format:
    """What an export to one format can do.

    Attributes:
        name: Name of the format, Ultralytics' word for it.
        suffix: How the name of its files or folders ends.
        folder: Whether it is a folder; None where only the exporter knows.
        precisions: Those it has; the first one is what it has without ``quantize=``.
        keys: Keys of ``export`` that change something in it.
        packages: Import names of the packages that make and run it.
        extra: Extra of kd-yolo that installs them.
        checked: Whether a runtime here can prove it.
        max_batch: Most images per call.
    """

    name: str
    suffix: str
    folder: bool | None
    precisions: tuple[str, ...]
    keys: frozenset[str]
    packages: tuple[str, ...] = ()
    extra: str = ""
    checked: bool = True
    max_batch: int | None = None


ALL = ("fp32", "fp16", "int8")
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxslim")
CHECKED = {
    item.name: item
    for item in (
        Format("onnx", ".onnx", False, ALL, GRAPH_KEYS, ONNX_PACKAGES, "onnx"),
        Format("openvino", "_openvino_model", True, ALL, SHAPE_KEYS, ("openvino",), "openvino"),
        Format("engine", ".engine", False, ALL, GRAPH_KEYS | {"target"}, ONNX_PACKAGES, "onnx"),
        Format("torchscript", ".torchscript", False, ("fp32",), SHAPE_KEYS),
        Format("ncnn", "_ncnn_model", True, ("fp32", "fp16"), frozenset(), ("ncnn", "pnnx"), "ncnn", max_batch=1),
        Format("bundle", "_bundle", True, ALL, GRAPH_KEYS, ONNX_PACKAGES, "onnx"),
    )
}
FORMATS = tuple(CHECKED)
"""The formats whose artifacts are proven; Ultralytics' others are passed through unproven."""

ALIASES = {
    "trt": "engine",
    "tensorrt": "engine",
    "ov": "openvino",
    "mlmodel": "coreml",
    "mlpackage": "coreml",
    "mlprogram": "coreml",
    "apple": "coreml",
    "ios": "coreml",
    "huawei": "ascend",
    "cann": "ascend",
    "om": "ascend",
    "vitis": "xilinx",
    "vitisai": "xilinx",
    "versal": "xilinx",
    "tflite": "litert",
}


def find_format(name: str) -> Format:
    """Return a format by its name or one of Ultralytics' aliases.

    Raises:
        ConfigError: It is unknown; the message has the nearest name and the list.
    """
    wanted = str(name).strip().lower()
    wanted = ALIASES.get(wanted, wanted)
    if wanted in CHECKED:
        return CHECKED[wanted]
    others = passthrough_formats()
    if wanted in others:
        return others[wanted]
    if wanted in {"pt", "pytorch", "-"}:
        raise ConfigError(f"format={name}: for a checkpoint of stock classes use kd-yolo deploy")
    known = [*CHECKED, *others]
    hint = nearest(wanted, [*known, *ALIASES])
    raise ConfigError(
        f"format={name}: unknown{hint} (proven: {', '.join(CHECKED)}; passed through to Ultralytics: "
        f"{', '.join(others)})"
    )


def passthrough_formats() -> dict[str, Format]:
    """Return the formats that only Ultralytics' exporter knows, as its own table describes them."""
    from ultralytics.engine.exporter import FP16_FORMATS, FP32_UNSUPPORTED_FORMATS, INT8_FORMATS, export_formats

    table = export_formats()
    found = {}
    for name, suffix, keys in zip(table["Argument"], table["Suffix"], table["Arguments"], strict=True):
        if name in CHECKED or name == "-":
            continue
        supported = (
            ("fp32", name not in FP32_UNSUPPORTED_FORMATS),
            ("fp16", name in FP16_FORMATS),
            ("int8", name in INT8_FORMATS),
        )
        precisions = tuple(precision for precision, there in supported if there) or ("w8a16",)
        known = frozenset(keys) & (GRAPH_KEYS | {"batch", "data"})
        found[str(name)] = Format(
            str(name), str(suffix), None, precisions, known, checked=False, max_batch=None if "batch" in keys else 1
        )
    return found
