"""Post-training int8 quantization of ONNX files, as accurate as it was asked to be or not at all."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from kd_yolo.export.calibration import calibration_pixels
from kd_yolo.export.int8 import Int8Report, Judge, LayerError, quantize
from kd_yolo.export.int8_graph import (
    Network,
    Placement,
    followed_by_silu,
    place_at_inputs,
    place_everywhere,
    quantized_model,
    read_network,
)
from kd_yolo.export.int8_ranges import Scale, Statistics, asymmetric_scale, collect, silu, symmetric_scale
from kd_yolo.export.sensitivity import IMAGES, Outputs, rank_layers
from numpy.typing import NDArray

from kd_yolo.errors import ConfigError, ExportError
from kd_yolo.files import written_aside
from kd_yolo.images import spread
from kd_yolo.runtimes.base import METADATA_KEY

CPU, TENSORRT = "cpu", "tensorrt"


@dataclass
class OnnxQuantizer:
    """An ONNX network, its ranges, and the int8 files that can be made of them.

    Attributes:
        network: The float graph.
        files: Calibration images.
        canvas: Height and width in pixels.
        channels: Channels of an image.
        scheme: ``cpu`` or ``tensorrt``.
        scales: Scale of every tensor that can be quantized.
        candidates: Layers that can be int8 without touching the head's outputs.
    """

    network: Network
    files: list[Path]
    canvas: tuple[int, int]
    channels: int
    scheme: str
    scales: dict[str, Scale] = field(default_factory=dict)

    def __post_init__(self) -> None:
        heads = set(self.network.heads)
        self.candidates = [name for name in self.network.layers if name not in heads]
        shape = self.network.model.graph.input[0].type.tensor_type.shape.dim
        self.batch = int(shape[0].dim_value) or 1
        everywhere = self.place(self.network.layers)
        # A smaller choice of layers quantizes no tensor that the largest does not, so that one measurement is enough.
        owners = list(dict.fromkeys(everywhere.tensors.values()))
        statistics = self._statistics(owners)
        scales = {name: self._scale(name, statistics[name]) for name in owners}
        self.scales = {name: scales[owner] for name, owner in everywhere.tensors.items()}

    @classmethod
    def of(
        cls, source: Path, files: list[Path], canvas: tuple[int, int], channels: int = 3, scheme: str = CPU
    ) -> OnnxQuantizer:
        """Read a float32 file and measure its ranges."""
        return cls(read_network(source), files, canvas, channels, scheme)

    def write(self, path: Path, layers: Collection[str]) -> None:
        """Write the file in which these layers are int8."""
        onnx.save(self.model(layers), path)

    def place(self, layers: Collection[str]) -> Placement:
        """Return where the quantizers go when these layers are int8."""
        return (place_everywhere if self.scheme == CPU else place_at_inputs)(self.network, layers)

    def model(self, layers: Collection[str]) -> Any:
        """Return the model in which these layers are int8."""
        model = quantized_model(self.network, self.place(layers), self.scales, int_bias=self.scheme == CPU)
        for entry in model.metadata_props:
            if entry.key == METADATA_KEY:
                entry.value = json.dumps(json.loads(entry.value) | {"precision": "int8"})
        return model

    @property
    def layers(self) -> Collection[str]:
        """Convolutions with weights."""
        return self.network.layers

    @property
    def heads(self) -> Collection[str]:
        """Those that make the outputs of the head."""
        return self.network.heads

    def build(self, folder: Path, floats: Sequence[str]) -> Path:
        """Write the file in which these layers are float into a folder; see ``Quantizer``."""
        path = folder / f"{len(floats)}.onnx"
        self.write(path, set(self.candidates) - set(floats))
        return path

    def settings(self) -> dict[str, Any]:
        """Return how the ranges were chosen."""
        cpu = self.scheme == CPU
        return {
            "scheme": self.scheme,
            "weights": "int8, symmetric, per output channel",
            "activations": "uint8 with a zero point, per tensor" if cpu else "int8, symmetric, per tensor",
            "biases": "int32" if cpu else "float32",
            "ranges": "least squared error; before SiLU, of what it makes",
            "canvas": list(self.canvas),
            "sensitivity_images": IMAGES,
            "onnxruntime": onnxruntime.__version__,
        }

    def rank(self) -> list[LayerError]:
        """Return the layers by the noise that each makes alone."""
        images = list(calibration_pixels(spread(self.files, IMAGES), self.canvas, self.channels, self.batch))
        wanted = self._head_outputs(self.network.model, images)
        return rank_layers(self.candidates, wanted, lambda layer: self._head_outputs(self.model({layer}), images))

    def _statistics(self, names: list[str]) -> dict[str, Statistics]:
        entry = self.network.model.graph.input[0].name
        made = [name for name in names if name != entry]
        session = _session(self.network.model, made)

        def run(batch: NDArray[np.float32]) -> list[NDArray[np.float32]]:
            results = dict(zip(made, session.run(made, {entry: batch}), strict=True)) | {entry: batch}
            return [results[name] for name in names]

        return collect(run, names, lambda: calibration_pixels(self.files, self.canvas, self.channels, self.batch))

    def _scale(self, name: str, statistics: Statistics) -> Scale:
        # What a SiLU reads matters only for what it makes: all its large negative values become nearly 0.
        after = silu if followed_by_silu(self.network, name) else None
        return (asymmetric_scale if self.scheme == CPU else symmetric_scale)(statistics, after)

    def _head_outputs(self, model: Any, images: Sequence[NDArray[np.float32]]) -> Outputs:
        names = [self.network.layers[name].output[0] for name in self.network.heads]
        session = _session(model, names)
        entry = session.get_inputs()[0].name
        return [session.run(names, {entry: batch}) for batch in images]


def quantize_onnx(
    source: Path,
    out: Path,
    calibration: Sequence[Path],
    judge: Judge,
    float_map: float,
    max_drop: float,
    canvas: tuple[int, int],
    channels: int = 3,
    scheme: str = CPU,
) -> Int8Report:
    """Quantize a float32 ONNX file; keep the most sensitive layers in float until it loses at most ``max_drop``.

    Scheme ``cpu``: uint8 activations with a zero point, int8 weights per output channel, int32 biases, quantizers
    around everything between two convolutions: what ONNX Runtime computes in 8 bits without going back to float.
    Scheme ``tensorrt``: int8 activations without a zero point, no quantized biases, quantizers before convolutions
    only: TensorRT takes no other zero point and fuses across them itself.

    Args:
        source: The float32 file, exported and proven.
        out: Where the int8 file goes; written only when it holds the bound.
        calibration: Training images, best a ``Calibration``.
        judge: Returns the mAP50-95, 0 to 1, of an ONNX file.
        float_map: That of ``source``.
        max_drop: Points of mAP50-95 that the file may lose.
        canvas: Height and width in pixels that the ranges are measured on.
        channels: Channels of an image, 3 or 1.
        scheme: ``cpu`` or ``tensorrt``.

    Raises:
        ConfigError: The scheme is unknown.
        DataError: A calibration image cannot be read.
        ExportError: The source is not a float32 graph of convolutions, or the bound cannot be held.
        OutputError: The file cannot be written.
    """
    if scheme not in {CPU, TENSORRT}:
        raise ConfigError(f"scheme={scheme}: must be {CPU} or {TENSORRT}")
    quantizer = OnnxQuantizer.of(source, list(calibration), canvas, channels, scheme)

    def publish(made: Path) -> None:
        with written_aside(out) as aside:
            aside.write_bytes(made.read_bytes())

    return quantize("onnx", quantizer, calibration, publish, judge, float_map, max_drop)


def _session(model: Any, outputs: Sequence[str]) -> Any:
    """Open a model with these tensors as its outputs."""
    copy = type(model).FromString(model.SerializeToString())
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's classes share no public base
        raise ExportError(f"int8: ONNX Runtime refuses the graph ({str(error).splitlines()[0][:200]})") from error
