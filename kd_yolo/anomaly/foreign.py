"""Backbones of other libraries as chains of modules: Ultralytics, torchvision, timm. Nothing is downloaded."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import Classify
from ultralytics.nn.tasks import ClassificationModel, parse_model, yaml_model_load

from kd_yolo.anomaly.stages import PROBE_PX, probe
from kd_yolo.checkpoints import model_in, read_checkpoint
from kd_yolo.errors import BackendMissingError, CheckpointError, ConfigError, ModelError, TeacherError, nearest
from kd_yolo.nn.lightnet import build_model

CLASSIFIER = (nn.AdaptiveAvgPool2d, nn.Dropout, nn.Linear)  # where the feature maps of a torchvision network end


def model_yaml(name: str) -> dict[str, Any]:
    """Return the model dictionary of a stock classifier or detector, a LightNet, or a YAML file.

    Args:
        name: For example ``yolo26n-cls``, ``yolo11s``, ``lightnet-n``, ``my-model.yaml``.

    Raises:
        ModelError: There is no such model.
    """
    if name.endswith(".pt"):
        raise ModelError(f"student '{name}': starts from random weights; give a model name or a YAML file, no .pt")
    try:
        return _plain(build_model(name).yaml)
    except (ConfigError, ModelError):
        pass  # no LightNet and no own file of a detector: a stock name without ending, or a classifier
    try:
        content = dict(yaml_model_load(name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"))
    except (FileNotFoundError, OSError) as error:
        raise ModelError(
            f"student '{name}' not found; give a stock classifier or detector such as yolo26n-cls or yolo11n, "
            "lightnet-n|s|m, or a YAML file"
        ) from error
    return _plain(content)


def ultralytics_chain(content: Mapping[str, Any]) -> list[nn.Module]:
    """Return the backbone layers of a model dictionary, untrained, re-parameterized where it says so.

    Raises:
        ModelError: It cannot be built, or its backbone is not a plain chain.
    """
    plain = _plain(content)
    if "backbone" not in plain or "head" not in plain:
        raise ModelError("the model dictionary has no backbone and head")
    if plain["head"] and plain["head"][-1][2] == "Classify":
        try:  # parse_model, because a ClassificationModel logs a summary whatever verbose says
            layers, _ = parse_model(copy.deepcopy(plain), ch=3, verbose=False)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise ModelError(f"Ultralytics cannot build this classifier ({reason})") from error
        return _backbone_layers(layers, plain)
    return _backbone_layers(build_model(plain).model, plain)


def read_detector(path: str, trust: bool) -> tuple[list[nn.Module], dict[str, Any]]:
    """Return the trained backbone layers of an Ultralytics or own checkpoint, and its structure as plain data.

    Raises:
        CheckpointError: The file is missing, damaged, not trusted, or holds neither a classifier nor a detector.
    """
    file, checkpoint = read_checkpoint(path, trust)
    candidate = checkpoint.get("ema") or checkpoint.get("model")
    if isinstance(candidate, ClassificationModel) and isinstance(candidate.model[-1], Classify):
        model: Any = candidate.float()
        if not all(bool(torch.isfinite(value).all()) for value in model.state_dict().values()):
            raise CheckpointError(f"{file}: has weights that are not finite; its training diverged; take another one")
    else:
        model = model_in(file, checkpoint)
    content = _plain(model.yaml)
    chain = _backbone_layers(model.eval().model, content)
    fresh = ultralytics_chain(content)
    for index, (rebuilt, trained) in enumerate(zip(fresh, chain, strict=True)):
        try:
            rebuilt.load_state_dict(trained.state_dict())  # also proves that the structure rebuilds the file's layers
        except RuntimeError as error:
            raise CheckpointError(
                f"{file}: layer {index} is not what its own model dictionary says (fused or changed); give the "
                "unfused training checkpoint"
            ) from error
    return fresh, {"kind": "ultralytics", "yaml": content}


class TimmMaps(nn.Module):
    """A timm network built with ``features_only``, its maps by stride.

    Args:
        name: timm's name of the network.
        strides: Wanted strides in pixels.
        file: Pretrained weights as timm publishes them, or None to load them later.

    Attributes:
        channels: Channels by stride.
        mean: What timm subtracts from images in [0, 1] for these weights.
        std: What it divides by.

    Raises:
        BackendMissingError: timm is not installed.
        TeacherError: No such network, no map of a stride, or the weights are another network's.
    """

    def __init__(self, name: str, strides: Sequence[int], file: Path | None = None) -> None:
        super().__init__()
        timm = _timm()
        try:
            features = timm.create_model(name, pretrained=False, features_only=True).feature_info
            known = {int(reduction): index for index, reduction in enumerate(features.reduction())}
            missing = [stride for stride in strides if stride not in known]
            if missing:
                raise ValueError(f"has no feature map of stride {missing[0]} (it has {', '.join(map(str, known))})")
            self.net = timm.create_model(
                name,
                pretrained=file is not None,
                pretrained_cfg_overlay={"file": str(file)} if file is not None else None,
                features_only=True,
                out_indices=[known[stride] for stride in strides],
            )
        except (RuntimeError, ValueError, KeyError, OSError, AttributeError) as error:
            raise TeacherError(f"teacher 'timm:{name}': {' '.join(str(error).split())[:200]}") from error
        config = getattr(self.net, "pretrained_cfg", None) or {}
        self.mean = tuple(float(value) for value in config.get("mean", (0.485, 0.456, 0.406)))
        self.std = tuple(float(value) for value in config.get("std", (0.229, 0.224, 0.225)))
        self.strides = tuple(strides)
        self.channels = dict(zip(strides, self.net.feature_info.channels(), strict=True))

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        """Return maps (B, C_s, H / s, W / s) by stride s."""
        return dict(zip(self.strides, self.net(x), strict=True))


def torchvision_chain(name: str, state: Mapping[str, Tensor] | None = None) -> list[nn.Module]:
    """Return a torchvision network as a chain of modules.

    Args:
        name: torchvision's name, for example ``resnet18``.
        state: State dictionary; a classifier of another number of classes does not matter. None: untrained.

    Raises:
        TeacherError: No such network, its modules do not run one after the other, or the weights are another's.
    """
    from torchvision import models  # here: it takes seconds to load

    known = models.list_models(models)
    if name not in known:
        raise TeacherError(f"teacher 'torchvision:{name}': torchvision has no such network{nearest(name, known)}")
    model = models.get_model(name, weights=None).eval()
    features = getattr(model, "features", None)
    chain = _flat(features if isinstance(features, nn.Sequential) else model)
    chain = list(itertools.takewhile(lambda module: not isinstance(module, CLASSIFIER), chain))
    chain = chain[: len(probe(chain))]
    if not _runs_as(model, chain):
        raise TeacherError(
            f"teacher 'torchvision:{name}': is no plain chain of stages that halve the size; take a resnet, regnet, "
            "mobilenet, efficientnet, convnext, densenet or vgg"
        )
    if state is not None:
        used = {id(value) for module in chain for value in module.state_dict(keep_vars=True).values()}
        own = {key: value for key, value in model.state_dict(keep_vars=True).items() if id(value) in used}
        wrong = [key for key, value in own.items() if key not in state or state[key].shape != value.shape]
        if wrong:
            raise TeacherError(
                f"teacher 'torchvision:{name}': the weights are another network's ('{wrong[0]}' is missing or of "
                f"another shape, {len(wrong)} in all)"
            )
        model.load_state_dict({key: state[key] for key in own}, strict=False)
    return chain


def _timm() -> Any:
    if find_spec("timm") is None:
        raise BackendMissingError("teacher 'timm:...' needs timm; run: pip install timm")
    return import_module("timm")


def _flat(module: nn.Module) -> list[nn.Module]:
    """Return the children of a module, plain sequences unrolled."""
    found: list[nn.Module] = []
    for child in module.children():
        found.extend(_flat(child) if type(child) is nn.Sequential else [child])
    return found


@torch.no_grad()
def _runs_as(model: nn.Module, chain: Sequence[nn.Module]) -> bool:
    """Return whether the last module of a chain gives in the chain what it gives in the whole network."""
    if not chain:
        return False
    seen: list[Tensor] = []
    hook = chain[-1].register_forward_hook(lambda _module, _inputs, output: seen.append(output.clone()))
    images = torch.rand(1, 3, PROBE_PX, PROBE_PX, generator=torch.Generator().manual_seed(0))
    try:
        model(images)
    except (RuntimeError, ValueError, AssertionError):  # a network for one size of image only
        return False
    finally:
        hook.remove()
    x = images
    for module in chain:
        x = module(x)
    return len(seen) == 1 and seen[0].shape == x.shape and torch.allclose(seen[0], x, rtol=1e-4, atol=1e-5)


def _backbone_layers(layers: Any, content: Mapping[str, Any]) -> list[nn.Module]:
    """Return the layers of a model's backbone.

    Raises:
        ModelError: One of them reads another layer than the one before it.
    """
    backbone = list(layers)[: len(content["backbone"])]
    branching = [layer.i for layer in backbone if layer.f != -1]
    if branching:
        raise ModelError(f"layer {branching[0]} of the backbone reads other layers than the one before it")
    return backbone


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model dictionary without what belongs to one machine."""
    return {key: copy.deepcopy(value) for key, value in content.items() if key != "yaml_file"}
