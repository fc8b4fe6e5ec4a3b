"""ONNX files in ONNX Runtime, on the provider that was asked for or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_yolo.devices import parse_device
from kd_yolo.errors import BackendMissingError, ConfigError, ModelError
from kd_yolo.runtimes.base import Description, Session, description_of

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}


class OnnxRuntimeSession(Session):
    """An ONNX file in ONNX Runtime."""

    def __init__(self, path: Path, session: Any, description: Description, canvas: tuple[int, int]) -> None:
        """Take an opened session; see ``open_session``."""
        self.session, self.description, self.canvas = session, description, canvas
        self.runtime = f"onnxruntime {session.get_providers()[0]}"
        entry = session.get_inputs()[0]
        self.entry, self.dtype = entry.name, torch.float16 if "float16" in entry.type else torch.float32

    def infer(self, pixels: Tensor) -> Tensor:
        """Run the graph; see ``Session.infer``."""
        result = self.session.run(None, {self.entry: pixels.to(self.dtype).contiguous().cpu().numpy()})[0]
        return torch.from_numpy(result).float()


def describe(path: Path) -> Description:
    """Read the metadata of an ONNX file.

    Raises:
        BackendMissingError: ONNX Runtime is missing.
        ModelError: As ``description_of``, or the file cannot be opened.
    """
    return _description(path, _open(path, ["CPUExecutionProvider"], threads=1))


def open_session(
    path: Path, imgsz: Any, batch: int | None, device: str, threads: int | None, provider: str | None
) -> OnnxRuntimeSession:
    """Open an ONNX file; see ``kd_yolo.runtimes.open_session``."""
    chosen = parse_device(device)
    name = (provider or chosen.type).lower()
    if name not in PROVIDERS:
        raise ConfigError(f"provider={provider}: unknown (known: {', '.join(PROVIDERS)})")
    wanted = PROVIDERS[name]
    _onnxruntime(path)
    on_gpu = name in {"cuda", "tensorrt"}
    options = {"device_id": chosen.index or 0} if on_gpu else {}
    session = _open(path, [(wanted, options)] if options else [wanted], threads)
    active = session.get_providers()[0]
    if active != wanted:
        raise BackendMissingError(f"{path}: {wanted} was asked for, but ONNX Runtime fell back to {active}")
    description = _description(path, session)
    return OnnxRuntimeSession(path, session, description, description.check(path, imgsz, batch))


def _open(path: Path, providers: list[Any], threads: int | None) -> Any:
    onnxruntime = _onnxruntime(path)
    names = [item if isinstance(item, str) else item[0] for item in providers]
    lacking = [name for name in names if name not in onnxruntime.get_available_providers()]
    if lacking:
        raise BackendMissingError(
            f"{path}: this ONNX Runtime has no {lacking[0]} (it has "
            f"{', '.join(onnxruntime.get_available_providers())}); install onnxruntime-gpu, or use device=cpu"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
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


def _description(path: Path, session: Any) -> Description:
    metadata = session.get_modelmeta().custom_metadata_map
    return description_of("onnx", metadata, path)
