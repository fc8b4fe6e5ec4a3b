"""``kd-yolo compare``: lay out the runs, do what is missing, compare, write the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ultralytics.utils import LOGGER

from kd_yolo.compare import local
from kd_yolo.compare.cells import TEACHER
from kd_yolo.compare.classify import check_classify_teachers, plan_classify
from kd_yolo.compare.final import judge_on_test, tested_methods
from kd_yolo.compare.job import Job, JobResult
from kd_yolo.compare.notes import describe, notes
from kd_yolo.compare.plan import Plan, cuda_devices, plan
from kd_yolo.compare.plots import plot
from kd_yolo.compare.report import CompareReport, Row, make_rows
from kd_yolo.compare.settings import CompareKeys, check_keys
from kd_yolo.compare.task import task_of_figures
from kd_yolo.compare.teachers import Figures, check_pairs, measure_teachers
from kd_yolo.compare.tracking import track
from kd_yolo.files import check_writable, write_json, write_text

Execute = Callable[[Sequence[Job], Callable[[JobResult], None]], list[JobResult]]


def compare(keys: CompareKeys, stock: Mapping[str, Any]) -> CompareReport:
    """Run or go on with a comparison.

    Finished runs are found again by their content address; unfinished ones are taken up; a run that fails is reported
    and the others go on.

    Args:
        keys: The comparison's keys.
        stock: Stock training arguments, the same for every run.

    Returns:
        The report, also written as ``compare.md``, ``compare.json`` and ``compare.png``.

    Raises:
        KDYoloError: Anything wrong with the input, before anything is trained; or the Ray cluster is not there.
    """
    check_keys(keys)
    check_writable(keys.home)
    laid = plan_classify(keys, stock) if keys.task == "classify" else plan(keys, stock)
    named = tested_methods(keys, laid.methods)
    if len(keys.seed_list) * max(len(laid.folds), 1) < 2:
        LOGGER.warning("one seed: no verdict is possible; three seeds are the least, five are better")
    if keys.task == "classify":
        figures = check_classify_teachers(laid, keys.home)
    else:
        figures = measure_teachers(laid, keys.home)
        check_pairs(laid, figures)
    results = _train(laid, keys, _engine(keys, laid))
    rows = _rows(laid, results, keys)
    if named:
        results = judge_on_test(laid.cells, results, rows, named, keys)
        rows = _rows(laid, results, keys)
    report = _report(laid, keys, results, rows, figures)
    folder = Path(keys.out).expanduser().absolute() if keys.out else keys.home
    report = save(report, folder)
    track(report, folder, keys.name)
    return report


def save(report: CompareReport, folder: Path) -> CompareReport:
    """Write ``compare.md``, ``compare.json`` and, when there is a gain to draw, ``compare.png``.

    Raises:
        OutputError: The folder cannot be written to.
    """
    drawn = plot(report, folder / "compare.png")
    report = replace(report, files=["compare.md", "compare.json", *(["compare.png"] if drawn else [])])
    write_text(folder / "compare.md", report.to_markdown() + "\n")
    write_json(folder / "compare.json", report.to_dict())
    return report


class Progress:
    """Says what finished and how long the rest will take, from the pace so far."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.fresh = total, 0, 0
        self.began = time.monotonic()

    def __call__(self, result: JobResult) -> None:
        """Count a result and print its line."""
        self.done += 1
        self.fresh += result.fresh
        LOGGER.info(self.line(result, time.monotonic() - self.began))

    def line(self, result: JobResult, elapsed_s: float) -> str:
        """Return the line of a result."""
        head = f"[{self.done}/{self.total}] {result.name}: "
        if result.status != "done":
            return f"{head}{result.status}, {result.reason}; log: {result.log}"
        figures = result.record["metrics"]
        main = task_of_figures(figures).shown[0]
        said = f"{main} {100 * figures[main]:.2f}"
        said += f", {duration(result.record['cost']['wall_s'])}" if result.fresh else ", was done"
        left = self.total - self.done
        return (
            f"{head}{said}; about {duration(elapsed_s / self.fresh * left)} left"
            if self.fresh and left
            else head + said
        )


def duration(seconds: float) -> str:
    """Return seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _engine(keys: CompareKeys, laid: Plan) -> Execute:
    """Return what does a wave of runs."""
    devices = cuda_devices(keys)
    if keys.engine == "ray":
        from kd_yolo.compare import ray_engine

        def on_cluster(jobs: Sequence[Job], on_done: Callable[[JobResult], None]) -> list[JobResult]:
            ready = [replace(job, threads=keys.threads or 1) for job in jobs]
            return ray_engine.execute(ready, workers=keys.jobs or 0, on_done=on_done, address=keys.address)

        return on_cluster

    def here(jobs: Sequence[Job], on_done: Callable[[JobResult], None]) -> list[JobResult]:
        workers, threads = local.fitting_workers(len(jobs), keys.threads, keys.jobs, devices)
        ready = [replace(job, threads=threads) for job in jobs]
        return local.execute(ready, workers=workers, on_done=on_done, devices=devices)

    return here


def _train(laid: Plan, keys: CompareKeys, execute: Execute) -> dict[str, JobResult]:
    """Do all runs, teachers first; a run whose teacher failed is not tried."""
    waves = laid.waves()
    progress = Progress(sum(map(len, waves)))
    needs = {cell.job.name: cell.needs for cell in laid.cells}
    results: dict[str, JobResult] = {}
    try:
        for wave in waves:
            ready = []
            for job in wave:
                teacher = results.get(str(needs[job.name]))
                if teacher is None or teacher.status == "done":
                    ready.append(job)
                    continue
                reason = f"its teacher {teacher.name} failed"
                results[job.name] = JobResult(
                    job.name, job.address, "failed", dict(job.labels), {}, reason, teacher.log
                )
                progress(results[job.name])
            results |= {one.name: one for one in execute(ready, progress)} if ready else {}
    except KeyboardInterrupt:
        LOGGER.info(f"stopped; {keys.home} keeps every run, and the same command goes on from here")
        raise
    return results


def _rows(laid: Plan, results: Mapping[str, JobResult], keys: CompareKeys) -> list[Row]:
    baseline = laid.methods[0]
    return make_rows(laid.cells, results, baseline, keys.metric, keys.confidence, keys.min_gain, keys.folds)


def _report(
    laid: Plan, keys: CompareKeys, results: Mapping[str, JobResult], rows: list[Row], figures: Figures
) -> CompareReport:
    baseline = laid.methods[0]
    done = [one for one in results.values() if one.status == "done"]
    failed = [
        {"name": one.name, "reason": one.reason or one.status, "log": one.log}
        for one in results.values()
        if one.status != "done"
    ]
    teachers = {cell.job.name for cell in laid.cells if cell.method == TEACHER}
    if keys.teacher == "self":
        own = [results[name].record["metrics"] for name in teachers if results[name].status == "done"]
        figures = {"self": {m: 100 * sum(one[m] for one in own) / len(own) for m in keys.kind.shown}} if own else {}
    records = [dict(one.record) for one in done]
    setting = describe(laid, keys, baseline, records, figures)
    said = notes(laid, keys, rows, records, {name: results[name] for name in teachers})
    return CompareReport(setting, rows, records, failed, said)
