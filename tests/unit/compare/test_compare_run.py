"""A whole comparison with a stand-in for training: waves, failures, the test split, trackers."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kd_yolo.bench.accuracy import Accuracy
from kd_yolo.compare import cells as cells_module
from kd_yolo.compare import final, local, run, teachers, tracking
from kd_yolo.compare.job import Job, JobResult
from kd_yolo.compare.outcome import finished
from kd_yolo.compare.report import CompareReport
from kd_yolo.compare.run import Progress, compare, duration
from kd_yolo.compare.settings import split_compare_keys
from kd_yolo.data.synthetic import make_steel_synth
from kd_yolo.errors import ConfigError, TeacherError
from kd_yolo.nn.student import StudentSpec

GAINS = {"none": 0.0, "score-l2": 0.02, "kd-lightnet": 0.01}
Compare = Callable[..., CompareReport]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_steel_synth(tmp_path_factory.mktemp("compare") / "steel", train=8, val=4, test=4, seed=3)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace training; return the names of the runs in the order they are asked for."""
    asked: list[str] = []

    def fake(job: Job, wait: bool = True, stop: threading.Event | None = None) -> JobResult:
        asked.append(job.name)
        labels = dict(job.labels)
        if labels["method"] in FAILING:
            return JobResult(job.name, job.address, "failed", labels, {}, "it broke", str(job.log))
        kept = finished(job.folder, job.address)
        if kept is not None:
            return JobResult(job.name, job.address, "done", labels, kept)
        value = 0.30 + GAINS[labels["method"]] + 0.01 * labels["seed"] + 0.0001 * len(job.name)
        cost = {"wall_s": 36.0, "cpu_s": 30.0, "gpu_s": 0.0, "peak_rss_mb": 500.0, "step_ms": 9.0, "complete": True}
        record = {"address": job.address, "name": job.name, **labels, "cost": cost, "versions": {"kd_yolo": "1"}}
        record |= {"metrics": {"mAP50-95": value, "mAP50": 2 * value}, "test": None}
        record |= {"machine": {"cpu": "CPU", "cores": 2, "threads": job.threads}}
        job.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        job.checkpoint.write_bytes(b"x")
        (job.folder / "result.json").write_text(json.dumps(record))
        return JobResult(job.name, job.address, "done", labels, record, fresh=True)

    FAILING.clear()
    monkeypatch.setattr(local, "run_job", fake)
    monkeypatch.setattr(
        cells_module, "resolve_student", lambda config: StudentSpec(config.model, {"name": config.model}, None, 32)
    )
    monkeypatch.setattr(cells_module, "check_training_inputs", lambda *given: {})
    monkeypatch.setattr(teachers, "check_teacher", lambda *given, **more: None)
    monkeypatch.setattr(teachers, "judge", lambda *given: Accuracy(0.6, 0.4, 4, "val"))
    return asked


FAILING: set[str] = set()


@pytest.fixture
def go(data: Path, trained: list[str], tmp_path: Path) -> Compare:
    teacher = tmp_path / "t.pt"
    teacher.write_bytes(b"t")

    def call(**given: Any) -> CompareReport:
        base = {"data": str(data), "students": "lightnet-n", "methods": "none,score-l2,kd-lightnet", "epochs": 2}
        base |= {"teacher": str(teacher), "seeds": "0,1,2", "imgsz": 64, "device": "cpu", "project": str(tmp_path)}
        return compare(*split_compare_keys({**base, **given}))

    return call


def test_compare__report_on_disk_says_what_was_returned(go: Compare, tmp_path: Path) -> None:
    report = go()
    home = tmp_path / "compare"
    assert (home / "compare.md").read_text().strip() == report.to_markdown()
    content = json.loads((home / "compare.json").read_text())
    assert content == json.loads(json.dumps(report.to_dict()))
    assert content["setting"]["teachers"] == {"t.pt": {"mAP50-95": 40.0, "mAP50": 60.0}}
    assert str(tmp_path) not in (home / "compare.md").read_text() + json.dumps(content)  # fit for publication
    assert len(content["runs"]) == 9
    assert report.failed == []
    assert "teacher t.pt (40.00 mAP50-95 on val)" in report.to_markdown()
    assert [row.gain.verdict for row in report.rows if row.gain] == ["helped", "helped"]


def test_compare__more_seeds_use_the_finished_runs(go: Compare, tmp_path: Path) -> None:
    first = go(seeds="0,1")
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("compare/runs/*/result.json")}
    second = go(seeds="0,1,2", out=str(tmp_path / "elsewhere"))
    assert len(first.runs) == 6
    assert len(second.runs) == 9
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert (tmp_path / "elsewhere" / "compare.md").is_file()


def test_compare__failed_method_leaves_the_others(go: Compare, tmp_path: Path) -> None:
    FAILING.add("score-l2")
    report = go()
    assert [one["reason"] for one in report.failed] == ["it broke"] * 3
    assert {row.method for row in report.rows} == {"none", "kd-lightnet"}
    assert "see " in report.failure_line()
    assert (tmp_path / "compare" / "compare.json").is_file()
    FAILING.clear()
    assert go().failed == []


def test_compare__failed_teacher_fails_its_students_untried(go: Compare, trained: list[str]) -> None:
    FAILING.add("none")
    report = go(teacher="self")
    assert len(trained) == 3
    reasons = {one["reason"] for one in report.failed}
    assert "it broke" in reasons
    assert any("its teacher lightnet-n-none-s0" in reason for reason in reasons)
    assert report.rows == []
    assert report.to_markdown()


def test_compare__self_teacher_is_trained_once_and_its_cost_named(go: Compare, trained: list[str]) -> None:
    report = go(teacher="self")
    assert len(trained) == len(set(trained)) == 9
    assert all("-none-" in name for name in trained[:3])
    note = next(one for one in report.notes if one.startswith("teacher=self"))
    assert "3 teachers of 2 epochs" in note
    assert "0.03 h in all" in note  # 3 x 36 s
    total = go(teacher="self", control="equal_total")
    assert len(set(trained)) == 12  # three longer baselines more
    assert any("the baseline has these epochs too (4)" in one for one in total.notes)


def test_compare__one_seed_warns(go: Compare) -> None:
    report = go(seeds=1)
    assert [row.gain.verdict for row in report.rows if row.gain] == ["cannot tell (one seed)"] * 2
    assert any(note.startswith("WARNING: one pair") for note in report.notes)


def test_compare__teacher_that_does_not_fit_is_refused_before_training(
    go: Compare, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: Any, *given: Any, **more: Any) -> None:
        if config.method == "kd-lightnet":
            raise TeacherError("needs raw logits")

    monkeypatch.setattr(teachers, "check_teacher", refuse)
    with pytest.raises(TeacherError, match="raw logits"):
        go()
    assert trained == []


def test_compare__test_split_is_judged_once_for_the_winner(
    go: Compare, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[tuple[str, str]] = []

    def fake(path: Path, name: str, split: str, side: int, device: str) -> Accuracy:
        judged.append((path.parent.parent.name, split))
        return Accuracy(0.5, 0.2 + 0.01 * len(judged), 4, split)

    monkeypatch.setattr(final, "judge", fake)
    assert go().rows[1].test == {}
    assert judged == []
    report = go(test=True)
    assert [row.method for row in report.rows if row.test] == ["score-l2"]
    assert [split for _, split in judged] == ["test"] * 3
    assert "test split, judged once" in report.to_markdown()
    again = go(test=True, test_methods="score-l2,none")
    assert len(judged) == 6  # the winner's figures are kept for good
    tested = {row.method: row.test["mAP50-95"] for row in again.rows if row.test}
    assert tested["score-l2"] == report.rows[1].test["mAP50-95"]
    assert "-3.00 mAP50-95" in again.to_markdown()  # 21..23 against 24..26
    with pytest.raises(ConfigError, match="did you mean 'winner'"):
        go(test=True, test_methods="winer")


def test_compare__ray_engine_gets_the_runs(go: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def execute(jobs: Sequence[Job], *, on_done: Any, **given: Any) -> list[JobResult]:
        seen.update(given, jobs=len(jobs))
        return local.execute(jobs, workers=1)

    monkeypatch.setitem(sys.modules, "kd_yolo.compare.ray_engine", SimpleNamespace(execute=execute))
    import kd_yolo.compare

    monkeypatch.setattr(kd_yolo.compare, "ray_engine", SimpleNamespace(execute=execute), raising=False)
    report = go(engine="ray", address="host:6379", jobs=5)
    assert seen == {"jobs": 9, "workers": 5, "address": "host:6379"}
    assert len(report.runs) == 9


def test_compare__interruption_says_how_to_go_on(go: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(run, "LOGGER", SimpleNamespace(info=said.append, warning=said.append))

    def interrupted(*given: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(local, "execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go()
    assert "the same command goes on" in said[-1]


def test_progress__what_is_left() -> None:
    progress = Progress(4)
    progress.done, progress.fresh = 2, 1
    record = {"metrics": {"mAP50-95": 0.1234}, "cost": {"wall_s": 90.0}}
    fresh = JobResult("a", "b", "done", {}, record, fresh=True)
    assert progress.line(fresh, 100.0) == "[2/4] a: mAP50-95 12.34, 90 s; about 3 min left"
    assert progress.line(JobResult("a", "b", "done", {}, record), 1.0).startswith("[2/4] a: mAP50-95 12.34, was done")
    failed = JobResult("a", "b", "failed", {}, {}, "broke", "a.log")
    assert progress.line(failed, 1.0) == "[2/4] a: failed, broke; log: a.log"


@pytest.mark.parametrize(("seconds", "said"), [(5, "5 s"), (600, "10 min"), (9000, "2.5 h")])
def test_duration__units(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_track__only_what_is_on_and_installed(go: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = go()
    files: list[str] = []
    logged: dict[str, Any] = {"files": files}

    class MLflow(SimpleNamespace):
        def start_run(self, run_name: str) -> Any:
            import contextlib

            logged["run"] = run_name
            return contextlib.nullcontext()

    fake = MLflow(
        set_experiment=lambda name: logged.update(experiment=name),
        log_params=lambda values: logged.update(params=values),
        log_metrics=lambda values: logged.update(metrics=values),
        log_artifact=lambda file: files.append(Path(file).name),
    )
    monkeypatch.setattr(tracking, "SETTINGS", {"mlflow": False, "tensorboard": False})
    assert tracking.track(report, tmp_path, "x") == []
    monkeypatch.setattr(tracking, "SETTINGS", {"mlflow": True, "tensorboard": True})
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # what Python does for a missing module
    assert tracking.track(report, tmp_path / "compare", "x") == ["mlflow"]
    assert (logged["experiment"], logged["run"]) == ("x", "x-summary")
    assert logged["files"] == ["compare.md", "compare.json", "compare.png"]
    assert logged["metrics"]["lightnet-n/score-l2/gain"] == pytest.approx(2.04, abs=0.1)


def test_track__failing_server_is_a_warning(go: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = go()

    def refuse(name: str) -> None:
        raise ConnectionError("server away\nmore")

    said: list[str] = []
    monkeypatch.setattr(tracking, "SETTINGS", {"mlflow": True})
    monkeypatch.setattr(tracking, "LOGGER", SimpleNamespace(warning=said.append))
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(set_experiment=refuse))
    assert tracking.track(report, tmp_path, "x") == []
    assert said == ["mlflow: the summary was not logged (server away)"]
