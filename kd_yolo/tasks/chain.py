"""A chain of distillations: each stage teaches the next, beside a direct run from the first to the last as control.

The idea is the teacher assistant (Mirzadeh et al., AAAI 2020, arXiv:1902.03393), which HFLKD uses for magnetic tiles:
a small student may learn more from a middle-sized teacher than from a large one. Whether it does is what the control
answers: it has the same student, teacher, epochs and seed, and leaves the middle out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ultralytics.utils import LOGGER

from kd_yolo.checkpoints import load_model
from kd_yolo.config import TrainConfig
from kd_yolo.errors import ConfigError, TeacherError
from kd_yolo.nn.student import StudentSpec
from kd_yolo.resources import load_yaml
from kd_yolo.tasks.peer import pretrained_peer
from kd_yolo.tasks.phases import PhaseResult, PhaseSpec, run_phase
from kd_yolo.tasks.preflight import check_own_teacher, check_teacher, resolve_student
from kd_yolo.tasks.start import check_start, start_student

DIRECT = "direct"


def chain_of(config: TrainConfig) -> list[str]:
    """Return the models of a chain, or an empty list for a run without one.

    Raises:
        ConfigError: Fewer than three stages, a key that a chain decides itself, or no method.
    """
    decided = ("model", "teacher", "teacher_model", "teacher_epochs", "generations")
    stages = stages_of(config, config.chain, decided, example="yolo26s.yaml,lightnet-m,lightnet-s")
    if stages and config.method == "none":
        raise ConfigError("method=none and chain=: a chain is made of distillations; choose a method")
    return stages


def stages_of(config: BaseModel, chain: str | list[str] | None, decided: Sequence[str], example: str) -> list[str]:
    """Read the models of ``chain=``, of any task; return an empty list for a run without one.

    Args:
        config: The run's keys.
        chain: Its ``chain``: words with commas between them, or a list.
        decided: Keys that a chain decides itself, which must then be as they are by default.
        example: What a message shows for a chain.

    Raises:
        ConfigError: Fewer than three stages, or a key that a chain decides itself.
    """
    if chain is None:
        return []
    given = chain if isinstance(chain, list) else chain.split(",")
    stages = [str(name).strip() for name in given if str(name).strip()]
    if len(stages) < 3:
        raise ConfigError(
            f"chain={','.join(stages)}: a chain has a teacher, at least one assistant and a student, as in "
            f"chain={example}; for two use model= and teacher="
        )
    known = type(config).model_fields
    for key in decided:
        if key in config.model_fields_set and getattr(config, key) != known[key].default:
            raise ConfigError(f"{key}= and chain= say the same thing; drop {key}=, the chain names every model")
    return stages


def check_chain(config: TrainConfig, stages: list[str], data: Path, imgsz: int, method: Mapping[str, Any]) -> None:
    """Refuse a chain that would fail at a later stage.

    Raises:
        KDYoloError: A model that does not exist, two stages that do not fit the method, or a first checkpoint that
            cannot teach this data set.
    """
    students = [resolve_stage(config, name) for name in stages]
    for teacher, student in (*pairwise(students), (students[0], students[-1])):
        check_own_teacher(method, student, teacher, data)
    if is_ready_teacher(stages[0], data, config.trust):
        check_teacher(config, data, imgsz, students[1], Path(stages[0]).expanduser())


def chain_peers(config: TrainConfig, stages: list[str], data: Path, stock: Mapping[str, Any]) -> dict[str, str]:
    """Return for every model of a chain the pretrained detector that it takes over, of those that have one.

    Raises:
        KDYoloError: A file that lies there cannot be used, or a start from it could not be made.
    """
    found: dict[str, str] = {}
    for name in dict.fromkeys(stages):
        student = resolve_stage(config, name)
        peer = pretrained_peer(config, student)
        check_start(config, student, (), peer, data, stock)
        if peer is not None:
            found[name] = str(peer)
    return found


def is_ready_teacher(name: str, data: Path, trust: bool = False) -> bool:
    """Tell whether a chain's first stage is a trained teacher of this data set (else it is trained first).

    A checkpoint that knows exactly the data's classes teaches as it is; one that knows none of them, such as a COCO
    checkpoint, is a warm start.

    Raises:
        TeacherError: It knows some of the classes: a chain's class list must not change from stage to stage.
    """
    if not name.endswith(".pt"):
        return False
    model, _ = load_model(Path(name).expanduser(), trust=trust)
    listed = load_yaml(data)["names"]
    wanted = {str(n).strip().lower() for n in (listed if isinstance(listed, list) else listed.values())}
    known = {str(n).strip().lower() for n in model.names.values()}
    if wanted == known:
        return True
    if wanted & known:
        raise TeacherError(
            f"chain: {name} knows {len(known)} classes, of which {len(wanted & known)} are among the data's "
            f"{len(wanted)} (missing: {', '.join(sorted(wanted - known)) or 'none'}); a chain's class list must stay "
            "the same: train its first stage on this data, or give its YAML"
        )
    return False


def resolve_stage(config: TrainConfig, name: str) -> StudentSpec:
    """Return what one stage trains; ``pretrained`` and ``reparam`` count for every stage."""
    return resolve_student(config.model_copy(update={"model": name}))


def run_chain(run_dir: Path, plan: Mapping[str, Any], config: TrainConfig, stages: list[str]) -> list[PhaseResult]:
    """Run every stage and the control, or take up where they were stopped.

    Returns:
        Results in the order they ran, with the chain's last student at the end.
    """
    data, imgsz = Path(config.data), int(plan["stock"]["imgsz"])
    results: list[PhaseResult] = []
    if is_ready_teacher(stages[0], data, config.trust):
        teacher = first = Path(stages[0]).expanduser().resolve()
    else:
        teacher = first = _stage(run_dir, plan, config, stages, 0, None, results)
    for number in range(1, len(stages)):
        if number == len(stages) - 1:
            results.append(run_phase(run_dir, _spec(run_dir, plan, config, DIRECT, stages[-1], (first,)), plan))
        if results and number > 1:
            student = resolve_stage(config, stages[number])
            check_teacher(config, data, imgsz, student, teacher, _metrics_of(results, number - 1))
        teacher = _stage(run_dir, plan, config, stages, number, teacher, results)
    last, direct = results[-1], next(r for r in results if r.name == DIRECT)
    gain = 100 * (last.fitness - direct.fitness)
    LOGGER.info(
        f"chain: {last.name} {last.fitness:.4f} mAP50-95 on validation, the direct run {direct.fitness:.4f} "
        f"({gain:+.1f} points, one seed: no verdict; kd-yolo compare gives one)"
    )
    return results


def stage_name(number: int, model: str) -> str:
    """Return the folder of a stage: its place in the chain and its model."""
    return f"stage{number + 1}-{re.sub(r'[^A-Za-z0-9._-]+', '-', Path(model).stem)}"


def _stage(
    run_dir: Path,
    plan: Mapping[str, Any],
    config: TrainConfig,
    stages: list[str],
    number: int,
    teacher: Path | None,
    results: list[PhaseResult],
) -> Path:
    name = stage_name(number, stages[number])
    spec = _spec(run_dir, plan, config, name, stages[number], (teacher,) if teacher else ())
    results.append(run_phase(run_dir, spec, plan))
    return run_dir / name / "weights" / "best.pt"


def _metrics_of(results: list[PhaseResult], number: int) -> dict[str, float]:
    return next(r.metrics for r in results if r.name.startswith(f"stage{number + 1}-"))


def _spec(
    run_dir: Path, plan: Mapping[str, Any], config: TrainConfig, name: str, model: str, teachers: tuple[Path, ...]
) -> PhaseSpec:
    """Return a phase; its student starts from the pretrained detector, not from its teacher, as its control does."""
    student = resolve_stage(config, model)
    peer = plan.get("peers", {}).get(model)
    started, defaults = start_student(run_dir, name, student, (), Path(peer) if peer else None, plan)
    return PhaseSpec(name, started, None, teachers, defaults)
