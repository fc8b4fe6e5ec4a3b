"""What differs between tasks in a comparison: which figures a run leaves, and what they are called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

TaskName = Literal["detect", "classify"]


@dataclass(frozen=True)
class CompareTask:
    """One task.

    Attributes:
        name: ``detect`` or ``classify``.
        figures: Short names of what a run leaves, by Ultralytics' names.
        shown: The two that reports show, the default metric first.
        students: Keys of ``kd-yolo train`` that every run gets.
        teachers: Keys of it that mean something only where there is a teacher.
    """

    name: TaskName
    figures: Mapping[str, str]
    shown: tuple[str, str]
    students: tuple[str, ...]
    teachers: tuple[str, ...]


DETECT = CompareTask(
    "detect",
    {
        "mAP50-95": "metrics/mAP50-95(B)",
        "mAP50": "metrics/mAP50(B)",
        "precision": "metrics/precision(B)",
        "recall": "metrics/recall(B)",
    },
    ("mAP50-95", "mAP50"),
    ("reparam", "trust"),
    (
        "teacher_merge",
        "teacher_imgsz",
        "teacher_levels",
        "teacher_views",
        "unlabeled",
        "unlabeled_ratio",
        "pseudo",
        "pseudo_conf",
        "pseudo_weight",
        "cache_teacher",
        "cache_gb",
        "cache_dir",
        "balance",
        "allow_weak_teacher",
        "allow_other_canvas",
    ),
)
CLASSIFY = CompareTask(
    "classify",
    {"top1": "metrics/accuracy_top1", "top5": "metrics/accuracy_top5"},
    ("top1", "top5"),
    ("reparam", "trust"),
    ("allow_weak_teacher",),
)
TASKS = {task.name: task for task in (DETECT, CLASSIFY)}


def task_of_arguments(arguments: Mapping[str, Any]) -> CompareTask:
    """Return the task of a run by its keys of ``kd-yolo train``."""
    return TASKS[arguments.get("task", "detect")]


def task_of_figures(names: Iterable[str]) -> CompareTask:
    """Return the task that leaves figures of these names; detection when nothing says otherwise."""
    return CLASSIFY if "top1" in set(names) else DETECT
