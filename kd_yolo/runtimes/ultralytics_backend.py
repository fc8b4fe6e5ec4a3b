"""A session as the module that Ultralytics' predictor and validator run.

Both take a module in place of a checkpoint (``AutoBackend``, format ``pt``), ask it for ``names``, ``stride``, ``yaml``
and ``end2end``, and call it. So an exported file runs in our sessions, with the letterboxing, the NMS, the metrics and
the results of a checkpoint, and nothing of Ultralytics is changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.models.yolo.detect import DetectionValidator

from kd_yolo.errors import ConfigError
from kd_yolo.runtimes.base import Description, Session
from kd_yolo.runtimes.opening import describe, open_session


class ExportedDetector(nn.Module):
    """An exported file in the place of a detector: described at once, opened by ``open``.

    Attributes:
        path: The file or folder.
        description: What it says about itself.
        names: Class names by index.
        stride: Largest stride in pixels, as a tensor, as detectors have it.
        yaml: ``channels``, where detectors keep it.
        session: The open session, or None.
    """

    def __init__(self, path: Path) -> None:
        """Read what the file says about itself.

        Raises:
            ModelError: The file is missing, damaged, no detector, or from a newer version.
        """
        super().__init__()
        self.path = path
        self.description: Description = describe(path)
        self.names = self.description.names
        self.stride = torch.tensor([float(self.description.stride)])
        self.yaml = {"channels": self.description.channels}
        self.task = "detect"
        self.session: Session | None = None
        self._opened: tuple[Any, ...] = ()

    @property
    def end2end(self) -> bool:
        """Whether the output are selected rows (NMS-free or NMS inside), as opposed to all anchors."""
        return self.description.head != "nms"

    @end2end.setter
    def end2end(self, value: bool) -> None:
        """Keep the branch: Ultralytics sets the one it is asked for, but an exported file has one for good."""

    def set_head_attr(self, **attributes: Any) -> None:
        """Leave the head alone: what Ultralytics would set before it selects rows is fixed in the file."""

    def open(self, imgsz: Any, device: Any) -> dict[str, Any]:
        """Open the file, unless it is open like that already.

        Args:
            imgsz: Wanted canvas, or None for the file's own.
            device: Ultralytics' key, or None: the CPU, for an engine the first GPU.

        Returns:
            The ``imgsz`` and ``device`` that Ultralytics is to be given.

        Raises:
            ModelError: The file is damaged, or made for another GPU.
            ConfigError: It cannot take that canvas, or the device is not there.
            BackendMissingError: The runtime is missing, or fell back to another device.
        """
        name = _device_name(device, self.description.format)
        canvas = self.description.check(self.path, imgsz)
        if self.session is None or self._opened != (canvas, name):
            self.session = None  # two engines at once may be more than a device can hold
            self.session = open_session(self.path, list(canvas), device=name)
            self._opened = (canvas, name)
        # Images for Intel's devices are made on the CPU.
        return {"imgsz": list(canvas), "device": "cpu" if ":" in name else name}

    def forward(self, pixels: Tensor) -> Tensor:
        """Run the graph on any number of images; see ``Session.__call__``.

        Raises:
            ConfigError: ``open`` was not called, or the images are on another canvas.
        """
        if self.session is None:
            raise ConfigError(f"{self.path}: is not open; use KDYOLO(...).predict or .val")
        return self.session(pixels)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExportedDetector:
        """Return the same object: Ultralytics copies what it is going to fuse, and a session cannot be copied."""
        return self


class CanvasValidator(DetectionValidator):
    """The stock validator on any canvas, square or not: Ultralytics' own key has one side only.

    Attributes:
        canvas: Height and width in pixels; None for that of an exported file, or Ultralytics' own way.
    """

    canvas: tuple[int, int] | None = None

    def get_model(self, model: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Set the canvas where Ultralytics takes it over from an exported file."""
        session = model.session if isinstance(model, ExportedDetector) else None
        canvas = self.canvas or (session.canvas if session else None)
        if canvas is not None:
            self.args.imgsz = list(canvas)
        return super().get_model(model, trainer, **kwargs)


def _device_name(device: Any, format: str) -> str:
    """Return the device key as text.

    Raises:
        ConfigError: Several devices.
    """
    if isinstance(device, (list, tuple)):
        if len(device) != 1:
            raise ConfigError(f"device={device}: an exported file runs on one device; give one number, or cpu")
        device = device[0]
    name = "" if device is None else str(device).strip().lower()
    if not name:
        return "0" if format in {"engine", "rtx"} else "cpu"
    return name.removeprefix("cuda:")
