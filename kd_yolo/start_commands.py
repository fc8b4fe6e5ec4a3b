"""Commands that make a start for training: ``pretrain`` and ``grow``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from kd_yolo.config import Strict, refuse_unknown, validate
from kd_yolo.errors import ConfigError

Outcome = tuple[str, Any]


class GrowKeys(Strict):
    """Keys of ``grow``."""

    model: str = Field(min_length=1, description="checkpoint of a stock detector; give model=FILE")
    scale: str = Field(default="s", min_length=1)
    out: str | None = None
    seed: int = Field(default=0, ge=0)
    trust: bool = False


def pretrain(values: Mapping[str, Any]) -> Outcome:
    """Let a student learn without labels what a pretrained detector computes."""
    from kd_yolo.pretrain.settings import split_pretrain_keys

    config = split_pretrain_keys(values)
    from kd_yolo.pretrain.run import pretrain as run

    report = run(config)
    return report.to_text(), report.to_dict()


def grow(values: Mapping[str, Any]) -> Outcome:
    """Write a larger detector that computes the same."""
    refuse_unknown(values, GrowKeys.model_fields, "grow")
    keys = validate(GrowKeys, values, where="grow")
    source = Path(keys.model).expanduser()
    out = Path(keys.out or f"{source.stem}-grown-{keys.scale}.pt").expanduser()
    if out.exists() and keys.out is None:
        raise ConfigError(f"{out}: exists already; give out=FILE")
    from kd_yolo.nn.grow import grow_file

    report = grow_file(source, out, keys.scale, keys.seed, keys.trust)
    return f"{out}: {report.summary()}", {"path": str(out), **report.to_dict()}
