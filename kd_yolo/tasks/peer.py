"""The pretrained detector whose rows a student stands for: what its YAML says of it, and where its file lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from ultralytics.nn.tasks import DetectionModel, yaml_model_load
from ultralytics.utils import LOGGER, SETTINGS

from kd_yolo.checkpoints import load_model
from kd_yolo.config import Strict, TrainConfig, validate
from kd_yolo.errors import CheckpointError, ModelError
from kd_yolo.nn.merging import merge, rep_blocks
from kd_yolo.nn.student import StudentSpec
from kd_yolo.nn.warmstart import warm_start

INHERITS_KEY = "inherits"


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

    Raises:
        CheckpointError: The file that lies there cannot be loaded.
        ModelError: It holds another network than its name says.
    """
    said = inherits(student.cfg)
    if said is None or config.pretrained is False:
        return None
    if student.weights is not None:
        return _given(config, student, student.weights, said)
    if any(path.suffix == ".pt" and teacher_source(path, said, config.trust) is not None for path in teachers):
        return None  # the student starts from that teacher
    name = f"{said.source}.pt"
    for folder in (Path.cwd(), Path(SETTINGS["weights_dir"])):
        if (folder / name).is_file():
            return _at_hand((folder / name).resolve(), said, config.trust)
    LOGGER.warning(
        f"{student.name} has no pretrained weights to start from, which costs most of its accuracy: no {name} in "
        f"{Path.cwd()} or {SETTINGS['weights_dir']}. Put it there (Ultralytics publishes it), give pretrained=FILE, or "
        "say pretrained=false"
    )
    return None


def fits(source: DetectionModel, said: Inherits) -> bool:
    """Tell whether a detector is the one whose rows a student's YAML means, whatever its classes.

    Raises:
        ModelError: There is no such model.
    """
    try:
        wanted = yaml_model_load(f"{said.source}.yaml")
    except FileNotFoundError as error:
        raise ModelError(
            f"{INHERITS_KEY}: Ultralytics knows no {said.source}.yaml; 'from' is a name such as yolo26n"
        ) from error
    same = all(source.yaml.get(key) == wanted.get(key) for key in ("backbone", "head"))
    return same and (source.yaml.get("scale") or None) == (wanted.get("scale") or None)


def source_in(path: Path, said: Inherits, trust: bool) -> DetectionModel | None:
    """Return the detector in a file if it is the one whose rows are meant, merged and in float32.

    Raises:
        CheckpointError: The file is missing, truncated, foreign or of another task.
    """
    return _as_source(load_model(path, trust=trust)[0], said)


def _as_source(model: DetectionModel, said: Inherits) -> DetectionModel | None:
    model = merge(model, check=False)[0] if rep_blocks(model) else model
    return model.float() if fits(model, said) else None


def teacher_source(path: Path, said: Inherits, trust: bool) -> DetectionModel | None:
    """The same for a teacher, which may be of any kind, and has been checked as a teacher."""
    try:
        return source_in(path, said, trust)
    except CheckpointError:
        return None


def _at_hand(path: Path, said: Inherits, trust: bool) -> Path:
    """Return a file that was found by its name, if it holds what the name says."""
    remedy = f"put {said.source}.pt as Ultralytics publishes it there, or say pretrained=FILE or pretrained=false"
    try:
        found = source_in(path, said, trust)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; this file was found by its name: {remedy}") from error
    if found is None:
        raise ModelError(f"{path}: is not the {said.source} that its name says; {remedy}")
    return path


def _given(config: TrainConfig, student: StudentSpec, path: Path, said: Inherits) -> Path | None:
    """Return a file that was named if it can be narrowed; say what a student has of one that cannot."""
    model, _ = load_model(path, trust=config.trust)
    if _as_source(model, said) is not None:
        return path
    same = all(model.yaml.get(key) == student.cfg.get(key) for key in ("backbone", "head"))
    if isinstance(config.pretrained, str) and not same:
        report = warm_start(student.build(nc=int(model.model[-1].nc)), model.float())
        LOGGER.warning(
            f"pretrained={config.pretrained}: is not the {said.source} that {student.name} takes over row by row; "
            f"what fits by role and shape is {report.summary()}"
        )
    return None
