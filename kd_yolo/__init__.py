"""Small, accurate defect detectors: distillation, re-parameterization and checked deployment for Ultralytics YOLO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["KDYOLO", "__version__"]

if TYPE_CHECKING:
    from kd_yolo.api import KDYOLO


def __getattr__(name: str) -> Any:
    """Import ``KDYOLO`` on first use, so that ``kd-yolo --help`` never waits for torch."""
    if name == "KDYOLO":
        from kd_yolo.api import KDYOLO

        return KDYOLO
    raise AttributeError(f"module 'kd_yolo' has no attribute '{name}'")
