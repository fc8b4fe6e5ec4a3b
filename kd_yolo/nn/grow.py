"""Grow a pretrained detector into a larger scale of its family that computes the same: a start for a strong teacher."""

from __future__ import annotations

import copy
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import Conv, Detect
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.checkpoints import load_model, serialize
from kd_yolo.errors import CheckpointError, ConfigError, ModelError, nearest
from kd_yolo.files import sha256, written_aside
from kd_yolo.nn.growing_blocks import Growth
from kd_yolo.nn.growing_channels import Channels, repeated
from kd_yolo.nn.lightnet import build_model
from kd_yolo.nn.merging import max_errors, random_images, raw_outputs, rep_blocks
from kd_yolo.provenance import versions

TOLERANCE = 1e-9  # relative, in float64; a correct growth is near 1e-14
CHECK_PX = 64  # canvas of the check, at least twice the largest stride


@dataclass(frozen=True)
class GrowReport:
    """What was grown and how exactly.

    Attributes:
        source_scale: Scale of the small network.
        scale: Scale of the grown one.
        source_parameters: Parameters of the small network.
        parameters: Parameters of the grown network.
        inherited: Parameters of the grown network that hold a value of the small one, once or repeated; the others are
            0: weights for a repetition that some other filter reads, and branches that start as nothing.
        max_relative_difference: Largest difference of a raw output, boxes and scores of each head branch, over the
            largest magnitude of that output, on random images, both networks in float64 and eval mode.
        max_feature_difference: The same of the feature maps of every row, each repetition against the channel it
            repeats.
    """

    source_scale: str
    scale: str
    source_parameters: int
    parameters: int
    inherited: int
    max_relative_difference: float
    max_feature_difference: float

    @property
    def share(self) -> float:
        """Inherited share of the grown network's parameters, 0 to 1."""
        return self.inherited / self.parameters

    def summary(self) -> str:
        """Return one line."""
        return (
            f"grown from scale {self.source_scale} to {self.scale}: {self.source_parameters / 1e6:.3f} M to "
            f"{self.parameters / 1e6:.3f} M parameters, {100 * self.share:.1f} % inherited, the rest 0; raw outputs "
            f"differ by {self.max_relative_difference:.1e} (relative, float64)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "share": self.share}


@torch.no_grad()
def grow(model: DetectionModel, scale: str = "s", seed: int = 0) -> tuple[DetectionModel, GrowReport]:
    """Build the larger scale of a detector's family and give it weights with which it computes what the small one does.

    Wider: every channel of the small network is repeated, and every filter reads each repeated input from one of its
    repetitions, see ``wide_kernel`` (Net2Net, Chen, Goodfellow and Shlens, ICLR 2016, arXiv:1511.05641, section
    "Net2WiderNet"). Repetitions are exact, BatchNorm statistics included, so the function is the same in eval and in
    train mode, for which no noise is needed: other filters read the repetitions, and their gradients part them. An
    attention repeats whole heads. Deeper (section "Net2DeeperNet"): a further block with a shortcut starts as the
    identity; one without, in a concatenation, starts with the features of the block before, unread.

    The grown network is built from the small one's own YAML with another scale, so it is a stock one: training,
    ``YOLO``, export and distillation treat it as any other. All of it is trainable.

    Args:
        model: A stock detector of Ultralytics with BatchNorms and scales in its YAML: YOLO26, YOLO11, YOLOv8, YOLOv5,
            of any number of classes, in any floating dtype; left as it is.
        scale: A larger scale of the same YAML. YOLO26 and YOLO11 grow up to ``s``: from ``m`` on their C3k2 rows hold
            other blocks.
        seed: Seed of the draws of who reads which repetition.

    Returns:
        The grown network in the dtype, mode and on the device of ``model``, and the report.

    Raises:
        ModelError: The model is fused, re-parameterized, without scales, or of another kind; the scale is unknown, not
            larger, or cannot compute the same; or the grown network, as measured, does not.
    """
    small = copy.deepcopy(model).cpu()
    origin = _check_source(small)
    cfg = _scaled(small.yaml, origin, scale)
    with torch.random.fork_rng(devices=[]):  # its random weights are all replaced: the caller's draws stay as they are
        large = build_model(cfg, nc=small.model[-1].nc, ch=int(small.yaml.get("channels", 3)))
    sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in (small, large)]
    if sizes[1] <= sizes[0]:
        raise ModelError(f"scale={scale}: is not larger than this model's scale {origin}; choose a larger one")
    large.to(next(small.parameters()).dtype)
    growth = Growth(scale, seed)
    rows = _fill(small, large, growth)
    _adopt(small, large)
    output, feature = _differences(small, large, rows)
    if not (output <= TOLERANCE and feature <= TOLERANCE):  # also true for NaN, which an unfilled weight gives
        raise ModelError(
            f"scale={scale}: the grown network does not compute what this model does: raw outputs differ by "
            f"{output:.3g}, features by {feature:.3g} (bound {TOLERANCE:g}); its layers are not those of its YAML"
        )
    report = GrowReport(origin, scale, sizes[0], sizes[1], growth.inherited, output, feature)
    return large.to(next(model.parameters()).device).train(model.training), report


def grow_file(source: Path, out: Path, scale: str = "s", seed: int = 0, trust: bool = False) -> GrowReport:
    """Grow the detector in a checkpoint and write it as an Ultralytics checkpoint in float32.

    The file holds the class names, training arguments and metrics of its source, and under the key ``kd_yolo`` where
    it came from. It is read back and compared before it gets its name.

    Args:
        source: Checkpoint of a stock detector.
        out: File to write, ending in ``.pt``.
        scale: Larger scale, see ``grow``.
        seed: Seed of the draws.
        trust: Load foreign classes from the source, which runs code in it.

    Raises:
        CheckpointError: The source cannot be loaded.
        ConfigError: ``out`` is no ``.pt`` name, or the source itself.
        ModelError: The detector cannot be grown to this scale; nothing is written.
        OutputError: The file cannot be written.
    """
    model, checkpoint = load_model(source, trust=trust)
    path, target = (Path(one).expanduser().absolute() for one in (source, out))
    if target.suffix != ".pt":
        raise ConfigError(f"out={out}: a checkpoint ends in .pt; choose another name")
    if target.resolve() == path.resolve():
        raise ConfigError(f"out={out}: is the source itself; choose another name")
    try:
        grown, report = grow(model, scale, seed)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    about = {
        "source": path.name,
        "source_sha256": sha256(path),
        "grown": {**report.to_dict(), "seed": seed},
        "versions": versions(),
    }
    with written_aside(target) as aside:
        aside.write_bytes(serialize(grown, checkpoint, about))
        if not _same_weights(grown, load_model(aside)[0]):
            raise CheckpointError(f"{target}: read back, it differs from what was proven; nothing is left of it")
    return report


def _check_source(model: DetectionModel) -> str:
    """Return the scale of a network that can be grown."""
    head = model.model[-1]
    if type(head) is not Detect:
        raise ModelError(
            f"this model has a {type(head).__name__} head; only a detector with a Detect head can be grown"
        )
    if rep_blocks(model):
        raise ModelError("this model is re-parameterized; run kd-yolo deploy first and grow the deployed file")
    norms = [getattr(module, "bn", None) for module in model.modules() if isinstance(module, Conv)]
    if not all(isinstance(norm, nn.BatchNorm2d) for norm in norms):
        raise ModelError("this model is fused; give the training checkpoint, which still has its BatchNorms")
    scales = model.yaml.get("scales")
    if not isinstance(scales, dict) or not scales:
        raise ModelError("this model's YAML has no scales, so there is no larger one of its family")
    return str(model.yaml.get("scale") or next(iter(scales)))


def _scaled(description: dict[str, Any], origin: str, scale: str) -> dict[str, Any]:
    """Return the model dictionary of another scale."""
    cfg = copy.deepcopy(dict(description))
    scales = [str(name) for name in cfg["scales"]]
    if scale not in scales:
        raise ModelError(f"scale={scale}: is not one of {', '.join(scales)}{nearest(scale, scales)}")
    if scale == origin:
        raise ModelError(f"scale={scale}: is this model's scale already; choose a larger one of {', '.join(scales)}")
    cfg["scale"] = scale
    if "yaml_file" in cfg:  # such as yolo26n.yaml, from which logs take the model's name
        name = Path(str(cfg["yaml_file"]))
        stem = re.sub(rf"^(yolov?\d+){re.escape(origin)}(?![a-z])", rf"\g<1>{scale}", name.stem)
        cfg["yaml_file"] = str(name.with_stem(stem))
    return cfg


def _fill(small: DetectionModel, large: DetectionModel, growth: Growth) -> list[Channels]:
    """Give every weight of the large network its value and return the channels of every row's output."""
    for value in large.state_dict().values():
        if value.is_floating_point():
            value.fill_(torch.nan)  # what is forgotten cannot pass the check
    if len(small.model) != len(large.model):
        raise ModelError(f"this model has {len(small.model)} rows, its YAML {len(large.model)}; it cannot be grown")
    image = int(small.yaml.get("channels", 3))
    written: list[Channels] = []
    for one, other in zip(small.model, large.model, strict=True):
        rows = [one.f] if isinstance(one.f, int) else one.f
        inputs = [repeated(image, image) if one.i == 0 else written[row] for row in rows]
        written.append(growth.row(one, other, inputs))
    return written


def _adopt(small: DetectionModel, large: DetectionModel) -> None:
    """Copy what belongs to a detector beside its weights."""
    for name in ("names", "args", "task"):
        if hasattr(small, name):
            setattr(large, name, copy.deepcopy(getattr(small, name)))
    for name in ("_end2end", "max_det", "agnostic_nms", "xyxy"):
        if name in vars(small.model[-1]):
            setattr(large.model[-1], name, getattr(small.model[-1], name))


def _differences(small: DetectionModel, large: DetectionModel, rows: list[Channels]) -> tuple[float, float]:
    """Return the largest relative difference of the raw outputs and of the features, in float64 and eval mode.

    Outputs alone are too coarse: deep in a YOLO26n with random weights, one lost slice of a filter was measured to
    change them by as little as 5e-9, but the feature map of its row by 1.5e-4 or more.
    """
    images = random_images(small, imgsz=max(CHECK_PX, 2 * int(small.stride.max())))
    outputs, features = zip(*(_run(one, images) for one in (small, large)), strict=True)
    expected = [feature[:, channels.source] for feature, channels in zip(features[0], rows[:-1], strict=True)]
    return max_errors(*outputs)[1], max_errors(expected, features[1])[1]


def _run(model: DetectionModel, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the raw outputs, and the feature map of every row before the head."""
    double = copy.deepcopy(model).double().eval()
    features: list[Tensor] = []
    for row in double.model[:-1]:
        row.register_forward_hook(lambda module, inputs, output: features.append(output.clone()))
    return raw_outputs(double, images), features


def _same_weights(first: DetectionModel, second: DetectionModel) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
