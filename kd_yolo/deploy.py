"""Turn a trained checkpoint into the file to ship: merged, stock classes only, proven equal, with provenance."""

from __future__ import annotations

import copy
import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultralytics.nn.tasks import DetectionModel

from kd_yolo.checkpoints import load_model, serialize
from kd_yolo.errors import ConfigError, ReparamError
from kd_yolo.files import sha256, write_json, written_aside
from kd_yolo.images import textured_images, to_canvas
from kd_yolo.inference import (
    channels_of,
    check_canvas,
    count_convolutions,
    count_parameters,
    deployed_form,
    max_stride,
    raw_outputs,
    use_head,
)
from kd_yolo.nn.merging import MergeReport
from kd_yolo.provenance import find_recipe, foreign_to_stock, head_name, versions
from kd_yolo.tables import PairReport

# Bounds on a deployed file against the training form, both run in float64, so that what is measured is what the file
# stores. Storing merged kernels in float32 costs about 1e-6 of the canvas for a pretrained network and was measured at
# 1.7e-5 on a LightNet after eight epochs on NEU-DET, whose first BatchNorm multiplies by 18; the smallest mistake in a
# merge costs more than 1e-3.
BOX_TOLERANCE = 1e-4  # of the longer side of the canvas
SCORE_TOLERANCE = 1e-5
CHECK_IMAGES = 4
LARGEST_CHECK_CANVAS = 320


@dataclass(frozen=True)
class DeployReport(PairReport):
    """What was written and how it was proven.

    Attributes:
        path: The deployed checkpoint.
        provenance: The JSON file beside it.
        source: The trained checkpoint.
        source_sha256: Its hash.
        sha256: Hash of the deployed checkpoint.
        head: ``nms`` or ``nms-free``: which branch was kept.
        merge: The merge and its error in float64, whole network and worst block.
        box_error_px: Largest difference of any raw box, deployed file against training form, both run in float64.
        score_error: The same for any class score.
        box_tolerance_px: Bound on ``box_error_px``.
        score_tolerance: Bound on ``score_error``.
        check_canvas: Height and width in pixels at which these were measured.
        check_images: Number of images they were measured on.
        params_trained: Parameters of the training form, both head branches.
        params: Parameters of the deployed file, BatchNorm included.
        params_fused: Parameters that run, after Ultralytics folds each BatchNorm while loading.
        convolutions_trained: Convolutions of the training form.
        convolutions: Convolutions of the deployed file.
        names: Class names.
        recipe: The distillation recipe of the run, or None.
        versions: Versions of what made the file.
        created: Local time, ISO 8601.
    """

    path: Path
    provenance: Path
    source: Path
    source_sha256: str
    sha256: str
    head: str
    merge: MergeReport
    box_error_px: float
    score_error: float
    box_tolerance_px: float
    score_tolerance: float
    check_canvas: tuple[int, int]
    check_images: int
    params_trained: int
    params: int
    params_fused: int
    convolutions_trained: int
    convolutions: int
    names: dict[int, str]
    recipe: dict[str, Any] | None
    versions: dict[str, str]
    created: str

    def rows(self) -> list[tuple[str, str]]:
        """Return what people want to know first."""
        height, width = self.check_canvas
        where = f"{self.check_images} images at {height}x{width}, float64"
        return [
            ("deployed", str(self.path)),
            ("head", self.head),
            ("parameters", f"{self.params_trained:,} trained, {self.params_fused:,} deployed"),
            ("convolutions", f"{self.convolutions_trained} trained, {self.convolutions} deployed"),
            ("merged blocks", f"{self.merge.blocks}, relative error {self.merge.relative_error:.1e}"),
            ("against training form", f"{self.box_error_px:.1e} px, {self.score_error:.1e} score ({where})"),
        ]


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
    target = _target(path, out)
    use_head(source, nms, str(path))
    deployed, merged = deployed_form(source, nms, str(path))
    about: dict[str, Any] = {"source_sha256": sha256(path), "head": head_name(nms)}
    with written_aside(target) as aside:
        aside.write_bytes(serialize(deployed, checkpoint, about))
        report = DeployReport(
            path=target,
            provenance=target.with_suffix(".json"),
            source=path,
            sha256=sha256(aside),
            merge=merged,
            recipe=find_recipe(path, checkpoint),
            versions=versions(),
            created=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            **about,
            **_verify(aside, source),
            **_count(source, deployed),
        )
        write_json(report.provenance, report.to_dict())  # a deployed file always has its provenance beside it
    return report


def _count(source: DetectionModel, deployed: DetectionModel) -> dict[str, Any]:
    """Return the report's figures of size, and the class names."""
    return {
        "params_trained": count_parameters(source),
        "params": count_parameters(deployed),
        "params_fused": count_parameters(copy.deepcopy(deployed).fuse(verbose=False)),
        "convolutions_trained": count_convolutions(source),
        "convolutions": count_convolutions(deployed),
        "names": {int(key): str(value) for key, value in deployed.names.items()},
    }


def _target(source: Path, out: str | Path | None) -> Path:
    if out is None:
        return source.with_name(f"{source.stem}-deploy.pt")
    target = Path(out).expanduser().absolute()
    if target.suffix != ".pt":
        raise ConfigError(f"out={out}: a deployed checkpoint ends in .pt; for other formats use export")
    if target.resolve() == source.resolve():
        raise ConfigError(f"out={out}: is the trained checkpoint itself; choose another name")
    return target


def _check_canvas(model: DetectionModel) -> tuple[int, int]:
    """Return the canvas of the run, limited in size because the check runs in float64."""
    stride = max_stride(model)
    imgsz = model.args.get("imgsz")
    side = min(imgsz if isinstance(imgsz, int) and imgsz > 0 else LARGEST_CHECK_CANVAS, LARGEST_CHECK_CANVAS)
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
