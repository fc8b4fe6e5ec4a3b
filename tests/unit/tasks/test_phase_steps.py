"""The steps of a phase that all tasks share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kd_yolo.config import Recipe
from kd_yolo.files import sha256
from kd_yolo.tasks.exact_resume import state_path
from kd_yolo.tasks.phase_steps import plain_metrics, stage_of, teacher_hashes
from kd_yolo.tasks.run_folder import recipe_path


def begin(run_dir: Path, name: str) -> Path:
    last = run_dir / name / "weights" / "last.pt"
    last.parent.mkdir(parents=True)
    last.touch()
    return last


@pytest.mark.parametrize("count", [1, 2])
def test_teacher_hashes__are_those_of_the_beginning(tmp_path: Path, count: int) -> None:
    teachers = [tmp_path / f"teacher-{number}.pt" for number in range(count)]
    for number, path in enumerate(teachers):
        path.write_bytes(bytes([number]))
    old = teacher_hashes(tmp_path, "student", teachers)
    assert old == [sha256(path) for path in teachers]
    paths = [str(path) for path in teachers]
    recipe = Recipe(
        teacher=paths if count > 1 else paths[0], teacher_sha256=old if count > 1 else old[0], method="kd-lightnet"
    )
    recipe_path(tmp_path, "student").write_text(yaml.safe_dump(recipe.model_dump()))
    teachers[-1].write_bytes(b"changed")
    new = [sha256(path) for path in teachers]
    assert new != old
    assert teacher_hashes(tmp_path, "student", teachers) == new  # nothing was trained with the old one
    begin(tmp_path, "student")
    assert teacher_hashes(tmp_path, "student", teachers) == old
    assert teacher_hashes(tmp_path, "student-2", teachers) == new  # another phase


@pytest.mark.parametrize(
    ("epoch", "finished", "expected"),
    [(0, None, "running"), (1, False, "running"), (1, True, "trained"), (2, None, "trained"), (-1, None, "trained")],
)
def test_stage_of__last_checkpoint_says(tmp_path: Path, epoch: int, finished: bool | None, expected: str) -> None:
    """Three epochs are planned; early stopping finishes a run before; -1 is a stripped checkpoint."""

    def load(path: Path, trust: bool) -> tuple[None, dict[str, Any]]:
        assert trust
        return None, {"epoch": epoch, "train_args": {"epochs": 3}}

    last = tmp_path / "student" / "weights" / "last.pt"
    assert stage_of(last, load, trust=True) == "fresh"
    begin(tmp_path, "student")
    if finished is not None:
        torch.save({"finished": finished}, state_path(last.parent, epoch))
    assert stage_of(last, load, trust=True) == expected


def test_plain_metrics__keeps_single_numbers() -> None:
    given = {"fitness": torch.tensor([0.5]), "metrics/a": 1, "val/loss": 2.0, "curve": [1.0], "map": torch.zeros(2)}
    assert plain_metrics(given) == {"fitness": 0.5, "metrics/a": 1.0}
