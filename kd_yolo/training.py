"""One training command, one straight line: plan the phases, run each, resume at any point, finish with artifacts.

A run folder holds ``run.yaml`` (everything the user asked for), one folder a phase (``teacher``, ``student``,
``student-2``, ...), each laid out as Ultralytics does, and at the end ``weights/best.pt`` and ``results.csv`` of the
final student where every Ultralytics user looks for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ultralytics.utils import LOGGER

from kd_yolo.config import TrainConfig, validate
from kd_yolo.data.datasets import resolve_dataset
from kd_yolo.errors import ConfigError, KDYoloError
from kd_yolo.files import absolute, write_json, write_text
from kd_yolo.nn.student import StudentSpec
from kd_yolo.resources import load_yaml
from kd_yolo.tasks.chain import chain_of, chain_peers, check_chain, resolve_stage, run_chain
from kd_yolo.tasks.peer import pretrained_peer
from kd_yolo.tasks.phases import PhaseResult, PhaseSpec, finished_phase, run_phase
from kd_yolo.tasks.preflight import (
    check_own_teacher,
    check_teacher,
    check_training_inputs,
    resolve_method,
    resolve_student,
    teacher_files,
)
from kd_yolo.tasks.run_folder import RUN_FILE, find_run, new_run_dir, publish
from kd_yolo.tasks.start import check_start, own_teacher, say_own_teacher, start_student
from kd_yolo.tasks.stock_defaults import finetuned_defaults
from kd_yolo.tasks.unlabeled import check_unlabeled

FILES = ("model", "pretrained", "teacher_model")  # keys that may name a file


@dataclass(frozen=True)
class TrainReport:
    """What a training run leaves.

    Attributes:
        run_dir: The run folder.
        best: Checkpoint of the final student, training form.
        phases: Results by phase, in the order they ran.
        artifacts: Deployed and exported files by kind.
        benchmark: Rows of the closing benchmark, if one ran.
    """

    run_dir: Path
    best: Path
    phases: list[PhaseResult]
    artifacts: dict[str, str] = field(default_factory=dict)
    benchmark: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "run_dir": str(self.run_dir),
            "best": str(self.best),
            "phases": [asdict(phase) for phase in self.phases],
            "artifacts": self.artifacts,
            "benchmark": self.benchmark,
        }


def train(config: TrainConfig, stock: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]]) -> TrainReport:
    """Run or resume a training command.

    Args:
        config: Our keys.
        stock: Stock training arguments.
        groups: Dotted keys: ``kd`` (method arguments) and ``schedule``.

    Raises:
        KDYoloError: Anything wrong with the input, before anything is trained.
    """
    if config.resume is not False:
        run_dir, plan = _resumed(config, stock, groups)
    else:
        run_dir, plan = _started(config, stock, groups)
    phases = _run_phases(run_dir, plan)
    final = phases[-1]
    publish(run_dir, final.name)
    report = TrainReport(run_dir, run_dir / "weights" / "best.pt", phases)
    return _finish(report, plan)


def _started(
    config: TrainConfig, stock: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]]
) -> tuple[Path, dict[str, Any]]:
    """Check every input, create the run folder and write the plan."""
    method = resolve_method(config, groups, stock)
    data = resolve_dataset(config.data)
    stages = chain_of(config)
    student = resolve_stage(config, stages[-1]) if stages else resolve_student(config)
    checked = check_training_inputs(config, stock, data, student)
    unlabeled = check_unlabeled(config, dict(stock))
    peer = None if stages else pretrained_peer(config, student, teacher_files(config))
    if stages:
        check_chain(config, stages, data, checked["imgsz"], method)
    elif config.teacher == "self" and method["name"] != "none":
        check_own_teacher(method, student, own_teacher(config, peer), data, config, checked["imgsz"])
    elif config.teacher not in {"self", "none"}:
        check_teacher(config, data, checked["imgsz"], student, method=method)
    peers = chain_peers(config, stages, data, stock)
    if not stages:
        check_start(config, student, teacher_files(config), peer, data, stock)
    run_dir = new_run_dir(stock)
    stock_arguments = {k: v for k, v in stock.items() if k not in {"project", "name", "exist_ok"}}
    plan = {
        "kd_yolo_run": 1,
        # absolute paths: the run may be resumed from another folder
        "config": {
            **config.model_dump(),
            "data": str(data),
            "teacher": ",".join(map(str, teacher_files(config))) or config.teacher,
            **{key: absolute(value) for key in FILES if isinstance(value := getattr(config, key), str)},
            "chain": ",".join(map(absolute, stages)) or None,
            "cache_dir": str(Path(config.cache_dir).expanduser().resolve()) if config.cache_dir else None,
            "unlabeled": str(unlabeled) if unlabeled else None,
            "resume": False,
        },
        "stock": {**stock_arguments, "imgsz": checked["imgsz"]},
        "method": method,
        "peer": str(peer) if peer else None,
        "peers": {absolute(name): file for name, file in peers.items()},
    }
    write_text(run_dir / RUN_FILE, yaml.safe_dump(plan, sort_keys=False))
    return run_dir, plan


def _resumed(
    config: TrainConfig, stock: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]]
) -> tuple[Path, dict[str, Any]]:
    """Find the run and read its plan; what else was given would be ignored, so it is refused."""
    given = [*(config.model_fields_set - {"resume", "data"}), *(set(stock) - {"project", "name"})]
    given += [f"{group}.{key}" for group, keys in groups.items() for key in keys]
    if given:
        raise ConfigError(f"{sorted(given)[0]}: a resumed run keeps its own settings; drop it, or start a new run")
    run_dir = find_run(config.resume, stock)
    plan = load_yaml(run_dir / RUN_FILE)
    if plan.get("kd_yolo_run") != 1:
        raise ConfigError(f"{run_dir / RUN_FILE}: not a kd-yolo run; give resume=FOLDER of one")
    validate(TrainConfig, plan["config"], where=str(run_dir / RUN_FILE))
    LOGGER.info(f"Resuming {run_dir}")
    return run_dir, plan


def _run_phases(run_dir: Path, plan: Mapping[str, Any]) -> list[PhaseResult]:
    config = TrainConfig.model_validate(plan["config"])
    if stages := chain_of(config):
        return run_chain(run_dir, plan, config, stages)
    student = resolve_student(config)
    peer = Path(plan["peer"]) if plan.get("peer") else None
    results: list[PhaseResult] = []
    teachers: tuple[Path, ...] = ()
    if config.teacher == "self" and plan["method"]["name"] != "none":
        results.append(_own_teacher_phase(run_dir, plan, config, student, peer))
        teachers = (run_dir / "teacher" / "weights" / "best.pt",)
        check_teacher(config, Path(config.data), plan["stock"]["imgsz"], student, teachers[0], results[-1].metrics)
    elif config.teacher not in {"self", "none"}:
        teachers = teacher_files(config)
    student, defaults = start_student(run_dir, "student", student, teachers, peer, plan)
    best: PhaseResult | None = None
    for generation in range(1, config.generations + 1):
        name = "student" if generation == 1 else f"student-{generation}"
        spec = PhaseSpec(name, student, None, teachers, defaults)
        result = run_phase(run_dir, spec, plan)
        results.append(result)
        if best is not None and result.fitness <= best.fitness:
            LOGGER.info(f"{name} did not improve on {best.name} ({result.fitness:.4f} <= {best.fitness:.4f}); stopping")
            break
        best = result
        teachers = (run_dir / name / "weights" / "best.pt",)
    assert best is not None
    if results[-1] is not best:
        results.append(results.pop(results.index(best)))  # the last one is the one that is kept
    return results


def _own_teacher_phase(
    run_dir: Path, plan: Mapping[str, Any], config: TrainConfig, student: StudentSpec, peer: Path | None
) -> PhaseResult:
    """Train ``teacher=self``, or return what is recorded of it: then what it was made from may be gone."""
    if recorded := finished_phase(run_dir, "teacher"):
        return recorded
    own = own_teacher(config, peer)
    say_own_teacher(config, own, student, peer)
    defaults = finetuned_defaults(own, Path(config.data), is_teacher=True, classes=plan["stock"].get("classes"))
    spec = PhaseSpec("teacher", own, config.teacher_epochs, (), defaults)
    imgsz = config.teacher_imgsz or plan["stock"]["imgsz"]
    return run_phase(run_dir, spec, {**plan, "stock": {**plan["stock"], "imgsz": imgsz}})


def _finish(report: TrainReport, plan: Mapping[str, Any]) -> TrainReport:
    """Deploy, export and time the final student; a failure here never loses the training."""
    from kd_yolo.deploy import deploy

    config = TrainConfig.model_validate(plan["config"])
    deployed = deploy(report.best, trust=config.trust)
    report.artifacts["deployed"] = str(deployed.path)
    imgsz = int(plan["stock"]["imgsz"])
    try:
        if config.export == "onnx":
            from kd_yolo.export import export

            made = export(report.best, format="onnx", imgsz=imgsz, data=config.data, trust=config.trust)
            report.artifacts["onnx"] = str(made.path)
        if config.benchmark:
            from kd_yolo.bench import benchmark

            files, out = list(report.artifacts.values()), report.run_dir / "benchmark"
            rows = benchmark(files, imgsz=imgsz, data=config.data, out=out)
            LOGGER.info("\n" + rows.to_markdown())
            report = TrainReport(report.run_dir, report.best, report.phases, report.artifacts, rows.to_dict())
    except KDYoloError as error:
        LOGGER.warning(f"training is complete ({report.best}), but: {error}")
    write_json(report.run_dir / "report.json", report.to_dict())
    return report
