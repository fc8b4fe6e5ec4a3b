"""A stopped run goes on exactly: same losses, whatever the moment, in the right phase, with the right recipe."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_yolo.config import split_train_keys
from kd_yolo.errors import ConfigError, TeacherError
from kd_yolo.files import sha256
from kd_yolo.tasks.detect import KDTrainer
from kd_yolo.tasks.distilling import truncate_csv
from kd_yolo.tasks.run_folder import find_run
from kd_yolo.training import train


def losses(run_dir: Path, phase: str) -> list[list[str]]:
    rows = [line.split(",") for line in (run_dir / phase / "results.csv").read_text().splitlines()]
    return [[cell for i, cell in enumerate(row) if i != 1] for row in rows]  # column 1 is wall time


def start(keys: dict[str, Any]) -> Path:
    return train(*split_train_keys(keys)).run_dir


class PowerCutError(Exception):
    """A power cut in the middle of training."""


@pytest.mark.parametrize(
    ("batch", "nbs", "close_mosaic", "stop_epoch", "stop_batch"),
    [(8, 64, 0, 1, 1), (4, 20, 2, 2, 3), (4, 20, 3, 3, 0), (8, 8, 1, 1, 0)],
)
def test_train__resumed_losses_equal_uninterrupted(
    train_keys: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    nbs: int,
    close_mosaic: int,
    stop_epoch: int,
    stop_batch: int,
) -> None:
    """Covers accumulation across epochs, leftover gradients, and stops before, at and after mosaic closes."""
    keys = train_keys(teacher="none", epochs=4, batch=batch, nbs=nbs, close_mosaic=close_mosaic, seed=5)
    whole = start({**keys, "name": "whole"})

    original = KDTrainer.preprocess_batch

    def cut(self: KDTrainer, data: dict[str, Any]) -> dict[str, Any]:
        result = original(self, data)
        if self.epoch == stop_epoch and self._batch_in_epoch == stop_batch + 1:
            raise PowerCutError
        return result

    monkeypatch.setattr(KDTrainer, "preprocess_batch", cut)
    with pytest.raises(PowerCutError):
        start({**keys, "name": "cut"})
    monkeypatch.setattr(KDTrainer, "preprocess_batch", original)
    resumed = start({"data": "resumed", "resume": str(tmp_path / "cut")})
    assert losses(resumed, "student") == losses(whole, "student")


def test_train__resume_without_exact_state_differs(
    train_keys: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison can fail: Ultralytics' own resume continues from half-precision EMA weights."""
    keys = train_keys(teacher="none", epochs=3, seed=5)
    whole = start({**keys, "name": "whole"})

    def no_second_epoch(self: KDTrainer) -> None:
        if self.epoch == 1:
            raise PowerCutError

    monkeypatch.setattr(KDTrainer, "_refuse_broken_distillation", no_second_epoch)
    with pytest.raises(PowerCutError):
        start({**keys, "name": "cut"})
    monkeypatch.undo()
    for state in (tmp_path / "cut" / "student" / "weights").glob("resume-*.pt"):
        state.unlink()
    resumed = start({"data": "resumed", "resume": str(tmp_path / "cut")})
    assert losses(resumed, "student") != losses(whole, "student")


def test_train__resume_refuses_a_teacher_that_changed(
    train_keys: Callable[..., dict[str, Any]], tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tmp_path / "teacher.pt"
    shutil.copyfile(tiny_teacher, teacher)
    keys = train_keys(teacher=str(teacher), epochs=2, allow_weak_teacher=True)

    def no_second_epoch(self: KDTrainer) -> None:
        if self.epoch == 1:
            raise PowerCutError

    monkeypatch.setattr(KDTrainer, "_refuse_broken_distillation", no_second_epoch)
    with pytest.raises(PowerCutError):
        start({**keys, "name": "cut"})
    monkeypatch.undo()

    content = torch.load(teacher, weights_only=False)
    torch.save({**content, "date": "another day"}, teacher)  # as good a teacher, but another file
    for _ in range(2):  # the refusal must not make the new file the known one
        with pytest.raises(TeacherError, match=r"teacher\.pt: changed since this run began") as caught:
            start({"data": "resumed", "resume": str(tmp_path / "cut")})
        assert "\n" not in str(caught.value)
    shutil.copyfile(tiny_teacher, teacher)
    resumed = start({"data": "resumed", "resume": str(tmp_path / "cut")})
    assert len(losses(resumed, "student")) == 1 + 2


def test_train__stopped_before_its_result_was_recorded(train_keys: Callable[..., dict[str, Any]]) -> None:
    """All epochs are done: nothing is trained again, and the last validation gives the same figures."""
    run_dir = start(train_keys(teacher="none", epochs=1))
    done, trained = run_dir / "student" / "phase.json", losses(run_dir, "student")
    recorded = json.loads(done.read_text())
    for path in (done, run_dir / "report.json"):
        path.unlink()
    start({"data": "resumed", "resume": str(run_dir)})
    again = json.loads(done.read_text())
    assert again["fitness"] == pytest.approx(recorded["fitness"])
    assert again["best_sha256"] == sha256(run_dir / "student" / "weights" / "best.pt")
    assert losses(run_dir, "student") == trained


@pytest.mark.slow
def test_train__killed_ten_times_equals_uninterrupted(
    train_keys: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """kill -9 at ten random moments of a two-phase run (set-up, training, checkpoint writing, evaluation)."""
    keys = train_keys(teacher="self", epochs=4, close_mosaic=1, allow_weak_teacher=True, seed=2)
    whole = start({**keys, "name": "whole"})

    words = [f"{key}={value}" for key, value in {**keys, "name": "killed"}.items()]
    command = [sys.executable, "-m", "kd_yolo", "train"]
    moments = random.Random(0)
    run_dir = tmp_path / "killed"
    kills = 0
    for attempt in range(60):
        resuming = (run_dir / "run.yaml").is_file()
        given = [f"resume={run_dir}"] if resuming else words
        process = subprocess.Popen([*command, *given], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if kills < 10:
            wait_for_start(run_dir)
            time.sleep(moments.uniform(0.0, 1.2))
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        _, message = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, (attempt, message[-2000:])
    assert kills == 10 or (run_dir / "report.json").is_file()
    assert kills >= 5, "the run was too short to be killed often enough"
    for phase in ("teacher", "student"):
        assert losses(run_dir, phase) == losses(whole, phase)


def wait_for_start(run_dir: Path, timeout_s: float = 30.0) -> None:
    """Wait until the process has imported everything and touches the run folder."""
    before = newest(run_dir)
    end = time.time() + timeout_s
    while newest(run_dir) == before and time.time() < end:
        time.sleep(0.02)


def newest(folder: Path) -> float:
    times = [0.0]
    for path in folder.rglob("*"):
        try:
            times.append(path.stat().st_mtime)
        except FileNotFoundError:
            continue
    return max(times)


def test_find_run__nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no unfinished run"):
        find_run(True, {"project": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"no run\.yaml"):
        find_run(str(tmp_path), {})


def test_truncate_csv__drops_rows_of_unfinished_epochs(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("epoch,time\n1,0.5\n2,0.9\n3,1.4\n")
    truncate_csv(path, epochs_done=2)
    assert path.read_text() == "epoch,time\n1,0.5\n2,0.9\n"


def test_train__exist_ok_starts_afresh_over_an_unfinished_run(
    train_keys: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An overwritten run must not be taken for the new run's progress."""
    keys = train_keys(teacher="none", epochs=3, exist_ok=True)
    fresh = losses(start({**keys, "name": "fresh", "seed": 9}), "student")

    def no_second_epoch(self: KDTrainer) -> None:
        if self.epoch == 1:
            raise PowerCutError

    monkeypatch.setattr(KDTrainer, "_refuse_broken_distillation", no_second_epoch)
    with pytest.raises(PowerCutError):
        start({**keys, "seed": 1})
    monkeypatch.undo()
    assert losses(start({**keys, "seed": 9}), "student") == fresh
