"""Stages of two detectors that stand for each other, and how a student's stage is taught by the peer's.

Both networks are cut where their feature maps leave a stage: the last row of the backbone at each stride, and the maps
that enter the head. Between two cuts lies a stage. In the forced phase every stage of the student receives the peer's
maps at its entrance, so that all stages learn at the same time and none waits for those before it (block-wise
distillation: Wang et al., arXiv:1911.13053 (DNA), section 3.2, equations 5 and 6; Hint training: FitNets,
arXiv:1412.6550, section 2.2). In the joined phase it receives what its own stages computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.errors import ModelError

PROBE_PX = 256
FINEST = 4  # pixels per cell of the first cut of a backbone; before that lies hardly a layer
RIDGE = 1e-3  # of the mean variance of the inputs


@dataclass(frozen=True)
class Cut:
    """One place where both networks are cut.

    Attributes:
        part: ``backbone`` or ``head``.
        stride: Input pixels per cell.
        student: Row of the student.
        peer: Row of the peer.
        student_channels: Width of the student's map.
        peer_channels: Width of the peer's.
    """

    part: str
    stride: int
    student: int
    peer: int
    student_channels: int
    peer_channels: int

    @property
    def name(self) -> str:
        """Return a short name."""
        return f"{self.part}/{self.stride}"


class Adapters(nn.Module):
    """1x1 convolutions between maps of different width; they are not part of the student.

    Attributes:
        out: From the student's maps to the peer's, by cut; identity where the widths agree.
        back: From the peer's maps to the student's entrance, by cut.
    """

    def __init__(self, cuts: Sequence[Cut]) -> None:
        """Build what the cuts need."""
        super().__init__()
        self.out = nn.ModuleDict({_key(cut): _adapter(cut.student_channels, cut.peer_channels) for cut in cuts})
        self.back = nn.ModuleDict({_key(cut): _adapter(cut.peer_channels, cut.student_channels) for cut in cuts})

    @torch.no_grad()
    def fit(
        self, student: DetectionModel, peer: DetectionModel, cuts: Sequence[Cut], batches: Iterable[Tensor]
    ) -> None:
        """Give every adapter the weights with the least squared error, both networks as they are.

        Args:
            student: In eval mode, on the device of the adapters.
            peer: The same.
            cuts: Those that the adapters were built for.
            batches: Images, each (B, 3, H, W) in 0..1; only one batch's maps are in memory at a time.
        """
        sums: dict[nn.Conv2d, _Moments] = {}
        for images in batches:
            x = images.to(next(student.parameters()).device)
            mine = run_rows(student, x, [cut.student for cut in cuts])
            theirs = run_rows(peer, x, [cut.peer for cut in cuts])
            for cut in cuts:
                for adapters, inputs, outputs in (
                    (self.out, mine[cut.student], theirs[cut.peer]),
                    (self.back, theirs[cut.peer], mine[cut.student]),
                ):
                    adapter = adapters[_key(cut)]
                    if isinstance(adapter, nn.Conv2d):
                        sums.setdefault(adapter, _Moments()).add(inputs, outputs)
        for adapter, moments in sums.items():
            moments.solve(adapter)


def find_cuts(student: DetectionModel, peer: DetectionModel) -> list[Cut]:
    """Return the cuts that both networks have, in the order in which the student runs.

    Raises:
        ModelError: They share none at the head's entrance.
    """
    mine, theirs = _cut_rows(student), _cut_rows(peer)
    pairs = {key: (mine[key], theirs[key]) for key in mine if key in theirs}
    cuts = [Cut(*key, row, other, width, other_width) for key, ((row, width), (other, other_width)) in pairs.items()]
    if not any(cut.part == "head" for cut in cuts):
        raise ModelError(
            f"the student's head reads strides {sorted(s for part, s in mine if part == 'head')}, that of the "
            f"pretrained model {sorted(s for part, s in theirs if part == 'head')}: they share none; take another model"
        )
    return sorted(cuts, key=lambda cut: cut.student)


@torch.no_grad()
def settle_batchnorm(student: DetectionModel, batches: Sequence[Tensor]) -> None:
    """Give the BatchNorms before the head the statistics of some images, as training will compute them.

    Those of new layers know nothing, and those of inherited layers knew other inputs; what is fitted on the maps in
    eval mode would be far off in training mode.

    Args:
        student: Changed in place, its mode and momenta are left as they were.
        batches: Images, each (B, 3, H, W) in 0..1.
    """
    norms = [m for layer in student.model[:-1] for m in layer.modules() if isinstance(m, nn.BatchNorm2d)]
    kept = [norm.momentum for norm in norms]
    training = student.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
    student.train()
    for images in batches:
        run_rows(student, images.to(next(student.parameters()).device), [])
    student.train(training)
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum


def run_rows(
    model: DetectionModel, images: Tensor, keep: Sequence[int], replaced: Mapping[int, Tensor] | None = None
) -> dict[int, Tensor]:
    """Run a detector up to its head and return the maps of some rows.

    Args:
        model: The detector.
        images: (B, 3, H, W) in 0..1.
        keep: Rows whose maps are returned.
        replaced: Maps that later rows receive instead of what a row computed.
    """
    outputs: list[Any] = []
    found: dict[int, Tensor] = {}
    x: Any = images
    for layer in model.model[:-1]:
        if layer.f != -1:
            x = outputs[layer.f] if isinstance(layer.f, int) else [x if j == -1 else outputs[j] for j in layer.f]
        x = layer(x)
        if layer.i in keep:
            found[layer.i] = x
        if replaced and layer.i in replaced:
            x = replaced[layer.i]
        outputs.append(x if layer.i in model.save else None)
    return found


def stage_losses(
    student: DetectionModel, peer: DetectionModel, adapters: Adapters, cuts: Sequence[Cut], images: Tensor, forced: bool
) -> dict[str, Tensor]:
    """Return each stage's squared error against the peer, over the variance of the peer's map: 1 is knowing nothing.

    Args:
        student: In training mode.
        peer: Frozen, in eval mode.
        adapters: Of these cuts.
        cuts: Where both are cut.
        images: (B, 3, H, W) in 0..1.
        forced: Give every stage the peer's maps at its entrance.
    """
    with torch.no_grad():
        targets = run_rows(peer, images, [cut.peer for cut in cuts])
    replaced = {}
    if forced:
        replaced = {cut.student: adapters.back[_key(cut)](targets[cut.peer]) for cut in cuts if cut.part == "backbone"}
    maps = run_rows(student, images, [cut.student for cut in cuts], replaced)
    losses = {}
    for cut in cuts:
        target = targets[cut.peer]
        error = (adapters.out[_key(cut)](maps[cut.student]) - target).square().mean()
        losses[cut.name] = error / target.var().clamp_min(1e-6)
    return losses


class _Moments:
    """Sums over pixels, in float64, from which a 1x1 convolution from inputs to outputs is solved."""

    def __init__(self) -> None:
        self.count = 0
        self.x = self.y = self.xx = self.xy = torch.zeros((), dtype=torch.float64)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Take in maps (B, C, H, W) and (B, D, H, W)."""
        x, y = (maps.transpose(0, 1).flatten(1).T.double() for maps in (inputs, outputs))
        self.count += len(x)
        self.x, self.y = self.x.to(x.device) + x.sum(0), self.y.to(x.device) + y.sum(0)
        self.xx, self.xy = self.xx.to(x.device) + x.T @ x, self.xy.to(x.device) + x.T @ y

    def solve(self, adapter: nn.Conv2d) -> None:
        """Write the weights and bias of least squared error, with a small ridge on the weights."""
        x, y = self.x / self.count, self.y / self.count
        gram = self.xx / self.count - torch.outer(x, x)
        gram += torch.eye(len(x)).to(gram) * (RIDGE * gram.diagonal().mean()).clamp_min(1e-12)
        weight = torch.linalg.solve(gram, self.xy / self.count - torch.outer(x, y)).T
        adapter.weight.copy_(weight[:, :, None, None])
        if adapter.bias is not None:
            adapter.bias.copy_(y - weight @ x)


def _cut_rows(model: DetectionModel) -> dict[tuple[str, int], tuple[int, int]]:
    """Return row and width of every cut by part and stride."""
    depth = len(model.yaml["backbone"])
    sizes: dict[int, tuple[int, int]] = {}
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            parameter = next(model.parameters())
            probe = torch.zeros(1, int(model.yaml.get("channels", 3)), PROBE_PX, PROBE_PX).to(parameter)
            maps = run_rows(model, probe, range(len(model.model) - 1))
    finally:
        model.train(training)
    for row, x in maps.items():
        if isinstance(x, Tensor):
            sizes[row] = (PROBE_PX // int(x.shape[-1]), int(x.shape[1]))
    cuts = {("backbone", sizes[row][0]): (row, sizes[row][1]) for row in range(depth) if row in sizes}
    cuts = {key: at for key, at in cuts.items() if key[1] >= FINEST}
    head = model.model[-1]
    rows = [row if row >= 0 else head.i + row for row in ([head.f] if isinstance(head.f, int) else head.f)]
    return cuts | {("head", sizes[row][0]): (row, sizes[row][1]) for row in rows}


def _adapter(inputs: int, outputs: int) -> nn.Module:
    return nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)


def _key(cut: Cut) -> str:
    return f"{cut.part}{cut.stride}"
