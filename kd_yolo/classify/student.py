"""What a classification run trains: a structure as plain data and, optionally, a checkpoint to start from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.nn.modules import Classify
from ultralytics.nn.tasks import ClassificationModel, yaml_model_load
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import initialize_weights

from kd_yolo.classify.checkpoints import load_classifier, load_source
from kd_yolo.classify.settings import MODELS, ClassifyConfig, find
from kd_yolo.errors import ConfigError, ModelError
from kd_yolo.nn.surgery import YAML_KEY, ReparamPlan, apply_plan, reparam_plan, reparameterize
from kd_yolo.nn.warmstart import warm_start
from kd_yolo.resources import load_yaml


@dataclass(frozen=True)
class ClassifierSpec:
    """A classifier before it is built.

    Attributes:
        name: What the user called it.
        cfg: Model dictionary, plain data; its ``kd_yolo`` key says which convolutions are re-parameterized.
        weights: Checkpoint to start from, or None to start from random weights.
    """

    name: str
    cfg: dict[str, Any]
    weights: Path | None

    def build(self, nc: int) -> ClassificationModel:
        """Return the structure with random weights."""
        return build_classifier(self.cfg, nc)


def resolve_classifier(config: ClassifyConfig, name: str | None = None) -> ClassifierSpec:
    """Return what a run, or a stage of a chain, trains.

    Args:
        config: The run's keys; ``pretrained`` and ``reparam`` hold for every stage.
        name: ``lightnet-n-cls``, a stock or own model YAML, or a ``.pt`` file; None takes the run's ``model``.

    Raises:
        ConfigError: No such model.
        CheckpointError: The file is missing, truncated, foreign or no classifier.
        ModelError: It cannot be built or re-parameterized as asked.
    """
    name = name or config.model
    weights: Path | None = None
    if isinstance(config.pretrained, str):
        load_source(config.pretrained, trust=config.trust)
        weights = Path(config.pretrained).expanduser().resolve()
    if name.endswith(".pt"):
        path = Path(name).expanduser().resolve()
        cfg = dict(load_classifier(path, trust=config.trust)[0].yaml)
        weights = None if config.pretrained is False else (weights or path)
    else:
        cfg = model_dictionary(name)
    cfg = _with_form(copy.deepcopy(cfg), config.reparam, name)
    build_classifier(cfg)
    return ClassifierSpec(name, cfg, weights)


def model_dictionary(name: str) -> dict[str, Any]:
    """Return the dictionary that a model name stands for: YAML file, built-in, or stock Ultralytics name.

    Raises:
        ConfigError: There is no such model; a detector's name is answered with the classifier's.
    """
    try:
        path = find(MODELS, name)
    except ConfigError as error:
        if Path(name).suffix in {".yaml", ".yml"}:
            try:
                return dict(yaml_model_load(name))
            except FileNotFoundError:
                raise error from None
        stem = f"{name}.yaml" if "-cls" in name else f"{name}-cls.yaml"
        raise ConfigError(f"{error}; a stock classifier is given as {stem}") from None
    return {**load_yaml(path), "yaml_file": path.name}


def build_classifier(cfg: Mapping[str, Any], nc: int | None = None, verbose: bool = False) -> ClassificationModel:
    """Build a classifier from a dictionary, with re-parameterized blocks where its ``kd_yolo`` key says so.

    A LightNet's BatchNorms get the eps and momentum that Ultralytics gives detectors, which its blocks have too; a
    stock classifier stays as stock Ultralytics builds it.

    Args:
        cfg: Model dictionary (not modified).
        nc: Number of classes; None keeps the dictionary's.
        verbose: Print the layer table.

    Raises:
        ModelError: The dictionary does not describe a classifier that Ultralytics can build.
    """
    content = copy.deepcopy(dict(cfg))
    label = str(content.get("yaml_file", "model dictionary"))
    missing = [key for key in ("nc", "backbone", "head") if key not in content]
    if missing:
        raise ModelError(f"{label}: the key '{missing[0]}' is missing; a model YAML has nc, backbone and head")
    plan = reparam_plan(content)
    try:
        model = ClassificationModel(content, ch=3, nc=nc, verbose=verbose)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ModelError(f"{label}: Ultralytics cannot build this model ({type(error).__name__}: {reason})") from error
    if not isinstance(model.model[-1], Classify):
        raise ModelError(
            f"{label}: ends in {type(model.model[-1]).__name__}, not in a Classify head; give a classifier such as "
            "lightnet-n-cls or yolo26n-cls.yaml"
        )
    if plan is not None:
        initialize_weights(model)
        apply_plan(model, plan)
    return model


def start_classifier(
    cfg: Mapping[str, Any], weights: Any, names: Mapping[int, str], verbose: bool = False
) -> ClassificationModel:
    """Build a classifier for these classes and load what it can start from.

    From the same network everything is taken; from another network or a detector the layers of the same role and
    shape. The last linear layer is matched by class name, where names say anything.

    Args:
        cfg: Model dictionary.
        weights: A classifier, a detector, or None.
        names: Class names of the data.
        verbose: Print the layer table.
    """
    plan = reparam_plan(dict(cfg))
    plain = {key: value for key, value in cfg.items() if key != YAML_KEY}
    same = weights is not None and all(cfg.get(key) == weights.yaml.get(key) for key in ("backbone", "head", "scale"))
    theirs = reparam_plan(dict(weights.yaml)) if weights is not None else None
    surgery = plan is not None and same and theirs is None
    model = build_classifier(plain if surgery else cfg, len(names), verbose)
    model.names = dict(names)
    if weights is None:
        return model
    if same and (surgery or theirs == plan):
        _load_same(model, weights)
        if surgery and plan is not None:
            count = reparameterize(model, plan.reparam)
            LOGGER.info(f"{count} convolutions re-parameterized ({plan.reparam}), from the pretrained function on")
    else:
        report = warm_start(model, weights)
        _take_norm_settings(model, weights, report.layers)
        LOGGER.info(f"warm start: {report.summary()}")
    rows = copy_class_rows(model, weights)
    LOGGER.info(f"warm start: {rows} of {len(names)} classes found by name")
    return model


@torch.no_grad()
def copy_class_rows(model: ClassificationModel, weights: Any) -> int:
    """Copy the rows of the last linear layer whose class names both models have; return how many.

    A stock YAML's placeholder names (0, 1, ...) match nothing.
    """
    source = weights.model[-1]
    if not isinstance(source, Classify):
        return 0
    target = model.model[-1].linear
    theirs = {str(name).strip().lower(): int(key) for key, name in weights.names.items()}
    if target.in_features != source.linear.in_features or set(theirs) == {str(key) for key in theirs.values()}:
        return 0
    found = 0
    for key, name in model.names.items():
        row = theirs.get(str(name).strip().lower())
        if row is not None and row < source.linear.out_features:
            target.weight[key] = source.linear.weight[row]
            target.bias[key] = source.linear.bias[row]
            found += 1
    return found


def _load_same(model: ClassificationModel, weights: nn.Module) -> None:
    """Load all but the last linear layer, which is matched by name."""
    head = f"model.{len(model.model) - 1}.linear."
    state = {key: value for key, value in weights.state_dict().items() if not key.startswith(head)}
    missing = [key for key in model.load_state_dict(state, strict=False).missing_keys if not key.startswith(head)]
    if missing:
        raise ModelError(f"the warm start lacks {missing[0]} ({len(missing)} such tensors); give another checkpoint")
    names = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    _copy_settings(model, weights, {name: name for name in names})


def _take_norm_settings(model: nn.Module, weights: nn.Module, layers: Mapping[str, str]) -> None:
    """Give inherited BatchNorms the eps and momentum of their source: detectors and classifiers differ there."""
    pairs = {f"{mine}.bn": f"{theirs}.bn" for mine, theirs in layers.items()}
    _copy_settings(model, weights, pairs)


def _copy_settings(model: nn.Module, weights: nn.Module, pairs: Mapping[str, str]) -> None:
    mine, theirs = dict(model.named_modules()), dict(weights.named_modules())
    for name, other in pairs.items():
        target, source = mine.get(name), theirs.get(other)
        if isinstance(target, nn.BatchNorm2d) and isinstance(source, nn.BatchNorm2d) and _plain(mine, name):
            target.eps, target.momentum = source.eps, source.momentum


def _plain(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Tell whether a BatchNorm stands alone behind its convolution: in a RepBlock ``inherit`` has set it already."""
    return type(modules[name.rpartition(".")[0]]).__name__ in {"Conv", "DWConv"}


def _with_form(cfg: dict[str, Any], reparam: str | None, name: str) -> dict[str, Any]:
    present = reparam_plan(cfg)
    if reparam is None or (present is not None and present.reparam == reparam):
        return cfg
    if present is None:
        if reparam != "none":
            # as reparameterize() does it: a trainable 1x1 kernel can hold the identity itself
            plan = ReparamPlan.model_validate({"reparam": reparam, "identity": reparam != "qarep"})
            cfg[YAML_KEY] = plan.model_dump()
        return cfg
    if name.endswith(".pt"):
        raise ModelError(f"{name}: its branches are {present.reparam}, not {reparam}; drop reparam=")
    if reparam == "none":
        return {key: value for key, value in cfg.items() if key != YAML_KEY}
    return {**cfg, YAML_KEY: {**cfg[YAML_KEY], "reparam": reparam}}
