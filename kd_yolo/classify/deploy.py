"""Turn a trained classifier into the file to ship: branches merged, stock classes only, proven equal."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from ultralytics.nn.tasks import ClassificationModel

from kd_yolo.checkpoints import serialize
from kd_yolo.classify.checkpoints import load_classifier
from kd_yolo.deployed import CHECK_IMAGES, DeployedFile, check_side, deploy_target, origin, sizes
from kd_yolo.errors import ReparamError
from kd_yolo.files import sha256, write_json, written_aside
from kd_yolo.images import textured_images, to_canvas
from kd_yolo.nn.merging import TOLERANCE, MergeReport, max_errors, merge, rep_blocks
from kd_yolo.provenance import foreign_to_stock

# Of the deployed file against the training form, both in float64: what storing merged kernels in float32 costs.
PROBABILITY_TOLERANCE = 1e-5


@dataclass(frozen=True)
class ClassifyDeployReport(DeployedFile):
    """What was written and how it was proven.

    Attributes:
        probability_error: Largest difference of any class probability, deployed file against training form, in float64.
        probability_tolerance: Bound on it.
        check_canvas: Side in pixels at which it was measured.
    """

    probability_error: float
    probability_tolerance: float
    check_canvas: int

    def _apart(self) -> str:
        where = f"{self.check_images} images at {self.check_canvas} px, float64"
        return f"{self.probability_error:.1e} in probability ({where})"


def deploy_classifier(
    model_path: str | Path, out: str | Path | None = None, trust: bool = False
) -> ClassifyDeployReport:
    """Write the deployed form of a trained classifier and prove that it computes the same.

    The file is a normal Ultralytics checkpoint: ``YOLO(path)`` loads, predicts, validates and exports it in an
    environment without kd_yolo. It is stored in float32.

    Args:
        model_path: A classifier that Ultralytics or kd_yolo trained, re-parameterized or not.
        out: Where to write; default ``<stem>-deploy.pt`` beside the checkpoint, with a JSON file of the same stem.
        trust: Load foreign classes from the checkpoint, which runs code in it.

    Raises:
        CheckpointError: The checkpoint cannot be loaded.
        ConfigError: ``out`` is not usable.
        ReparamError: The result does not compute what the training form computes; nothing is left on disk.
        OutputError: The files cannot be written.
    """
    source, checkpoint = load_classifier(model_path, trust=trust)
    path = Path(model_path).expanduser().absolute()
    target = deploy_target(path, out)
    deployed, merged = merge_classifier(source)
    deployed.task, deployed.args = "classify", source.args
    digest = sha256(path)
    with written_aside(target) as aside:
        aside.write_bytes(serialize(deployed, checkpoint, {"task": "classify", "source_sha256": digest}))
        report = ClassifyDeployReport(
            source_sha256=digest,
            **origin(path, checkpoint, target, aside, merged),
            **_verify(aside, source),
            **sizes(source, deployed),
        )
        write_json(report.provenance, report.to_dict())
    return report


def merge_classifier(model: ClassificationModel) -> tuple[ClassificationModel, MergeReport]:
    """Return a copy of a classifier in which every ``RepBlock`` is one stock ``Conv``, checked in float64.

    Raises:
        ReparamError: A relative error exceeds 1e-9 or is not finite; the message names the worst block.
    """
    merged, _ = merge(model, check=False)
    source = copy.deepcopy(model).cpu().double().eval()
    target = merge(source, check=False)[0]
    generator = torch.Generator().manual_seed(1)
    worst_name, worst = "", 0.0
    with torch.no_grad():
        for name, block in rep_blocks(source).items():
            x = torch.randn(1, block.c1, 7, 9, dtype=torch.float64, generator=generator)
            error = max_errors([block(x)], [target.get_submodule(name)(x)])[1]
            if not error <= worst:  # also true for NaN
                worst_name, worst = name, error
        images = torch.rand(2, 3, 128, 128, dtype=torch.float64, generator=generator)
        absolute, relative = max_errors([logits(source, images)], [logits(target, images)])
    if not (relative <= TOLERANCE and worst <= TOLERANCE):
        raise ReparamError(
            f"the merged classifier differs from the trained one: relative error {relative:.3g} (bound {TOLERANCE:g}); "
            f"worst block '{worst_name}' with {worst:.3g}; do not deploy this model"
        )
    report = MergeReport(len(rep_blocks(source)), absolute, relative, TOLERANCE, worst_name, worst, True)
    return merged, report


def logits(model: ClassificationModel, images: Tensor) -> Tensor:
    """Return the class logits (B, K) of a classifier in eval mode for images (B, 3, H, W)."""
    output = model(images)
    return output[1] if isinstance(output, (tuple, list)) else output


def _verify(path: Path, source: ClassificationModel) -> dict[str, Any]:
    """Load a written checkpoint under restrictions and compare it with the training form.

    Raises:
        ReparamError: It differs, or refers to classes that a stock installation lacks.
    """
    # The transforms that prediction repeats are torchvision's, without which Ultralytics cannot classify at all.
    foreign = [name for name in foreign_to_stock(path) if not name.startswith("torchvision.")]
    if foreign:
        raise ReparamError(f"the deployed classifier still refers to {', '.join(foreign)}; nothing was written")
    loaded, _ = load_classifier(path)
    side = check_side(source)
    images = to_canvas(textured_images(CHECK_IMAGES), (side, side), 3).double()
    with torch.no_grad():
        reference = copy.deepcopy(source).double()
        expected, found = (logits(model, images).softmax(1) for model in (reference, loaded.double()))
    error = float((expected - found).abs().max())
    if not error <= PROBABILITY_TOLERANCE:  # also true for NaN
        raise ReparamError(
            f"the deployed classifier differs from the trained one by {error:.3g} in probability (bound "
            f"{PROBABILITY_TOLERANCE:g}); nothing was written"
        )
    return {
        "probability_error": error,
        "probability_tolerance": PROBABILITY_TOLERANCE,
        "check_canvas": side,
        "check_images": CHECK_IMAGES,
    }
