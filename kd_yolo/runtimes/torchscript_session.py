"""TorchScript files in PyTorch."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_yolo.devices import parse_device
from kd_yolo.errors import ConfigError, ModelError
from kd_yolo.runtimes.base import Description, Session, description_of
from kd_yolo.runtimes.reading import torchscript_metadata


class TorchScriptSession(Session):
    """A TorchScript graph on one device."""

    def __init__(self, module: Any, description: Description, canvas: tuple[int, int], device: torch.device) -> None:
        """Take a loaded graph; see ``open_session``."""
        self.module, self.description, self.canvas, self.device = module, description, canvas, device
        self.runtime = f"torchscript {device.type}"
        floating = (value.dtype for value in module.parameters() if value.is_floating_point())
        self.dtype = next(floating, torch.float32)

    @torch.inference_mode()
    def infer(self, pixels: Tensor) -> Tensor:
        """Run the graph; see ``Session.infer``."""
        output: Any = self.module(pixels.to(self.device, self.dtype))
        return (output[0] if isinstance(output, (tuple, list)) else output).float()

    def sync(self) -> None:
        """Wait for CUDA."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_device_memory_mb(self) -> float | None:
        """Return what PyTorch's allocator held at most."""
        return torch.cuda.max_memory_allocated(self.device) / 1e6 if self.device.type == "cuda" else None


def describe(path: Path, task: str | None = "detect") -> Description:
    """Read the metadata of a TorchScript file; the graph is not loaded.

    Raises:
        ModelError: As ``description_of``, or the file is truncated or no TorchScript archive.
    """
    return description_of("torchscript", torchscript_metadata(path), path, task)


def open_session(
    path: Path,
    imgsz: Any,
    batch: int | None,
    device: str,
    threads: int | None,
    provider: str | None,
    task: str | None = "detect",
) -> TorchScriptSession:
    """Open a TorchScript file; see ``kd_yolo.runtimes.open_session``.

    ``threads`` is PyTorch's setting of the whole process, and stays.
    """
    if provider is not None:
        raise ConfigError(f"provider={provider}: is for ONNX files; leave it out for {path}")
    chosen = parse_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    description = describe(path, task)
    canvas = description.check(path, imgsz, batch)
    importlib.import_module("torchvision")  # registers the operator that a graph with NMS inside refers to
    try:
        with _no_deprecation():
            module = torch.jit.load(str(path), map_location=chosen).eval()
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()
        raise ModelError(
            f"{path}: PyTorch cannot open it ({first[0][:160] if first else 'RuntimeError'}); export it again"
        ) from error
    return TorchScriptSession(module, description, canvas, chosen)


@contextlib.contextmanager
def _no_deprecation() -> Iterator[None]:
    """Keep PyTorch's advice to use another format away from people who were given this one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
