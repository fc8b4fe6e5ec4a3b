"""What the first training step proves: the teacher says something finite, and it reaches the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from ultralytics.utils import LOGGER

from kd_yolo.errors import DistillationError


def check_first_step(terms: Mapping[str, Tensor], weight: float, targets: Sequence[Tensor]) -> None:
    """Refuse a distillation loss that is not finite, is zero, or has no gradient on the student; log what was found.

    The graph is kept, and no ``.grad`` is written.

    Args:
        terms: Named scalar losses with a graph.
        weight: The method's weight; with 0 nothing but finiteness is asked for.
        targets: Where a gradient must arrive: the student's neck maps and head parameters.

    Raises:
        DistillationError: One of them failed.
    """
    listed = ", ".join(f"{name}={float(value.detach()):.4g}" for name, value in terms.items())
    for name, value in terms.items():
        if not bool(torch.isfinite(value)):
            raise DistillationError(f"distillation loss '{name}' is {float(value)} in the first step ({listed})")
    if weight == 0:
        LOGGER.info("KD: all distillation weights are zero; this run is plain training")
        return
    total = torch.stack([value.reshape(()) for value in terms.values()]).sum()
    if float(total.detach()) <= 0:
        raise DistillationError(
            f"distillation loss is zero in the first step ({listed}): the teacher says nothing; check its classes"
        )
    grads = torch.autograd.grad(total, list(targets), retain_graph=True, allow_unused=True)
    norm = float(sum((g.detach().float() ** 2).sum() for g in grads if g is not None)) ** 0.5
    if not norm > 0:
        raise DistillationError(f"the distillation loss has no gradient on the student ({listed})")
    LOGGER.info(f"KD: first step checked: {listed}, gradient norm on neck and head {norm:.4g}")
