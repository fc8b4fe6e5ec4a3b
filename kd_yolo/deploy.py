"""Turn a trained checkpoint into the file to ship: merged, stock classes only, proven equal, with provenance."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultralytics.nn.tasks import DetectionModel

from kd_yolo.checkpoints import load_model, serialize
from kd_yolo.deployed import CHECK_IMAGES, DeployedFile, check_side, deploy_target, origin, sizes
from kd_yolo.errors import ReparamError
from kd_yolo.files import sha256, write_json, written_aside
from kd_yolo.images import textured_images, to_canvas
from kd_yolo.inference import channels_of, check_canvas, deployed_form, max_stride, raw_outputs, use_head
from kd_yolo.provenance import foreign_to_stock, head_name

# Bounds on a deployed file against the training form, both run in float64, so that what is measured is what the file
# stores. Storing merged kernels in float32 costs about 1e-6 of the canvas for a pretrained network and was measured at
# 1.7e-5 on a LightNet after eight epochs on NEU-DET, whose first BatchNorm multiplies by 18; the smallest mistake in a
# merge costs more than 1e-3.
BOX_TOLERANCE = 1e-4  # of the longer side of the canvas
SCORE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class DeployReport(DeployedFile):
    """What was written and how it was proven.

    Attributes:
        head: ``nms`` or ``nms-free``: which branch was kept.
        box_error_px: Largest difference of any raw box, deployed file against training form, both run in float64.
        score_error: The same for any class score.
        box_tolerance_px: Bound on ``box_error_px``.
        score_tolerance: Bound on ``score_error``.
        check_canvas: Height and width in pixels at which these were measured.
    """

    head: str
    box_error_px: float
    score_error: float
    box_tolerance_px: float
    score_tolerance: float
    check_canvas: tuple[int, int]

    def rows(self) -> list[tuple[str, str]]:
        """Return what people want to know first."""
        first, *others = super().rows()
        return [first, ("head", self.head), *others]

    def _apart(self) -> str:
        height, width = self.check_canvas
        where = f"{self.check_images} images at {height}x{width}, float64"
        return f"{self.box_error_px:.1e} px, {self.score_error:.1e} score ({where})"


def deploy(
    model_path: str | Path, out: str | Path | None = None, nms: bool = True, trust: bool = False
) -> DeployReport:
    """Write the deployed form of a trained checkpoint and prove that it computes the same.

    The file is a normal Ultralytics checkpoint: ``YOLO(path)`` loads, predicts, validates and exports it in an
    environment without kd_yolo, also under restricted loading. It is stored in float32, because half precision would
    move boxes by up to a pixel. BatchNorm is kept, so that the merged network can still be trained or quantized.

    Args:
        model_path: A checkpoint that Ultralytics or kd_yolo trained, re-parameterized or not.
        out: Where to write; default ``<stem>-deploy.pt`` beside the checkpoint. A JSON file of the same stem holds the
            provenance.
        nms: Keep the one-to-many head branch, whose output needs NMS; otherwise the NMS-free one-to-one branch. The
            other branch is removed.
        trust: Load foreign classes from the checkpoint, which runs code in it.

    Raises:
        CheckpointError: The checkpoint cannot be loaded.
        ConfigError: ``out`` is not usable, or the model lacks the wanted head branch.
        ReparamError: The result does not compute what the training form computes; nothing is left on disk.
        OutputError: The files cannot be written.
    """
    source, checkpoint = load_model(model_path, trust=trust)
    path = Path(model_path).expanduser().absolute()
    target = deploy_target(path, out)
    use_head(source, nms, str(path))
    deployed, merged = deployed_form(source, nms, str(path))
    about: dict[str, Any] = {"source_sha256": sha256(path), "head": head_name(nms)}
    with written_aside(target) as aside:
        aside.write_bytes(serialize(deployed, checkpoint, about))
        report = DeployReport(
            **about,
            **origin(path, checkpoint, target, aside, merged),
            **_verify(aside, source),
            **sizes(source, deployed),
        )
        write_json(report.provenance, report.to_dict())  # a deployed file always has its provenance beside it
    return report


def _check_canvas(model: DetectionModel) -> tuple[int, int]:
    """Return the canvas that both forms are compared on."""
    stride = max_stride(model)
    side = check_side(model)
    return check_canvas(-(-side // stride) * stride, stride)


def _verify(path: Path, source: DetectionModel) -> dict[str, Any]:
    """Load a written checkpoint under restrictions and compare it with the training form.

    Returns:
        The report's figures of the comparison.

    Raises:
        ReparamError: It differs, or refers to classes that a stock installation lacks.
    """
    foreign = foreign_to_stock(path)
    if foreign:
        raise ReparamError(f"the deployed model still refers to {', '.join(foreign)}; nothing was written")
    loaded, _ = load_model(path)
    canvas = _check_canvas(source)
    images = to_canvas(textured_images(CHECK_IMAGES), canvas, channels_of(source)).double()
    expected = raw_outputs(copy.deepcopy(source).double(), images)
    apart = expected.difference(raw_outputs(loaded.double(), images))
    limit = BOX_TOLERANCE * max(canvas)
    if not (apart.box <= limit and apart.score <= SCORE_TOLERANCE):  # also true for NaN
        raise ReparamError(
            f"the deployed model differs from the trained one by {apart.box:.3g} px (bound {limit:.3g}) and "
            f"{apart.score:.3g} in score (bound {SCORE_TOLERANCE:g}); nothing was written"
        )
    return {
        "box_error_px": apart.box,
        "score_error": apart.score,
        "box_tolerance_px": limit,
        "score_tolerance": SCORE_TOLERANCE,
        "check_canvas": canvas,
        "check_images": CHECK_IMAGES,
    }
