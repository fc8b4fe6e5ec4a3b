"""What every deployed checkpoint is reported with, whatever its task: where it lies, its size, where it came from."""

from __future__ import annotations

import copy
import datetime
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kd_yolo.errors import ConfigError
from kd_yolo.files import sha256
from kd_yolo.inference import count_convolutions, count_parameters
from kd_yolo.nn.merging import MergeReport
from kd_yolo.provenance import find_recipe, versions
from kd_yolo.tables import PairReport

CHECK_IMAGES = 4
LARGEST_CHECK_CANVAS = 320  # the check runs in float64


@dataclass(frozen=True)
class DeployedFile(PairReport):
    """What was written and where it came from; a subclass adds how it was proven.

    Attributes:
        path: The deployed checkpoint.
        provenance: The JSON file beside it.
        source: The trained checkpoint.
        source_sha256: Its hash.
        sha256: Hash of the deployed checkpoint.
        merge: The merge and its error in float64, whole network and worst block.
        check_images: Number of images that both forms were compared on.
        params_trained: Parameters of the training form, all head branches.
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
    merge: MergeReport
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
        return [
            ("deployed", str(self.path)),
            ("parameters", f"{self.params_trained:,} trained, {self.params_fused:,} deployed"),
            ("convolutions", f"{self.convolutions_trained} trained, {self.convolutions} deployed"),
            ("merged blocks", f"{self.merge.blocks}, relative error {self.merge.relative_error:.1e}"),
            ("against training form", self._apart()),
        ]

    @abstractmethod
    def _apart(self) -> str:
        """Say how far the outputs of the deployed file are from the training form's, and where it was measured."""


def deploy_target(source: Path, out: str | Path | None) -> Path:
    """Return where to write the deployed form of a checkpoint.

    Args:
        source: The trained checkpoint, absolute.
        out: Where to write; None for ``<stem>-deploy.pt`` beside it.

    Raises:
        ConfigError: ``out`` is no ``.pt`` file or the trained checkpoint itself.
    """
    if out is None:
        return source.with_name(f"{source.stem}-deploy.pt")
    target = Path(out).expanduser().absolute()
    if target.suffix != ".pt":
        raise ConfigError(f"out={out}: a deployed checkpoint ends in .pt; for other formats use export")
    if target.resolve() == source.resolve():
        raise ConfigError(f"out={out}: is the trained checkpoint itself; choose another name")
    return target


def origin(path: Path, checkpoint: dict[str, Any], target: Path, written: Path, merged: MergeReport) -> dict[str, Any]:
    """Return the report's fields on where a file lies and where it came from, but for ``source_sha256``.

    Args:
        path: The trained checkpoint.
        checkpoint: Its dictionary.
        target: Where the deployed checkpoint will lie.
        written: Where it lies now.
        merged: What the merge did.
    """
    return {
        "path": target,
        "provenance": target.with_suffix(".json"),
        "source": path,
        "sha256": sha256(written),
        "merge": merged,
        "recipe": find_recipe(path, checkpoint),
        "versions": versions(),
        "created": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def sizes(source: nn.Module, deployed: Any) -> dict[str, Any]:
    """Return the report's figures of size, and the class names, of a trained and a deployed model."""
    return {
        "params_trained": count_parameters(source),
        "params": count_parameters(deployed),
        "params_fused": count_parameters(copy.deepcopy(deployed).fuse(verbose=False)),
        "convolutions_trained": count_convolutions(source),
        "convolutions": count_convolutions(deployed),
        "names": {int(key): str(value) for key, value in deployed.names.items()},
    }


def check_side(model: Any) -> int:
    """Return the side in pixels on which a model is compared: the run's canvas, limited in size."""
    imgsz = model.args.get("imgsz")
    return min(imgsz if isinstance(imgsz, int) and imgsz > 0 else LARGEST_CHECK_CANVAS, LARGEST_CHECK_CANVAS)
