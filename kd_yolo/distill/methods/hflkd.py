"""HFLKD for detectors: one-to-all feature matching, and class logits separated into relevant and irrelevant ones.

"A hierarchical feature-logit-based knowledge distillation scheme for internal defect detection of magnetic tiles"; its
released code is a 1-D classifier of two classes. What is taken over: attention between all positions of both maps, the
separation of logits by decoupled distillation (Zhao et al., CVPR 2022, arXiv:2203.08679), predicted term weights. The
rest is decided here for YOLO heads of K independent sigmoids. Per level l, both maps averaged to g x g at most:

    S = standardise(W_l f)    E = standardise(h)             over batch and positions, one 1x1 convolution W_l
    M_ij = softmax_j(s_l <e_i, s_j> / sqrt(d))               head by head, s_l learned; query=student: <s_i, e_j>
    L_F = mean over levels of sum_i c_i |(M S)_i - e_i|^2 / (C sum_i c_i)       c_i: the teacher's confidence

With p = sigmoid(t / tau), q = sigmoid(s / tau), kb the Bernoulli KL, and on the assigner's foreground anchors a their
class c_a and score omega_a:

    L_rel = tau^2 sum_a omega_a kb(p_a,c_a || q_a,c_a) / sum_a omega_a
    L_irr = tau^2 sum_ak v_ak kb(p_ak || q_ak) / sum_ak v_ak            all other pairs (a, k)
    v_ak = max(sigmoid(t_ak), floor)^gamma
    loss = weight (alpha w_F L_F + mu w_rel L_rel + nu w_irr L_irr)     all w = 1 when weighting=fixed

Against the released code: the target is not whitened against a student that cannot be negative, both sides are
standardised alike; W_l is trained; sqrt(d) is there; means are divided by the batch once. v_ak is not tempered: a
temperature above 1 lifts the background (at 5, a logit of -8 becomes 0.17). L_irr does not vanish for one class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kd_yolo.distill.base import (
    DetectorSpec,
    DistillMethod,
    MethodArgs,
    Taps,
    at_least_float32,
    check_same_anchors,
    level_sizes,
)
from kd_yolo.distill.ops import weighting
from kd_yolo.distill.ops.features import standardise
from kd_yolo.distill.ops.logits import MASKED_LOGIT, bernoulli_kl, known_logits, positive, teacher_confidence
from kd_yolo.distill.ops.matching import (
    attend,
    grid_average,
    head_count,
    limited_size,
    weighted_position_l2,
)
from kd_yolo.distill.ops.separation import assigned_targets, target_loss
from kd_yolo.distill.ops.standardize import check_standardizable, standardize_logits
from kd_yolo.errors import ConfigError, DistillationError

Side = Literal["student", "teacher"]
Weighting = Literal["fixed", "frozen", "regularised", "uncertainty", "bilevel"]

LOG_VARIANCE_LIMIT = 3.0


class HFLKDArgs(MethodArgs):
    """Arguments of ``hflkd``."""

    alpha: float = Field(default=1.0, ge=0.0, description="factor on kd_hfl_feat; 0 leaves the term out")
    mu: float = Field(default=1.0, ge=0.0, description="factor on kd_hfl_rel, the true class; 0 leaves the term out")
    nu: float = Field(default=2.0, ge=0.0, description="factor on kd_hfl_irr, all other logits; 0 leaves the term out")
    tau: float = Field(default=1.0, gt=0.0, description="temperature of the class logits")
    gamma: float = Field(default=1.0, ge=0.0, description="power of the teacher's probability in kd_hfl_irr")
    floor: float = Field(default=0.01, gt=0.0, le=1.0, description="least probability counted there, for background")
    grid: int = Field(default=20, ge=1, le=40, description="maps are averaged to at most grid x grid positions")
    query: Side = Field(default="teacher", description="whose positions ask; student is the released code's")
    embed: Side = Field(default="student", description="whose map is projected; teacher is the released code's")
    sharpness: float = Field(default=1.0, gt=0.0, description="start of the learned factor on the similarity")
    weighting: Weighting = Field(default="fixed", description="how the three terms are weighed, see the documentation")
    w_low: float = Field(default=0.1, gt=0.0, lt=1.0, description="least learned weight")
    w_high: float = Field(default=2.0, gt=1.0, description="largest learned weight")
    kappa: float = Field(default=0.1, gt=0.0, description="step of what learns the weights")
    standardize: bool = Field(default=False, description="z-score the logits over the classes (arXiv:2403.01878)")


class HFLKD(DistillMethod):
    """One-to-all features (``kd_hfl_feat``), relevant (``kd_hfl_rel``) and irrelevant logits (``kd_hfl_irr``).

    Not zero at equality: the projection starts at random, and a mixture of positions is not the position itself.

    ``weighting`` other than ``fixed`` multiplies the three factors by w_i. What trains the w_i is added without value
    (see ``ops/weighting.py``): the terms stay what the student minimises, never below 0, and ``weight`` scales all.
    """

    Args = HFLKDArgs
    args: HFLKDArgs
    zero_at_equality: ClassVar[bool] = False

    loss_average: Tensor

    def __init__(self, args: HFLKDArgs, student: DetectorSpec, teacher: DetectorSpec) -> None:
        """Build one projection a level, the sharpness and what predicts the weights.

        Raises:
            ConfigError: Nothing to distil, or ``standardize`` with one class.
        """
        super().__init__(args, student, teacher)
        gains = {"kd_hfl_feat": args.alpha, "kd_hfl_rel": args.mu, "kd_hfl_irr": args.nu}
        self.gains = {name: gain for name, gain in gains.items() if gain > 0}
        self.terms = tuple(self.gains)
        if not self.terms:
            raise ConfigError("hflkd: alpha, mu and nu are all 0; raise one or use method=none")
        if args.standardize:
            check_standardizable(student.num_classes, "hflkd")
        features = "kd_hfl_feat" in self.gains
        self.reads = frozenset(() if args.weight == 0 else {"neck", "scores"} if features else {"scores"})
        self.projections = nn.ModuleList()
        if features:
            self._build_matching(args)
        if args.weighting == "uncertainty":
            self.log_variance = nn.Parameter(torch.zeros(len(self.terms)))
        elif args.weighting != "fixed":
            self.predictor = weighting.weight_predictor(student.levels[-1].channels, len(self.terms))
        if args.weighting == "regularised":
            self.register_buffer("loss_average", torch.zeros(len(self.terms)))

    def forward(self, student: Taps, teacher: Taps, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the terms, see the base class.

        Without ``fg_mask`` and ``target_labels`` in the batch ``kd_hfl_rel`` is 0 and every logit is irrelevant.

        Raises:
            TeacherError: The class logits do not match.
            DistillationError: The assigner's outputs do not fit the logits, or ``bilevel`` cannot reach the neck.
        """
        if self.args.weight == 0:
            return {name: torch.zeros((), device=student.scores.device) for name in self.terms}
        check_same_anchors(student.scores, teacher.scores)
        with torch.autocast(student.scores.device.type, enabled=False):
            losses = {}
            if "kd_hfl_feat" in self.gains:
                losses["kd_hfl_feat"] = self._feature_loss(student, teacher)
            losses.update(self._logit_losses(student, teacher, batch))
            gained = torch.stack([gain * losses[name] for name, gain in self.gains.items()])
            weighed = self.args.weight * self._weigh(gained, student, batch)
        return dict(zip(self.terms, weighed.unbind(), strict=True))

    def _build_matching(self, args: HFLKDArgs) -> None:
        for mine, theirs in zip(self.student_spec.levels, self.teacher_spec.levels, strict=True):
            widths = (mine.channels, theirs.channels)
            widths = widths if args.embed == "student" else widths[::-1]
            self.projections.append(nn.Conv2d(*widths, 1, bias=False))  # a bias would be standardised away
        # Ultralytics leaves parameters of this name without weight decay.
        self.logit_scale = nn.Parameter(torch.full((len(self.projections),), math.log(args.sharpness)))

    def _feature_loss(self, student: Taps, teacher: Taps) -> Tensor:
        confidence = teacher_confidence(known_logits(teacher.scores.detach(), teacher.class_mask))
        parts = confidence.split(level_sizes(teacher.neck), dim=-1)
        levels = zip(student.neck, teacher.neck, parts, self.projections, self.logit_scale.exp(), strict=True)
        losses = []
        for mine, theirs, certain, project, scale in levels:
            size = limited_size((theirs.shape[-2], theirs.shape[-1]), self.args.grid)
            weight = grid_average(certain.unflatten(1, theirs.shape[-2:]), size).flatten(1)
            asked = grid_average(at_least_float32(mine), size)
            target = grid_average(at_least_float32(theirs.detach()), size)
            if self.args.embed == "student":
                asked = project(asked)
            else:
                target = project(target.clone() if target.is_inference() else target)
            asked, target = standardise(asked).flatten(2), standardise(target).flatten(2)
            losses.append(one_to_all_loss(asked, target, weight, self.args.query, scale))
        return torch.stack(losses).mean()

    def _logit_losses(self, student: Taps, teacher: Taps, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        if not {"kd_hfl_rel", "kd_hfl_irr"} & self.gains.keys():
            return {}
        mask, tau = teacher.class_mask, self.args.tau
        raw = known_logits(teacher.scores.detach(), mask)
        mine, theirs = known_logits(student.scores, mask), raw
        if self.args.standardize:
            mine, theirs = (standardize_logits(x, mask) for x in (student.scores, teacher.scores.detach()))
        assigned = assigned_targets(batch, mine)
        losses = {}
        if "kd_hfl_rel" in self.gains:
            losses["kd_hfl_rel"] = mine.sum() * 0.0 if assigned is None else _relevant(mine, theirs, raw, assigned, tau)
        if "kd_hfl_irr" in self.gains:
            pairs = irrelevant_weight(raw, assigned, self.args.gamma, self.args.floor)
            divergence = bernoulli_kl(mine / tau, theirs / tau)
            losses["kd_hfl_irr"] = tau**2 * (pairs * divergence).sum() / positive(pairs.sum())
        return losses

    def _weigh(self, losses: Tensor, student: Taps, batch: Mapping[str, Any]) -> Tensor:
        """Return w_i L_i, (n,), with what trains the weights added without value."""
        args, mode = self.args, self.args.weighting
        if mode == "fixed":
            return losses
        if mode == "uncertainty":
            with torch.no_grad():
                self.log_variance.clamp_(-LOG_VARIANCE_LIMIT, LOG_VARIANCE_LIMIT)
            own = (-self.log_variance).exp() * losses.detach() + self.log_variance / 2
            return (-self.log_variance.detach()).exp() * losses + weighting.value_free(own)
        coarsest = at_least_float32(student.neck[-1])
        if mode == "frozen":
            return weighting.predicted_weights(self.predictor, coarsest, 0.0, 1.0, frozen=True) * losses
        weights = weighting.predicted_weights(self.predictor, coarsest, args.w_low, args.w_high)
        if mode == "regularised":
            average = weighting.moving_average(self.loss_average, losses.detach())
            if self.training:
                self.loss_average.copy_(average)
            own = weighting.regularised_objective(weights, losses, average, args.kappa)
        else:
            own = -args.kappa * weights * self._alignments(losses, student, batch)
        return weights.detach() * losses + weighting.value_free(own)

    def _alignments(self, losses: Tensor, student: Taps, batch: Mapping[str, Any]) -> Tensor:
        """Return how far a step along each term lowers the class loss of held-out images, (n,), in -1..1; constants.

        Without two images, the assigner's scores or a graph there is nothing to compare with: 0, the weights stay.

        Raises:
            DistillationError: The class logits do not come from the maps given to the method.
        """
        held_out, target = weighting.held_out_images(student.scores.shape[0]), batch.get("target_scores")
        if not held_out or target is None or not losses.requires_grad:
            return torch.zeros_like(losses)
        apart, kept = slice(0, held_out), slice(held_out, None)
        task = weighting.class_loss(at_least_float32(student.scores[apart]), target[apart])
        goal = weighting.layer_gradients(task, student.neck, apart)
        if goal is None:
            raise DistillationError(
                "hflkd: weighting=bilevel needs class logits that depend on the neck maps the method gets; mixed "
                "precision hands it copies: train with amp=false, or use weighting=regularised"
            )
        found = (weighting.layer_gradients(loss, student.neck, kept) for loss in losses.unbind())
        return torch.stack([weighting.alignment(gradient, goal) for gradient in found])


def one_to_all_loss(student: Tensor, teacher: Tensor, weight: Tensor, query: Side, scale: Tensor | float) -> Tensor:
    """Return L_F of one level: the student's positions, mixed by similarity, against the teacher's.

    Args:
        student: S, (B, C, N).
        teacher: E, (B, C, N).
        weight: c_i, (B, N).
        query: ``teacher``: position i of the teacher is explained by all positions of the student.
        scale: Sharpness of the similarity.
    """
    heads = head_count(student.shape[1])
    asking, asked = (teacher, student) if query == "teacher" else (student, teacher)
    return weighted_position_l2(attend(asking, asked, student, heads, scale), teacher, weight)


def irrelevant_weight(teacher: Tensor, assigned: tuple[Tensor, Tensor] | None, gamma: float, floor: float) -> Tensor:
    """Return v_ak = max(p_ak, floor)^gamma, (B, K, A); 0 for unknown classes and the true class of the foreground.

    Args:
        teacher: Class logits of known classes, others at ``MASKED_LOGIT``, (B, K, A).
        assigned: c_a and omega_a, (B, A) each.
        gamma: Power.
        floor: Least probability.
    """
    weight = teacher.sigmoid().clamp_min(floor).pow(gamma).masked_fill(teacher <= MASKED_LOGIT, 0.0)
    if assigned is None:
        return weight
    labels, strength = (x.unsqueeze(1) for x in assigned)
    return weight.scatter(1, labels, weight.gather(1, labels).masked_fill(strength > 0, 0.0))


def _relevant(student: Tensor, teacher: Tensor, raw: Tensor, assigned: tuple[Tensor, Tensor], tau: float) -> Tensor:
    labels, strength = assigned
    known = raw.gather(1, labels.unsqueeze(1)).squeeze(1) > MASKED_LOGIT
    return target_loss(student, teacher, labels, strength * known, tau)
