"""What the student's own loss assigns to every anchor, kept for the methods; a second assignment would cost as much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.distill.taps import head_strides, select_anchors


class AssignedTargets:
    """Targets of the one-to-many branch, renewed by each call of the student's loss.

    Attributes:
        values: ``fg_mask`` (B, A), ``target_labels`` (B, A) and ``target_scores`` (B, A, K) at all of the student's
            levels; empty before the first loss.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self._watched: Any = None

    def watch(self, student: DetectionModel) -> None:
        """Listen to the assigner of the student's criterion, which is built if it does not exist yet."""
        if getattr(student, "criterion", None) is None:
            student.criterion = student.init_criterion()
        criterion = student.criterion
        if self._watched is criterion:
            return
        self._watched = criterion
        assigner = getattr(criterion, "one2many", criterion).assigner

        def keep_targets(module: nn.Module, inputs: Any, outputs: Any) -> None:
            labels, _, scores, foreground = (x.detach() for x in outputs[:4])
            self.values = {
                "fg_mask": foreground.bool(),
                "target_labels": labels.long(),
                "target_scores": scores.float(),
            }

        assigner.register_forward_hook(keep_targets)

    def at(self, strides: Sequence[int], preds: Mapping[str, Any], student: DetectionModel) -> dict[str, Tensor]:
        """Return the targets at the matched strides, see ``DistillMethod.forward``."""
        feats, own = preds.get("one2many", preds)["feats"], head_strides(student)
        chosen = {}
        for name, values in self.values.items():
            last = values.transpose(1, 2) if values.ndim == 3 else values
            kept = select_anchors(last, feats, own, strides)
            chosen[name] = kept.transpose(1, 2) if values.ndim == 3 else kept
        return chosen
