"""Strict models of every outside input; one validation pass, then frozen objects.

Stock Ultralytics keys keep Ultralytics' own names, types and defaults; they are read from its ``default.yaml`` without
importing it, so that the command line stays fast.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kd_yolo.errors import ConfigError, nearest
from kd_yolo.resources import load_yaml

# Decided by kd-yolo itself: each line says what to use instead.
REPLACED_KEYS = {
    "distill_model": "use teacher=FILE and method=NAME",
    "dis": "use kd.weight=NUMBER",
    "task": "it belongs to train, as in train task=anomaly",
    "mode": "the command is the mode",
    "save_dir": "use project= and name=",
    "cfg": "give its keys on the command line, as key=value",
}
REPARAM_FORMS = ("qarep", "repvgg", "multi", "none")


class Strict(BaseModel):
    """Base: frozen, unknown keys refused, nothing coerced silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TrainConfig(Strict):
    """What ``kd-yolo train`` adds to the stock training arguments."""

    data: str = Field(min_length=1, description="data set: YAML file or built-in name such as neu or steel-synth")
    model: str = Field(default="lightnet-s", min_length=1, description="student: lightnet-n|s|m, YAML or .pt file")
    teacher: str = Field(default="self", min_length=1, description="self, none, or a file; several with commas")
    teacher_merge: Literal["mean", "per_class"] = Field(
        default="mean", description="several teachers: mean, or per_class (the best one of each class)"
    )
    chain: str | list[str] | None = Field(default=None, description="models, each distilled into the next: A,B,C")
    unlabeled: str | None = Field(default=None, min_length=1, description="folder of images without labels")
    unlabeled_ratio: float = Field(default=0.5, gt=0, le=10, description="unlabeled images per labelled image")
    pseudo: bool = Field(default=False, description="take confident teacher boxes as labels of unlabeled images")
    pseudo_conf: float = Field(default=0.5, gt=0, lt=1, description="lowest confidence of such a box")
    pseudo_weight: float = Field(default=0.5, gt=0, le=1, description="weight of their loss against real labels")
    teacher_imgsz: int | None = Field(default=None, ge=32, description="larger canvas of the teacher, pixels")
    teacher_levels: Literal["position", "stride"] = Field(
        default="stride", description="with teacher_imgsz: a level learns from that of its stride, or of its grid"
    )
    teacher_views: Literal[1, 2, 4] = Field(
        default=1, description="average the teacher over mirror images: 2 left to right, 4 upside down too"
    )
    cache_teacher: Literal["disk", "ram"] | None = Field(default=None, description="keep the teacher's answers")
    cache_gb: float = Field(default=4.0, gt=0, description="size limit of that cache, GB")
    cache_dir: str | None = Field(default=None, description="folder of the disk cache; default: in the run folder")
    method: str = Field(default="kd-lightnet", min_length=1, description="distillation method, or none")
    reparam: Literal["qarep", "repvgg", "multi", "none"] | None = Field(
        default=None, description="branches: qarep|repvgg|multi|none; default qarep for LightNet, none for stock models"
    )
    teacher_model: str | None = Field(default=None, description="structure of the self teacher; default: the student's")
    teacher_epochs: int | None = Field(default=None, ge=1, description="epochs of the self teacher; default: epochs")
    generations: int = Field(default=1, ge=1, le=10, description="self-distillation rounds, while validation improves")
    pretrained: bool | str = Field(default=True, description="warm start: a .pt file, or false")
    balance: float | None = Field(default=None, gt=0, le=10, description="gradient ratio of KD terms to the task loss")
    allow_weak_teacher: bool = Field(default=False, description="accept a teacher below 0.05 mAP50")
    allow_other_canvas: bool = Field(default=False, description="accept a teacher trained at another imgsz")
    trust: bool = Field(default=False, description="load foreign pickled classes from the given checkpoints")
    resume: bool | str = Field(default=False, description="continue the last unfinished run, or the run in this folder")
    export: Literal["onnx", "none"] = Field(default="onnx", description="format to export after training")
    benchmark: bool = Field(default=True, description="time the deployed student after training")

    @field_validator("data", "model", "teacher", "method", "teacher_model", "pretrained", "resume", mode="before")
    @classmethod
    def _path_to_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value


class Recipe(Strict):
    """The one file that carries distillation through Ultralytics (its path travels in ``distill_model``)."""

    kd_yolo: Literal[1] = 1
    teacher: str | list[str] = Field(description="absolute path of the teacher's file, or of several")
    teacher_sha256: str | list[str]
    teacher_merge: Literal["mean", "per_class"] = "mean"
    teacher_imgsz: int | None = None
    teacher_levels: Literal["position", "stride"] = "stride"
    teacher_views: Literal[1, 2, 4] = 1
    method: str
    args: dict[str, Any] = Field(default_factory=dict)
    schedule: dict[str, Any] = Field(default_factory=dict)
    balance: float | None = None
    trust: bool = False
    unlabeled: str | None = None
    unlabeled_ratio: float = 0.5
    pseudo: bool = False
    pseudo_conf: float = 0.5
    pseudo_weight: float = 0.5
    cache_teacher: Literal["disk", "ram"] | None = None
    cache_gb: float = 4.0
    cache_dir: str | None = None

    @property
    def teachers(self) -> list[tuple[str, str]]:
        """Return path and hash of every teacher."""
        paths, hashes = (x if isinstance(x, list) else [x] for x in (self.teacher, self.teacher_sha256))
        return list(zip(paths, hashes, strict=True))


class MethodFile(Strict):
    """A YAML file of ``cfg/methods`` or of the user."""

    name: str
    args: dict[str, Any] = Field(default_factory=dict)
    schedule: dict[str, Any] = Field(default_factory=dict)
    balance: float | None = None


ModelT = TypeVar("ModelT", bound=BaseModel)


def validate(schema: type[ModelT], values: Mapping[str, Any], where: str = "") -> ModelT:
    """Validate a mapping; turn the first problem into one line.

    Raises:
        ConfigError: Unknown key (with the nearest known), missing key, or a value of the wrong type or range.
    """
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        problems = error.errors()  # a typo makes its key unknown and perhaps the right one missing: name the typo
        first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
        key = ".".join(str(part) for part in first["loc"] if part not in {"bool", "str"})
        prefix = f"{where}: " if where else ""
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{prefix}unknown key '{key}'{nearest(key, schema.model_fields)}") from error
        if first["type"] == "missing":
            meaning = schema.model_fields[key].description or "needed"
            raise ConfigError(f"{prefix}missing key '{key}': {meaning}") from error
        raise ConfigError(f"{prefix}{key}={first.get('input')!r} is not valid: {first['msg']}") from error


@cache
def stock_keys() -> dict[str, Any]:
    """Return Ultralytics' argument names and defaults, read from its ``default.yaml`` without importing it."""
    spec = find_spec("ultralytics")
    if spec is None or spec.origin is None:
        raise ConfigError("ultralytics is not installed; run: pip install kd-yolo")
    content = yaml.safe_load((Path(spec.origin).parent / "cfg" / "default.yaml").read_text(encoding="utf-8"))
    return dict(content)


TEXT_KEYS = ("category", "name")
"""Keys whose values are names even where they look like numbers: 08, 0815, 1e3."""


def parse_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """Parse ``key=value`` words; values are YAML scalars or lists, so ``5``, ``true``, ``0.1``, ``[0, 1]`` work.

    Raises:
        ConfigError: A word without ``=``, an empty key, or a key given twice.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        key = key.strip().lstrip("-").replace("-", "_")
        if not sign or not key:
            raise ConfigError(f"'{pair}' is not understood; arguments look like key=value, for example epochs=50")
        if key in values:
            raise ConfigError(f"'{key}' is given twice; keep one")
        as_text = key in TEXT_KEYS and text.strip().lower() not in {"", "none", "null"}
        values[key] = text.strip() if as_text else parse_value(text)
    return values


def parse_value(text: str) -> Any:
    """Read one command-line value; text that is no YAML scalar or list stays text."""
    stripped = text.strip()
    if stripped in {"None", "none", "True", "False"}:
        return {"None": None, "none": "none", "True": True, "False": False}[stripped]
    try:
        value = yaml.safe_load(stripped)
    except yaml.YAMLError:
        return stripped
    if isinstance(value, str) and _is_number(stripped):
        return float(stripped)  # YAML 1.1 reads 1e-3 as text
    return value if isinstance(value, (int, float, bool, list)) else (None if value is None else stripped)


def split_train_keys(values: Mapping[str, Any]) -> tuple[TrainConfig, dict[str, Any], dict[str, dict[str, Any]]]:
    """Split what the user gave into our keys, stock keys and the dotted groups ``kd.*`` and ``schedule.*``.

    Raises:
        ConfigError: An unknown or replaced key.
    """
    own: dict[str, Any] = {}
    stock: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {"kd": {}, "schedule": {}}
    for key, value in values.items():
        group, dot, rest = key.partition(".")
        if dot and group in groups:
            groups[group][rest] = value
        elif key in REPLACED_KEYS:
            raise ConfigError(f"'{key}' is not used here: {REPLACED_KEYS[key]}")
        elif key in TrainConfig.model_fields:
            own[key] = value
        elif key in stock_keys():
            stock[key] = value
        else:
            known = [*TrainConfig.model_fields, *stock_keys(), "kd.tau", "kd.gamma", "kd.alpha", "kd.weight"]
            raise ConfigError(f"unknown key '{key}'{nearest(key, known)} (kd-yolo train --help lists all)")
    if own.get("teacher") is None:
        own.pop("teacher", None)
    return validate(TrainConfig, own), stock, groups


def whole_number(stock: Mapping[str, Any], key: str) -> int:
    """Return a stock argument that must be a whole number, or Ultralytics' default.

    Raises:
        ConfigError: It is something else.
    """
    value = stock.get(key, stock_keys()[key])
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{key}={value}: a whole number is needed")
    return value


def refuse_unknown(values: Mapping[str, Any], known: Iterable[str], command: str) -> None:
    """Raise for the first key that a command does not know, naming the nearest.

    Raises:
        ConfigError: As said.
    """
    names = list(known)
    for key in values:
        if key not in names:
            hint = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
            suggestion = f"; did you mean '{hint[0]}'?" if hint else ""
            raise ConfigError(f"{command}: unknown key '{key}'{suggestion} (kd-yolo {command} --help lists all)")


def read_recipe(path: str | Path | None) -> Recipe | None:
    """Read a recipe, or return None for a file that is not ours and belongs to stock Ultralytics.

    Raises:
        ConfigError: The file has our header but is not a valid recipe.
    """
    if path is None or Path(str(path)).suffix not in {".yaml", ".yml"} or not Path(str(path)).is_file():
        return None
    content = load_yaml(Path(str(path)))
    return validate(Recipe, content, where=str(path)) if "kd_yolo" in content else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
