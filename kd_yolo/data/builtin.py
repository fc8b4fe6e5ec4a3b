"""The packaged descriptions of known data sets: where they may lie, how to read them, how they are split."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from kd_yolo.config import Strict, validate
from kd_yolo.resources import builtin_names, find, load_yaml


class Raw(Strict):
    """Where the published data may lie, and how to read it."""

    format: Literal["voc", "masks", "deeppcb", "coco"]
    folders: list[str] = Field(min_length=1, description="names under which the published folder is usually kept")
    holds: list[str] = Field(min_length=1, description="paths of which one must exist inside, to be sure that it is it")
    min_area: int = Field(default=10, ge=1, description="masks: smallest component, pixels")
    group: str | None = Field(default=None, description="regular expression; images of one match stay in one split")


class Builtin(Strict):
    """A YAML file of ``cfg/datasets``."""

    kd_yolo: Literal[1]
    title: str
    origin: str = Field(description="where the data comes from and on what terms")
    names: dict[int, str]
    raw: Raw | None = None
    make: dict[str, int] | None = Field(default=None, description="arguments of the generator, for made data")
    split: dict[str, str] | None = Field(default=None, description="fixed split: stems, compact")


def describe_datasets() -> dict[str, str]:
    """Return the built-in data sets: name to title."""
    return {name: load_builtin(find("datasets", name)).title for name in builtin_names("datasets")}


def load_builtin(file: Path) -> Builtin:
    """Read a YAML of ``cfg/datasets``.

    Raises:
        ConfigError: A key is unknown, missing or of the wrong type.
    """
    return validate(Builtin, load_yaml(file), str(file))


def fixed_splits(format_name: str) -> dict[str, dict[str, str]]:
    """Return the fixed splits of the built-in data sets that are published in a format, by name."""
    specs = {name: load_builtin(find("datasets", name)) for name in builtin_names("datasets")}
    fitting = {name: spec for name, spec in specs.items() if spec.raw is not None and spec.raw.format == format_name}
    return {name: spec.split for name, spec in fitting.items() if spec.split is not None}
