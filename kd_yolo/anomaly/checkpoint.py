"""Anomaly checkpoints: plain data and tensors only, so that no class and no code travels in the file."""

from __future__ import annotations

import datetime
import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kd_yolo
from kd_yolo.anomaly.backbones import rebuild_backbone
from kd_yolo.anomaly.calibration import Calibration
from kd_yolo.anomaly.merging import fold
from kd_yolo.anomaly.model import AnomalyModel
from kd_yolo.anomaly.spec import AnomalySpec
from kd_yolo.checkpoints import DAMAGE
from kd_yolo.config import validate
from kd_yolo.errors import BackendMissingError, CheckpointError, KDYoloError
from kd_yolo.files import written_aside

FORMAT = "kd_yolo/anomaly/1"  # stands as text in the file's index, where is_anomaly() looks for it
MARK = b"kd_yolo/anomaly/"


def save_anomaly(
    path: str | Path, model: AnomalyModel, train_args: Mapping[str, Any], extra: Mapping[str, Any] | None = None
) -> None:
    """Write a model, its calibration and what it was trained with, aside and renamed.

    Args:
        path: The ``.pt`` file.
        model: Trained or deployed; its weights are written in float32.
        train_args: Plain data.
        extra: Plain data and tensors, for example metrics, or an optimiser's state.

    Raises:
        OutputError: The file cannot be written.
    """
    calibration = None if model.calibration is None else asdict(model.calibration)
    content = {
        "date": datetime.datetime.now().astimezone().isoformat(),
        "kd_yolo": {
            "format": FORMAT,
            "task": model.task,
            "version": kd_yolo.__version__,
            "names": dict(model.names),
            "stride": model.stride,
            "spec": model.spec.model_dump(),
            "teacher": _plain(model.teacher.structure),
            "student": _plain(model.student_yaml),
            "deployed": model.is_deployed,
            "calibration": calibration,
        },
        "state_dict": {key: _stored(value) for key, value in model.state_dict().items()},
        "train_args": _plain(train_args),
        "extra": _plain(extra or {}),
    }
    buffer = io.BytesIO()  # torch.save to a file reports a full disk in its own words; writing bytes is an OSError
    torch.save(content, buffer)
    with written_aside(Path(path).expanduser().absolute()) as aside:
        aside.write_bytes(buffer.getvalue())


def load_anomaly(path: str | Path, trust: bool = False) -> tuple[AnomalyModel, dict[str, Any]]:
    """Read what ``save_anomaly`` wrote. Neither the teacher's package nor the student's file is needed.

    Args:
        path: The ``.pt`` file.
        trust: Of no effect: such a file holds no classes. It is there because the other loaders have it.

    Returns:
        The model in eval mode, float32, on the CPU, calibrated if it was saved so; and the file's whole content.

    Raises:
        CheckpointError: The file is missing, damaged, of another task, or does not fit what it says it is.
    """
    del trust
    file = Path(path).expanduser().absolute()
    content = _read(file)
    own = content["kd_yolo"]
    try:
        spec = validate(AnomalySpec, own["spec"], where=file.name)
        teacher = rebuild_backbone(spec.teacher, own["teacher"])
        model = AnomalyModel(spec, teacher=teacher, student=own["student"])
        if own["deployed"]:
            fold(model)
        model.load_state_dict(content["state_dict"])
        if own["calibration"] is not None:
            model.apply_calibration(_calibration(own["calibration"]))
    except BackendMissingError:  # of a teacher that timm builds; the message names the package
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, KDYoloError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
        raise CheckpointError(f"{file}: damaged, or written by another version of kd-yolo ({reason[:160]})") from error
    if not all(bool(torch.isfinite(value).all()) for value in model.state_dict().values()):
        raise CheckpointError(f"{file}: has weights that are not finite; its training diverged; take another one")
    return model.eval(), content


def is_anomaly(path: str | Path) -> bool:
    """Return whether a file is an anomaly checkpoint, by a look at its index only; never raises."""
    try:
        with zipfile.ZipFile(Path(path).expanduser()) as archive:
            index = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            return MARK in archive.read(index)
    except (OSError, ValueError, StopIteration, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError):
        return False


def _read(file: Path) -> dict[str, Any]:
    """Return the content of an anomaly checkpoint."""
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; give the path of a trained anomaly .pt checkpoint")
    if not zipfile.is_zipfile(file):
        raise CheckpointError(f"{file}: empty, truncated, or not a checkpoint; copy or train it again")
    if not is_anomaly(file):
        raise CheckpointError(f"{file}: is no anomaly checkpoint; train one with kd-yolo train task=anomaly")
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(f"the checksum of {broken} is wrong")
        content = torch.load(file, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{file}: damaged ({reason[:120]}); copy or train it again") from error
    own = content.get("kd_yolo") if isinstance(content, dict) else None
    if not isinstance(own, dict) or own.get("task") != "anomaly" or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(f"{file}: is no anomaly checkpoint; train one with kd-yolo train task=anomaly")
    if own.get("format") != FORMAT:
        raise CheckpointError(f"{file}: has the format {own.get('format')!r}; this version of kd-yolo reads {FORMAT!r}")
    return content


def _calibration(content: Mapping[str, Any]) -> Calibration:
    return Calibration(**{field.name: content[field.name] for field in fields(Calibration)})


def _stored(value: Tensor) -> Tensor:
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).clone()


def _plain(value: Any) -> Any:
    """Return plain data: what is neither a number, text, tensor nor a collection of these is written as text."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(item) for item in value]
    item = getattr(value, "item", None)  # NumPy scalars
    return _plain(item()) if callable(item) else str(value)
