"""Post-training int8 quantization of OpenVINO models with NNCF, as accurate as it was asked to be or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from kd_yolo.export.calibration import calibration_pixels
from kd_yolo.export.int8 import Int8Report, Judge, LayerError, quantize
from kd_yolo.export.int8_openvino_graph import ancestors, bounds, is_layer, is_quantizer, tensor_name, xml_file
from kd_yolo.export.int8_ranges import Scale, asymmetric_scale, collect, quantize_weight, weight_scales
from kd_yolo.export.sensitivity import IMAGES, Outputs, rank_layers
from numpy.typing import NDArray

from kd_yolo.errors import BackendMissingError, ExportError
from kd_yolo.files import folder_aside, written_aside
from kd_yolo.images import spread
from kd_yolo.runtimes.base import METADATA_KEY

PLACING_IMAGES = 8  # NNCF places the quantizers; the ranges are ours, so that it need not see all images each time
F32 = {"INFERENCE_PRECISION_HINT": "f32"}  # a CPU with bfloat16 would otherwise measure the layers in bfloat16


class OpenVinoQuantizer:
    """An OpenVINO model and what NNCF makes of it.

    Attributes:
        layers: Convolutions with constant weights by name, those of the decoding left out; in order.
        heads: Those that no other one follows: their outputs are box distances and class logits.
        candidates: The others.
    """

    def __init__(self, source: Path, files: list[Path], canvas: tuple[int, int], channels: int) -> None:
        self.openvino, self.nncf = _packages(source)
        self.xml = xml_file(source)
        self.files, self.canvas, self.channels = files, canvas, channels
        self.core = self.openvino.Core()
        self.scales: dict[str, Scale] = {}
        try:
            self.model = self.core.read_model(self.xml)
        except RuntimeError as error:
            raise ExportError(f"{self.xml}: OpenVINO cannot read it ({str(error).splitlines()[0][:200]})") from error
        ops = self.model.get_ordered_ops()
        self.layers = {op.get_friendly_name(): op for op in ops if is_layer(op)}
        if not self.layers:
            raise ExportError(f"{self.xml}: has no convolution with constant weights; there is nothing to quantize")
        before = ancestors([op.input_value(0).get_node() for op in self.layers.values()])
        self.heads = [name for name in self.layers if name not in before]
        self.candidates = [name for name in self.layers if name in before]
        skipped = {"Constant", "Parameter", "Result"}
        names = {op.get_friendly_name() for op in ops if op.get_type_name() not in skipped}
        self.decoding = sorted(names - before - set(self.layers))
        shape = self.model.input(0).get_partial_shape()
        self.batch = 1 if shape[0].is_dynamic else int(shape[0].get_length())

    def write(self, folder: Path, floats: Collection[str]) -> None:
        """Write the folder of the model in which these layers, the head's and the decoding are float."""
        parameters = self.nncf.AdvancedQuantizationParameters(
            overflow_fix=self.nncf.OverflowFix.DISABLE, disable_bias_correction=True
        )
        with _quiet():
            made = self.nncf.quantize(
                self.model.clone(),
                self.nncf.Dataset(_Images(self.files[:PLACING_IMAGES], self.canvas, self.channels, self.batch)),
                preset=self.nncf.QuantizationPreset.MIXED,
                subset_size=PLACING_IMAGES,
                ignored_scope=self.nncf.IgnoredScope(names=[*self.decoding, *self.heads, *sorted(floats)]),
                advanced_parameters=parameters,
            )
        self._set_ranges(made)
        folder.mkdir(parents=True, exist_ok=True)
        self.openvino.save_model(made, folder / self.xml.name, compress_to_fp16=False)
        for file in self.xml.parent.iterdir():
            if file.suffix not in {".xml", ".bin"} and file.is_file():
                shutil.copy(file, folder / file.name)
        _mark_int8(folder / "metadata.yaml")

    def build(self, folder: Path, floats: Sequence[str]) -> Path:
        """Write the folder in which these layers are float into another one; see ``Quantizer``."""
        made = folder / str(len(floats)) / f"{self.xml.stem}_openvino_model"
        self.write(made, floats)
        return made

    def rank(self) -> list[LayerError]:
        """Return the layers by the noise that each makes alone, with int8 weights and a uint8 input."""
        images = _Images(spread(self.files, IMAGES), self.canvas, self.channels, self.batch)
        inputs = {name: tensor_name(self.layers[name].input_value(0)) for name in self.candidates}
        self._measure(list(dict.fromkeys(inputs.values())))
        outputs = [self.layers[name].output(0) for name in self.heads]
        wanted = self._run(self.openvino.Model(outputs, self.model.get_parameters()), images)

        def outputs_with(name: str) -> Outputs:
            model = self.model.clone()
            ops = {op.get_friendly_name(): op for op in model.get_ordered_ops()}
            self._disturb(ops[name], self.scales[inputs[name]])
            outputs = [ops[head].output(0) for head in self.heads]
            return self._run(self.openvino.Model(outputs, model.get_parameters()), images)

        return rank_layers(self.candidates, wanted, outputs_with)

    def settings(self) -> dict[str, Any]:
        """Return how the model was quantized."""
        return {
            "weights": "int8, symmetric, per output channel",
            "activations": "8 bits, NNCF preset mixed, per tensor",
            "biases": "float32",
            "ranges": "least squared error; NNCF places the quantizers",
            "canvas": list(self.canvas),
            "sensitivity_images": IMAGES,
            "openvino": self.openvino.__version__,
            "nncf": self.nncf.__version__,
        }

    def _measure(self, names: Sequence[str]) -> None:
        """Find the scales of tensors of the float model that have none yet."""
        names = [name for name in names if name not in self.scales]
        if not names:
            return
        known = {tensor_name(value): value for op in self.model.get_ordered_ops() for value in op.outputs()}
        tensors = [known[name] for name in names]
        compiled = self.core.compile_model(self.openvino.Model(tensors, self.model.get_parameters()), "CPU", F32)

        def run(batch: NDArray[np.float32]) -> list[NDArray[np.float32]]:
            results = compiled({0: batch})
            return [results[index] for index in range(len(tensors))]

        images = _Images(self.files, self.canvas, self.channels, self.batch)
        found = collect(run, names, lambda: images)
        self.scales |= {name: asymmetric_scale(statistics) for name, statistics in found.items()}

    def _set_ranges(self, model: Any) -> None:
        """Give the quantizers of activations that NNCF placed our ranges."""
        quantizers = {op: tensor_name(op.input_value(0)) for op in model.get_ops() if is_quantizer(op)}
        self._measure(list(dict.fromkeys(quantizers.values())))
        for op, name in quantizers.items():
            values = [self.openvino.opset13.constant(value) for value in bounds(self.scales[name])]
            for index in range(4):  # input low, input high, output low, output high
                op.input(1 + index).replace_source_output(values[index % 2].output(0))

    def _disturb(self, layer: Any, scale: Scale) -> None:
        """Quantize the input and the weights of one layer in place."""
        opset = self.openvino.opset13
        low, high = bounds(scale)
        quantized = opset.fake_quantize(layer.input_value(0), low, high, low, high, 256)
        layer.input(0).replace_source_output(quantized.output(0))
        weight = layer.input_value(1).get_node().data
        flat = weight.reshape(-1, *weight.shape[2:]) if layer.get_type_name() == "GroupConvolution" else weight
        steps = weight_scales(flat)
        back = quantize_weight(flat, steps) * steps.reshape(-1, *[1] * (flat.ndim - 1))
        constant = opset.constant(back.reshape(weight.shape).astype(np.float32))
        layer.input(1).replace_source_output(constant.output(0))

    def _run(self, model: Any, images: _Images) -> Outputs:
        compiled = self.core.compile_model(model, "CPU", F32)
        return [[results[i] for i in range(len(self.heads))] for results in (compiled({0: b}) for b in images)]


def quantize_openvino(
    source: Path,
    out: Path,
    calibration: Sequence[Path],
    judge: Judge,
    float_map: float,
    max_drop: float,
    canvas: tuple[int, int],
    channels: int = 3,
) -> Int8Report:
    """Quantize an OpenVINO model with NNCF; keep sensitive layers in float until it loses at most ``max_drop``.

    The decoding and the head's output convolutions are never quantized: NNCF alone would put box coordinates of the
    whole canvas on 256 levels.

    Args:
        source: The float32 folder, exported and proven, or the .xml in it.
        out: Folder or .xml file to write, with the .bin beside it; written only when it holds the bound. A folder
            gets the metadata of ``source`` too, and its name should end in ``_openvino_model``.
        calibration: Training images, best a ``Calibration``.
        judge: Returns the mAP50-95, 0 to 1, of an OpenVINO folder.
        float_map: That of ``source``.
        max_drop: Points of mAP50-95 that the model may lose.
        canvas: Height and width in pixels that the ranges are measured on.
        channels: Channels of an image, 3 or 1.

    Raises:
        BackendMissingError: OpenVINO or NNCF is missing.
        DataError: A calibration image cannot be read.
        ExportError: The source is not a graph of convolutions, or the bound cannot be held.
        OutputError: The folder cannot be written.
    """
    quantizer = OpenVinoQuantizer(source, list(calibration), canvas, channels)
    return quantize("openvino", quantizer, calibration, lambda made: _publish(made, out), judge, float_map, max_drop)


def _publish(made: Path, out: Path) -> None:
    """Copy a folder to its place, or only its graph where an .xml file was asked for."""
    if out.suffix != ".xml":
        with folder_aside(out) as aside:
            shutil.copytree(made, aside, dirs_exist_ok=True)
        return
    for suffix in (".bin", ".xml"):
        with written_aside(out.with_suffix(suffix)) as aside:
            shutil.copy(next(made.glob(f"*{suffix}")), aside)


class _Images:
    """Calibration batches that can be read again and again."""

    def __init__(self, files: Sequence[Path], canvas: tuple[int, int], channels: int, batch: int) -> None:
        self.arguments = (files, canvas, channels, batch)

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        return calibration_pixels(*self.arguments)


def _packages(source: Path) -> tuple[Any, Any]:
    try:
        import nncf
        import openvino
    except ImportError as error:
        raise BackendMissingError(
            f"{source}: int8 of OpenVINO needs {error.name}; run: pip install 'kd-yolo[openvino]'"
        ) from error
    nncf.set_log_level(logging.ERROR)
    return openvino, nncf


def _mark_int8(metadata: Path) -> None:
    """Set the precision in our entry of a copied metadata file."""
    if not metadata.is_file():
        return
    content = yaml.safe_load(metadata.read_text(encoding="utf-8")) or {}
    own = content.get(METADATA_KEY)
    if own is None:
        return
    as_text = isinstance(own, str)
    own = (json.loads(own) if as_text else dict(own)) | {"precision": "int8"}
    content[METADATA_KEY] = json.dumps(own) if as_text else own
    metadata.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back NNCF's progress bars."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
