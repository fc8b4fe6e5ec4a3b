"""The keys of ``kd-yolo train task=classify`` and its methods, checked once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from kd_yolo import resources
from kd_yolo.config import REPLACED_KEYS, MethodFile, Strict, stock_keys, validate, whole_number
from kd_yolo.distill.schedule import Schedule
from kd_yolo.errors import ConfigError, nearest
from kd_yolo.resources import load_yaml

MODELS = "models/classify"
METHODS = "methods/classify"
NO_METHOD: dict[str, Any] = {"name": "none", "args": {}, "schedule": {}, "balance": None}
DEFAULT_METHOD = "hflkd"
# Of a method file that does not say: our choice. Distillation to the last epoch, since no mosaic is closed here.
SCHEDULE: dict[str, Any] = {"warmup": 0.1, "decay": "constant", "off_last": None}
REPLACED = {key: text for key, text in REPLACED_KEYS.items() if key != "task"}


class ClassifyConfig(Strict):
    """What ``kd-yolo train task=classify`` adds to the stock training arguments."""

    data: str = Field(min_length=1, description="folder with train/CLASS/ and val/CLASS/, or neu, magnetic-tile")
    model: str = Field(default="lightnet-n-cls", min_length=1, description="student: lightnet-n-cls|s-cls, YAML or .pt")
    teacher: str = Field(default="none", min_length=1, description="a trained classifier's .pt file, or none")
    chain: str | list[str] | None = Field(default=None, description="models, each distilled into the next: A,B,C")
    method: str | None = Field(default=None, min_length=1, description="kd, dkd, hflkd, a YAML file, or none")
    reparam: Literal["qarep", "repvgg", "multi", "none"] | None = Field(default=None, description="form of branches")
    pretrained: bool | str = Field(default=True, description="warm start: a .pt file, or false")
    allow_weak_teacher: bool = Field(default=False, description="accept a teacher no better than the commonest class")
    trust: bool = Field(default=False, description="load foreign pickled classes from the given checkpoints")
    resume: bool | str = Field(default=False, description="continue the last unfinished run, or the run in this folder")

    @field_validator("data", "model", "teacher", "method", "pretrained", "resume", mode="before")
    @classmethod
    def _path_to_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, (Path, int, float)) and not isinstance(value, bool) else value

    @property
    def method_name(self) -> str:
        """Return the method; without one given, HFLKD where there is a teacher or a chain, else none."""
        if self.method is not None:
            return self.method
        return DEFAULT_METHOD if self.chain or self.teacher != "none" else "none"


def split_classify_keys(
    values: Mapping[str, Any],
) -> tuple[ClassifyConfig, dict[str, Any], dict[str, dict[str, Any]]]:
    """Split what the user gave into our keys, stock keys and the dotted groups ``kd.*`` and ``schedule.*``.

    Args:
        values: Keys as given; ``task=classify`` may be among them.

    Raises:
        ConfigError: An unknown or replaced key, the nearest known one named; a wrong value; ``data`` missing.
    """
    own: dict[str, Any] = {}
    stock: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {"kd": {}, "schedule": {}}
    for key, value in values.items():
        group, dot, rest = key.partition(".")
        if key == "task":
            if value != "classify":
                raise ConfigError(f"task={value}: this is classification; give task=classify")
        elif dot and group in groups:
            groups[group][rest] = value
        elif key in REPLACED:
            raise ConfigError(f"'{key}' is not used here: {REPLACED[key]}")
        elif key in ClassifyConfig.model_fields:
            own[key] = value
        elif key in stock_keys():
            stock[key] = value
        else:
            known = [*ClassifyConfig.model_fields, *stock_keys(), "kd.tau", "kd.weight", "kd.alpha"]
            raise ConfigError(
                f"task=classify: unknown key '{key}'{nearest(key, known)} (kd-yolo train --help lists all)"
            )
    for key in ("teacher", "method"):
        if own.get(key, "") is None:
            own.pop(key)
    return validate(ClassifyConfig, own, where="task=classify"), stock, groups


def resolve_method(
    config: ClassifyConfig, groups: Mapping[str, Mapping[str, Any]], stock: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the method with file, then command-line arguments applied, all validated.

    Raises:
        ConfigError: Unknown method, argument or schedule key; a method without a teacher or a teacher without a method.
    """
    name = config.method_name
    taught = config.teacher != "none" or config.chain is not None
    if name == "none":
        _refuse_useless(config, groups, taught)
        return dict(NO_METHOD)
    if not taught:
        raise ConfigError(f"method={name}: needs a teacher; give teacher=FILE.pt or chain=A,B,C, or method=none")
    from kd_yolo.classify.methods import parse_args

    file = find(METHODS, name)
    method = validate(MethodFile, load_yaml(file), where=str(file))
    if method.balance is not None:
        raise ConfigError(f"{file}: 'balance' is not used by classifiers; drop it and set the method's weights")
    arguments = {**method.args, **groups.get("kd", {})}
    schedule = {**SCHEDULE, **method.schedule, **groups.get("schedule", {})}
    parse_args(method.name, arguments)
    epochs, tail = (whole_number(stock, key) for key in ("epochs", "close_mosaic"))
    validate(Schedule, schedule, where="schedule").active_epochs(max(epochs, 1), tail)
    return {"name": method.name, "args": arguments, "schedule": schedule, "balance": None}


def find(kind: str, name: str) -> Path:
    """Return the YAML file of a model or method: a file of that name first, then the built-in.

    Args:
        kind: ``models/classify`` or ``methods/classify``.
        name: A path to a YAML file, or the name of a built-in with or without ``.yaml``.

    Raises:
        ConfigError: Nothing was found; the message lists the built-in ones.
    """
    local = Path(name).expanduser()
    if local.suffix in {".yaml", ".yml"} and local.is_file():
        return local.resolve()
    known = resources.builtin_names(kind)
    stem = local.stem if local.suffix in {".yaml", ".yml"} else local.name
    if str(local.parent) == "." and stem in known:
        return resources.builtin_root() / kind / f"{stem}.yaml"
    word = kind.partition("/")[0].removesuffix("s")
    raise ConfigError(
        f"{word} '{name}' of classifiers not found: no YAML file {local} and no built-in of that name "
        f"(built-in: {', '.join(known)}){nearest(stem, known)}"
    )


def _refuse_useless(config: ClassifyConfig, groups: Mapping[str, Mapping[str, Any]], taught: bool) -> None:
    """Refuse what would have no effect without a method.

    Raises:
        ConfigError: A teacher, a chain or an argument is given.
    """
    if taught:
        what = "chain=" if config.chain is not None else f"teacher={config.teacher}"
        raise ConfigError(f"method=none: {what} would have no effect; drop it, or choose a method")
    for group, keys in groups.items():
        for key in keys:
            raise ConfigError(f"{group}.{key} has no effect without a teacher; drop it, or set teacher= and method=")
