"""A real comparison on tiny data: stopped in the middle, taken up, matched, and not trained twice."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kd_yolo.compare.job import run_job
from kd_yolo.compare.plan import plan
from kd_yolo.compare.run import compare
from kd_yolo.compare.settings import CompareKeys, split_compare_keys
from kd_yolo.errors import ConfigError

Keys = Callable[..., tuple[CompareKeys, dict[str, Any]]]


@pytest.fixture
def keys(tiny_data: Path, tiny_teacher: Path, tiny_layout: str, tmp_path: Path) -> Keys:
    def build(**given: Any) -> tuple[CompareKeys, dict[str, Any]]:
        base: dict[str, Any] = {
            "data": str(tiny_data),
            "students": tiny_layout,
            "methods": "none,score-l2",
            "seeds": "0",
        }
        base |= {"teacher": str(tiny_teacher), "allow_weak_teacher": True, "project": str(tmp_path), "device": "cpu"}
        base |= {"epochs": 2, "imgsz": 64, "batch": 8, "workers": 0, "close_mosaic": 0, "jobs": 2, "threads": 1}
        return split_compare_keys({**base, **given})

    return build


@pytest.mark.slow
def test_compare__stopped_taken_up_and_never_twice(keys: Keys, tiny_data: Path, tmp_path: Path) -> None:
    jobs = [job for wave in plan(*keys()).waves() for job in wave]
    assert len(jobs) == 2
    stop_in_the_middle(jobs[0])

    report = compare(*keys(test=True, test_methods="score-l2"))
    assert report.failed == []
    assert [row.method for row in report.rows] == ["none", "score-l2"]
    assert [row.gain.verdict for row in report.rows if row.gain] == ["cannot tell (one seed)"]
    for job in jobs:
        record = json.loads((job.folder / "result.json").read_text())
        best = json.loads((job.folder / "report.json").read_text())["phases"][-1]
        assert record["metrics"]["mAP50-95"] == best["metrics"]["metrics/mAP50-95(B)"]
        assert record["best_sha256"] == best["best_sha256"]
        assert record["cost"]["steps_per_epoch"] == 3  # 24 images in batches of 8
        assert record["cost"]["cpu_s"] > 1
        assert record["cost"]["peak_rss_mb"] > 100
        assert record["versions"]["ultralytics"].startswith("8.4")
        assert (record["test"] is not None) == (record["method"] == "score-l2")
        assert len((job.folder / "results.csv").read_text().splitlines()) == 3  # header and two epochs, none twice
    stopped = json.loads((jobs[0].folder / "result.json").read_text())
    assert stopped["cost"]["attempts"] == 2

    # the only differences between the two trainings are the method and its teacher
    stock, configs = zip(*(run_file(job.folder) for job in jobs), strict=True)
    assert stock[0] == stock[1]
    differing = {key for key in configs[0] if configs[0][key] != configs[1][key]}
    assert differing == {"method", "teacher", "allow_weak_teacher"}

    logs = {job.name: job.log.stat().st_mtime_ns for job in jobs}
    began = time.monotonic()
    again = compare(*keys(test=True, test_methods="score-l2"))
    assert time.monotonic() - began < 60
    assert [row.values for row in again.rows] == [row.values for row in report.rows]
    assert {job.name: job.log.stat().st_mtime_ns for job in jobs} == logs
    assert sorted(path.name for path in (tmp_path / "compare").glob("compare.*")) == sorted(report.files)


def test_compare__weak_teacher_is_refused_before_any_run(keys: Keys, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="allow_weak_teacher=true"):
        compare(*keys(allow_weak_teacher=False))
    assert not list(tmp_path.glob("compare/runs/*"))


def test_compare__method_argument_that_does_not_exist(keys: Keys, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: score-l2\nargs: {weigth: 2.0}\n")
    with pytest.raises(ConfigError, match="weight"):
        compare(*keys(methods=f"none,{file}"))
    assert not list(tmp_path.glob("compare/runs/*"))


def stop_in_the_middle(job: Any) -> None:
    """Train until the first of two epochs is saved, then stop."""
    stop, results = threading.Event(), []
    thread = threading.Thread(target=lambda: results.append(run_job(job, stop=stop)))
    thread.start()
    end = time.monotonic() + 240
    while not (job.folder / "student" / "weights" / "last.pt").is_file() and thread.is_alive():
        assert time.monotonic() < end
        time.sleep(0.02)
    stop.set()
    thread.join()
    assert results[0].status == "stopped", results[0]
    assert not (job.folder / "result.json").exists()


def run_file(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    content = yaml.safe_load((folder / "run.yaml").read_text())
    return content["stock"], content["config"]
