"""OpenVINO folders, on the device that was asked for and in the precision that the file promises."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_yolo.errors import BackendMissingError, ConfigError, ModelError
from kd_yolo.runtimes.base import Description, Session, check_signature, description_of
from kd_yolo.runtimes.reading import check_file, folder_file, yaml_metadata
from kd_yolo.runtimes.telemetry import no_telemetry

X86 = frozenset({"x86_64", "amd64"})  # what platform.machine() says, in lower case


class OpenVinoSession(Session):
    """An OpenVINO model, compiled for one device.

    Attributes:
        inference_precision: What the plugin says it computes in, for example ``f32``.
    """

    def __init__(
        self, compiled: Any, description: Description, canvas: tuple[int, int], fixed_batch: int | None
    ) -> None:
        """Take a compiled model; see ``open_session``."""
        self.compiled, self.description, self.canvas = compiled, description, canvas
        self._fixed_batch = fixed_batch
        self.runtime = f"openvino {', '.join(compiled.get_property('EXECUTION_DEVICES'))}"
        self.inference_precision = str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
        self.request = compiled.create_infer_request()

    @property
    def fixed_batch(self) -> int | None:
        """Images that a call of ``infer`` takes; see ``Session``."""
        return self._fixed_batch

    def infer(self, pixels: Tensor) -> Tensor:
        """Run the graph; see ``Session.infer``."""
        result = self.request.infer([pixels.float().contiguous().cpu().numpy()])
        return torch.from_numpy(result[0]).float()


def describe(path: Path, task: str | None = "detect") -> Description:
    """Read ``metadata.yaml`` of an OpenVINO folder; OpenVINO is not needed.

    Args:
        path: The folder, or the ``.xml`` file in it.
        task: See ``kd_yolo.runtimes.describe``.

    Raises:
        ModelError: As ``description_of``, or one of the folder's files is missing, empty or damaged.
    """
    graph = folder_file(path, "*.xml")
    check_file(graph.with_suffix(".bin"), graph.parent)
    with graph.open("rb") as stream:
        if not stream.read(64).lstrip().startswith((b"<?xml", b"<net")):
            raise ModelError(f"{path}: its {graph.name} is not an OpenVINO graph; export it again")
    return description_of("openvino", yaml_metadata(graph.parent), path, task)


def open_session(
    path: Path,
    imgsz: Any,
    batch: int | None,
    device: str,
    threads: int | None,
    provider: str | None,
    task: str | None = "detect",
) -> OpenVinoSession:
    """Open an OpenVINO folder; see ``kd_yolo.runtimes.open_session``.

    ``device`` may also be ``intel:gpu`` or ``intel:npu``.
    """
    if provider is not None:
        raise ConfigError(f"provider={provider}: is for ONNX files; leave it out for {path}")
    description = describe(path, task)
    canvas = description.check(path, imgsz, batch)
    openvino = _openvino(path)
    core = openvino.Core()
    name = _device(device, core.available_devices, path)
    fixed_batch = None if description.any_batch else description.batch
    try:
        model = core.read_model(str(folder_file(path, "*.xml")))
        check_signature(description, _shapes(model.inputs), _shapes(model.outputs), path)
        if description.dynamic and _needs_static(description.precision, name):
            fixed_batch = batch or description.batch
            model.reshape([fixed_batch, description.channels, *canvas])
        compiled = core.compile_model(model, name, _properties(openvino, core, name, description.precision, threads))
        active = list(compiled.get_property("EXECUTION_DEVICES"))
    except RuntimeError as error:
        raise ModelError(f"{path}: OpenVINO cannot open it ({_last_line(error)}); export it again") from error
    if [one.split(".")[0] for one in active] != [name.split(".")[0]]:
        raise BackendMissingError(f"{path}: OpenVINO {name} was asked for, but it chose {', '.join(active)}")
    return OpenVinoSession(compiled, description, canvas, fixed_batch)


def _device(device: str, available: list[str], path: Path) -> str:
    """Return OpenVINO's name of a device that is there.

    Raises:
        ConfigError: It is unknown, or not there.
    """
    asked = str(device).strip().lower()
    name = asked.removeprefix("intel:").upper()
    if name.split(".")[0] not in {"CPU", "GPU", "NPU"}:
        raise ConfigError(f"device={device}: {path} is an OpenVINO model; use cpu, intel:gpu or intel:npu")
    if not any(one == name or one.startswith(f"{name}.") for one in available):
        raise ConfigError(f"device={device}: OpenVINO sees {', '.join(available) or 'no device'} here; use device=cpu")
    return name


def _properties(openvino: Any, core: Any, name: str, precision: str, threads: int | None) -> dict[str, Any]:
    """Return the settings that keep a model's promise.

    Left alone, OpenVINO computes a float32 file in bfloat16 on a CPU that can, and in float16 on a GPU. A float16 file
    may be computed in float16 where the hardware has it, but never in bfloat16, whose mantissa is three bits shorter.
    Not on x86: its float16 kernels are slower than float32 there (docs/quantization.md), and the file is as small.
    """
    properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if name == "CPU":
        properties["INFERENCE_NUM_THREADS"] = threads or torch.get_num_threads()
    if name != "NPU":  # which has no float32
        half = precision == "fp16" and "FP16" in core.get_property(name, "OPTIMIZATION_CAPABILITIES")
        half = half and not (name == "CPU" and platform.machine().lower() in X86)
        properties["INFERENCE_PRECISION_HINT"] = openvino.Type.f16 if half else openvino.Type.f32
    return properties


def _needs_static(precision: str, name: str) -> bool:
    """Return whether a dynamic model must be given one shape before it is compiled.

    The NPU has static shapes only. OpenVINO's CPU plugin crashes on INT8 models with free lengths where the CPU has
    AMX (openvinotoolkit/openvino issue 37577).
    """
    return name.startswith("NPU") or (name == "CPU" and precision == "int8" and "amx_int8" in _cpu_flags())


def _cpu_flags() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def _shapes(ports: list[Any]) -> list[list[int | None]]:
    found = [port.get_partial_shape() for port in ports]
    return [[length.get_length() if length.is_static else None for length in shape] for shape in found]


def _last_line(error: BaseException) -> str:
    """Return where OpenVINO's messages say what is wrong: at their end, after the places it went through."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:160]


def _openvino(path: Path) -> Any:
    try:
        with no_telemetry():
            import openvino
    except ImportError as error:
        raise BackendMissingError(f"{path}: needs openvino; run: pip install 'kd-yolo[openvino]'") from error
    return openvino
