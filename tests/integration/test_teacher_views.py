"""A teacher averaged over mirror images: the whole command, and bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kd_yolo.cli import main
from kd_yolo.config import split_train_keys
from kd_yolo.distill.teachers.mirrored import MirroredTeacher
from kd_yolo.training import train


def test_train__under_a_teacher_of_two_views(
    train_keys: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    taps = MirroredTeacher.taps

    def watch(self: MirroredTeacher, *given: Any, **named: Any) -> Any:
        asked.append(self.views)
        return taps(self, *given, **named)

    monkeypatch.setattr(MirroredTeacher, "taps", watch)
    keys = train_keys(teacher="self", teacher_views=2, epochs=1, pretrained=False, allow_weak_teacher=True)
    run_dir = train(*split_train_keys(keys)).run_dir
    assert set(asked) == {2}
    (recipe,) = run_dir.glob("student.recipe.yaml")
    assert yaml.safe_load(recipe.read_text())["teacher_views"] == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"teacher_views": 3}, "teacher_views=3 is not valid: Input should be 1, 2 or 4"),
        ({"teacher_views": 2, "teacher": "none"}, "teacher_views=2 has no effect without a teacher; drop it"),
        ({"teacher_views": 2, "method": "none"}, "teacher_views=2 has no effect without a teacher; drop it"),
        ({"teacher_views": 2, "method": "cwd"}, "teacher_views=2 has no effect: method 'cwd' reads the teacher's neck"),
    ],
)
def test_teacher_views__bad_input(
    train_keys: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    given: dict[str, Any],
    said: str,
) -> None:
    keys = train_keys(**{"teacher": "self", "epochs": 1, "pretrained": False, "name": "refused", **given})
    assert main(["train", *(f"{key}={value}" for key, value in keys.items())]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
