"""Where a student's first weights come from: a pretrained detector, narrowed to the student's size before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER

from kd_yolo.checkpoints import serialize
from kd_yolo.config import TrainConfig
from kd_yolo.errors import CheckpointError, ConfigError, DataError, ModelError
from kd_yolo.files import sha256, write_json, written_aside
from kd_yolo.images import dataset_files, read_image, spread, to_canvas
from kd_yolo.nn.lightnet import build_model
from kd_yolo.nn.narrow import MIN_IMAGES, check_rows, narrow
from kd_yolo.nn.narrow_report import NarrowReport
from kd_yolo.nn.student import StudentSpec, student_spec
from kd_yolo.provenance import versions
from kd_yolo.resources import load_yaml
from kd_yolo.tasks.peer import Inherits, inherits, source_in, teacher_source
from kd_yolo.tasks.preflight import resolve_student
from kd_yolo.tasks.stock_defaults import finetuned_defaults, narrowed_defaults

START_IMAGES = 96  # training images, without their labels, that the layers are fitted on
LARGEST_START_CANVAS = 320


def own_teacher(config: TrainConfig, peer: Path | None) -> StudentSpec:
    """Return what ``teacher=self`` trains first: the pretrained detector, or the student's own structure."""
    if peer is None or config.teacher_model is not None:
        return resolve_student(config, teacher=True)
    return student_spec(str(peer), trust=config.trust)


def say_own_teacher(config: TrainConfig, own: StudentSpec, student: StudentSpec, peer: Path | None) -> None:
    """Log what ``teacher=self`` trains first and where the student starts, before the hours that it takes."""
    what = f"{own.weights} is fine-tuned" if own.goes_on else f"a {own.name} is trained"
    if own.weights and not own.goes_on:
        what += f" from what {own.weights} has of it"
    elif not own.weights:
        what += " from random weights"
    start = ""
    if peer is not None and config.teacher_model is None:
        start = f", with the weights of {peer if isinstance(config.pretrained, str) else 'that teacher'} to start from"
    LOGGER.info(f"teacher=self: first {what} on this data, then {student.name} is trained under it{start}")


def start_source(
    config: TrainConfig, student: StudentSpec, teachers: Sequence[Path], peer: Path | None
) -> tuple[Path, DetectionModel] | None:
    """Return what a student is narrowed from: file and detector, or None when it starts as it is.

    That is the file of ``pretrained=``; else a teacher, which is the same detector after its training on this very data
    and so the better start; else the pretrained detector at hand.

    Args:
        config: The run's configuration.
        student: What will be trained.
        teachers: Its teachers' files.
        peer: What ``pretrained_peer`` returned.

    Raises:
        CheckpointError: The file of ``pretrained=`` or the pretrained detector cannot be loaded.
    """
    said = inherits(student.cfg)
    explicit = isinstance(config.pretrained, str)
    if said is None or config.pretrained is False or (student.weights is not None and not explicit):
        return None
    for path in () if explicit else teachers:
        if path.suffix == ".pt" and (source := teacher_source(path, said, config.trust)) is not None:
            return path, source
    last = student.weights if explicit else peer
    source = source_in(last, said, config.trust) if last is not None else None
    return (last, source) if last is not None and source is not None else None


def check_start(
    config: TrainConfig,
    student: StudentSpec,
    teachers: Sequence[Path],
    peer: Path | None,
    data: Path,
    stock: Mapping[str, Any],
) -> None:
    """Refuse a start that could not be made, before a teacher is trained for it.

    Args:
        config: The run's configuration.
        student: What will be trained.
        teachers: Its teachers' files, as far as they are there already.
        peer: What ``pretrained_peer`` returned; a teacher that is trained from it has its structure.
        data: Ready data YAML.
        stock: Stock arguments, of which ``fraction`` is read.

    Raises:
        ConfigError: The images have other channels than photographs.
        DataError: There are too few of them.
        ModelError: The rows of ``inherits`` do not fit.
    """
    found, said = start_source(config, student, teachers, peer), inherits(student.cfg)
    if found is None or said is None:
        return
    path, source = found
    channels, count = int(load_yaml(data).get("channels", 3)), len(_trained_files(data, stock))
    if channels not in {1, 3}:
        raise ConfigError(f"{data}: what {path} computes cannot be fitted on {channels} channels; say pretrained=false")
    if count < MIN_IMAGES:
        raise DataError(
            f"{data}: {student.name} cannot take over {path} with {count} training images; {MIN_IMAGES} are needed, or "
            "say pretrained=false"
        )
    image = int(source.yaml.get("channels", 3))
    try:
        check_rows(build_model(student.cfg, nc=int(source.model[-1].nc), ch=image), source, said.rows)
    except ModelError as error:
        raise ModelError(
            f"{student.name}: cannot take over {path}: {error}; correct its 'inherits', or say pretrained=false"
        ) from error


def start_student(
    run_dir: Path, name: str, student: StudentSpec, teachers: Sequence[Path], peer: Path | None, plan: Mapping[str, Any]
) -> tuple[StudentSpec, dict[str, Any]]:
    """Narrow a student from what it takes over, if there is such a thing.

    Args:
        run_dir: The run's folder, where ``NAME.start.pt`` is kept for a resumed run.
        name: The phase's name.
        student: What will be trained.
        teachers: Its teachers' files.
        peer: What ``pretrained_peer`` returned.
        plan: The content of ``run.yaml``.

    Returns:
        The student with its first weights, and the stock arguments that it is trained with unless others are given.

    Raises:
        CheckpointError: What it takes over is gone or damaged, and was not taken over yet.
    """
    config = TrainConfig.model_validate(plan["config"])
    out, said = run_dir / f"{name}.start.pt", inherits(student.cfg)
    try:
        found = start_source(config, student, teachers, peer)
    except CheckpointError:
        if not (out.is_file() and _record(out).is_file()):
            raise
        LOGGER.info(f"warm start: {out}")  # a resumed run no longer needs the file that it was made from
        return replace(student, weights=out), narrowed_defaults()
    if found is None or said is None:
        return student, finetuned_defaults(student, Path(config.data), classes=plan["stock"].get("classes"))
    path, source = found
    return replace(student, weights=_narrowed(out, student, source, path, said, plan)), narrowed_defaults()


def _narrowed(
    out: Path, student: StudentSpec, source: DetectionModel, path: Path, said: Inherits, plan: Mapping[str, Any]
) -> Path:
    """Return the file with the student's first weights; made once."""
    record, digest = _record(out), sha256(path)
    if out.is_file() and record.is_file() and load_yaml(record).get("source_sha256") == digest:
        LOGGER.info(f"warm start: {out}")
        return out
    target = build_model(student.cfg, nc=int(source.model[-1].nc), ch=int(source.yaml.get("channels", 3)))
    target.names = dict(source.names)
    files = _trained_files(Path(plan["config"]["data"]), plan["stock"])
    report = narrow_on_images(target, source, said.rows, files, int(plan["stock"]["imgsz"]))
    LOGGER.info(f"warm start: {student.name} from {path}: {report.summary()}")
    target.args = {"imgsz": plan["stock"]["imgsz"], "task": "detect"}
    content = {"source": path.name, "source_sha256": digest, "narrowed": report.to_dict(), "versions": versions()}
    with written_aside(out) as aside:
        aside.write_bytes(serialize(target.eval(), {}, content))
    write_json(record, content)
    return out


def _trained_files(data: Path, stock: Mapping[str, Any]) -> list[Path]:
    """Return the images that the training sees, as Ultralytics cuts them off."""
    files = dataset_files(data, "train")
    return files[: round(len(files) * float(stock.get("fraction", 1.0)))]


def _record(out: Path) -> Path:
    return out.with_suffix(".json")


def narrow_on_images(
    target: DetectionModel, source: DetectionModel, rows: Sequence[int], files: Sequence[Path], imgsz: int
) -> NarrowReport:
    """Narrow a detector on images, evenly chosen from a list.

    Args:
        target: The student, changed in place.
        source: What it takes over.
        rows: For every row of the target the row of the source.
        files: Images; labels are not read.
        imgsz: Canvas, pixels; a larger one than 320 px is brought down to that, which is enough for the fit.
    """
    stride = int(target.stride.max())
    side = max(min(imgsz, LARGEST_START_CANVAS) // stride * stride, stride)
    chosen = [read_image(file) for file in spread(list(files), START_IMAGES)]
    images = to_canvas(chosen, (side, side), int(target.yaml.get("channels", 3)))
    with torch.random.fork_rng(devices=[]):
        return narrow(target, source, rows, images)
