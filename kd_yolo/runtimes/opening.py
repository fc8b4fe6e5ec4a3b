"""Tell exported files apart, read their metadata, open them in their runtime."""

from __future__ import annotations

import importlib
from pathlib import Path

from ultralytics.engine.exporter import export_formats

from kd_yolo.errors import ModelError
from kd_yolo.runtimes.base import Description, Session

# format -> module with ``describe(path, task) -> Description`` and
# ``open_session(path, imgsz, batch, device, threads, provider, task) -> Session``
MODULES = {
    "onnx": "kd_yolo.runtimes.onnxruntime_session",
    "openvino": "kd_yolo.runtimes.openvino_session",
    "torchscript": "kd_yolo.runtimes.torchscript_session",
    "ncnn": "kd_yolo.runtimes.ncnn_session",
    "engine": "kd_yolo.runtimes.tensorrt_session",
    "rtx": "kd_yolo.runtimes.tensorrt_session",
}
SUFFIXES = {".onnx": "onnx", ".torchscript": "torchscript", ".engine": "engine", ".xml": "openvino", ".param": "ncnn"}
FOLDERS = {"*.xml": "openvino", "*.ncnn.param": "ncnn"}
FOLDER_NAMES = {"_openvino_model": "openvino", "_ncnn_model": "ncnn"}


def artifact_format(path: Path) -> str:
    """Return the format of an exported file or folder, by its name and what lies in it.

    Args:
        path: A file, or a folder as OpenVINO and ncnn have.

    Returns:
        A key of ``MODULES``; ``engine`` for both kinds of TensorRT engine, whose header tells them apart.

    Raises:
        ModelError: There is nothing, or nothing that an export writes.
    """
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder")
    if path.is_dir():
        found = [name for pattern, name in FOLDERS.items() if any(path.glob(pattern))]
        if found:
            return found[0]
        raise ModelError(f"{path}: is a folder without an exported model (no .xml of OpenVINO, no .param of ncnn)")
    if path.suffix.lower() in SUFFIXES:
        return SUFFIXES[path.suffix.lower()]
    raise ModelError(f"{path}: is not an exported model (known: {', '.join(SUFFIXES)}, OpenVINO and ncnn folders)")


def is_foreign(path: Path) -> bool:
    """Return whether a path is named like a format that Ultralytics exports and these runtimes do not open."""
    name = path.name.lower()
    matching = [suffix for suffix in export_formats()["Suffix"] if suffix and name.endswith(suffix)]
    return bool(matching) and max(matching, key=len) not in {".pt", *SUFFIXES, *FOLDER_NAMES}


def describe(path: Path, task: str | None = "detect") -> Description:
    """Return what an exported file says about itself; nothing is run.

    Args:
        path: File or folder.
        task: What it must be for: ``detect``, ``anomaly``, or None for both.

    Raises:
        ModelError: The file is missing, damaged, for another task, or from a newer version.
        BackendMissingError: Reading it needs a package that is not installed.
    """
    description: Description = importlib.import_module(MODULES[artifact_format(path)]).describe(path, task)
    return description


def open_session(
    path: Path,
    imgsz: int | tuple[int, int] | list[int] | None = None,
    batch: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    provider: str | None = None,
    task: str | None = "detect",
) -> Session:
    """Open an exported file in its runtime, on exactly the device that was asked for.

    Args:
        path: File or folder.
        imgsz: Canvas of the calls to come; default the file's own.
        batch: Images per call; default the file's own.
        device: ``cpu``, ``cuda`` or a CUDA number; for OpenVINO ``cpu``, ``intel:gpu`` or ``intel:npu``.
        threads: CPU threads; default PyTorch's number.
        provider: Execution provider of ONNX Runtime: ``cpu``, ``cuda``, ``tensorrt`` or ``openvino``; default by
            ``device``.
        task: As of ``describe``.

    Raises:
        ModelError: The file is damaged, for another task, from a newer version, or made for another GPU.
        ConfigError: It cannot take that canvas or batch, or the device is not there.
        BackendMissingError: The runtime or provider is missing, or fell back to another one.
    """
    module = importlib.import_module(MODULES[artifact_format(path)])
    session: Session = module.open_session(path, imgsz, batch, device, threads, provider, task)
    return session
