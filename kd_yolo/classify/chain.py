"""A chain of classifiers: each stage teaches the next, beside a direct run from the first to the last as control.

HFLKD's hierarchy: the teacher teaches an assistant, and the assistant the student (teacher assistants: Mirzadeh et al.,
AAAI 2020, arXiv:1902.03393). The released code never ran the control, the student taught by the teacher itself, with
the same epochs and seed; here it always runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ultralytics.utils import LOGGER

from kd_yolo.classify.checkpoints import load_source
from kd_yolo.classify.phases import ClassifyPhase, run_phase
from kd_yolo.classify.preflight import check_teacher, device_of
from kd_yolo.classify.settings import ClassifyConfig
from kd_yolo.classify.student import resolve_classifier
from kd_yolo.errors import TeacherError
from kd_yolo.tasks.chain import DIRECT, stages_of


def chain_of(config: ClassifyConfig) -> list[str]:
    """Return the models of a chain, or an empty list for a run without one.

    Raises:
        ConfigError: Fewer than three stages, or a key that a chain decides itself.
    """
    example = "yolo26s-cls.yaml,yolo26n-cls.yaml,lightnet-n-cls"
    return stages_of(config, config.chain, ("model", "teacher"), example=example)


def check_chain(config: ClassifyConfig, stages: list[str], names: Mapping[int, str]) -> None:
    """Refuse a chain that would fail, or whose stages have different class orders.

    Raises:
        KDYoloError: A model that does not exist, or a stage's checkpoint with the data's classes in another order.
    """
    for name in stages:
        resolve_classifier(config, name)
        is_ready_teacher(name, names, config.trust)


def is_ready_teacher(name: str, names: Mapping[int, str], trust: bool = False) -> bool:
    """Tell whether a stage is a checkpoint that already knows exactly the data's classes, in the data's order.

    A checkpoint that knows none of them, such as an ImageNet one, is a warm start.

    Args:
        name: The stage as given.
        names: The data's classes.
        trust: Load foreign classes from the checkpoint.

    Raises:
        TeacherError: It knows some of the classes, or all in another order: a chain's class list must not change from
            stage to stage.
    """
    if not name.endswith(".pt"):
        return False
    known: Any = load_source(name, trust=trust).names
    theirs, mine = ([str(listed[key]).strip() for key in sorted(listed)] for listed in (known, names))
    if theirs == mine:
        return True
    shared = set(theirs) & set(mine)
    if not shared:
        return False
    same = len(shared) == len(mine) == len(theirs)
    what = "the data's classes in another order" if same else f"{len(shared)} of the data's {len(mine)} classes"
    raise TeacherError(
        f"chain: {name} knows {what} ({', '.join(theirs[:6])}; the data: {', '.join(mine[:6])}); all stages of a chain "
        "need one class list in one order: train this stage on this data, or give its YAML"
    )


def run_chain(
    run_dir: Path, plan: Mapping[str, Any], config: ClassifyConfig, stages: list[str], names: Mapping[int, str]
) -> list[ClassifyPhase]:
    """Run every stage and the control, or take up where they were stopped.

    Returns:
        Results in the order they ran, with the chain's last student at the end.
    """
    results: list[ClassifyPhase] = []
    imgsz = int(plan["stock"]["imgsz"])

    def stage(number: int, teacher: Path | None) -> Path:
        name = stage_name(number, stages[number])
        results.append(run_phase(run_dir, name, resolve_classifier(config, stages[number]), teacher, plan))
        return run_dir / name / "weights" / "best.pt"

    ready = is_ready_teacher(stages[0], names, config.trust)
    first = Path(stages[0]).expanduser().resolve() if ready else stage(0, None)
    teacher = first
    for number in range(1, len(stages)):
        top1 = results[-1].top1 if results and (number > 1 or not ready) else None
        if number == len(stages) - 1:
            student = resolve_classifier(config, stages[-1])
            control = run_phase(run_dir, DIRECT, student, first, plan)
            results.append(control)
        check_teacher(config, teacher, Path(config.data), imgsz, top1=top1, device=device_of(plan["stock"]))
        teacher = stage(number, teacher)
    last, direct = results[-1], next(result for result in results if result.name == DIRECT)
    LOGGER.info(
        f"chain: {last.name} top-1 {last.top1:.4f} on validation, the direct run {direct.top1:.4f} "
        f"({100 * (last.top1 - direct.top1):+.1f} points, one seed: no verdict)"
    )
    return results


def stage_name(number: int, model: str) -> str:
    """Return the folder of a stage: its place in the chain and its model."""
    path = Path(model)
    label = path.parent.parent.name if path.parent.name == "weights" else path.stem
    return f"stage{number + 1}-{re.sub(r'[^A-Za-z0-9._-]+', '-', label)}"
