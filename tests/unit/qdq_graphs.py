"""Quantized graphs as ONNX Runtime's quantizer makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from kd_yolo.export.onnx_graph import sort_nodes
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.transformers.float16 import convert_float_to_float16

from kd_yolo.images import textured_images, to_canvas


class Images(CalibrationDataReader):  # type: ignore[misc]
    """Textured images, one a call."""

    def __init__(self, name: str, side: int) -> None:
        pixels = to_canvas(textured_images(4, (side, side), seed=5), (side, side)).numpy()
        self.rest = [{name: np.ascontiguousarray(image[None])} for image in pixels]

    def get_next(self) -> dict[str, Any] | None:
        return self.rest.pop() if self.rest else None


def quantize_graph(source: Path, out: Path, **given: Any) -> Path:
    """Quantize an ONNX file, by default to what TensorRT takes; ``given`` overrides settings and extra options."""
    extra = {
        "ActivationSymmetric": given.pop("symmetric", True),
        "WeightSymmetric": True,
        "QuantizeBias": given.pop("bias", False),
        "OpTypesToExcludeOutputQuantization": ["Conv"],
    }
    entry = onnx.load(source).graph.input[0]
    quantize_static(
        str(source),
        str(out),
        Images(entry.name, entry.type.tensor_type.shape.dim[2].dim_value),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=given.pop("activations", QuantType.QInt8),
        weight_type=QuantType.QInt8,
        op_types_to_quantize=given.pop("operators", ["Conv"]),
        extra_options=extra,
    )
    return _named(onnx.load(out), out, "int8")


def halve_graph(source: Path, out: Path) -> Path:
    """Convert an ONNX file to float16 inside, as Ultralytics' exporter does."""
    return _named(convert_float_to_float16(onnx.load(source), keep_io_types=True), out, "fp16")


def _named(model: onnx.ModelProto, out: Path, precision: str) -> Path:
    """Write a graph whose metadata was copied from that of the float32 one."""
    for entry in model.metadata_props:
        if entry.key == "kd_yolo":
            entry.value = entry.value.replace('"precision": "fp32"', f'"precision": "{precision}"')
    sort_nodes(model.graph)
    onnx.save(model, out)
    return out
