"""Where a student's first weights come from: a pretrained detector, narrowed to the student's size before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from ultralytics.nn.tasks import DetectionModel, yaml_model_load
from ultralytics.utils import LOGGER, SETTINGS

from kd_yolo.checkpoints import load_model, serialize
from kd_yolo.config import Strict, TrainConfig, validate
from kd_yolo.errors import CheckpointError, ModelError
from kd_yolo.files import sha256, write_json, written_aside
from kd_yolo.images import dataset_files, read_image, spread, to_canvas
from kd_yolo.nn.lightnet import build_model
from kd_yolo.nn.merging import merge, rep_blocks
from kd_yolo.nn.narrow import NarrowReport, narrow
from kd_yolo.nn.student import StudentSpec, student_spec
from kd_yolo.provenance import versions
from kd_yolo.resources import load_yaml
from kd_yolo.tasks.preflight import resolve_student
from kd_yolo.tasks.stock_defaults import finetuned_defaults, narrowed_defaults

INHERITS_KEY = "inherits"
START_IMAGES = 96  # training images, without their labels, that the layers are fitted on
LARGEST_START_CANVAS = 320


class Inherits(Strict):
    """The ``inherits:`` key of a model YAML."""

    source: str = Field(alias="from", min_length=1, description="name of the pretrained detector whose rows these are")
    rows: list[int] = Field(min_length=2, description="for every row the row of that detector it takes over")


def inherits(cfg: Mapping[str, Any]) -> Inherits | None:
    """Return what a model dictionary says of the detector it takes over, or None.

    Raises:
        ModelError: The key is malformed.
    """
    content = cfg.get(INHERITS_KEY)
    if content is None:
        return None
    if not isinstance(content, dict) or set(content) != {"from", "rows"}:
        raise ModelError(f"{INHERITS_KEY}: write a mapping with 'from', a model name, and 'rows', a list of numbers")
    return validate(Inherits, content, where=INHERITS_KEY)


def pretrained_peer(config: TrainConfig, student: StudentSpec, teachers: Sequence[Path] = ()) -> Path | None:
    """Return the pretrained detector that a student takes over, if it is at hand.

    It is the file of ``pretrained=`` when that holds this detector. Without one Ultralytics' places are looked at,
    the working folder and its ``weights_dir``; nothing is downloaded. A teacher that holds it makes it superfluous.
    """
    said = inherits(student.cfg)
    if said is None or config.pretrained is False:
        return None
    if student.weights is not None:
        return student.weights if _source(student.weights, said, config.trust) is not None else None
    if any(path.suffix == ".pt" and _source(path, said, config.trust) is not None for path in teachers):
        return None  # the student starts from that teacher
    name = f"{said.source}.pt"
    for folder in (Path.cwd(), Path(SETTINGS["weights_dir"])):
        if (folder / name).is_file():
            return (folder / name).resolve()
    LOGGER.warning(
        f"{student.name} has no pretrained weights to start from, which costs most of its accuracy: no {name} in "
        f"{Path.cwd()} or {SETTINGS['weights_dir']}. Put it there (Ultralytics publishes it), give pretrained=FILE, or "
        "say pretrained=false"
    )
    return None


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
    """
    said = inherits(student.cfg)
    explicit = isinstance(config.pretrained, str)
    if said is None or config.pretrained is False or (student.weights is not None and not explicit):
        return None
    for path in [student.weights] if explicit else [*teachers, peer]:
        if path is not None and path.suffix == ".pt" and (source := _source(path, said, config.trust)) is not None:
            return path, source
    return None


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
    """
    config = TrainConfig.model_validate(plan["config"])
    found = start_source(config, student, teachers, peer)
    said = inherits(student.cfg)
    if found is None or said is None:
        return student, finetuned_defaults(student, Path(config.data))
    path, source = found
    return replace(
        student, weights=_narrowed(run_dir / f"{name}.start.pt", student, source, path, said, plan)
    ), narrowed_defaults()


def fits(source: DetectionModel, said: Inherits) -> bool:
    """Tell whether a detector is the one whose rows a student's YAML means, whatever its classes."""
    wanted = yaml_model_load(f"{said.source}.yaml")
    same = all(source.yaml.get(key) == wanted.get(key) for key in ("backbone", "head"))
    return same and (source.yaml.get("scale") or None) == (wanted.get("scale") or None)


def _source(path: Path, said: Inherits, trust: bool) -> DetectionModel | None:
    """Return the detector in a file if it is the one whose rows are meant, merged and in float32."""
    try:
        model, _ = load_model(path, trust=trust)
    except CheckpointError:
        return None  # a teacher of another kind, which has been checked as a teacher already
    model = merge(model, check=False)[0] if rep_blocks(model) else model
    return model.float() if fits(model, said) else None


def _narrowed(
    out: Path, student: StudentSpec, source: DetectionModel, path: Path, said: Inherits, plan: Mapping[str, Any]
) -> Path:
    """Return the file with the student's first weights; made once."""
    record = out.with_suffix(".json")
    digest = sha256(path)
    if out.is_file() and record.is_file() and load_yaml(record).get("source_sha256") == digest:
        LOGGER.info(f"warm start: {out}")
        return out
    target = build_model(student.cfg, nc=int(source.model[-1].nc))
    target.names = dict(source.names)
    files = dataset_files(plan["config"]["data"], "train")
    report = narrow_on_images(target, source, said.rows, files, int(plan["stock"]["imgsz"]))
    LOGGER.info(f"warm start: {student.name} from {path}: {report.summary()}")
    target.args = {"imgsz": plan["stock"]["imgsz"], "task": "detect"}
    content = {"source": path.name, "source_sha256": digest, "narrowed": report.to_dict(), "versions": versions()}
    with written_aside(out) as aside:
        aside.write_bytes(serialize(target.eval(), {}, content))
    write_json(record, content)
    return out


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
