"""ONNX files in ONNX Runtime, on the provider that was asked for or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_yolo.devices import parse_device
from kd_yolo.errors import BackendMissingError, ConfigError, ModelError, nearest
from kd_yolo.runtimes.base import Description, Session, check_signature, description_of
from kd_yolo.runtimes.reading import onnx_metadata

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}


class OnnxRuntimeSession(Session):
    """An ONNX file in ONNX Runtime."""

    def __init__(self, session: Any, description: Description, canvas: tuple[int, int]) -> None:
        """Take an opened session; see ``open_session``."""
        self.session, self.description, self.canvas = session, description, canvas
        self.runtime = f"onnxruntime {session.get_providers()[0]}"
        entry = session.get_inputs()[0]
        self.entry, self.dtype = entry.name, torch.float16 if "float16" in entry.type else torch.float32

    def infer(self, pixels: Tensor) -> Tensor:
        """Run the graph; see ``Session.infer``."""
        result = self.session.run(None, {self.entry: pixels.to(self.dtype).contiguous().cpu().numpy()})[0]
        return torch.from_numpy(result).float()


def describe(path: Path, task: str | None = "detect") -> Description:
    """Read the metadata of an ONNX file; ONNX Runtime is not needed.

    Raises:
        ModelError: As ``description_of``, or the file is truncated or no ONNX file.
    """
    return description_of("onnx", onnx_metadata(path), path, task)


def open_session(
    path: Path,
    imgsz: Any,
    batch: int | None,
    device: str,
    threads: int | None,
    provider: str | None,
    task: str | None = "detect",
) -> OnnxRuntimeSession:
    """Open an ONNX file; see ``kd_yolo.runtimes.open_session``."""
    name = str(provider).lower() if provider else parse_device(device).type
    if name not in PROVIDERS:
        raise ConfigError(f"provider={provider}: unknown{nearest(name, PROVIDERS)} (known: {', '.join(PROVIDERS)})")
    description = describe(path, task)
    canvas = description.check(path, imgsz, batch)
    wanted = PROVIDERS[name]
    session = _open(path, wanted, _options(name, device), threads)
    active = session.get_providers()[0]
    if active != wanted:
        raise BackendMissingError(f"{path}: {wanted} was asked for, but ONNX Runtime fell back to {active}")
    check_signature(description, _shapes(session.get_inputs()), _shapes(session.get_outputs()), path)
    return OnnxRuntimeSession(session, description, canvas)


def _options(name: str, device: str) -> dict[str, Any]:
    """Return the options of a provider: which GPU it runs on.

    Raises:
        ConfigError: ``device`` is not there; for a provider of a GPU ``cpu`` stands for its first one.
    """
    if name not in {"cuda", "tensorrt"}:
        return {}
    chosen = parse_device("cuda" if str(device).lower() == "cpu" else device)
    found: dict[str, Any] = {"device_id": chosen.index or 0}
    # float32 means float32: TensorFloat-32 has ten bits and is on unless told.
    return found | {"use_tf32": "0"} if name == "cuda" else found


def _open(path: Path, provider: str, provider_options: dict[str, Any], threads: int | None) -> Any:
    onnxruntime = _onnxruntime(path)
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise BackendMissingError(
            f"{path}: this ONNX Runtime has no {provider} (it has {', '.join(available)}); install the onnxruntime "
            "package that has it, or use device=cpu"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[(provider, provider_options)])
    except Exception as error:  # onnxruntime's classes share no public base
        raise ModelError(f"{path}: ONNX Runtime cannot open it ({str(error).splitlines()[0][:200]})") from error
    session.disable_fallback()
    return session


def _onnxruntime(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendMissingError(f"{path}: needs onnxruntime; run: pip install 'kd-yolo[onnx]'") from error
    return onnxruntime


def _shapes(nodes: list[Any]) -> list[list[int | None]]:
    """Return the declared shapes; ONNX names a free length instead of numbering it."""
    return [[length if isinstance(length, int) else None for length in node.shape] for node in nodes]
