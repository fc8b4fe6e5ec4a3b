"""The keys of ``kd-yolo pretrain``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from kd_yolo.config import Strict, refuse_unknown, validate
from kd_yolo.errors import ConfigError


class PretrainConfig(Strict):
    """What a pretraining is asked to do; ``from`` is a word of Python's, so the peer is ``peer`` inside."""

    model: str = Field(min_length=1, description="student: lightnet-n|s|m, a YAML or a .pt file")
    peer: str = Field(min_length=1, description="pretrained detector that it learns from; give from=FILE")
    images: str = Field(min_length=1, description="folder of images, or a data set, whose training images are taken")
    imgsz: int = Field(default=160, ge=32, le=2048, description="canvas, pixels; the student may be used on others")
    epochs: int = Field(default=10, ge=0, description="passes over the images; 0 takes over and fits only")
    batch: int = Field(default=32, ge=2, description="images a step")
    forced: float = Field(default=0.5, ge=0, le=1, description="share of the epochs in which stages learn on their own")
    lr0: float = Field(default=2e-3, gt=0, le=0.1, description="highest learning rate of AdamW")
    lr_inherited: float = Field(default=0.25, ge=0, le=1, description="factor on it for inherited layers")
    reparam: Literal["qarep", "repvgg", "multi", "none"] | None = Field(
        default=None, description="form of the branches"
    )
    seed: int = Field(default=0, ge=0, description="seed")
    device: str = Field(default="cpu", min_length=1, description="cpu or a CUDA number")
    out: str | None = Field(default=None, description="checkpoint to write; default: MODEL-from-PEER.pt")
    resume: bool = Field(default=True, description="go on where an interrupted pretraining of the same keys stopped")
    trust: bool = Field(default=False, description="load foreign pickled classes from the given checkpoints")


def split_pretrain_keys(values: Mapping[str, Any]) -> PretrainConfig:
    """Return the checked keys of a command line.

    Raises:
        ConfigError: An unknown or missing key, or a value out of range.
    """
    known = ["from" if name == "peer" else name for name in PretrainConfig.model_fields]
    refuse_unknown(values, known, "pretrain")
    given = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    peer = given.pop("from", None)
    if not isinstance(peer, str) or not peer:
        meaning = PretrainConfig.model_fields["peer"].description
        problem = "missing key 'from'" if peer is None else f"from={peer!r} is not valid"
        raise ConfigError(f"pretrain: {problem}: {meaning}")
    if isinstance(given.get("device"), int):
        given["device"] = str(given["device"])
    return validate(PretrainConfig, {**given, "peer": peer}, where="pretrain")
