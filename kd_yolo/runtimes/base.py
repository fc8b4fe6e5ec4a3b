"""What every runtime offers."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kd_yolo.errors import ConfigError, ModelError
from kd_yolo.runtimes.description import (
    METADATA_KEY,
    Description,
    check_same_classes,
    check_signature,
    description_of,
)

__all__ = ["METADATA_KEY", "Description", "Session", "check_same_classes", "check_signature", "description_of"]


class Session(ABC):
    """One exported file, opened and ready.

    Attributes:
        runtime: For example ``onnxruntime CPUExecutionProvider`` or ``openvino CPU``.
        description: What the file says about itself.
        canvas: Height and width of the calls to come, in pixels.
    """

    runtime: str
    description: Description
    canvas: tuple[int, int]

    @abstractmethod
    def infer(self, pixels: Tensor) -> Tensor:
        """Run the graph.

        Args:
            pixels: (B, C, H, W), float32 in 0..1, on the CPU or on the session's device.

        Returns:
            The graph's one output in float32: (B, 4 + K, A) of all anchors with centre-size boxes in pixels, or
            (B, n, 6) of selected rows x1, y1, x2, y2, score, class; (B, 1, H, W) of an anomaly map.
        """

    @property
    def fixed_batch(self) -> int | None:
        """Images that a call of ``infer`` takes, no more and no fewer, or None for any number."""
        return None if self.description.any_batch else self.description.batch

    def __call__(self, pixels: Tensor) -> Tensor:
        """Run the graph on any number of images: in portions of its fixed batch, the last one padded with zeros.

        Args:
            pixels: (N, C, H, W) on the canvas; otherwise as for ``infer``.

        Returns:
            As ``infer``, for all N images.

        Raises:
            ConfigError: The images are on a canvas, or have channels, that the file does not take.
            ModelError: The output is not that of a detector with the classes that the file names, or no anomaly map.
        """
        self._check_pixels(pixels)
        size = self.fixed_batch
        if size is None or len(pixels) == size:
            output = self.infer(pixels)
        else:
            # Cloned: a runtime may write every answer into the same buffer.
            output = torch.cat([self.infer(_padded(part, size))[: len(part)].clone() for part in pixels.split(size)])
        self._check_output(output, pixels)
        return output

    def sync(self) -> None:
        """Wait until the device is idle."""
        return

    def peak_device_memory_mb(self) -> float | None:
        """Return the device memory used at most, in 10^6 bytes, or None without a device of its own."""
        return None

    def _check_pixels(self, pixels: Tensor) -> None:
        channels, *canvas = pixels.shape[1:]
        told = self.description
        if channels != told.channels:
            raise ConfigError(f"{self.runtime}: the file takes images of {told.channels} channels, not {channels}")
        if not told.dynamic and tuple(canvas) != self.canvas:
            height, width = self.canvas
            raise ConfigError(f"{self.runtime}: the file's canvas is {height}x{width}, not {canvas[0]}x{canvas[1]}")

    def _check_output(self, output: Tensor, pixels: Tensor) -> None:
        if self.description.task == "anomaly":
            expected = (len(pixels), 1, *pixels.shape[2:])
            if tuple(output.shape) != expected:
                raise ModelError(
                    f"{self.runtime}: the file's output is {tuple(output.shape)}, not {expected} as an anomaly map is; "
                    "export it again"
                )
            return
        classes = len(self.description.names)
        raw = self.description.head == "nms"
        if output.ndim != 3 or (output.shape[1] != 4 + classes if raw else output.shape[2] != 6):
            form = f"(B, {4 + classes}, A)" if raw else "(B, n, 6)"
            raise ModelError(
                f"{self.runtime}: the file's output is {tuple(output.shape)}, that of a detector of {classes} classes "
                f"(head '{self.description.head}') is {form}; its metadata belongs to another model: export it again"
            )


def _padded(pixels: Tensor, size: int) -> Tensor:
    """Append black images up to ``size``."""
    lacking = size - len(pixels)
    return torch.cat((pixels, pixels.new_zeros(lacking, *pixels.shape[1:]))) if lacking else pixels
