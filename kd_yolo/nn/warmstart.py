"""Start a student from a pretrained detector of another structure: layers of the same role and shape are inherited."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from ultralytics.nn.modules import Conv
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.nn.blocks import RepBlock

PROBE_PX = 256  # canvas for reading each layer's resolution; a multiple of every stride in use

# Where a layer sits: its part of the network ("body", or the path in the head) and the side of its output at PROBE_PX.
Role = tuple[str, int]


@dataclass(frozen=True)
class WarmStartReport:
    """What was inherited.

    Attributes:
        layers: Target layer to the source layer it took.
        parameters: Parameters of the target that now hold pretrained values.
        total: All parameters of the target.
    """

    layers: dict[str, str]
    parameters: int
    total: int

    @property
    def share(self) -> float:
        """Inherited share of the target's parameters, 0 to 1."""
        return self.parameters / self.total if self.total else 0.0

    def summary(self) -> str:
        """Return one line."""
        return (
            f"{len(self.layers)} layers, {self.parameters / 1e6:.3f} M of {self.total / 1e6:.3f} M parameters "
            f"({100 * self.share:.1f} %) inherited"
        )


@torch.no_grad()
def warm_start(model: DetectionModel, source: DetectionModel) -> WarmStartReport:
    """Copy every layer of ``source`` that has the role and shape of one in ``model``, in the order of both networks.

    A layer's role is its part of the network and the resolution of its output, so that a filter of stride 8 never lands
    at stride 32. A ``RepBlock`` takes a plain convolution into its dense branch, with its other branches starting at
    nothing, so that it computes what the source layer computed. A poor match is no error: the report says how little
    was inherited.

    Args:
        model: The student, changed in place.
        source: A pretrained detector of any structure with stock layers.
    """
    sources = _layers(source)
    used: set[str] = set()
    layers: dict[str, str] = {}
    parameters = 0
    for name, (target, role) in _layers(model).items():
        for other, (candidate, other_role) in sources.items():
            if other not in used and role == other_role and _shape(target) == _shape(candidate):
                _copy(target, candidate)
                used.add(other)
                layers[name] = other
                parameters += sum(p.numel() for p in target.parameters())
                break
    return WarmStartReport(layers, parameters, sum(p.numel() for p in model.parameters()))


def _layers(model: DetectionModel) -> dict[str, tuple[nn.Module, Role]]:
    """Return the convolution layers of a detector with their roles, in the order in which they run."""
    found: dict[str, tuple[nn.Module, Role]] = {}
    head = f"model.{len(model.model) - 1}."
    names = {module: name for name, module in model.named_modules() if _is_layer(module)}
    inner = {child for module in names for child in module.modules() if child is not module}

    def note(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        part = names[module].removeprefix(head) if names[module].startswith(head) else "body"
        found.setdefault(names[module], (module, (part, int(output.shape[-1]))))

    hooks = [module.register_forward_hook(note) for module in names if module not in inner]
    training = model.training
    parameter = next(model.parameters())
    try:
        model.eval()
        model(torch.zeros(1, int(model.yaml.get("channels", 3)), PROBE_PX, PROBE_PX).to(parameter))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return found


def _is_layer(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d or isinstance(module, (Conv, RepBlock))


def _shape(module: nn.Module) -> tuple[object, ...]:
    """Return what must agree: kernel, channels, stride, groups, dilation, and whether a BatchNorm follows."""
    plain = type(module) is nn.Conv2d
    conv = module if plain else module.conv
    assert isinstance(conv, nn.Conv2d)
    return (tuple(conv.weight.shape), conv.stride, conv.groups, conv.dilation, plain or not hasattr(module, "bn"))


def _copy(target: nn.Module, source: nn.Module) -> None:
    if isinstance(target, RepBlock):
        if isinstance(source, RepBlock):
            if source.form == target.form:
                target.load_state_dict(source.state_dict(), strict=False)
                return
            source = source.to_conv()
        target.inherit(source.conv.weight, source.bn)  # type: ignore[union-attr, arg-type]
    elif isinstance(source, RepBlock):
        target.load_state_dict(source.to_conv().state_dict())
    else:
        target.load_state_dict(source.state_dict())
