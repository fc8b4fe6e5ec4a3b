"""The local engine: as many runs at once as fit on this machine."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace

import psutil

from kd_yolo.bench.affinity import physical_cores
from kd_yolo.compare.job import Job, JobResult, run_job

RUN_GB = 2.0  # a small detector's training process on a CPU, data loaders included
BUSY_S = 2.0


def execute(
    jobs: Sequence[Job],
    *,
    workers: int,
    on_done: Callable[[JobResult], None] = lambda result: None,
    devices: Sequence[str] = (),
) -> list[JobResult]:
    """Do runs, several at once, and return their results in the order of ``jobs``.

    A run that another process is doing is left for last, and then waited for. Ctrl-C ends the training processes; every
    run can be taken up again.

    Args:
        jobs: The runs.
        workers: Runs at once; with ``devices`` at most as many as those.
        on_done: Called in this thread with every result as it comes.
        devices: CUDA numbers to hand out, one a run.
    """
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for device in devices:
        free.put(device)
    slots = max(1, min(workers, len(devices)) if devices else workers)
    stop = threading.Event()
    with ThreadPoolExecutor(slots) as pool:
        try:
            results = _dispatch(jobs, pool, slots, free if devices else None, stop, on_done)
        except BaseException:
            stop.set()  # the pool's exit waits for the runs to end
            raise
    return [results[index] for index in range(len(jobs))]


def fitting_workers(jobs: int, threads: int | None, asked: int | None, devices: Sequence[str]) -> tuple[int, int]:
    """Return how many runs at once and how many CPU threads for each.

    Args:
        jobs: Number of runs.
        threads: Threads of a run as asked for, or None.
        asked: Runs at once as asked for, or None.
        devices: CUDA numbers; empty on a CPU.
    """
    cores = len(physical_cores())
    if asked is None:
        by_memory = max(1, int(psutil.virtual_memory().available / 1e9 / RUN_GB))
        asked = len(devices) if devices else min(cores // (threads or 1), by_memory)
    workers = max(1, min(asked, jobs, len(devices) or asked))
    return workers, threads or max(1, cores // workers)


def _dispatch(
    jobs: Sequence[Job],
    pool: ThreadPoolExecutor,
    slots: int,
    free: queue.SimpleQueue[str] | None,
    stop: threading.Event,
    on_done: Callable[[JobResult], None],
) -> dict[int, JobResult]:
    waiting = deque(enumerate(jobs))
    running: dict[Future[JobResult], int] = {}
    results: dict[int, JobResult] = {}
    busy_since_progress = 0
    while waiting or running:
        while waiting and len(running) < slots:
            index, job = waiting.popleft()
            running[pool.submit(_run, job, free, stop)] = index
        finished, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
        for future in finished:
            index, result = running.pop(future), future.result()
            if result.status == "busy":
                waiting.append((index, jobs[index]))
                busy_since_progress += 1
                continue
            busy_since_progress = 0
            results[index] = result
            on_done(result)
        if waiting and busy_since_progress >= len(waiting):  # all that is left is being done elsewhere
            time.sleep(BUSY_S)
            busy_since_progress = 0
    return results


def _run(job: Job, free: queue.SimpleQueue[str] | None, stop: threading.Event) -> JobResult:
    if free is None or not job.gpus:
        return run_job(job, wait=False, stop=stop)
    device = free.get()
    try:
        environment = {**job.environment, "CUDA_VISIBLE_DEVICES": device}
        return run_job(replace(job, environment=environment), wait=False, stop=stop)
    finally:
        free.put(device)
