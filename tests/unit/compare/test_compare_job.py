"""One run: done once, taken up, retried, stopped, accepted from elsewhere; its cost and its reason for failing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from compare_factory import make_job, starts, train_with

from kd_yolo.compare import job as job_module
from kd_yolo.compare.job import Job, run_job, train_command
from kd_yolo.compare.outcome import finished, why_failed
from kd_yolo.config import parse_pairs, split_train_keys

BUSY_WORK = "sum(i * i for i in range(3_000_000));b = bytearray(60_000_000)"


def test_run_job__trains_once_and_records_its_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_with(monkeypatch, BUSY_WORK)
    job = make_job(tmp_path, threads=3)
    first, second = run_job(job), run_job(job)
    assert (first.status, first.fresh) == ("done", True)
    assert (second.status, second.fresh) == ("done", False)
    assert len(starts(job)) == 1
    assert starts(job)[0][1] == "3"
    assert first.record == second.record == finished(job.folder, job.address)
    assert first.record["metrics"] == {"mAP50-95": 0.25, "mAP50": 0.5}
    cost = first.record["cost"]
    assert 0.05 < cost["cpu_s"] <= cost["wall_s"] + 0.2
    assert cost["peak_rss_mb"] > 60  # the kernel counts the moment before exec too, so a large parent shows
    assert cost["gpu_s"] == 0
    assert cost["step_ms"] == 1000.0  # 4 s an epoch after the first, 32 images in batches of 8
    assert (cost["attempts"], cost["complete"]) == (1, True)
    assert not list(job.folder.glob("claim*"))
    assert "started" in job.log.read_text()


def test_run_job__gpu_seconds_are_those_that_a_gpu_was_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_with(monkeypatch)
    job = make_job(tmp_path)
    on_gpu = Job(**{**job.__dict__, "arguments": {**job.arguments, "device": 0}, "gpus": 1})
    cost = run_job(on_gpu).record["cost"]
    assert cost["gpu_s"] == cost["wall_s"] > 0


def test_run_job__crash_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_with(
        monkeypatch,
        "started = (folder / 'started.txt').read_text();started.count('\\n') == 1 and os.kill(os.getpid(), 9)",
    )
    job = make_job(tmp_path)
    result = run_job(job)
    assert result.status == "done"
    assert len(starts(job)) == 2
    assert result.record["cost"]["attempts"] == 2


@pytest.mark.parametrize(("actions", "times", "reason"), [
    ("print('kd-yolo: data=x: not found', file=sys.stderr);sys.exit(2)", 1, "data=x: not found (exit status 2)"),
    ("raise ValueError('no good')", 2, "ValueError: no good (exit status 1)"),
    ("os.kill(os.getpid(), 9)", 2, "ended by signal 9, as for want of memory"),
])  # fmt: skip
def test_run_job__failure_is_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, actions: str, times: int, reason: str
) -> None:
    train_with(monkeypatch, actions)
    job = make_job(tmp_path)
    result = run_job(job)
    assert (result.status, result.reason) == ("failed", reason)
    assert result.log == str(job.log)
    assert len(starts(job)) == times
    assert not (job.folder / "result.json").exists()
    train_with(monkeypatch)
    assert run_job(job).status == "done"  # the same command tries again


def test_run_job__stop_ends_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_with(monkeypatch, "time.sleep(120)")
    job, stop = make_job(tmp_path), threading.Event()
    timer = threading.Timer(1.0, stop.set)
    timer.start()
    began = time.monotonic()
    result = run_job(job, stop=stop)
    assert result.status == "stopped"
    assert time.monotonic() - began < 15
    assert not psutil.pid_exists(int(starts(job)[0][0]))
    train_with(monkeypatch)
    assert run_job(job).status == "done"


def test_run_job__busy_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_with(monkeypatch, "time.sleep(2)")
    job = make_job(tmp_path)
    results = []
    other = threading.Thread(target=lambda: results.append(run_job(job)))
    other.start()
    while not starts(job):
        time.sleep(0.02)
    assert run_job(job, wait=False).status == "busy"
    waited = run_job(job)
    other.join()
    assert [waited.status, results[0].status] == ["done", "done"]
    assert len(starts(job)) == 1
    assert [waited.fresh, results[0].fresh] == [False, True]


def test_run_job__takes_the_result_of_an_orphan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watcher is killed with SIGKILL, its training goes on: the next caller waits for it and starts nothing."""
    train_with(monkeypatch, "time.sleep(3)")
    job = make_job(tmp_path)
    watcher = os.fork()
    if watcher == 0:  # pragma: no cover - the other process
        run_job(job)
        os._exit(0)
    while not (job.folder / "claim.json").is_file() or "child" not in (job.folder / "claim.json").read_text():
        time.sleep(0.02)
    while not starts(job):
        time.sleep(0.02)
    os.kill(watcher, signal.SIGKILL)
    os.waitpid(watcher, 0)
    result = run_job(job)
    assert (result.status, result.fresh) == ("done", False)
    assert len(starts(job)) == 1
    assert result.record["cost"]["complete"] is False  # nobody was there to read the figures


def test_run_job__accepts_a_run_put_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_with(monkeypatch)
    job = make_job(tmp_path)
    run_job(job)
    for name in ("result.json", "attempts.json"):
        (job.folder / name).unlink()
    versions = {"versions": {"kd_yolo": "9"}}
    (job.folder / "weights" / "best-deploy.json").write_text(json.dumps(versions))
    result = run_job(job)
    assert (result.status, result.fresh) == ("done", False)
    assert len(starts(job)) == 1
    cost = result.record["cost"]
    assert (cost["wall_s"], cost["cpu_s"], cost["peak_rss_mb"]) == (18.0, None, None)
    assert result.record["versions"] == {"kd_yolo": "9"}


@pytest.mark.parametrize(("text", "said"), [
    ("stock: {seed: 7, epochs: 2, batch: 8, imgsz: 64}\nmethod: {name: none}\n", "trained with seed=7, not 0"),
    ("stock: {seed: 0, epochs: 9, batch: 8, imgsz: 64}\nmethod: {name: none}\n", "trained with epochs=9, not 2"),
    ("stock: {seed: 0, epochs: 2, batch: 8, imgsz: 64}\nmethod: {name: cwd}\n", "trained with method=cwd, not none"),
])  # fmt: skip
def test_run_job__another_run_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    train_with(monkeypatch)
    job = make_job(tmp_path)
    run_job(job)
    (job.folder / "result.json").unlink()
    (job.folder / "run.yaml").write_text(text)
    result = run_job(job)
    assert result.status == "failed"
    assert said in result.reason


@pytest.mark.parametrize("damage", ["result", "address", "weights"])
def test_finished__what_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    train_with(monkeypatch)
    job = make_job(tmp_path)
    run_job(job)
    assert finished(job.folder, job.address) is not None
    if damage == "result":
        (job.folder / "result.json").write_text('{"address": "addr')
    elif damage == "weights":
        shutil.rmtree(job.folder / "weights")
    assert finished(job.folder, "other" if damage == "address" else job.address) is None


def test_run_job__run_without_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_with(monkeypatch, "sys.exit(0)")
    result = run_job(make_job(tmp_path))
    assert result.status == "failed"
    assert "ended without a result" in result.reason


def test_train_command__is_what_train_reads(tmp_path: Path) -> None:
    arguments = {"data": "neu", "model": "lightnet-n", "teacher": "none", "method": "none", "pretrained": False}
    arguments |= {"epochs": 2, "lr0": 1e-5, "classes": [0, 2], "cache": "ram", "seed": 0, "plots": False, "batch": 8}
    job = Job("a", "b", tmp_path / "a", arguments)
    config, stock, _ = split_train_keys(parse_pairs(train_command(job)[4:]))
    assert (config.model, config.method, config.teacher, config.pretrained) == ("lightnet-n", "none", "none", False)
    assert {key: stock[key] for key in ("epochs", "lr0", "classes", "cache", "seed", "plots", "batch")} == {
        key: arguments[key] for key in ("epochs", "lr0", "classes", "cache", "seed", "plots", "batch")
    }
    assert (stock["project"], stock["name"], stock["exist_ok"]) == (str(tmp_path), "a", True)
    job.folder.mkdir()
    (job.folder / "run.yaml").write_text("")
    assert train_command(job)[4:] == [f"resume={job.folder}"]


def test_why_failed__only_the_last_attempt_speaks(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("$ one\nValueError: old\n$ two\n\x1b[34mepoch 1\x1b[0m\nRuntimeError: new\n")
    assert why_failed(log, 1) == "RuntimeError: new (exit status 1)"
    log.write_text("$ one\nValueError: old\n$ two\nnothing\n")
    assert why_failed(log, 1) == "exit status 1"
    assert why_failed(tmp_path / "none.log", 3) == "exit status 3"


def test_run_job__folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file")
    result = run_job(make_job(tmp_path))
    assert result.status == "failed"
    assert "another project=" in result.reason


def test_module__is_light() -> None:
    """Importing the job module on a cluster's worker must not import PyTorch."""
    import subprocess
    import sys

    code = f"import sys, {job_module.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
