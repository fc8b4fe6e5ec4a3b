"""Start a narrower detector from a pretrained one: choose channels, slice, and refit every layer in closed form."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import C2PSA, C3, SPPF, C2f, Conv, Detect
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.errors import ModelError
from kd_yolo.nn.block_walk import BRANCHES
from kd_yolo.nn.growing_channels import Channels, repeated
from kd_yolo.nn.merging import merge, rep_blocks
from kd_yolo.nn.narrow_report import NarrowReport
from kd_yolo.nn.narrowing_blocks import Importance, Narrowing, tie
from kd_yolo.nn.narrowing_sites import Samples, Site
from kd_yolo.nn.refit import refit

MIN_IMAGES = 8
HELD_OUT = 8  # one of so many images measures the result and is not fitted
CHUNK = 16  # images that the source sees at a time
MAX_PIXELS = 8_000_000  # of all fitted images with their mirror images; about 1 GB of feature maps
IMPORTANT = 32  # images that the choice of channels looks at


@torch.no_grad()
def narrow(
    target: DetectionModel,
    source: DetectionModel,
    rows: Sequence[int],
    images: Tensor,
    ridge: float = 1e-2,
    seed: int = 0,
) -> NarrowReport:
    """Let a narrower detector take over the weights of a pretrained one, without labels and without gradients.

    First the channels of every tensor that vary most are chosen, those that a shortcut adds together, and every
    convolution is sliced. Then, from the image to the head, every convolution is refitted by least squares: it reads
    what the narrow network's earlier layers write and reproduces, before the activation, what the source writes at the
    chosen channels, see ``refit``. Images are seen as they are and mirrored. Equal widths keep all channels in order,
    so a target of the source's own structure computes exactly what the source does.

    Args:
        target: A freshly built detector, changed in place; with stock convolutions or ``RepBlock``, whose dense branch
            gets the fitted kernel. Unlike the source it may have fewer channels, heads of an attention, and rows; a
            chain of a Bottleneck and attentions may be the Bottleneck alone.
        source: A trained detector of the same number of classes, unfused; left as it is.
        rows: For every row of ``target``, head included, the row of ``source`` it stands for, each once. Rows that keep
            width and size may be left out between them.
        images: (N, C, H, W) in 0..1, N at least 8, sides multiples of the largest stride; no labels are needed. One of
            eight is not fitted but measures the result. More than MAX_PIXELS are thinned out evenly.
        ridge: Pull towards the sliced weights, see ``fit_dense``; with 16 images or fewer, 3e-2 generalises better.
        seed: Seed of the drawn positions.

    Returns:
        The report; the errors in it are those on the held-out images.

    Raises:
        ModelError: The source is fused or of an unknown kind; rows do not fit or are wider than the source's; there are
            too few images, or images of another kind. A target that was refused may be partly filled.
    """
    started = time.perf_counter()
    _check_networks(target, source, rows)
    _check_images(source, images)
    device, dtype, training = next(target.parameters()).device, next(target.parameters()).dtype, target.training
    large, work = _prepared(target, source, images)
    fitted, measured = _split(work)
    walk = Narrowing(_importance(large, fitted[:: max(1, len(fitted) // IMPORTANT)]))
    channels = _fill(target, large, rows, walk)
    before = _errors(target, large, channels, measured)
    _refit(target, large, walk.sites, torch.cat([fitted, fitted.flip(3)]), ridge, seed)
    after = _errors(target, large, channels, measured)
    target.to(device, dtype).train(training)
    sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in (source, target)]
    counts = (sizes[0], sizes[1], walk.inherited, len(fitted), len(measured))
    return NarrowReport(*counts, before, after, time.perf_counter() - started)


@torch.no_grad()
def check_rows(target: DetectionModel, source: DetectionModel, rows: Sequence[int]) -> None:
    """Refuse what ``narrow`` would refuse of two networks, without their images; see there.

    Raises:
        ModelError: As there. The target is filled at random or partly filled: throw it away.
    """
    _check_networks(target, source, rows)
    side = 2 * int(source.stride.max())
    large, work = _prepared(target, source, torch.rand(2, int(source.yaml.get("channels", 3)), side, side))
    _fill(target, large, rows, Narrowing(_importance(large, work)))


def _prepared(target: DetectionModel, source: DetectionModel, images: Tensor) -> tuple[DetectionModel, Tensor]:
    """Return a merged copy of the source, and the images, where the target can be fitted; the target goes there too."""
    parameter = next(target.parameters())
    device = parameter.device if parameter.device.type == "cuda" else "cpu"  # others lack float64
    work = images.to(device, torch.float64 if parameter.dtype == torch.float64 else torch.float32)
    large: DetectionModel = copy.deepcopy(source).to(work).eval()
    target.to(work).eval()
    return (merge(large, check=False)[0] if rep_blocks(large) else large), work


def _check_networks(target: DetectionModel, source: DetectionModel, rows: Sequence[int]) -> None:
    for name, model in (("target", target), ("source", source)):
        if type(model.model[-1]) is not Detect:
            raise ModelError(f"the {name} has a {type(model.model[-1]).__name__} head; only a Detect head is known")
    if not all(isinstance(getattr(m, "bn", None), nn.BatchNorm2d) for m in source.modules() if isinstance(m, Conv)):
        raise ModelError("the source is fused; give the training checkpoint, which still has its BatchNorms")
    last = len(source.model) - 1
    if len(rows) != len(target.model):
        raise ModelError(f"{len(rows)} rows are given for the target's {len(target.model)}; each needs one")
    wrong = [row for row in rows if not 0 <= row <= last]
    if wrong:
        raise ModelError(f"row {wrong[0]} is not one of the source's rows 0 to {last}")
    twice = [row for row in rows if list(rows).count(row) > 1]
    if twice:
        raise ModelError(f"the source's row {twice[0]} is given twice; each can be stood for once")
    if rows[-1] != last:
        raise ModelError(f"the target's head stands for row {rows[-1]} of the source, whose head is row {last}")


def _check_images(source: DetectionModel, images: Tensor) -> None:
    channels, stride = int(source.yaml.get("channels", 3)), int(source.stride.max())
    if images.dim() != 4 or images.shape[1] != channels or not images.is_floating_point():
        raise ModelError(
            f"images of shape {tuple(images.shape)} in {images.dtype}: (N, {channels}, H, W) floats needed"
        )
    if len(images) < MIN_IMAGES:
        raise ModelError(f"{len(images)} images are too few to refit a network on; give at least {MIN_IMAGES}")
    if any(side % stride or not side for side in images.shape[2:]):
        raise ModelError(f"images of {images.shape[2]} x {images.shape[3]} px: sides must be multiples of {stride}")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise ModelError(f"images hold values from {low:g} to {high:g}; they must be in 0..1")


def _split(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the images to fit, thinned out to what memory allows, and those to measure."""
    most = max(MIN_IMAGES, MAX_PIXELS // (2 * images.shape[2] * images.shape[3]))
    if len(images) > most:
        images = images[torch.linspace(0, len(images) - 1, most).round().long()]
    held = torch.arange(len(images)) % HELD_OUT == HELD_OUT // 2
    return images[~held], images[held]


def _fill(target: DetectionModel, source: DetectionModel, rows: Sequence[int], walk: Narrowing) -> list[Channels]:
    """Slice every convolution of the target and return the channels of what its head reads."""
    image = int(source.yaml.get("channels", 3))
    written: list[Channels] = []
    for layer, row in zip(target.model, rows, strict=True):
        _check_reads(layer, source, rows)
        inputs = [written[index] if index >= 0 else repeated(image, image) for index in _reads(layer)]
        written.append(walk.row(source.model[row], layer, inputs))
    return [written[index] for index in _reads(target.model[-1])]


def _check_reads(layer: Any, source: DetectionModel, rows: Sequence[int]) -> None:
    """Refuse a row that reads something else than the source's, but for rows that are left out between them."""
    mine, theirs = _reads(layer), _reads(source.model[rows[layer.i]])
    label = f"row {layer.i} for the source's row {rows[layer.i]}"
    if len(mine) != len(theirs):
        raise ModelError(f"{label} does not fit: it reads {len(mine)} rows, the source {len(theirs)}")
    for index, wanted in zip(mine, theirs, strict=True):
        found = rows[index] if index >= 0 else index
        while wanted != found and wanted not in rows and isinstance(source.model[wanted], (C2f, C3, C2PSA, SPPF)):
            wanted = _reads(source.model[wanted])[0]
        if wanted != found:
            raise ModelError(f"{label} does not fit: it reads what stands for row {found}, the source row {wanted}")


def _reads(layer: Any) -> list[int]:
    """Return the indices of the rows that a row reads; -1 is the image."""
    return [row if row >= 0 else layer.i + row for row in ([layer.f] if isinstance(layer.f, int) else layer.f)]


def _run(model: DetectionModel, images: Tensor) -> list[Tensor]:
    """Run all rows and all branches of the head, and return the maps that enter it."""
    maps = _features(model, images)
    for name in BRANCHES:
        for part, feature in zip(getattr(model.model[-1], name, None) or (), maps, strict=False):
            part(feature)
    return maps


def _features(model: DetectionModel, images: Tensor) -> list[Tensor]:
    """Return the maps that enter the head; others are dropped as soon as nobody reads them."""
    last = {index: layer.i for layer in model.model for index in _reads(layer)}
    maps: dict[int, Tensor] = {-1: images}
    for layer in model.model[:-1]:
        reads = _reads(layer)
        inputs = [maps[index] for index in reads]
        for index in reads:
            if last[index] == layer.i:
                maps.pop(index, None)
        maps[layer.i] = layer(inputs[0] if isinstance(layer.f, int) else inputs)
        del inputs
    return [maps[index] for index in _reads(model.model[-1])]


def _importance(source: DetectionModel, images: Tensor) -> Importance:
    """Return the standard deviation of every channel that a ``Conv`` writes, tied where shortcuts tie channels."""
    found: Importance = {}

    def note(module: nn.Module, inputs: object, output: Tensor) -> None:
        spread = output.var((0, 2, 3)).sqrt().cpu()
        found[module] = found[module] + spread if module in found else spread

    with _hooks((module, note) for module in source.modules() if isinstance(module, Conv)):
        for part in images.split(CHUNK):
            _run(source, part)
    tie(found, source)
    return found


def _refit(
    target: DetectionModel, source: DetectionModel, sites: Sequence[Site], images: Tensor, ridge: float, seed: int
) -> None:
    """Refit all convolutions in one pass of the target: each before it runs, so that the next reads its new output."""
    samples = Samples(sites, len(images), seed=seed)
    with _hooks((end, samples.note) for end in samples.ends):
        for part in images.split(CHUNK):
            _run(source, part)
    known = {site.target: site for site in sites}

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        site = known[module]
        refit(site, inputs[0], *samples.take(site), ridge)

    handles = [module.register_forward_pre_hook(before) for module in known]
    try:
        _run(target, images)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _hooks(pairs: Iterable[tuple[nn.Module, Callable[[nn.Module, Any, Tensor], None]]]) -> Iterator[None]:
    """Listen to what modules write."""
    handles = [module.register_forward_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _errors(
    target: DetectionModel, source: DetectionModel, channels: Sequence[Channels], images: Tensor
) -> tuple[float, ...]:
    """Return the squared error of each map that enters the head, over the variance of the source's channels."""
    errors = []
    for one, other, chosen in zip(_features(source, images), _features(target, images), channels, strict=True):
        expected = one[:, chosen.source.to(one.device)]
        variance = expected.var((0, 2, 3), correction=0).mean()
        errors.append(float((other - expected).square().mean() / variance))
    return tuple(errors)
