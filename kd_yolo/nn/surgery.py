"""Put re-parameterized blocks into stock detectors; ``merge`` takes them out again."""

from __future__ import annotations

import copy
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn
from ultralytics.nn.modules import Conv
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.errors import ModelError, nearest
from kd_yolo.nn.blocks import FORMS, SIZE, RepBlock
from kd_yolo.nn.merging import YAML_KEY, MergeReport, merge, replace_module

__all__ = [
    "YAML_KEY",
    "MergeReport",
    "ReparamPlan",
    "apply_plan",
    "eligible_convs",
    "merge",
    "reparam_plan",
    "reparameterize",
]


class ReparamPlan(BaseModel):
    """The ``kd_yolo:`` key of a model YAML: which convolutions are re-parameterized, and how.

    Attributes:
        reparam: Form of the blocks, see ``RepBlock``.
        scope: ``body`` for backbone and neck, ``all`` for the head too.
        identity: Give the blocks an identity branch where shapes permit it.
        branches: Parallel 3x3 branches of the form ``multi``.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    reparam: Literal["qarep", "repvgg", "multi"]
    scope: Literal["body", "all"] = "all"
    identity: bool = True
    branches: int = Field(default=2, ge=1, le=8)


def reparameterize(model: DetectionModel, form: str = "qarep") -> int:
    """Replace every plain 3x3 ``Conv`` of a stock detector, head included, by a ``RepBlock``, in place.

    In eval mode the network then computes what it did before. In train mode ``repvgg`` and ``multi`` do too; ``qarep``
    differs where a channel's batch variance comes near the BatchNorm's eps, because its outer BatchNorm normalises once
    more (see ``RepBlock.inherit``). The network has more freedom to train and merges back to its old size and graph.
    ``model.yaml["kd_yolo"]`` records the change, so that ``build_model(model.yaml)`` rebuilds the same structure.

    Args:
        model: An unfused stock detector.
        form: Form of the blocks, see ``RepBlock``.

    Returns:
        The number of replaced convolutions; 0 when the model already has this form.

    Raises:
        ModelError: The form is unknown, the model is fused, has no eligible convolution, or has another form already.
    """
    # A trainable 1x1 kernel can hold the identity itself: a fixed one beside it would only cost an addition.
    plan = ReparamPlan(reparam=_known_form(form), scope="all", identity=form != "qarep")
    present = reparam_plan(model.yaml)
    if present is not None:
        if present == plan:
            return 0
        raise ModelError(f"this model is re-parameterized already ({present.reparam}); merge it before another form")
    names = eligible_convs(model, plan.scope)
    if not names:
        raise ModelError("this model has no unfused 3x3 Conv to re-parameterize; load the unfused training checkpoint")
    for name in names:
        conv: Any = model.get_submodule(name)
        block = RepBlock.from_conv(conv, plan.reparam, plan.identity, plan.branches)
        block.inherit(conv.conv.weight, conv.bn)
        replace_module(model, name, block)
    _record(model, plan)
    return len(names)


def apply_plan(model: DetectionModel, plan: ReparamPlan) -> int:
    """Replace eligible convolutions by untrained blocks, in place: the structure without the weights.

    Args:
        model: A stock detector built from YAML.
        plan: Which convolutions, and how.

    Returns:
        The number of replaced convolutions.

    Raises:
        ModelError: Nothing is eligible.
    """
    names = eligible_convs(model, plan.scope)
    if not names:
        raise ModelError(
            f"{YAML_KEY}.reparam: {plan.reparam} asks for re-parameterization, but no 3x3 Conv is eligible"
        )
    for name in names:
        conv: Any = model.get_submodule(name)
        replace_module(model, name, RepBlock.from_conv(conv, plan.reparam, plan.identity, plan.branches))
    _record(model, plan)
    return len(names)


def reparam_plan(model_yaml: dict[str, Any]) -> ReparamPlan | None:
    """Return the plan in a model dictionary, or None when it has no ``kd_yolo`` key.

    Raises:
        ModelError: The key is malformed; the message names the entry and the nearest known one.
    """
    if YAML_KEY not in model_yaml:
        return None
    content = model_yaml[YAML_KEY]
    if not isinstance(content, dict):
        raise ModelError(
            f"{YAML_KEY}: {content!r} is not a mapping; write for instance '{YAML_KEY}: {{reparam: qarep}}'"
        )
    try:
        return ReparamPlan(**content)
    except (ValidationError, TypeError) as error:
        raise ModelError(_explain(error, content)) from error


def eligible_convs(model: DetectionModel, scope: str = "all") -> list[str]:
    """Return the names of the stock convolutions that a ``RepBlock`` can stand for.

    These are exactly ``Conv`` (no subclass, whose forward may differ), 3x3, padding 1, ungrouped, undilated, with their
    BatchNorm still there. ``scope='body'`` leaves out the last layer, the head.
    """
    layers: Any = model.model
    head = f"model.{len(layers) - 1}."
    return [
        name
        for name, module in model.named_modules()
        if _eligible(module) and not (scope == "body" and name.startswith(head))
    ]


def _eligible(module: Any) -> bool:
    if type(module) is not Conv or type(module.conv) is not nn.Conv2d or not hasattr(module, "bn"):
        return False
    conv, bn = module.conv, module.bn
    shape = (conv.kernel_size, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    plain = shape == ((SIZE, SIZE), (1, 1), (1, 1), 1, "zeros") and conv.stride[0] == conv.stride[1]
    return bool(plain and conv.bias is None and bn.affine and bn.track_running_stats)


def _record(model: DetectionModel, plan: ReparamPlan) -> None:
    """Write the plan into the model's own dictionary, which may be shared with the caller's."""
    model.yaml = copy.deepcopy(model.yaml) | {YAML_KEY: plan.model_dump()}


def _known_form(form: str) -> Any:
    if form not in FORMS:
        raise ModelError(f"form '{form}' is not one of {', '.join(FORMS)}{nearest(form, FORMS)}")
    return form


def _explain(error: Exception, content: dict[str, Any]) -> str:
    """Return one line for a malformed ``kd_yolo`` key."""
    known = list(ReparamPlan.model_fields)
    for key in content:
        if key not in known:
            return f"{YAML_KEY}: unknown key '{key}' (known: {', '.join(known)}){nearest(str(key), known)}"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        return f"{YAML_KEY}.{key}: {first['msg']} (found {first['input']!r})"
    return f"{YAML_KEY}: {error}"
