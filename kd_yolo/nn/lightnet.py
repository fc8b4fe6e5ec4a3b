"""Build detectors from model YAML: the LightNet family, stock Ultralytics models, and re-parameterized ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.nn.tasks import DetectionModel, yaml_model_load
from ultralytics.utils.torch_utils import get_flops

from kd_yolo import resources
from kd_yolo.errors import ConfigError, ModelError
from kd_yolo.nn.surgery import YAML_KEY, apply_plan, merge, reparam_plan


def build_lightnet(name: str, nc: int, ch: int = 3, form: str = "qarep", verbose: bool = False) -> DetectionModel:
    """Build an untrained LightNet.

    Args:
        name: ``lightnet-n``, ``lightnet-s``, ``lightnet-m``, or a model YAML file with a ``kd_yolo`` key.
        nc: Number of classes.
        ch: Image channels.
        form: Form of the re-parameterized blocks, see ``RepBlock``; it replaces the YAML's own.
        verbose: Print the layer table.

    Raises:
        ConfigError: There is no such YAML.
        ModelError: The YAML cannot be built, or has no ``kd_yolo`` key.
    """
    content = _load(name)
    if YAML_KEY not in content:
        raise ModelError(f"{name}: not a LightNet, its YAML has no '{YAML_KEY}' key")
    plan = content[YAML_KEY]
    content[YAML_KEY] = plan | {"reparam": form} if isinstance(plan, dict) else plan
    return build_model(content, nc, ch, verbose)


def build_model(cfg: dict[str, Any] | str, nc: int | None = None, ch: int = 3, verbose: bool = False) -> DetectionModel:
    """Build any detector from a dictionary or YAML, with re-parameterized blocks where its ``kd_yolo`` key says so.

    ``model.yaml`` of the result is plain data and describes the whole structure: building from it again gives modules
    whose state dictionaries match strictly. That is what resuming a run relies on.

    Args:
        cfg: Model dictionary (not modified); or the name of a built-in (``lightnet-s``), a YAML file, or a stock name
            (``yolo26n.yaml``).
        nc: Number of classes; None keeps the YAML's.
        ch: Image channels.
        verbose: Print the layer table.

    Raises:
        ConfigError: There is no such YAML.
        ModelError: The dictionary does not describe a detector that Ultralytics can build.
    """
    content = _load(cfg) if isinstance(cfg, str) else copy.deepcopy(cfg)
    label = cfg if isinstance(cfg, str) else str(content.get("yaml_file", "model dictionary"))
    missing = [key for key in ("nc", "backbone", "head") if key not in content]
    if missing:
        raise ModelError(f"{label}: the key '{missing[0]}' is missing; a model YAML has nc, backbone and head")
    plan = reparam_plan(content)
    try:
        model = DetectionModel(content, ch=ch, nc=nc, verbose=verbose)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ModelError(f"{label}: Ultralytics cannot build this model ({type(error).__name__}: {reason})") from error
    if plan is not None:
        apply_plan(model, plan)
    return model


def count_deployed(model: DetectionModel, imgsz: int = 640) -> dict[str, float]:
    """Count what is left of a model after merge and fuse, with the one head branch that inference keeps.

    Args:
        model: Any detector; it stays untouched.
        imgsz: Side of the square image for which GFLOPs are counted.

    Returns:
        ``params`` (int), ``convolutions`` (int, two-dimensional ones), ``gflops`` (two per multiply-add).
    """
    deployed = merge(model, check=False)[0].float().fuse(verbose=False)
    return {
        "params": sum(parameter.numel() for parameter in deployed.parameters()),
        "convolutions": sum(isinstance(module, nn.Conv2d) for module in deployed.modules()),
        "gflops": float(get_flops(deployed, imgsz)),
    }


def _load(name: str) -> dict[str, Any]:
    """Return the model dictionary that a name stands for: file, built-in, or stock Ultralytics name."""
    try:
        path = resources.find("models", name)
    except ConfigError:
        if Path(name).suffix not in {".yaml", ".yml"}:
            raise
        try:
            return dict(yaml_model_load(name))
        except FileNotFoundError:
            pass
        raise
    return resources.load_yaml(path) | {"yaml_file": path.name}
