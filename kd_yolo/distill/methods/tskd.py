"""TSKD: crossed responses, decoupled features, structure and relations.

Wen et al., "A triple semantic-aware knowledge distillation network for industrial defect detection", Computers in
Industry 166, 2025, 104252. The paper's abstract names three parts; the formulas below are those of its released code,
carried over to a YOLO detector. S is the student's neck map, adapted to the teacher's C channels, T the teacher's:

    CRD  kd_crd_cls = lambda_c sum_{a,k} |s - q| BCE(s, q) / Z,  q = sigmoid(teacher), s = sigmoid(reused)
         kd_crd_box = lambda_r sum_a max_k q_ak (1 - GIoU(reused box, teacher's box)) / Z
    DED  kd_fg, kd_bg = alpha sum_l 256 / C_l 1/B sum M A^s(T) A^c(T) (S - T)^2      M: boxes, or what is outside
         kd_se = alpha_se sum_l (1 - mean SSIM(S, T)) / 2
    DRD  kd_px = alpha_px sum_l mean (G(T) - G(S))^2                                 G: graph reasoning over cells
         kd_ins = alpha_ins sum_l mean (G(R(T)) - G(R(S)))^2                         R: boxes, pooled from A^s A^c F

CRD is CrossKD (CVPR 2024, arXiv:2306.11369): the student's map after block k of each head branch goes through the rest
of the teacher's branch ("reused"). Z is the assigner's soft count of positives.

``variant=published`` is what the released code computes: CRD and the first two terms of DED. It also computes the
structural term and the relations, but in a second statement whose result is thrown away, so they never train anything.
Its alphas of 5e-4 are 1e-4 here, where neck maps are louder than those they were made for.
``variant=intended``, the default, is what the abstract describes: every part, with weights that let it count. It is
the default because a method should do what it is named for; its extra terms are a fraction of DED by default, so that
little is lost where they do not help.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kd_yolo.distill.base import DetectorSpec, DistillMethod, MethodArgs, Taps, at_least_float32, check_same_anchors
from kd_yolo.distill.ops.attention import decoupled_loss
from kd_yolo.distill.ops.crossing import (
    Hold,
    crossed_bins,
    crossed_losses,
    head_adapters,
    reused_predictions,
)
from kd_yolo.distill.ops.features import width_adapters
from kd_yolo.distill.ops.masks import decoupled_masks, ground_truth
from kd_yolo.distill.ops.relation import (
    attended_map,
    draw_graph,
    graph_unit,
    graph_weights,
    pool_boxes,
    relation_loss,
)
from kd_yolo.distill.ops.structure import structural_loss
from kd_yolo.errors import ConfigError, TeacherError

Variant = Literal["published", "intended"]
Relation = Literal["random", "frozen", "learned", "drkd"]
Attention = Literal["raw", "scaled"]
# What an argument that is null stands for.
VARIANTS: dict[Variant, dict[str, Any]] = {
    "published": {"drd": False, "se": False, "hold": "post", "attention": "raw", "alpha_fg": 1e-4, "alpha_bg": 1e-4},
    "intended": {"drd": True, "se": True, "hold": "pre", "attention": "scaled", "alpha_fg": 5e-4, "alpha_bg": 5e-4},
}
ROI_BINS = 6
# alpha_fg and alpha_bg are made for maps of 256 channels: the sums grow with C.
REFERENCE_CHANNELS = 256


class TSKDArgs(MethodArgs):
    """Arguments of ``tskd``; null leaves the choice to the variant, see ``VARIANTS``."""

    variant: Variant = Field(default="intended", description="intended (every part) or published (crd and ded)")
    crd: bool = Field(default=True, description="crossed responses")
    ded: bool = Field(default=True, description="decoupled foreground and background features")
    drd: bool | None = Field(default=None, description="relations between cells and between boxes")
    se: bool | None = Field(default=None, description="structural term")
    k: int = Field(default=1, ge=0, le=2, description="head block after which the student crosses over")
    hold: Hold | None = Field(default=None, description="cross before (pre) or after (post) the block's activation")
    lambda_c: float = Field(default=0.4, ge=0.0, description="factor on kd_crd_cls; 0 leaves it out")
    lambda_r: float = Field(default=5.0, ge=0.0, description="factor on kd_crd_box; 0 leaves it out")
    lambda_d: float = Field(default=0.0, ge=0.0, description="factor on kd_crd_dfl, needs a teacher with reg_max > 1")
    alpha_fg: float | None = Field(default=None, ge=0.0, description="factor on kd_fg; 0 leaves it out")
    alpha_bg: float | None = Field(default=None, ge=0.0, description="factor on kd_bg; 0 leaves it out")
    alpha_px: float = Field(default=0.04, ge=0.0, description="factor on kd_px; 0 leaves it out")
    alpha_ins: float = Field(default=0.25, ge=0.0, description="factor on kd_ins; 0 leaves it out")
    alpha_se: float = Field(default=0.2, ge=0.0, description="factor on kd_se; 0 leaves it out")
    tau: float = Field(default=0.5, gt=0.0, description="temperature of the attention")
    attention: Attention | None = Field(
        default=None, description="softmax of |F| (raw) or of |F| / its maximum (scaled)"
    )
    relation: Relation = Field(default="frozen", description="weights of the graph: random, frozen, learned or drkd")
    nodes: int = Field(default=64, ge=1, description="most nodes of a graph; the released code takes C / 2")
    window: int = Field(default=7, ge=1, description="width of the structural window in cells, odd")


class TSKD(DistillMethod):
    """Crossed responses (``kd_crd_cls``, ``kd_crd_box``), decoupled features (``kd_fg``, ``kd_bg``), relations
    (``kd_px``, ``kd_ins``) and structure (``kd_se``); a part that is switched off has no term.

    Relations by ``relation``: ``random`` draws new weights at every step, as the released code does, and takes the
    boxes of the batch as channels; ``frozen`` draws them once; ``learned`` trains one unit a level for both maps, its
    normalisation starting at 0; ``drkd`` trains one for each (Ni et al., IJCAI 2023). The last three take the boxes as
    positions, so that their weights do not depend on how many there are, nor the loss on their order.

    Not zero for a student that equals its teacher: |s - q| has a kink there, and float32 lies on either side of it.
    """  # noqa: D205

    Args = TSKDArgs
    args: TSKDArgs
    zero_at_equality: ClassVar[bool] = False
    batch_statistics: ClassVar[bool] = True

    def __init__(self, args: TSKDArgs, student: DetectorSpec, teacher: DetectorSpec) -> None:
        """Choose the terms and build adapters and graphs.

        Raises:
            ConfigError: Nothing is switched on, the window is even, the head has fewer than k blocks, or bins are
                asked of a teacher that has none.
            TeacherError: A detector has no head to cross.
        """
        args = resolved(args)
        super().__init__(args, student, teacher)
        self.weights = {name: args.weight * factor for name, factor in _factors(args).items() if factor > 0}
        self.terms = tuple(self.weights)
        if not self.terms:
            raise ConfigError("tskd: crd, ded, drd and se are all off; switch one on or use method=none")
        if args.window % 2 == 0:
            raise ConfigError(f"tskd: window={args.window}: give an odd number of cells")
        if "kd_crd_dfl" in self.weights and teacher.reg_max == 1:
            raise ConfigError("tskd: lambda_d needs a teacher with box bins (reg_max > 1); set kd.lambda_d=0")
        self.crosses = any(name.startswith("kd_crd") for name in self.terms)
        self.by_features = any(not name.startswith("kd_crd") for name in self.terms)
        self.hold = args.k
        channels = [level.channels for level in teacher.levels]
        if self.crosses:
            self.head_adapters = head_adapters("tskd", student, teacher, args.k)
        if self.by_features:
            self.neck_adapters = width_adapters(student.levels, teacher.levels)
        self.graphs = self._build_graphs(channels)
        self.reads = self._what_is_read()
        self._steps = 0
        self._seed = int(torch.randint(0, 2**31, ()))

    def forward(self, student: Taps, teacher: Taps, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the terms that are switched on, see the base class.

        Without targets of the assigner Z is the number of foreground anchors, or the sum of the teacher's confidence.
        Without boxes all is background; with fewer than two in the batch there is no relation between boxes.

        Raises:
            TeacherError: Teacher and student have not the same anchors, or a head was not tapped.
        """
        if self.args.weight == 0:
            return {name: torch.zeros((), device=student.scores.device) for name in self.terms}
        with torch.autocast(student.scores.device.type, enabled=False):
            losses = self._crossed(student, teacher, batch) if self.crosses else {}
            if self.by_features:
                losses.update(self._by_features(student, teacher, batch))
        return {name: weight * losses[name] for name, weight in self.weights.items()}

    def _what_is_read(self) -> frozenset[str]:
        if self.args.weight == 0:
            return frozenset()
        responses = {"head", "scores", "boxes"} if self.crosses else set()
        return frozenset(responses | ({"neck"} if self.by_features else set()))

    def _build_graphs(self, channels: list[int]) -> nn.ModuleDict:
        """Return units by term, side and level; none for ``random``, which draws its own."""
        graphs: dict[str, nn.Module] = {}
        relation = self.args.relation
        sides = ("student", "teacher") if relation == "drkd" else ("both",)
        for term, widths in (("kd_px", channels), ("kd_ins", [ROI_BINS**2] * len(channels))):
            if term not in self.weights or relation == "random":
                continue
            for side in sides:
                graphs[f"{term}_{side}"] = nn.ModuleList(
                    graph_unit(c, self._nodes(c), relation != "frozen", 0.0 if relation == "learned" else 1.0)
                    for c in widths
                )
        return nn.ModuleDict(graphs)

    def _nodes(self, channels: int) -> int:
        return min(max(channels // 2, 1), self.args.nodes)

    def _crossed(self, student: Taps, teacher: Taps, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        if student.head is None or teacher.head is None:
            side = "student" if student.head is None else "teacher"
            raise TeacherError(f"tskd: the {side} has no YOLO head to cross; set kd.crd=false")
        check_same_anchors(student.scores, teacher.scores)
        form: Hold = self.args.hold or "pre"
        scores, boxes = reused_predictions(student.head, teacher.head, self.head_adapters, form)
        bins = self.teacher_spec.reg_max
        cls, box = crossed_losses(scores, boxes, student, teacher, batch, bins)
        losses = {"kd_crd_cls": cls, "kd_crd_box": box}
        if "kd_crd_dfl" in self.weights:
            losses["kd_crd_dfl"] = crossed_bins(boxes, teacher, bins)
        return losses

    def _by_features(self, student: Taps, teacher: Taps, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        boxes, image = ground_truth(batch, at_least_float32(student.neck[0]))
        self._steps += 1
        generator = torch.Generator().manual_seed(self._seed + self._steps)
        sums: dict[str, Tensor] = {}
        for level, (mine, theirs) in enumerate(zip(student.neck, teacher.neck, strict=True)):
            mine = self.neck_adapters[level](at_least_float32(mine))
            theirs = at_least_float32(theirs.detach())
            theirs = theirs.clone() if theirs.is_inference() else theirs  # autograd keeps no inference tensors
            for name, loss in self._level(level, mine, theirs, boxes, image, generator).items():
                sums[name] = sums[name] + loss if name in sums else loss
        return sums

    def _level(
        self, level: int, mine: Tensor, theirs: Tensor, boxes: Tensor, image: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        attention = self.args.tau, self.args.attention == "scaled"
        losses: dict[str, Tensor] = {}
        if "kd_fg" in self.weights or "kd_bg" in self.weights:
            masks = decoupled_masks(boxes, image, len(mine), (mine.shape[2], mine.shape[3]))
            scale = REFERENCE_CHANNELS / theirs.shape[1]
            losses["kd_fg"], losses["kd_bg"] = (scale * x for x in decoupled_loss(mine, theirs, *masks, *attention))
        if "kd_px" in self.weights:
            losses["kd_px"] = self._related("kd_px", level, mine, theirs, generator)
        if "kd_ins" in self.weights:
            if len(boxes) < 2:
                losses["kd_ins"] = mine.new_zeros(())
            else:
                pooled = [pool_boxes(attended_map(x, *attention), boxes, image, ROI_BINS) for x in (mine, theirs)]
                first, second = (self._as_instances(x) for x in pooled)
                losses["kd_ins"] = self._related("kd_ins", level, first, second, generator)
        if "kd_se" in self.weights:
            losses["kd_se"] = structural_loss(mine, theirs, self.args.window)
        return losses

    def _as_instances(self, pooled: Tensor) -> Tensor:
        """Return pooled boxes (N, 6, 6) as one map: N channels of 6 x 6 for ``random``, else 36 channels of N x 1."""
        if self.args.relation == "random":
            return pooled.unsqueeze(0)
        return pooled.flatten(1).T[None, :, :, None]

    def _related(self, term: str, level: int, mine: Tensor, theirs: Tensor, generator: torch.Generator) -> Tensor:
        if self.args.relation == "random":
            drawn = draw_graph(mine.shape[1], self._nodes(mine.shape[1]), generator)
            shared = {name: value.to(mine) for name, value in drawn.items()}
            return relation_loss(mine, theirs, shared, shared)
        sides = ("student", "teacher") if self.args.relation == "drkd" else ("both", "both")
        units = [graph_weights(self.graphs[f"{term}_{side}"][level]) for side in sides]  # type: ignore[index]
        return relation_loss(mine, theirs, *units)


def resolved(args: TSKDArgs) -> TSKDArgs:
    """Return the arguments with every null replaced by what the variant stands for."""
    choices = VARIANTS[args.variant]
    return args.model_copy(update={key: value for key, value in choices.items() if getattr(args, key) is None})


def _factors(args: TSKDArgs) -> dict[str, float]:
    """Return the factor of every term, 0 for a part that is off; the arguments are resolved."""
    parts = {
        "kd_crd_cls": (args.crd, args.lambda_c),
        "kd_crd_box": (args.crd, args.lambda_r),
        "kd_crd_dfl": (args.crd, args.lambda_d),
        "kd_fg": (args.ded, args.alpha_fg),
        "kd_bg": (args.ded, args.alpha_bg),
        "kd_px": (args.drd, args.alpha_px),
        "kd_ins": (args.drd, args.alpha_ins),
        "kd_se": (args.se, args.alpha_se),
    }
    return {name: float(factor or 0.0) if on else 0.0 for name, (on, factor) in parts.items()}
