"""The form in which an anomaly model is deployed: branches merged, BatchNorm in the convolutions, nothing unused."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn

from kd_yolo.anomaly.model import AnomalyModel
from kd_yolo.anomaly.projectors import AnchorProjector, StudentProjector
from kd_yolo.errors import ReparamError
from kd_yolo.nn.merging import max_errors, rep_blocks, replace_module
from kd_yolo.nn.reparam import fold_bn

CHECK_PX = 128  # float64 convolutions are slow
TOLERANCE = 1e-5  # of map values, in float64; a correct form is near 1e-12


def deployed(model: AnomalyModel) -> AnomalyModel:
    """Return a copy that computes the same maps with fewer operations; the source stays untouched.

    Re-parameterized blocks become one convolution, every BatchNorm is folded into the convolution before it (in
    teacher, student and projectors), scale factors into kernels, and heads that only training uses are removed. Checked
    in float64 on a random image.

    Args:
        model: A trained model; a deployed one is copied.

    Returns:
        The copy, float32, in eval mode, without gradients, on the CPU.

    Raises:
        ReparamError: Its maps differ from the model's by more than 1e-5, or are not finite.
    """
    source = copy.deepcopy(model).cpu().double().eval()
    target = copy.deepcopy(source)
    if not model.is_deployed:
        fold(target)
    images = _random_images(min(model.spec.imgsz, CHECK_PX))
    with torch.no_grad():
        expected = [*source.level_maps(images), source(images)]
        found = [*target.level_maps(images), target(images)]
    error = max_errors(expected, found)[0]
    if not error <= TOLERANCE:
        raise ReparamError(
            f"the deployed maps differ from the trained model's by {error:.3g} (bound {TOLERANCE:g}); do not deploy it"
        )
    return target.float().eval().requires_grad_(False)


def fold(model: AnomalyModel) -> None:
    """Change a model to its deployed structure in place, whatever its weights; unchecked, see ``deployed``."""
    for name, block in rep_blocks(model).items():
        replace_module(model, name, block.to_conv())
    for parent in list(model.modules()):
        _fold_children(parent)
    for projector in model.modules():
        if isinstance(projector, (StudentProjector, AnchorProjector)):
            _fold_scale(projector)
    if "same" not in model.spec.map_kinds:
        model.anchors = nn.ModuleDict()
    if "cross" not in model.spec.map_kinds:
        model.projectors = nn.ModuleDict()
    model.is_deployed = True
    model.eval().requires_grad_(False)


def _fold_children(parent: nn.Module) -> None:
    """Fold each BatchNorm into the convolution that stands directly before it among its siblings."""
    for (_, conv), (name, norm) in itertools.pairwise(list(parent.named_children())):
        if not isinstance(conv, nn.Conv2d) or type(norm) is not nn.BatchNorm2d:
            continue  # a subclass of the norm may do more, such as timm's, which holds the activation too
        if conv.out_channels == norm.num_features:
            kernel, bias = fold_bn(conv.weight, conv.bias, norm)
            _set(conv, "weight", kernel.to(conv.weight.dtype))
            _set(conv, "bias", bias.to(conv.weight.dtype))
            setattr(parent, name, nn.Identity())


@torch.no_grad()
def _fold_scale(projector: StudentProjector | AnchorProjector) -> None:
    last = projector.conv2
    _set(last, "weight", last.weight * projector.scale)
    if last.bias is not None:
        _set(last, "bias", last.bias * projector.scale)
    projector.scale = 1.0


def _set(conv: nn.Conv2d, name: str, value: Tensor) -> None:
    """Replace a weight by one of the same kind: a teacher's are buffers, all others parameters."""
    is_buffer = "weight" in conv._buffers
    conv._parameters.pop(name, None)
    conv._buffers.pop(name, None)
    if is_buffer:
        conv.register_buffer(name, value)
    else:
        conv.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _random_images(side: int) -> Tensor:
    return torch.rand(1, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
