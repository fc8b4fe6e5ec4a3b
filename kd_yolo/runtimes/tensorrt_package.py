"""The packages of TensorRT and of TensorRT for RTX, which share one API, imported when they are needed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from kd_yolo.errors import BackendMissingError, ModelError

PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Import name of each runtime that the metadata of an engine names."""
EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}
OLDEST = 10
_LOGGERS: dict[Any, Any] = {}
"""By the base class of a package's loggers; never emptied."""


def load_package(runtime: str, name: str) -> Any:
    """Import TensorRT or TensorRT for RTX.

    Args:
        runtime: A key of ``PACKAGES``.
        name: What the message begins with.

    Raises:
        BackendMissingError: It is not installed, does not load, or is too old to know named tensors.
    """
    hint = f"run: pip install 'kd-yolo[{EXTRAS[runtime]}]'"
    try:
        module = importlib.import_module(PACKAGES[runtime])
    except (ImportError, OSError) as error:  # OSError: its libraries do not load
        raise BackendMissingError(f"{name}: needs {PACKAGES[runtime]}; {hint}") from error
    if runtime == "tensorrt" and int(str(module.__version__).split(".")[0]) < OLDEST:
        raise BackendMissingError(f"{name}: needs TensorRT {OLDEST} or newer, this is {module.__version__}; {hint}")
    return module


def shared_logger(trt: Any) -> Any:
    """Return the logger of a package, which keeps errors for our own message instead of printing them.

    There is one for the life of the process: TensorRT writes to the first logger that it was ever given, whatever it is
    given later, and calls it from destructors too. A logger that Python has freed by then is a crash.

    Args:
        trt: The module ``tensorrt`` or ``tensorrt_rtx``; the logger's base class is known only once it is imported.
    """
    if trt.ILogger not in _LOGGERS:
        _LOGGERS[trt.ILogger] = _make_logger(trt)
    log = _LOGGERS[trt.ILogger]
    log.errors.clear()
    return log


def deserialize(trt: Any, plan: bytes, path: Path) -> tuple[Any, tuple[Any, Any]]:
    """Load an engine on the current CUDA device.

    Args:
        trt: The module ``tensorrt`` or ``tensorrt_rtx``.
        plan: The engine without the metadata before it.
        path: What messages call it.

    Returns:
        The engine, and its runtime and logger, which must live as long: they do not hold on to each other.

    Raises:
        ModelError: The runtime does not take it.
    """
    log = shared_logger(trt)
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise ModelError(f"{path}: {trt.__name__} {trt.__version__} cannot load this engine ({log.first_error()})")
    return engine, (runtime, log)


def dtype_name(dtype: Any) -> str:
    """Return the usual name of a ``DataType``: FLOAT is float32, HALF is float16."""
    name = str(dtype.name)
    return {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}.get(name, name.lower())


def _make_logger(trt: Any) -> Any:
    serious = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Kept(trt.ILogger):
        """Keeps error messages, each in one line."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in serious:
                self.errors.append(" ".join(message.split()))

        def first_error(self) -> str:
            return self.errors[0][:300] if self.errors else "it gave no reason"

    return Kept()
