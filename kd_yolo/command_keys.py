"""The keys of the commands that have no model of their own elsewhere."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kd_yolo.config import Strict


class DeployKeys(Strict):
    """Keys of ``deploy``."""

    model: str = Field(description="checkpoint; give model=FILE")
    out: str | None = None
    nms: bool = True
    trust: bool = False


class ExportKeys(Strict):
    """Keys of ``export``."""

    model: str = Field(description="checkpoint; give model=FILE")
    format: str = "onnx"
    imgsz: int | list[int] | None = None
    batch: int = Field(default=1, ge=1)
    dynamic: bool = False
    quantize: Literal[8, 16, 32] | None = None
    half: bool = False
    int8: bool = False
    target: str | None = None
    nms: bool = False
    nms_free: bool | None = None
    opset: int | None = None
    simplify: bool = True
    data: str | None = None
    split: str = "val"
    category: str | None = None
    max_drop: float = Field(default=0.5, ge=0, le=100)
    calibration_images: int | None = Field(default=None, ge=8)
    out: str | None = None
    trust: bool = False


class BenchmarkKeys(Strict):
    """Keys of ``benchmark``."""

    model: str | list[str] = Field(description="files separated by commas; give model=A,B")
    imgsz: int | list[int] | None = None
    batch: int = Field(default=1, ge=1)
    data: str | None = None
    category: str | None = None
    split: str = "val"
    rounds: int | None = Field(default=None, ge=1)
    iterations: int | None = Field(default=None, ge=1)
    stream: int | None = Field(default=None, ge=1)
    threads: int | None = Field(default=None, ge=1)
    affinity: bool | list[int] | None = None
    device: str | int = "cpu"
    targets: str | list[str] | None = None
    against: str | None = None
    out: str | None = None
    trust: bool = False


class DemoKeys(Strict):
    """Keys of ``demo``."""

    project: str = "runs/demo"
    epochs: int | None = Field(default=None, ge=1, le=1000)
    model: str | None = None
    imgsz: int | None = Field(default=None, ge=32)
