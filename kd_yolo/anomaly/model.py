"""HKT and HKT+: a student that reproduces a frozen teacher on normal images, and whose failures are the anomaly map."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_yolo.anomaly import calibration as calibrating
from kd_yolo.anomaly import maps as mapping
from kd_yolo.anomaly.backbones import TeacherBackbone, build_backbone
from kd_yolo.anomaly.calibration import Calibration
from kd_yolo.anomaly.foreign import model_yaml
from kd_yolo.anomaly.losses import level_distance, reduce_positions
from kd_yolo.anomaly.projectors import AnchorProjector, FrozenProjector, StudentProjector
from kd_yolo.anomaly.spec import AnomalySpec
from kd_yolo.anomaly.student import Student
from kd_yolo.errors import DataError, ModelError
from kd_yolo.nn.precision import at_least_float32

STD_EPS = 1e-6


class AnomalyModel(nn.Module):
    """Hierarchical knowledge transfer (Xu, Jiang, J. Imaging 2025, 11(4), 102).

    From the paper: a frozen pretrained teacher, a student with CBAM, and the teacher's highest map as the target of
    every student level, through one projector per level. Our choice: the projectors are on the student's side (on the
    teacher's side alone, trained ones collapse to a constant), distances are 1 - cosine, targets are standardised per
    channel.

    Args:
        spec: Structure, loss and score.
        teacher: A built teacher, instead of ``spec.teacher``.
        student: Model dictionary of the student, instead of that of ``spec.student``.
        allow_random: Accept a teacher with random weights; only tests do.
        trust: Rebuild foreign classes of the teacher's file, which runs code in it.

    Attributes:
        task: ``anomaly``.
        names: Classes of the boxes around anomalous regions.
        stride: Images must be a multiple of it, in pixels.
        loss_names: What the items of ``loss`` are: ``x_p2`` is the cross-layer loss of the level at stride 2 ** 2.
        is_deployed: Whether this is the form of ``kd_yolo.anomaly.merging.deployed``.
        calibration: None until ``calibrate`` or ``apply_calibration``.

    Raises:
        TeacherError: The teacher is unknown, random, without weights, or lacks a stride.
        ModelError: The student cannot be built.
    """

    level_low: Tensor
    level_high: Tensor

    def __init__(
        self,
        spec: AnomalySpec,
        teacher: TeacherBackbone | None = None,
        student: Mapping[str, Any] | None = None,
        allow_random: bool = False,
        trust: bool = False,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.task = "anomaly"
        self.names = {0: "normal", 1: "anomaly"}
        self.stride = 32
        self.levels = tuple(spec.levels)
        self.loss_names = (*(f"x_p{stride.bit_length() - 1}" for stride in self.levels), "same")
        self.is_deployed = False
        self.calibration: Calibration | None = None
        self.student_yaml = dict(student) if student is not None else model_yaml(spec.student)
        self.teacher = teacher or build_backbone(
            spec.teacher, spec.teacher_strides, allow_random, trust, spec.plus_depth if spec.plus else None
        )
        self.student = Student(self.student_yaml, spec.taps, spec.cbam, spec.plus)
        self.projectors = nn.ModuleDict(
            {f"s{stride}": self._projector(stride) for stride in self.levels if spec.cross > 0}
        )
        self.anchors = nn.ModuleDict(
            {
                f"s{stride}": AnchorProjector(self.student.channels[stride], self.teacher.channels[stride])
                for stride in self.levels
                if spec.same > 0
            }
        )
        self._register_statistics()
        self.blur = mapping.GaussianBlur(mapping.grid_sigma(spec.sigma_px, spec.imgsz, self.levels[0]))

    @torch.no_grad()
    def targets(self, images: Tensor) -> dict[str, Tensor]:
        """Return what the student has to reproduce; it does not change in training and may be kept.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            Standardised teacher maps by ``s<stride>``, (B, C_s, H / s, W / s), float32, without gradient.
        """
        return self._standardised(self.teacher(images))

    def loss(self, images: Tensor, targets: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return the training loss: weighted sum over levels of mean distances, in float32 under autocast too.

        Args:
            images: (B, 3, H, W) in [0, 1], normal images only.
            targets: What ``targets(images)`` returned, from any device; the teacher is then not run.

        Returns:
            The total, a scalar; and the terms before weighting (n,), detached, in the order of ``loss_names``.

        Raises:
            ModelError: A side of the images is no multiple of the stride, or the model is a deployed one.
        """
        self._check(images)
        if self.is_deployed:
            raise ModelError("this is the deployed form, which cannot be trained; take the training checkpoint")
        known = self.targets(images) if targets is None else targets
        goals = {key: value.to(images.device, non_blocking=True) for key, value in known.items()}
        features = self.student(images)
        zero = next(iter(features.values())).new_zeros((), dtype=torch.float32)
        cross, same = [zero] * len(self.levels), zero
        for index, stride in enumerate(self.levels):
            if self.spec.cross > 0:
                cross[index] = self._mean(self._cross_distance(stride, features[stride], goals))
            if self.spec.same > 0:
                same = same + self._mean(self._same_distance(stride, features[stride], goals))
        total = self.spec.cross * torch.stack(cross).sum() + self.spec.same * same
        return total, torch.stack([*cross, same]).detach()

    def level_maps(self, images: Tensor) -> list[Tensor]:
        """Return the distances that make the map, (B, 1, H / s, W / s) of each level, float32, finest first.

        With ``maps=both`` the cross-layer distances come first, then the same-layer ones.
        """
        goals = self._standardised(self.teacher(images))
        features = self.student(images)
        found: list[Tensor] = []
        for kind in self.spec.map_kinds:
            distance = self._cross_distance if kind == "cross" else self._same_distance
            found.extend(distance(stride, features[stride], goals) for stride in self.levels)
        return found

    def final_map(self, levels: list[Tensor]) -> Tensor:
        """Fuse, blur and enlarge what ``level_maps`` returned to (B, 1, H, W), float32."""
        strides = list(self.levels) * len(self.spec.map_kinds)
        low, high = self.level_low.to(levels[0].dtype), self.level_high.to(levels[0].dtype)
        fused = mapping.fuse(levels, strides, low, high, self.spec.fuse)
        return mapping.upsample(self.blur(fused), self.levels[0])

    def forward(self, images: Tensor) -> Tensor:
        """Return the anomaly map (B, 1, H, W), float32, of images (B, 3, H, W) in [0, 1].

        Raises:
            ModelError: The model is in train mode, or a side of the images is no multiple of the stride.
        """
        if self.training:
            raise ModelError("an anomaly map is asked for in train mode; call eval() first, or loss() to train")
        self._check(images)
        return self.final_map(self.level_maps(images))

    def image_scores(self, maps: Tensor) -> Tensor:
        """Return the score (B,) of each image from its final map (B, 1, H, W)."""
        return mapping.image_scores(maps, self.spec.score, self.spec.top_fraction)

    @torch.no_grad()
    def fit_targets(self, batches: Iterable[Tensor]) -> None:
        """Set mean and standard deviation of every channel of the teacher's maps, before training.

        Args:
            batches: Batches of normal images (B, 3, H, W) in [0, 1].

        Raises:
            DataError: There are no images.
        """
        statistics = calibrating.channel_statistics(self.teacher(images) for images in batches)
        if not statistics:
            raise DataError("no normal images to fit the teacher's statistics on; give at least one")
        for stride, (mean, std) in statistics.items():
            self.get_buffer(f"target_mean_{stride}").copy_(mean.reshape(1, -1, 1, 1))
            self.get_buffer(f"target_std_{stride}").copy_(std.reshape(1, -1, 1, 1))

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> Calibration:
        """Set the level quantiles, thresholds and score range from held-out normal images.

        Args:
            batches: Batches of normal images (B, 3, H, W) in [0, 1].

        Returns:
            The calibration, which is also applied.

        Raises:
            DataError: There are no images, or a distance is not finite.
        """
        was_training = self.training
        self.eval()
        levels = [[level.cpu() for level in self.level_maps(images)] for images in batches]
        self.train(was_training)
        if not levels:
            raise DataError("no held-out normal images to calibrate on; keep some of the training images back")
        if not all(bool(torch.isfinite(level).all()) for batch in levels for level in batch):
            raise DataError("distances on the held-out normal images are not finite; the training diverged")
        low, high = calibrating.level_quantiles(levels)
        self._set_levels(low, high)
        scores: list[Tensor] = []

        def final_maps() -> Iterable[Tensor]:
            for batch in levels:
                final = self.final_map([level.to(self.level_low.device) for level in batch])
                scores.append(self.image_scores(final).cpu())
                yield final

        total = sum(batch[0].numel() for batch in levels) * self.levels[0] ** 2
        quantile, margin = self.spec.threshold_quantile, self.spec.threshold_margin
        pixels = calibrating.largest(final_maps(), total, quantile)
        limit = calibrating.threshold(torch.cat(scores), quantile, margin)
        smallest, largest = calibrating.score_range(torch.cat(scores), limit)
        pixel_limit = calibrating.threshold(pixels, quantile, margin, total)
        self.calibration = Calibration(low, high, limit, pixel_limit, smallest, largest)
        return self.calibration

    def apply_calibration(self, calibration: Calibration) -> None:
        """Set the numbers of an earlier ``calibrate``.

        Raises:
            ModelError: They belong to a model of another number of levels.
        """
        expected = len(self.level_low)
        if not len(calibration.level_low) == len(calibration.level_high) == expected:
            raise ModelError(f"the calibration has {len(calibration.level_low)} levels, the model {expected}")
        self._set_levels(calibration.level_low, calibration.level_high)
        self.calibration = calibration

    def _check(self, images: Tensor) -> None:
        if torch.jit.is_tracing():  # type: ignore[attr-defined]  # sizes are tensors then
            return
        if images.shape[-1] % self.stride or images.shape[-2] % self.stride:
            raise ModelError(f"images are {tuple(images.shape[-2:])}; both sides must be multiples of {self.stride}")

    def _projector(self, stride: int) -> nn.Module:
        own = self.student.channels[stride]
        target = self.teacher.channels[self.spec.target_stride(stride)]
        if self.spec.projector == "student":
            return StudentProjector(own, target)
        if self.spec.projector == "teacher-frozen":
            return FrozenProjector(target, own, seed=stride)
        return StudentProjector(target, own)

    def _register_statistics(self) -> None:
        for stride, channels in self.teacher.channels.items():
            self.register_buffer(f"target_mean_{stride}", torch.zeros(1, channels, 1, 1))
            self.register_buffer(f"target_std_{stride}", torch.ones(1, channels, 1, 1))
        count = len(self.levels) * len(self.spec.map_kinds)
        self.register_buffer("level_low", torch.zeros(count))  # with these two, calibration changes nothing
        self.register_buffer("level_high", torch.full((count,), mapping.CALIBRATED_RANGE))

    def _set_levels(self, low: list[float], high: list[float]) -> None:
        self.level_low.copy_(torch.tensor(low))
        self.level_high.copy_(torch.tensor(high))

    def _standardised(self, teacher: Mapping[int, Tensor]) -> dict[str, Tensor]:
        return {
            f"s{stride}": (
                (at_least_float32(values) - self.get_buffer(f"target_mean_{stride}"))
                / (self.get_buffer(f"target_std_{stride}") + STD_EPS)
            )
            for stride, values in teacher.items()
        }

    def _mean(self, distances: Tensor) -> Tensor:
        return reduce_positions(distances, self.spec.hard_quantile)

    def _cross_distance(self, stride: int, feature: Tensor, goals: Mapping[str, Tensor]) -> Tensor:
        """Return d(Q_l(S_l), up(Z)) of one level, or d(S_l, up(P_l(Z))) with projectors on the teacher's side."""
        factor = self.spec.target_stride(stride) // stride
        return level_distance(*self.cross_pair(stride, feature, goals), factor, self.spec.floor)

    def cross_pair(self, stride: int, feature: Tensor, goals: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the two maps that a level compares, each at its own resolution, scaled by C ** -0.5.

        Args:
            stride: Of the level.
            feature: The student's map there, (B, C_l, h, w).
            goals: What ``targets`` returned.
        """
        top = self.spec.target_stride(stride)
        goal, projector = goals[f"s{top}"], self.projectors[f"s{stride}"]
        if self.spec.projector == "student":
            return projector(feature), goal * goal.shape[1] ** -0.5
        scale = feature.shape[1] ** -0.5  # a 1x1 projection before the interpolation: fewer positions
        frozen = self.spec.projector == "teacher-frozen"
        return feature * scale, projector(goal * scale) if frozen else projector(goal)

    def _same_distance(self, stride: int, feature: Tensor, goals: Mapping[str, Tensor]) -> Tensor:
        """Return d(R_l(S_l), T_l) of one level."""
        own, goal = self.anchors[f"s{stride}"](feature), goals[f"s{stride}"]
        return level_distance(own, goal * goal.shape[1] ** -0.5, 1, self.spec.floor)
