"""The folder of a run: its name, and how a stopped one is found again. The same for every task."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_yolo.config import read_recipe
from kd_yolo.errors import ConfigError
from kd_yolo.files import check_writable, written_aside
from kd_yolo.resources import load_yaml

RUN_FILE = "run.yaml"
REPORT_FILE = "report.json"
PHASES = ("teacher", "direct", "student*", "stage*-*", "*.teacher-cache", "*.start.*")
"""Folders that hold the progress of a run."""


def find_run(resume: bool | str, stock: Mapping[str, Any], task: str = "detect") -> Path:
    """Return the run folder that ``resume`` means: a folder, a file inside one, or the latest unfinished run.

    Args:
        resume: The key as given.
        stock: Stock arguments, of which ``project`` and ``name`` are read.
        task: Only runs of this task are looked at.

    Raises:
        ConfigError: There is none, or the folder holds a run of another task.
    """
    if isinstance(resume, str):
        path = Path(resume).expanduser().resolve()
        for folder in (path, *path.parents[:3]):
            if (folder / RUN_FILE).is_file():
                if task_of(folder) != task:
                    raise ConfigError(f"resume={resume}: is a run of task={task_of(folder)}; leave task={task} out")
                return folder
        raise ConfigError(f"resume={resume}: no {RUN_FILE} there; give the folder of a run that kd-yolo train started")
    project = project_of(stock, task)
    named = [project / str(stock["name"])] if stock.get("name") else sorted(project.glob("*"), key=_modified)
    for folder in reversed(named):
        if (folder / RUN_FILE).is_file() and not (folder / REPORT_FILE).is_file() and task_of(folder) == task:
            return folder
    raise ConfigError(f"resume=true: no unfinished run in {project}; give resume=FOLDER or project=FOLDER")


def new_run_dir(stock: Mapping[str, Any], task: str = "detect", stale: Sequence[str] = PHASES) -> Path:
    """Create the folder of a new run: the next free name, or with ``exist_ok`` the name itself.

    Args:
        stock: Stock arguments, of which ``project``, ``name`` and ``exist_ok`` are read.
        task: For the default project, and so that no run of another task is overwritten.
        stale: Patterns of folders and files that an overwritten run must not hand on as progress.

    Raises:
        ConfigError: With ``exist_ok``, the folder holds a run of another task.
        OutputError: The folder cannot be written to.
    """
    project, name = project_of(stock, task), str(stock.get("name") or "train")
    run_dir, number = project / name, 2
    if stock.get("exist_ok"):
        if (run_dir / RUN_FILE).is_file():
            if task_of(run_dir) != task:
                raise ConfigError(f"{run_dir}: holds a run of task={task_of(run_dir)}; give another name=")
            _clear(run_dir, stale)
    else:
        while run_dir.exists():
            run_dir, number = project / f"{name}{number}", number + 1
    check_writable(run_dir)
    return run_dir


def publish(run_dir: Path, final: str) -> None:
    """Copy the final student's files to where an Ultralytics run has them, and its recipe beside them.

    Args:
        run_dir: The run's folder.
        final: The folder in it of the phase that trained the student.
    """
    source = run_dir / final
    for relative in ("weights/best.pt", "weights/last.pt", "results.csv", "results.png"):
        if (source / relative).is_file():
            with written_aside(run_dir / relative) as aside:
                shutil.copyfile(source / relative, aside)
    recipe = recipe_path(run_dir, final)
    if recipe.is_file() and read_recipe(recipe) is not None:
        with written_aside(run_dir / "recipe.yaml") as aside:
            shutil.copyfile(recipe, aside)


def recipe_path(run_dir: Path, phase: str) -> Path:
    """Return where a phase's recipe lies: beside its folder, which a multi-GPU launch clears."""
    return run_dir / f"{phase}.recipe.yaml"


def project_of(stock: Mapping[str, Any], task: str) -> Path:
    """Return the absolute folder of the runs."""
    return Path(str(stock.get("project") or f"runs/{task}")).expanduser().resolve()


def task_of(folder: Path) -> str:
    """Return the task of the run in a folder, as its ``run.yaml`` says."""
    return str(load_yaml(folder / RUN_FILE).get("task", "detect"))


def _clear(run_dir: Path, stale: Sequence[str]) -> None:
    for path in [found for pattern in stale for found in run_dir.glob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    (run_dir / REPORT_FILE).unlink(missing_ok=True)


def _modified(folder: Path) -> float:
    run_file = folder / RUN_FILE
    return run_file.stat().st_mtime if run_file.is_file() else 0.0
