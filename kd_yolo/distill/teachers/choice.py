"""Which of several teachers speaks for which class: the one with the best validation AP of that class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ultralytics.utils import LOGGER, RANK

from kd_yolo.config import Recipe
from kd_yolo.distill.teachers.base import Teacher
from kd_yolo.distill.teachers.validation import validate_teacher
from kd_yolo.errors import ConfigError
from kd_yolo.files import write_json
from kd_yolo.resources import load_yaml


def best_teachers(
    members: Sequence[Teacher], recipe: Recipe, names: Mapping[int, str], arguments: Mapping[str, Any]
) -> list[int]:
    """Return for every class the number of its teacher, measured once a run.

    The result lies beside the recipe, so that a resumed run and every process of a multi-GPU run choose the same.

    Args:
        members: The teachers, in the recipe's order.
        recipe: Names and hashes of their files.
        names: The data set's class names.
        arguments: The trainer's: ``data``, ``imgsz`` and ``distill_model``, the recipe's file.

    Raises:
        ConfigError: There is no validation data to choose by, or this is one process of several and nothing was
            measured before they were started.
    """
    if not arguments.get("data"):
        raise ConfigError("teacher_merge=per_class chooses by validation AP and needs data=; use teacher_merge=mean")
    data, imgsz = str(Path(str(arguments["data"])).resolve()), int(arguments["imgsz"])
    asked = {
        "teachers": [digest for _, digest in recipe.teachers],
        "classes": [names[key] for key in sorted(names)],
        "imgsz": imgsz,
        "data": data,
    }
    recipe_file = arguments.get("distill_model")
    file = Path(str(recipe_file)).with_suffix(".classes.json") if recipe_file else None
    known = load_yaml(file) if file is not None and file.is_file() else {}  # JSON is YAML
    if all(known.get(key) == value for key, value in asked.items()):
        return list(known["choice"])
    if RANK != -1:  # Ultralytics' validator would wait for the other processes
        raise ConfigError(f"{file}: missing or of other teachers; start multi-GPU runs with kd-yolo train")
    table = [class_ap(member, names, Path(data), imgsz) for member in members]
    choice = choose(table)
    if file is not None:
        write_json(file, {**asked, "choice": choice, "ap50_95": table})
    listed = ", ".join(
        f"{names[k]}: {Path(recipe.teachers[t][0]).name}" for k, t in zip(sorted(names), choice, strict=True)
    )
    LOGGER.info(f"KD: teachers by class: {listed}")
    return choice


def class_ap(member: Teacher, names: Mapping[int, str], data: Path, imgsz: int) -> list[float | None]:
    """Return AP50-95 by class on the validation split; None where the teacher lacks the class."""
    score = validate_teacher(member, names, data, imgsz)
    known = [True] * len(names) if member.class_known is None else member.class_known.tolist()
    return [score.class_ap.get(k, 0.0) if know else None for k, know in enumerate(known)]


def choose(table: Sequence[Sequence[float | None]]) -> list[int]:
    """Return the best teacher of every class; the first of equals, and the first of all for a class that none knows.

    Args:
        table: AP by teacher and class; None where it lacks the class.
    """
    columns = zip(*table, strict=True)
    return [max(range(len(table)), key=lambda t: -1.0 if column[t] is None else column[t]) for column in columns]
