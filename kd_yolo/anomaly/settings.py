"""The keys of ``kd-yolo train task=anomaly``, checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from kd_yolo.config import Strict, stock_keys, validate
from kd_yolo.errors import ConfigError, nearest

STOCK_DEFAULTS: dict[str, Any] = {
    "imgsz": 256,
    "batch": 16,
    "optimizer": "AdamW",
    "lr0": 0.002,
    "lrf": 0.01,
    "weight_decay": 1e-4,
    "cos_lr": True,
    "warmup_epochs": 3.0,
    "warmup_bias_lr": 0.0,
    "patience": 0,
    "amp": False,
    "seed": 0,
    "device": "cpu",
    "plots": True,
    "deterministic": True,
}
"""The schedule of our HKT (AdamW, cosine) in Ultralytics' names; every one may be given."""
PASSED_ON = (
    *STOCK_DEFAULTS,
    "epochs",
    "momentum",
    "warmup_momentum",
    "workers",
    "verbose",
    "project",
    "name",
    "exist_ok",
)
OPTIMIZERS = ("adam", "adamax", "adamw", "nadam", "radam", "rmsprop", "sgd")
"""Ultralytics' own, without those that look into a detector's head."""
USUAL_EPOCHS = 100
LEAST_STEPS = 2000
STRIDE = 32


class AnomalyConfig(Strict):
    """What ``kd-yolo train task=anomaly`` adds to the stock training arguments."""

    data: str = Field(min_length=1, description="mvtec, btad, magnetic-tile, surface-synth, a YAML file or a folder")
    category: str | None = Field(default=None, description="which category; all for every one of them")
    model: str = Field(default="hkt", min_length=1, description="hkt, hkt-plus, hkt-hybrid, same-layer, or a YAML file")
    teacher: str | None = Field(default=None, min_length=1, description="pretrained backbone; default: the model's")
    holdout: float = Field(default=0.1, gt=0, lt=0.5, description="share of the normals kept for calibration")
    flips: bool = Field(default=False, description="mirror the training images at random")
    brightness: float = Field(
        default=0.0, ge=0, lt=1, description="change the training images' brightness by up to this share"
    )
    trust: bool = Field(default=False, description="load foreign pickled classes from the teacher's file")
    resume: bool | str = Field(default=False, description="continue the last unfinished run, or the run in this folder")

    @field_validator("data", "model", "teacher", "category", "resume", mode="before")
    @classmethod
    def _to_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, (Path, int, float)) and not isinstance(value, bool) else value


def split_anomaly_keys(values: Mapping[str, Any]) -> tuple[AnomalyConfig, dict[str, Any], dict[str, Any]]:
    """Split what the user gave into our keys, stock training arguments and the dotted ``kd.*``.

    Raises:
        ConfigError: An unknown key (the nearest is named), one without a meaning here, or a wrong value.
    """
    own: dict[str, Any] = {}
    stock: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
    for key, value in values.items():
        if key == "task":
            continue
        if key == "kd.imgsz":
            raise ConfigError("kd.imgsz: the canvas is imgsz=")
        if key.startswith("kd."):
            overrides[key.removeprefix("kd.")] = value
        elif key in AnomalyConfig.model_fields:
            own[key] = value
        elif key in PASSED_ON:
            stock[key] = value
        elif key in stock_keys():
            raise ConfigError(f"'{key}' has no meaning with task=anomaly; leave it out")
        else:
            known = [*AnomalyConfig.model_fields, *PASSED_ON, "kd.same", "kd.floor", "kd.fuse", "kd.cbam", "kd.student"]
            raise ConfigError(f"unknown key '{key}'{nearest(key, known)} (kd-yolo train task=anomaly --help lists all)")
    _check_stock(stock)
    return validate(AnomalyConfig, own), stock, overrides


def epochs_for(images: int, batch: int, given: int | None) -> int:
    """Return the epochs of a run: what was given, else 100, and more of them until there are 2,000 steps.

    Args:
        images: Training images.
        batch: Images per step.
        given: The user's ``epochs``.
    """
    return given or max(USUAL_EPOCHS, math.ceil(LEAST_STEPS / math.ceil(images / batch)))


def _check_stock(stock: Mapping[str, Any]) -> None:
    optimizer = str(stock.get("optimizer", STOCK_DEFAULTS["optimizer"]))
    if optimizer.lower() not in OPTIMIZERS:
        raise ConfigError(f"optimizer={optimizer}: one of {', '.join(OPTIMIZERS)}{nearest(optimizer, OPTIMIZERS)}")
    imgsz = stock.get("imgsz", STOCK_DEFAULTS["imgsz"])
    if not isinstance(imgsz, int) or isinstance(imgsz, bool) or imgsz < 64 or imgsz % STRIDE:
        raise ConfigError(f"imgsz={imgsz}: a multiple of {STRIDE} of at least 64 is needed, for example imgsz=256")
    for key in ("batch", "epochs"):
        value = stock.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{key}={value}: a whole number of at least 1 is needed")
    if "," in str(stock.get("device", "cpu")) or isinstance(stock.get("device"), list):
        raise ConfigError(f"device={stock['device']}: task=anomaly trains on one device; give cpu or one CUDA number")
