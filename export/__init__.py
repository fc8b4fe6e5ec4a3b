"""Export to other runtimes, each artifact proven equal to the unfused float32 model before it exists."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_yolo.errors import ConfigError, nearest

if TYPE_CHECKING:
    from kd_yolo.export.report import ExportReport

FORMATS = ("onnx",)
__all__ = ["FORMATS", "ExportReport", "export"]


def export(model: str | Path, format: str = "onnx", **arguments: Any) -> ExportReport:
    """Deploy a checkpoint, export it, and prove the file equal to the model.

    Args:
        model: A trained or deployed checkpoint.
        format: Target format; ``onnx``.
        **arguments: See ``kd_yolo.export.onnx_file.export_onnx``.

    Raises:
        ConfigError: The format is not available here; the message lists what is.
        KDYoloError: As the format's own function says.
    """
    if format.lower() != "onnx":
        raise ConfigError(
            f"format={format}: not available yet{nearest(format.lower(), FORMATS)} (available: {', '.join(FORMATS)}; "
            "yolo export takes a deployed checkpoint to every other format, unchecked)"
        )
    from kd_yolo.export.onnx_file import export_onnx

    return export_onnx(model, **arguments)


def __getattr__(name: str) -> Any:
    """Import the report class on first use, so that listing formats never waits for torch."""
    if name == "ExportReport":
        from kd_yolo.export.report import ExportReport

        return ExportReport
    raise AttributeError(f"module 'kd_yolo.export' has no attribute '{name}'")
