"""One training command of classifiers: plan the phases, run each, resume at any point, finish with artifacts.

A run folder holds ``run.yaml`` (everything the user asked for), one folder a phase (``student``; or the stages of a
chain and ``direct``), each laid out as Ultralytics does, and at the end ``weights/best.pt`` and ``results.csv`` of the
final student where every Ultralytics user looks for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ultralytics.utils import LOGGER

from kd_yolo.classify.chain import chain_of, check_chain, is_ready_teacher, run_chain
from kd_yolo.classify.data import resolve_class_data
from kd_yolo.classify.deploy import deploy_classifier
from kd_yolo.classify.folder import read_class_folder
from kd_yolo.classify.phases import ClassifyPhase, run_phase
from kd_yolo.classify.preflight import check_stock, check_teacher, device_of
from kd_yolo.classify.settings import ClassifyConfig, resolve_method
from kd_yolo.classify.student import resolve_classifier
from kd_yolo.config import validate
from kd_yolo.data.signals import train_defaults
from kd_yolo.errors import ConfigError
from kd_yolo.files import absolute, write_json, write_text
from kd_yolo.resources import load_yaml
from kd_yolo.tasks.run_folder import RUN_FILE, find_run, new_run_dir, publish

RESUMED = "resumed"
"""What stands for ``data`` where a run is resumed."""


@dataclass(frozen=True)
class ClassifyReport:
    """What a classification run leaves.

    Attributes:
        run_dir: The run folder.
        best: Checkpoint of the final student, training form.
        phases: Results by phase, in the order they ran, the final student at the end.
        artifacts: Deployed files by kind.
    """

    run_dir: Path
    best: Path
    phases: list[ClassifyPhase]
    artifacts: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "task": "classify",
            "run_dir": str(self.run_dir),
            "best": str(self.best),
            "phases": [asdict(phase) for phase in self.phases],
            "artifacts": self.artifacts,
        }

    def to_text(self) -> str:
        """Return what people want to know first."""
        lines = [f"{phase.name}: top-1 {phase.top1:.4f}, top-5 {phase.top5:.4f}" for phase in self.phases]
        files = [f"{kind}: {path}" for kind, path in self.artifacts.items()]
        return "\n".join(["", *lines, f"best student: {self.best}", *files])


def train_classify(
    config: ClassifyConfig, stock: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]]
) -> ClassifyReport:
    """Run or resume a classification training command.

    Args:
        config: Our keys.
        stock: Stock training arguments.
        groups: Dotted keys: ``kd`` (method arguments) and ``schedule``.

    Raises:
        KDYoloError: Anything wrong with the input, before anything is trained.
    """
    run_dir, plan = (_resumed if config.resume is not False else _started)(config, stock, groups)
    config = ClassifyConfig.model_validate(plan["config"])
    names = read_class_folder(Path(config.data)).names
    if stages := chain_of(config):
        phases = run_chain(run_dir, plan, config, stages, names)
    else:
        teacher = None if config.teacher == "none" else Path(config.teacher)
        phases = [run_phase(run_dir, "student", resolve_classifier(config), teacher, plan)]
    publish(run_dir, phases[-1].name)
    best = run_dir / "weights" / "best.pt"
    deployed = deploy_classifier(best, trust=config.trust)
    report = ClassifyReport(run_dir, best, phases, {"deployed": str(deployed.path)})
    write_json(run_dir / "report.json", report.to_dict())
    return report


def _started(
    config: ClassifyConfig, stock: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]]
) -> tuple[Path, dict[str, Any]]:
    """Check every input, create the run folder and write the plan."""
    method = resolve_method(config, groups, stock)
    data = resolve_class_data(config.data)
    folder = read_class_folder(data, check_images=True)
    arguments = check_stock({**train_defaults(data), **stock}, folder)
    stages = chain_of(config)
    teacher = config.teacher
    if stages:
        check_chain(config, stages, folder.names)
    else:
        resolve_classifier(config)
    given = stages[0] if stages and is_ready_teacher(stages[0], folder.names, config.trust) else teacher
    if given != "none":
        path = Path(given).expanduser().resolve()
        check_teacher(config, path, data, arguments["imgsz"], device=device_of(arguments))
        teacher = "none" if stages else str(path)
    run_dir = new_run_dir(stock, "classify")
    plan = {
        "kd_yolo_run": 1,
        "task": "classify",
        # absolute paths: the run may be resumed from another folder
        "config": {**_absolute(config), "data": str(data), "teacher": teacher, "resume": False},
        "stock": {k: v for k, v in arguments.items() if k not in {"project", "name", "exist_ok"}},
        "method": method,
    }
    write_text(run_dir / RUN_FILE, yaml.safe_dump(plan, sort_keys=False))
    return run_dir, plan


def _absolute(config: ClassifyConfig) -> dict[str, Any]:
    """Return the keys with the paths of models and warm start absolute."""
    values = config.model_dump()
    values["model"] = absolute(config.model)
    if isinstance(config.pretrained, str):
        values["pretrained"] = absolute(config.pretrained)
    if config.chain is not None:
        values["chain"] = [absolute(name) for name in chain_of(config)]
    if values["method"] is not None:
        values["method"] = absolute(values["method"])
    return values


def _resumed(
    config: ClassifyConfig, stock: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]]
) -> tuple[Path, dict[str, Any]]:
    """Find the run and read its plan; what else was given would be ignored, so it is refused."""
    given = [*(config.model_fields_set - {"resume", "data", "allow_weak_teacher"}), *(set(stock) - {"project", "name"})]
    given += ["data"] if config.data != RESUMED else []
    given += [f"{group}.{key}" for group, keys in groups.items() for key in keys]
    if given:
        raise ConfigError(f"{sorted(given)[0]}: a resumed run keeps its own settings; drop it, or start a new run")
    run_dir = find_run(config.resume, stock, "classify")
    plan = load_yaml(run_dir / RUN_FILE)
    if plan.get("kd_yolo_run") != 1 or plan.get("task") != "classify":
        raise ConfigError(f"{run_dir / RUN_FILE}: not a classification run of kd-yolo; give resume=FOLDER of one")
    validate(ClassifyConfig, plan["config"], where=str(run_dir / RUN_FILE))
    if config.allow_weak_teacher and not plan["config"]["allow_weak_teacher"]:  # what a weak assistant asks for
        plan["config"]["allow_weak_teacher"] = True
        write_text(run_dir / RUN_FILE, yaml.safe_dump(plan, sort_keys=False))
    LOGGER.info(f"Resuming {run_dir}")
    return run_dir, plan
