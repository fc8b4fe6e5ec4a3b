"""HFLKD for classifiers: one-to-all feature matching, and class logits separated into relevant and irrelevant ones.

"A hierarchical feature-logit-based knowledge distillation scheme for internal defect detection of magnetic tiles"; what
is marked [code] is from its released code, the rest is our choice. With the student's map s and the teacher's t, both
averaged to g x g positions at most, in ``mode=fixed``:

    S = standardise(W s)    E = standardise(t)               over batch and positions; one 1x1 convolution W, trained
    M_ij = softmax_j(a <e_i, s_j> / sqrt(d))                 8 heads [code], a learned; query=student: <s_i, e_j> [code]
    L_F = mean over batch, channels, positions of (M S - E)^2                       [code]
    L_rel = tau^2 KL((p_y, 1 - p_y) of the teacher || of the student)               [code]
    L_irr = tau^2 KL(softmax over k != y of the teacher || of the student)          [code]
    loss = beta CE + weight (alpha w_F L_F + mu w_rel L_rel + nu w_irr L_irr)       beta = 1, all w = 1: weighting=fixed

``mode=repo`` is the released algorithm with its defects: E = BN(W t) with a random W that is never trained, S = s, no
sqrt(d) (so a softmax near one-hot), both KL terms divided by the batch size twice, all four factors (CE included) from
a random network that is never trained but lets its gradient into the student (``weighting=frozen``), and unit gains.
A map that cannot be negative then cannot reach E's negative half: L_F stays above about 0.5.

With two classes L_irr is 0 by its nature, and L_rel is plain temperature KD.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from ultralytics.utils import LOGGER

from kd_yolo.classify.methods import ClassifyMethod, ClassTaps, ClassTerms, Tap
from kd_yolo.distill.base import MethodArgs, at_least_float32
from kd_yolo.distill.ops import weighting
from kd_yolo.distill.ops.features import standardise
from kd_yolo.distill.ops.matching import attend, grid_average, limited_size
from kd_yolo.distill.ops.separation import separation_loss
from kd_yolo.errors import ConfigError, DistillationError

Side = Literal["student", "teacher"]
Weighting = Literal["fixed", "frozen", "regularised", "uncertainty", "bilevel"]
Mode = Literal["fixed", "repo"]

LOG_VARIANCE_LIMIT = 3.0
MANY_CLASSES = 20
VERY_MANY_CLASSES = 100
BN_FLOOR = 1e-5  # BatchNorm's own


class HFLKDArgs(MethodArgs):
    """Arguments of ``hflkd``."""

    alpha: float = Field(default=1.0, ge=0.0, description="factor on hflkd_feat; 0 leaves the term out")
    mu: float = Field(default=1.0, ge=0.0, description="factor on hflkd_rel, the true class; 0 leaves the term out")
    nu: float | None = Field(default=None, ge=0.0, description="factor on hflkd_irr; default 2, from 100 classes on 8")
    tau: float | None = Field(default=None, gt=0.0, description="temperature; default 5, above 20 classes 4")
    mode: Mode = Field(default="fixed", description="fixed, or repo: the released code with its defects")
    weighting: Weighting | None = Field(default=None, description="how terms are weighed; default fixed, repo: frozen")
    query: Side | None = Field(default=None, description="whose positions ask; default teacher, repo: student")
    embed: Side | None = Field(default=None, description="whose map is projected; default student, repo: teacher")
    tap: Tap = Field(default="head", description="head: the head's last map | backbone: what enters the head")
    heads: int = Field(default=8, ge=1, le=64, description="heads of the attention, at most")
    grid: int = Field(default=20, ge=1, le=40, description="maps are averaged to at most grid x grid positions")
    sharpness: float = Field(default=1.0, gt=0.0, description="start of the learned factor on the similarity")
    w_low: float = Field(default=0.1, gt=0.0, lt=1.0, description="least learned weight")
    w_high: float = Field(default=2.0, gt=1.0, description="largest learned weight")
    kappa: float = Field(default=0.1, gt=0.0, description="step of what learns the weights")


class HFLKD(ClassifyMethod):
    """One-to-all features (``hflkd_feat``), relevant (``hflkd_rel``) and irrelevant logits (``hflkd_irr``).

    Attributes:
        gains: Factor of each term that is not left out.
        tau: Temperature in use.
        weighting: Weighting in use.
    """

    Args = HFLKDArgs
    args: HFLKDArgs
    loss_average: Tensor

    def __init__(self, args: HFLKDArgs, student_channels: int, teacher_channels: int, num_classes: int) -> None:
        """Build the projection, the sharpness and what predicts the weights.

        Raises:
            ConfigError: Nothing to distil.
        """
        super().__init__(args, student_channels, teacher_channels, num_classes)
        released = args.mode == "repo"
        default_nu = 1.0 if released else 8.0 if num_classes >= VERY_MANY_CLASSES else 2.0
        nu = default_nu if args.nu is None else args.nu
        gains = {"hflkd_feat": args.alpha, "hflkd_rel": args.mu, "hflkd_irr": nu}
        self.gains = {name: gain for name, gain in gains.items() if gain > 0}
        if not self.gains:
            raise ConfigError("hflkd: alpha, mu and nu are all 0; raise one or use method=none")
        self.terms = tuple(self.gains)
        self.tau = args.tau or (4.0 if num_classes > MANY_CLASSES else 5.0)
        self.weighting: Weighting = args.weighting or ("frozen" if released else "fixed")
        self.query: Side = args.query or ("student" if released else "teacher")
        self.embed: Side = args.embed or ("teacher" if released else "student")
        self.tap = args.tap
        if num_classes == 2 and "hflkd_irr" in self.gains:
            LOGGER.warning("KD: with two classes hflkd_irr is 0 by its nature, and hflkd_rel is plain temperature KD")
        if "hflkd_feat" in self.gains:
            widths = (student_channels, teacher_channels)
            # A bias would be standardised away.
            self.projection = nn.Conv2d(*(widths if self.embed == "student" else widths[::-1]), 1, bias=False)
            # Ultralytics leaves parameters of this name without weight decay.
            self.logit_scale = nn.Parameter(torch.tensor(math.log(args.sharpness)))
        self._build_weighting(student_channels)

    def forward(self, student: ClassTaps, teacher: ClassTaps, target: Tensor) -> ClassTerms:
        """Return the terms, see the base class.

        Raises:
            DistillationError: ``bilevel`` was given logits that do not depend on the map.
        """
        if self.args.weight == 0:
            return ClassTerms({name: torch.zeros((), device=student.logits.device) for name in self.terms})
        losses: dict[str, Tensor] = {}
        if "hflkd_feat" in self.gains:
            losses["hflkd_feat"] = self.feature_loss(student.feature, teacher.feature.detach())
        mine, theirs = at_least_float32(student.logits), at_least_float32(teacher.logits.detach())
        losses["hflkd_rel"], losses["hflkd_irr"] = separation_loss(
            mine, theirs, target, self.tau, released=self.args.mode == "repo"
        )
        gained = torch.stack([gain * losses[name] for name, gain in self.gains.items()])
        weighed, factor = self._weigh(gained, student, target)
        values = (self.args.weight * weighed).unbind()
        return ClassTerms(dict(zip(self.terms, values, strict=True)), factor)

    def feature_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return L_F, a scalar.

        Args:
            student: (B, C_s, H, W).
            teacher: (B, C_t, H', W') without gradient; both are averaged to one grid.
        """
        size = limited_size((teacher.shape[-2], teacher.shape[-1]), self.args.grid)
        mine, theirs = (grid_average(at_least_float32(x), size) for x in (student, teacher))
        if self.args.mode == "repo":
            weight = self.projection.weight.detach()  # not in the released optimizer
            if self.embed == "teacher":
                theirs = F.batch_norm(F.conv2d(theirs, weight), None, None, training=True, eps=BN_FLOOR)
            else:
                mine = F.conv2d(mine, weight)
            scale: Tensor | float = math.sqrt(mine.shape[1] // self._heads(mine.shape[1]))
            return one_to_all(mine.flatten(2), theirs.flatten(2), self.query, self._heads(mine.shape[1]), scale)
        if self.embed == "student":
            mine = self.projection(mine)
        else:
            theirs = self.projection(theirs)
        mine, theirs = standardise(mine).flatten(2), standardise(theirs).flatten(2)
        return one_to_all(mine, theirs, self.query, self._heads(mine.shape[1]), self.logit_scale.exp())

    def _build_weighting(self, channels: int) -> None:
        count = len(self.terms)
        if self.weighting == "uncertainty":
            self.log_variance = nn.Parameter(torch.zeros(count))
        elif self.weighting != "fixed":
            # Of the released order (relevant, irrelevant, feature, cross entropy) only the number matters here.
            self.predictor = weighting.weight_predictor(channels, count + (self.weighting == "frozen"))
        if self.weighting == "regularised":
            self.register_buffer("loss_average", torch.zeros(count))

    def _heads(self, channels: int) -> int:
        return max(h for h in range(1, self.args.heads + 1) if channels % h == 0)

    def _weigh(self, losses: Tensor, student: ClassTaps, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return w_i L_i, (n,), with what trains the weights added without value; and the factor on the task loss."""
        args, mode = self.args, self.weighting
        if mode == "fixed":
            return losses, None
        if mode == "uncertainty":
            with torch.no_grad():
                self.log_variance.clamp_(-LOG_VARIANCE_LIMIT, LOG_VARIANCE_LIMIT)
            own = (-self.log_variance).exp() * losses.detach() + self.log_variance / 2
            own = torch.where(losses.detach() > 0, own, torch.zeros_like(own))  # a term that is 0 says nothing
            return (-self.log_variance.detach()).exp() * losses + weighting.value_free(own), None
        feature = at_least_float32(student.feature)
        if mode == "frozen":
            weights = weighting.predicted_weights(self.predictor, feature, 0.0, 1.0, frozen=True)
            return weights[:-1] * losses, weights[-1]
        weights = weighting.predicted_weights(self.predictor, feature, args.w_low, args.w_high)
        if mode == "regularised":
            average = weighting.moving_average(self.loss_average, losses.detach())
            if self.training:
                self.loss_average.copy_(average)
            own = weighting.regularised_objective(weights, losses, average, args.kappa)
        else:
            own = -args.kappa * weights * self._alignments(losses, student, target)
        return weights.detach() * losses + weighting.value_free(own), None

    def _alignments(self, losses: Tensor, student: ClassTaps, target: Tensor) -> Tensor:
        """Return how far a step along each term lowers the cross entropy of held-out images, (n,), in -1..1; constants.

        A step of a 1x1 layer on the tapped map, put there as the identity, stands for a step of the last stage: the
        first-order term of one step of bilevel optimisation. A batch of one image has nothing to hold out: 0.

        Raises:
            DistillationError: The logits do not depend on the map.
        """
        held_out = weighting.held_out_images(student.logits.shape[0])
        if not held_out or not losses.requires_grad:
            return torch.zeros_like(losses)
        apart, kept = slice(0, held_out), slice(held_out, None)
        task = F.cross_entropy(at_least_float32(student.logits[apart]), target[apart])
        goal = weighting.layer_gradients(task, [student.feature], apart)
        if goal is None:
            raise DistillationError("hflkd: weighting=bilevel needs class logits that depend on the tapped map")
        found = (weighting.layer_gradients(loss, [student.feature], kept) for loss in losses.unbind())
        return torch.stack([weighting.alignment(gradient, goal) for gradient in found])


def one_to_all(student: Tensor, teacher: Tensor, query: Side, heads: int, scale: Tensor | float) -> Tensor:
    """Return the mean of (M S - E)^2, a scalar: the student's positions, mixed by similarity, against the teacher's.

    Args:
        student: S, (B, C, N).
        teacher: E, (B, C, N).
        query: ``teacher``: position i of the teacher is explained by all positions of the student.
        heads: Heads of the attention; a divisor of C.
        scale: Factor on ``<., .> / sqrt(d)``.
    """
    asking, asked = (teacher, student) if query == "teacher" else (student, teacher)
    return (attend(asking, asked, student, heads, scale) - teacher).square().mean()
