"""Start a student from a pretrained detector of another structure: layers of the same role and shape are inherited."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from ultralytics.nn.modules import Conv
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.nn.blocks import RepBlock

PROBE_PX = 256  # canvas for reading each layer's resolution; a multiple of every stride in use

# Where a layer sits: backbone, neck or head; the kind of its row and the path inside it; output side at PROBE_PX.
Role = tuple[str, str, int]
Row = dict[Role, tuple[str, nn.Module]]


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
    """Copy every layer of ``source`` that has the role and shape of one in ``model``, row by row.

    A layer's role is its part of the network, the kind of YAML row it belongs to with its path inside that row, and the
    resolution of its output: a backbone's stride-2 convolution is inherited by one of the same stride and channels, an
    SPPF by an SPPF, a head's branch by the same branch; never a stride-8 filter at stride 32, and never a part of some
    block by a plain row that happens to have its shape but sees other features. A row takes all it can from one row,
    the one that fits most of it, for the layers of a block only work together; a row is taken once. A ``RepBlock``
    takes a convolution into its dense branch, with its other branches starting at nothing, so that it computes what the
    source layer computed. A poor match is no error: the report says how little was inherited.

    Args:
        model: The student, changed in place.
        source: A pretrained detector of any structure with stock layers.
    """
    targets, sources = _rows(model), _rows(source)
    unused = dict(sources)
    layers: dict[str, str] = {}
    parameters = 0
    for row in targets.values():
        best = max(unused, key=lambda index: _fitting(row, unused[index]), default=None)
        if best is None or _fitting(row, unused[best]) == 0:
            continue
        for role, (name, target) in row.items():
            other, candidate = unused[best].get(role, ("", target))
            if other and _shape(target) == _shape(candidate):
                _copy(target, candidate)
                layers[name] = other
                parameters += sum(p.numel() for p in target.parameters())
        del unused[best]
    return WarmStartReport(layers, parameters, sum(p.numel() for p in model.parameters()))


def _rows(model: DetectionModel) -> dict[int, Row]:
    """Return the layers of every row of a detector by role."""
    rows: dict[int, Row] = {}
    for name, (module, role) in _layers(model).items():
        rows.setdefault(int(name.split(".")[1]), {})[role] = (name, module)
    return dict(sorted(rows.items()))


def _fitting(target: Row, source: Row) -> int:
    """Return how many parameters of a row another could give it."""
    pairs = [(module, source[role][1]) for role, (_, module) in target.items() if role in source]
    return sum(sum(p.numel() for p in mine.parameters()) for mine, theirs in pairs if _shape(mine) == _shape(theirs))


def _layers(model: DetectionModel) -> dict[str, tuple[nn.Module, Role]]:
    """Return the convolution layers of a detector with their roles, in the order in which they run."""
    found: dict[str, tuple[nn.Module, Role]] = {}
    names = {module: name for name, module in model.named_modules() if _is_layer(module)}
    inner = {child for module in names for child in module.modules() if child is not module}

    def note(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        role = (*_place(model, names[module]), int(output.shape[-1]))
        found.setdefault(names[module], (module, role))

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


def _place(model: DetectionModel, name: str) -> tuple[str, str]:
    """Return the part of the network, and kind of row with the path inside it, of a layer such as ``model.9.cv1``."""
    _, index, *path = name.split(".")
    row = int(index)
    if row == len(model.model) - 1:
        return "head", ".".join(path)
    kind = "Conv" if isinstance(model.model[row], RepBlock) else type(model.model[row]).__name__
    return ("backbone" if row < len(model.yaml["backbone"]) else "neck"), ".".join((kind, *path))


def _is_layer(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d or isinstance(module, (Conv, RepBlock))


def _shape(module: nn.Module) -> tuple[object, ...]:
    """Return what must agree: kernel, channels, stride, groups, dilation, and whether a BatchNorm follows."""
    plain = type(module) is nn.Conv2d
    conv = module if plain else module.conv
    assert isinstance(conv, nn.Conv2d)
    return (tuple(conv.weight.shape), conv.stride, conv.groups, conv.dilation, plain or not hasattr(module, "bn"))


def _copy(target: nn.Module, source: nn.Module) -> None:
    if isinstance(source, RepBlock):
        if isinstance(target, RepBlock) and _same_branches(target, source):
            target.load_state_dict(source.state_dict())
            return
        source = source.to_conv()
    if isinstance(target, RepBlock):
        target.inherit(source.conv.weight, source.bn)  # type: ignore[union-attr, arg-type]
    else:
        target.load_state_dict(source.state_dict())


def _same_branches(first: RepBlock, second: RepBlock) -> bool:
    names = [{name: value.shape for name, value in block.state_dict().items()} for block in (first, second)]
    return first.form == second.form and first.skip == second.skip and names[0] == names[1]
