"""Read and write Ultralytics checkpoints: known classes only, no code of theirs run, no download, no installation."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import importlib
import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
import ultralytics
from pydantic import BaseModel
from torch import nn
from ultralytics.nn.modules import Detect
from ultralytics.nn.modules.head import v10Detect
from ultralytics.nn.tasks import DetectionModel, guess_model_task, torch_safe_load
from ultralytics.utils import DEFAULT_CFG_DICT, DEFAULT_CFG_KEYS
from ultralytics.utils.checks import check_yolov5u_filename

import kd_yolo
from kd_yolo.errors import CheckpointError

# Packages of ours whose classes a training checkpoint may hold: blocks of an unmerged student and, in a mid-run
# last.pt, the distillation wrapper with its method.
OWN_PACKAGES = ("kd_yolo.nn.", "kd_yolo.distill.", "kd_yolo.classify.")
PLAIN_HEADS = (Detect, v10Detect)
# Training state that a shipped file has no use for; the keys stay, as Ultralytics' strip_optimizer leaves them.
TRAINING_STATE = ("best_fitness", "ema", "updates", "optimizer", "scaler", "stopper")
# What reading a damaged archive or pickle raises.
DAMAGE = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    struct.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)


def load_model(
    path: str | Path, trust: bool = False, heads: tuple[type[nn.Module], ...] = PLAIN_HEADS
) -> tuple[DetectionModel, dict[str, Any]]:
    """Load a detector from an Ultralytics checkpoint.

    The restricted loader of PyTorch is used: only PyTorch's, Ultralytics' and our own classes are rebuilt, and no other
    code in the file runs. The EMA weights are preferred, as everywhere in Ultralytics; the wrapper that a mid-run
    ``last.pt`` of a distillation holds is removed and the student returned.

    Args:
        path: A local ``.pt`` file. Names are never completed, looked up elsewhere or downloaded.
        trust: Also rebuild foreign classes, which runs code contained in the file.
        heads: Accepted classes of the last layer; a teacher may have one that a student may not.

    Returns:
        The model in float32, in eval mode, on the CPU, with ``args`` as a dictionary of stock keys; and the checkpoint
        dictionary.

    Raises:
        CheckpointError: The file is missing, empty, truncated, no checkpoint, holds foreign classes and is not trusted,
            holds no model, holds a model of another task, or has weights that are not finite.
    """
    file, checkpoint = read_checkpoint(path, trust)
    return model_in(file, checkpoint, heads), checkpoint


def read_checkpoint(path: str | Path, trust: bool = False) -> tuple[Path, dict[str, Any]]:
    """Return the absolute path and the content of a ``.pt`` file, read as ``load_model`` does.

    Raises:
        CheckpointError: As ``load_model``, as far as the file and its classes are concerned.
    """
    file = _existing_file(Path(path).expanduser())
    return file, _read_trusted(file) if trust else _read_restricted(file)


def model_in(
    file: Path, checkpoint: dict[str, Any], heads: tuple[type[nn.Module], ...] = PLAIN_HEADS
) -> DetectionModel:
    """Return the detector of a checkpoint that ``read_checkpoint`` read, made ready as by ``load_model``.

    Raises:
        CheckpointError: It holds no model, a model of another task, or weights that are not finite.
    """
    model = _detector(file, checkpoint, heads).float()
    model.args = _stock_args(checkpoint, model)
    model.pt_path = str(file)
    model.task = "detect"
    model.criterion = None
    if not all(bool(torch.isfinite(value).all()) for value in model.state_dict().values()):
        raise CheckpointError(f"{file}: has weights that are not finite; its training diverged; take another one")
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = True
    return model.eval().requires_grad_(False)


def serialize(deployed: DetectionModel, checkpoint: dict[str, Any], provenance: dict[str, Any]) -> bytes:
    """Return an Ultralytics checkpoint of a deployed model as bytes.

    Args:
        deployed: Merged model of stock classes, see ``kd_yolo.inference.deployed_form``.
        checkpoint: What the training checkpoint holds; its metrics and training arguments are kept.
        provenance: Plain data for the key ``kd_yolo``.
    """
    model = copy.deepcopy(deployed)
    # The recipe's path is of no use on another machine, and Ultralytics would look for a teacher there.
    model.args = {**deployed.args, "distill_model": None}
    model.pt_path = None
    content = {
        "date": datetime.datetime.now().astimezone().isoformat(),
        "version": ultralytics.__version__,
        "license": "AGPL-3.0 License (https://ultralytics.com/license)",
        "docs": "https://docs.ultralytics.com",
        "epoch": -1,
        **dict.fromkeys(TRAINING_STATE),
        "model": model,
        "train_args": model.args,
        "train_metrics": checkpoint.get("train_metrics"),
        "names": model.names,
        "kd_yolo": {"version": kd_yolo.__version__, **provenance},
    }
    buffer = io.BytesIO()  # torch.save to a file reports a full disk in its own words; writing bytes is an OSError
    torch.save(content, buffer)
    return buffer.getvalue()


def foreign_classes(path: Path) -> list[str]:
    """Return what a checkpoint refers to beyond PyTorch, Ultralytics and this package, as dotted names.

    Complete only after a restricted load was tried, which is when Ultralytics registers the classes it knows.
    """
    return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))


def _existing_file(file: Path) -> Path:
    """Return the absolute path of what looks like a checkpoint, so that nothing is ever searched for online."""
    if not file.exists():
        raise CheckpointError(f"{file}: no such file; give the path of a trained .pt checkpoint")
    if not file.is_file():
        raise CheckpointError(f"{file}: is not a file; give the path of a trained .pt checkpoint")
    if file.suffix.lower() != ".pt":
        raise CheckpointError(f"{file}: is not a .pt checkpoint; give the trained .pt file")
    try:
        size, is_zip = file.stat().st_size, zipfile.is_zipfile(file)
        with file.open("rb"):
            pass
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); check its permissions") from error
    if size == 0:
        raise CheckpointError(f"{file}: is empty; copy or train it again")
    if not is_zip:
        raise CheckpointError(f"{file}: truncated, or not a PyTorch checkpoint; copy or train it again")
    file = file.absolute()
    # Ultralytics rewrites some names (quotes removed, yolov5n.pt -> yolov5nu.pt) and then downloads what it misses.
    if check_yolov5u_filename(str(file).strip().replace("'", ""), verbose=False) != str(file):
        raise CheckpointError(f"{file}: Ultralytics reads this file name as another one; rename the file")
    return file


def _read_restricted(file: Path) -> dict[str, Any]:
    _check_readable(file)
    try:
        torch.serialization.add_safe_globals([*_own_classes(file), frozenset])
        checkpoint, _ = torch_safe_load(str(file), safe_only=True)
    except (TypeError, ModuleNotFoundError, AttributeError, pickle.UnpicklingError) as error:
        foreign = foreign_classes(file)
        if not foreign:
            raise CheckpointError(
                f"{file}: refused by the restricted loader ({_first_line(error.__cause__ or error)}); "
                "pass trust=true only if you trust its source"
            ) from error
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise CheckpointError(
            f"{file}: holds the foreign class {foreign[0]}{more}; pass trust=true only if you trust its source"
        ) from error
    except DAMAGE as error:
        raise _damaged(file, error) from error
    return _mapping(file, checkpoint)


def _check_readable(file: Path) -> None:
    """Refuse an archive with wrong checksums, which PyTorch does not look at, or whose classes cannot be listed."""
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(f"the checksum of {broken} is wrong")
        foreign_classes(file)
    except DAMAGE as error:
        raise _damaged(file, error) from error


def _own_classes(file: Path) -> list[type]:
    """Return the classes of this package that a checkpoint refers to: modules and plain data, never functions."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    found: list[type] = []
    for name in names:
        module, _, attribute = name.rpartition(".")
        if not module.startswith(OWN_PACKAGES):
            continue
        try:
            item = getattr(importlib.import_module(module), attribute, None)
        except ModuleNotFoundError:
            continue  # written by another version of this package: reported as foreign, by name
        if not isinstance(item, type) or item.__module__ != module:
            continue
        if issubclass(item, (nn.Module, BaseModel)) or dataclasses.is_dataclass(item):
            found.append(item)
    return found


def _read_trusted(file: Path) -> dict[str, Any]:
    """Load with every class allowed, but never let Ultralytics install a package that a class is missing from."""
    _check_readable(file)
    try:
        for name in foreign_classes(file):
            module = name.rpartition(".")[0]
            if not module.startswith(("ultralytics.", "pathlib")):  # old names of these are mapped while loading
                importlib.import_module(module)
        checkpoint, _ = torch_safe_load(str(file), safe_only=False)
    except ImportError as error:
        raise CheckpointError(
            f"{file}: needs the module '{error.name}', which is not installed; install it from a source you trust"
        ) from error
    except DAMAGE as error:
        raise _damaged(file, error) from error
    except (TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: cannot be loaded ({_first_line(error)})") from error
    return _mapping(file, checkpoint)


def _mapping(file: Path, checkpoint: Any) -> dict[str, Any]:
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{file}: holds a {type(checkpoint).__name__}, not an Ultralytics checkpoint")
    return checkpoint


def _detector(file: Path, checkpoint: dict[str, Any], heads: tuple[type[nn.Module], ...]) -> DetectionModel:
    """Return the detector of a checkpoint: EMA first, unwrapped from a distillation."""
    candidate = checkpoint.get("ema") or checkpoint.get("model")
    if not isinstance(candidate, nn.Module):
        values = candidate.values() if isinstance(candidate, dict) else checkpoint.values()
        if values and all(isinstance(value, torch.Tensor) for value in values):
            raise CheckpointError(f"{file}: holds weights only (a state_dict), no model; give the run's best.pt")
        raise CheckpointError(f"{file}: has no model in it; give a best.pt or last.pt that Ultralytics wrote")
    student = getattr(candidate, "student_model", None)
    if isinstance(student, nn.Module):
        candidate = student
        for module in student.modules():
            module._forward_hooks.clear()  # what tapped the student in training
    if checkpoint.get("modelopt"):
        raise CheckpointError(f"{file}: is trained for quantization (modelopt), which is not supported here yet")
    head = getattr(candidate, "model", [None])[-1]
    if not isinstance(candidate, DetectionModel) or type(head) not in heads:
        raise CheckpointError(
            f"{file}: is a {type(candidate).__name__} with a {type(head).__name__} head (task "
            f"{guess_model_task(candidate)}); a detector with a Detect head is needed"
        )
    return candidate


def _stock_args(checkpoint: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the training arguments with defaults filled in and foreign keys left out."""
    saved = checkpoint.get("train_args") or getattr(model, "args", None) or {}
    saved = saved if isinstance(saved, dict) else vars(saved)
    return {**DEFAULT_CFG_DICT, **{key: value for key, value in saved.items() if key in DEFAULT_CFG_KEYS}}


def _damaged(file: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"{file}: damaged or not a checkpoint ({_first_line(error)}); copy or train it again")


def _first_line(error: BaseException) -> str:
    """Return what an error says in one line; PyTorch puts its reason after a page of advice."""
    lines = str(error).partition("WeightsUnpickler error:")[2].strip().splitlines() or str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]
