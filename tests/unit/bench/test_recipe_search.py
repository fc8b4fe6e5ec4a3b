"""The search behind the default recipe: its space, its stops and its resuming; trainings are stood in for."""

from __future__ import annotations

import csv
import json
import os
import signal
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from test_bench_scripts import FOLDER, load

from kd_yolo.compare.job import Job, JobResult
from kd_yolo.config import split_train_keys, stock_keys
from kd_yolo.tasks.preflight import resolve_method
from kd_yolo.tasks.stock_defaults import narrowed_defaults


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return load("recipe_search", monkeypatch)


@pytest.fixture
def keys(search: ModuleType, tmp_path: Path) -> dict[str, Any]:
    teacher = tmp_path / "teacher.pt"
    teacher.write_bytes(b"weights")
    given = {"teacher": str(teacher), "data": str(tmp_path / "data.yaml"), "trials": 7, "jobs": 1, "top": 2}
    return {**search.KEYS, **given}


def merit(arguments: dict[str, Any]) -> float:
    """What a stand-in training reaches: a higher balance is better, so is the cosine."""
    return 30.0 + float(arguments["balance"]) + 2.0 * bool(arguments["schedule.decay"] == "cosine")


def stand_in(monkeypatch: pytest.MonkeyPatch, search: ModuleType, epochs: int = 8, pause: float = 0.0) -> list[Job]:
    """Replace the training by one that writes its results at once, or one epoch a pause until it is told to stop."""
    jobs: list[Job] = []
    monkeypatch.setattr(search, "POLL_S", 0.01)

    def run(job: Job, wait: bool = True, stop: threading.Event | None = None) -> JobResult:
        jobs.append(job)
        value = merit(dict(job.arguments))
        (job.folder / "student").mkdir(parents=True, exist_ok=True)
        for done in range(1, epochs + 1):
            with (job.folder / "student" / "results.csv").open("w", newline="") as stream:
                rows = csv.writer(stream)
                rows.writerow(["epoch", "metrics/mAP50-95(B)"])
                rows.writerows([epoch, value / 100 * epoch / epochs] for epoch in range(1, done + 1))
            if stop is not None and stop.wait(pause):
                return JobResult(job.name, job.address, "stopped", {}, reason="stopped")
        return JobResult(job.name, job.address, "done", {}, {"metrics": {"mAP50-95": value / 100}})

    monkeypatch.setattr(search, "run_job", run)
    monkeypatch.setattr(search, "train", lambda jobs, workers: [run(job) for job in jobs])
    return jobs


def test_space__holds_arguments_of_train_and_starts_at_the_default(search: ModuleType, keys: dict[str, Any]) -> None:
    for key, values in search.SPACE.items():
        for value in values:
            job = search.job_of({**search.DEFAULT, key: value}, 0, keys, Path("runs"))
            split_train_keys(job.arguments)  # refuses what train does not know
    for change in search.FIRST:
        for key, value in change.items():
            assert value in search.SPACE[key]


def test_job__is_named_by_all_that_determines_it(search: ModuleType, keys: dict[str, Any], tmp_path: Path) -> None:
    recipes = [{**search.DEFAULT, **change} for change in search.FIRST]
    names = {search.job_of(recipe, seed, keys, tmp_path).name for recipe in recipes for seed in (0, 1)}
    assert len(names) == 2 * len(recipes)
    before = search.job_of(search.DEFAULT, 0, keys, tmp_path).name
    Path(keys["teacher"]).write_bytes(b"other weights")
    assert search.job_of(search.DEFAULT, 0, keys, tmp_path).name != before


def test_job__rates_are_those_that_the_automatic_choice_sets(search: ModuleType, keys: dict[str, Any]) -> None:
    arguments = search.job_of({**search.DEFAULT, "optimizer": "AdamW 0.002"}, 0, keys, Path("runs")).arguments
    # Ultralytics warms biases up from 0.1 unless told otherwise, which undoes an inherited start within an epoch
    assert (arguments["lr0"], arguments["momentum"], arguments["warmup_bias_lr"]) == (0.002, 0.9, 0.0)
    assert "lr0" not in search.job_of(search.DEFAULT, 0, keys, Path("runs")).arguments


def test_screen_and_confirm__the_best_wins(
    search: ModuleType, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = stand_in(monkeypatch, search)
    study = search.screen(keys, tmp_path, threading.Event())
    assert len(study.trials) == 7
    tried = [trial.params for trial in study.trials[: len(search.FIRST)]]
    assert tried == [{**search.DEFAULT, **change} for change in search.FIRST]
    chosen = search.confirm(study, keys, tmp_path)
    assert chosen[0]["mean"] == max(row["mean"] for row in chosen) == sum(chosen[0]["values"][1:]) / 2
    assert chosen[0]["recipe"] != search.DEFAULT
    assert [row["recipe"] for row in chosen].count(search.DEFAULT) == 1
    text = search.page(json.loads(json.dumps(search.summary(study, chosen, keys))))
    assert text.splitlines()[4].startswith(f"| {search.changed(chosen[0]['recipe'])} | ")
    assert "| default before |" in text
    assert {job.arguments["seed"] for job in jobs} == {search.SCREEN_SEED, *search.CONFIRM_SEEDS}


def test_confirm__a_gain_within_the_margin_leaves_the_default(
    search: ModuleType, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, search)
    study = search.screen(keys, tmp_path, threading.Event())
    monkeypatch.setattr(search, "MARGIN", 100.0)
    assert search.confirm(study, keys, tmp_path)[0]["recipe"] == search.DEFAULT


def test_screen__goes_on_after_an_interruption(
    search: ModuleType, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = stand_in(monkeypatch, search)
    study = search.screen({**keys, "trials": 3}, tmp_path, threading.Event())
    asked = study.ask(fixed_distributions=distributions(search))  # a trial whose process was killed
    search.screen(keys, tmp_path, threading.Event())
    again = [job.arguments for job in jobs[3:]]
    wanted = search.job_of(asked.params, search.SCREEN_SEED, keys, tmp_path).arguments
    assert wanted in again
    ended = [t for t in study.get_trials() if t.state in {TrialState.COMPLETE, TrialState.PRUNED}]
    assert len(ended) == 7
    assert [t.state for t in study.get_trials() if t.number == asked.number] == [TrialState.FAIL]


@pytest.mark.parametrize("jobs_at_once", [1, 2])
def test_main__ctrl_c_ends_the_trainings_and_the_next_call_resumes_them(
    search: ModuleType, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs_at_once: int
) -> None:
    jobs = stand_in(monkeypatch, search, pause=5.0)  # 40 s a run unless it is told to stop
    monkeypatch.setattr(search, "HERE", tmp_path)
    monkeypatch.setattr(search, "resolve_dataset", lambda name: tmp_path / "neu" / "data.yaml")
    words = [f"teacher={keys['teacher']}", f"out={tmp_path}", "trials=7", "top=1", f"jobs={jobs_at_once}"]
    monkeypatch.setattr("sys.argv", ["recipe_search.py", *words])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        began = time.monotonic()
        with pytest.raises(SystemExit, match="stopped; the same command goes on"):
            search.main()
        assert time.monotonic() - began < 10
        interrupted = {job.name for job in jobs}
        assert len(interrupted) == jobs_at_once
        again = stand_in(monkeypatch, search)
        search.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert interrupted <= {job.name for job in again}
    written = json.loads((tmp_path / "recipe_search.json").read_text())
    assert len(written["trials"]) == 7
    assert written["setting"]["data"] == "neu"
    assert written["winner"] == written["confirmed"][0]["recipe"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["epoch=8"], "unknown key 'epoch'; did you mean 'epochs'"),
        (["trials=abc"], "trials=abc: a whole number of at least 1 is needed"),
        (["teacher=/no/such.pt"], "teacher=/no/such.pt: no such file"),
        (["data=no-such-set", "teacher=TEACHER"], "no-such-set"),
    ],
)
def test_main__bad_input_is_one_line(
    search: ModuleType, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    given = [word.replace("TEACHER", keys["teacher"]) for word in words]
    monkeypatch.setattr("sys.argv", ["recipe_search.py", *given])
    with pytest.raises(SystemExit) as caught:
        search.main()
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_screen__another_setting_is_another_search(
    search: ModuleType, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = stand_in(monkeypatch, search)
    search.screen(keys, tmp_path, threading.Event())
    search.screen(keys, tmp_path, threading.Event())
    assert len(jobs) == 7
    search.screen({**keys, "imgsz": 160}, tmp_path, threading.Event())
    assert len(jobs) == 14


def test_screen__a_poor_run_is_stopped(
    search: ModuleType, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, search)
    study = search.screen({**keys, "trials": 6}, tmp_path, threading.Event())
    monkeypatch.setitem(globals(), "merit", lambda arguments: 3.0)
    stand_in(monkeypatch, search, pause=0.1)
    search.screen(keys, tmp_path, threading.Event())
    last = study.get_trials()[-1]
    assert last.state == TrialState.PRUNED
    assert 5 <= len(last.intermediate_values) < 8  # 0.6 of 8 epochs


def distributions(search: ModuleType) -> dict[str, Any]:
    return {key: optuna.distributions.CategoricalDistribution(values) for key, values in search.SPACE.items()}


def test_winner__is_what_is_shipped(search: ModuleType) -> None:
    """The winner of the committed search is the default: of the method's YAML and of ``cfg/train/default.yaml``."""
    winner = json.loads((FOLDER / "recipe_search.json").read_text(encoding="utf-8"))["winner"]
    assert set(winner) == set(search.SPACE)
    config, stock, groups = split_train_keys({"data": "neu", "teacher": "x.pt"})
    method = resolve_method(config, groups, stock)
    shipped = {"balance": method["balance"], "schedule.decay": method["schedule"]["decay"]}
    shipped |= {f"kd.{key}": value for key, value in method["args"].items()}
    shipped |= {**stock_keys(), **narrowed_defaults()}
    if shipped["kd.one2one"] is None:  # where both detectors have that head, which they had in the search
        shipped["kd.one2one"] = True
    assert {key: shipped[key] for key in winner} == winner
