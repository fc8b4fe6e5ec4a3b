"""What a run trains: a structure as plain data and, optionally, a checkpoint to start from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER

from kd_yolo.checkpoints import load_model
from kd_yolo.errors import ModelError
from kd_yolo.nn.lightnet import build_model
from kd_yolo.nn.surgery import YAML_KEY, ReparamPlan, reparam_plan, reparameterize
from kd_yolo.nn.warmstart import warm_start
from kd_yolo.resources import load_yaml


@dataclass(frozen=True)
class StudentSpec:
    """A student before it is built.

    Attributes:
        name: What the user called it.
        cfg: Model dictionary, plain data; its ``kd_yolo`` key says which convolutions are re-parameterized.
        weights: Checkpoint to start from, or None to start from random weights.
        max_stride: Largest stride in pixels; the canvas must be a multiple of it.
    """

    name: str
    cfg: dict[str, Any]
    weights: Path | None
    max_stride: int

    @property
    def goes_on(self) -> bool:
        """Whether the weights are those of the named checkpoint itself, so that none of its layers is random."""
        return self.weights is not None and self.weights == Path(self.name).expanduser().resolve()

    def build(self, nc: int) -> DetectionModel:
        """Return the structure with random weights."""
        return build_model(self.cfg, nc=nc)


def student_spec(
    name: str, reparam: str | None = None, weights: Path | None = None, scratch: bool = False, trust: bool = False
) -> StudentSpec:
    """Read a model name or file.

    Args:
        name: ``lightnet-n|s|m``, a stock or own model YAML, or a ``.pt`` file.
        reparam: Form of the branches, ``none`` for plain convolutions, None for what the model has.
        weights: Checkpoint to start from instead of the model's own.
        scratch: Start from random weights even when ``name`` is a checkpoint.
        trust: Load foreign classes from the checkpoint.

    Raises:
        ConfigError: No such model.
        CheckpointError: The file is missing, truncated, foreign or of another task.
        ModelError: It cannot be built or re-parameterized as asked.
    """
    if name.endswith(".pt"):
        path = Path(name).expanduser().resolve()
        source = load_model(path, trust=trust)[0].yaml
        weights = None if scratch else (weights or path)
    else:
        source = build_model(name).yaml
    cfg = _with_form(copy.deepcopy(dict(source)), reparam, name)
    return StudentSpec(name, cfg, weights, int(build_model(cfg).stride.max()))


def build_student(
    cfg: Any, weights: DetectionModel | None, nc: int, ch: int, names: Mapping[int, str] | None, verbose: bool
) -> DetectionModel | None:
    """Build the model a trainer asks for and load what it can start from.

    Args:
        cfg: Model dictionary, or a path to one.
        weights: Source model, or None.
        nc: Number of classes.
        ch: Image channels.
        names: Class names to match when the source has other classes; None leaves stock placeholders.
        verbose: Print the layer table.

    Returns:
        The model, or None when ``cfg`` is not ours to build (a stock name) and stock code should.
    """
    if isinstance(cfg, (str, Path)):
        if not Path(cfg).is_file():
            return None
        cfg = load_yaml(Path(cfg))
    plan = reparam_plan(cfg)
    surgery = plan is not None and weights is not None and _same_plain_network(cfg, weights)
    model = build_model(_without_plan(cfg) if surgery else cfg, nc, ch, verbose)
    if names is not None:
        model.names = dict(names)  # lets load() match classes by name
    if weights is None:
        return model
    if surgery:
        model.load(weights)
        assert plan is not None
        count = reparameterize(model, plan.reparam)
        LOGGER.info(
            f"{count} convolutions re-parameterized ({plan.reparam}); the network starts at the pretrained function"
        )
    elif reparam_plan(dict(weights.yaml)) == plan and _same_network(cfg, weights.yaml):
        model.load(weights)
    else:
        report = warm_start(model, weights)
        LOGGER.info(f"warm start: {report.summary()}")
    return model


def _with_form(cfg: dict[str, Any], reparam: str | None, name: str) -> dict[str, Any]:
    present = reparam_plan(cfg)
    if reparam is None or (present is not None and present.reparam == reparam):
        return cfg
    if present is None:
        if reparam != "none":
            # as reparameterize() does it: a trainable 1x1 kernel can hold the identity itself
            cfg[YAML_KEY] = ReparamPlan.model_validate(
                {"reparam": reparam, "identity": reparam != "qarep"}
            ).model_dump()
        return cfg
    if name.endswith(".pt"):
        raise ModelError(
            f"{name}: its branches are {present.reparam}, not {reparam}; drop reparam=, or run kd-yolo deploy first "
            "and start from the deployed file"
        )
    if reparam == "none":
        return _without_plan(cfg)
    cfg[YAML_KEY] = {**cfg[YAML_KEY], "reparam": reparam}
    return cfg


def _without_plan(cfg: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in cfg.items() if key != YAML_KEY}


def _same_network(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return all(first.get(key) == second.get(key) for key in ("backbone", "head", "scale"))


def _same_plain_network(cfg: Mapping[str, Any], weights: DetectionModel) -> bool:
    return reparam_plan(dict(weights.yaml)) is None and _same_network(cfg, weights.yaml)
