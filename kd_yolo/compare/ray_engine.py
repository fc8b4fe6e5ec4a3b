"""The Ray engine: the runs of a comparison on all machines of a Ray cluster that share a folder.

One task a run, one resource request a task. What a run reaches lies in its folder, which all machines see, so a run
whose worker or machine dies is sent out again and goes on where it was left. Ray is imported when it is used.

Source: Moritz et al., Ray, OSDI 2018, section 4.2 (tasks and failures); https://docs.ray.io, "Task fault tolerance".
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sys
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_yolo.compare.job import Job, JobResult, Status
from kd_yolo.compare.local import RUN_GB
from kd_yolo.compare.outcome import finished
from kd_yolo.compare.ray_worker import run_on_worker
from kd_yolo.errors import BackendMissingError, ConfigError, KDYoloError

LOST_RETRIES = 3  # how often a run is sent out again after its worker or machine died; Ray's own default
BYTES_PER_PIXEL = 800  # of a training batch on a CPU, small detector beside a small teacher (benchmarks/step_time.py)
CONNECT_S = 5.0
CANCEL_S = 30.0  # a cancelled run ends its training in order first
OBJECT_STORE_BYTES = 100 * 2**20  # only job descriptions and results pass through it
HOW = "start one with `ray start --head`, join one with `ray start --address=HOST:PORT`, or give address=local"


def execute(
    jobs: Sequence[Job],
    *,
    workers: int = 0,
    on_done: Callable[[JobResult], None] = lambda result: None,
    devices: Sequence[str] = (),
    address: str = "auto",
    on_lost: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> list[JobResult]:
    """Do runs on a Ray cluster and return their results in the order of ``jobs``.

    Finished runs are found here; no cluster is needed when all are. Ctrl-C cancels what runs; the same command takes it
    up again.

    Args:
        jobs: The runs; every machine must see their folders.
        workers: Runs at once at most; 0 leaves that to what the cluster has.
        on_done: Called in this thread with every result as it comes.
        devices: Unused: a run with ``gpus`` gets one from Ray.
        address: ``auto`` (the cluster that this machine belongs to), ``local`` (this machine alone) or ``HOST:PORT``.
        on_lost: Called with one line when a worker died and its run is sent out again.

    Raises:
        BackendMissingError: Ray is not installed.
        ConfigError: There is no such cluster, or none of its machines can take one of the runs.
        KDYoloError: The cluster was lost while runs were under way.
    """
    results: dict[str, JobResult] = {}
    for job in jobs:
        record = finished(job.folder, job.address)
        if record is not None:
            results[job.name] = _result(job, "done", record=record)
            on_done(results[job.name])
    missing = [job for job in jobs if job.name not in results]
    if missing:
        with connected(address) as ray, _shared_mark(missing) as mark:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            tasks = [_task(ray, job, nodes) for job in missing]
            dispatch = _Dispatch(ray, missing, tasks, mark, on_done, on_lost)
            results |= dispatch.run(workers if workers > 0 else len(missing))
    return [results[job.name] for job in jobs]


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Connect to a cluster, yield the ``ray`` module, and disconnect; a connection that was there stays.

    Raises:
        BackendMissingError: Ray is not installed.
        ConfigError: There is no such cluster; the line says what to start.
    """
    # Read when Ray is imported: no report of usage leaves this machine unless the user asked for it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise BackendMissingError(f"engine=ray: Ray is missing ({error}); run: pip install 'kd-yolo[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    _check_reachable(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15 otherwise: last of all on a machine that does more
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        ray.init(address=address, **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = _first_line(error).split(". ")[0]  # what follows is advice for Ray's own commands
        raise ConfigError(f"address={address}: no Ray cluster there ({reason}); {HOW}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def memory_bytes(job: Job) -> int:
    """Return an estimate of the main memory a run needs, for scheduling only; it limits nothing.

    On a CPU 1 GB and what a batch takes, at least ``RUN_GB``; on a GPU 4 GB, the batch being on the device.
    """
    if job.gpus:
        return int(4e9)
    batch, imgsz = job.arguments.get("batch"), job.arguments.get("imgsz")
    sides = [side for side in (imgsz if isinstance(imgsz, list) else [imgsz]) if isinstance(side, int)] or [640]
    images = batch if isinstance(batch, int) and batch > 0 else 16
    return int(max(1e9 * RUN_GB, 1e9 + BYTES_PER_PIXEL * images * max(sides) ** 2))


class _Dispatch:
    """Sends tasks out, at most so many at once, and gathers what comes back."""

    def __init__(
        self,
        ray: Any,
        jobs: Sequence[Job],
        tasks: Sequence[Any],
        mark: Path,
        on_done: Callable[[JobResult], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self.ray, self.jobs, self.tasks, self.mark = ray, jobs, tasks, mark
        self.on_done, self.on_lost = on_done, on_lost
        self.running: dict[Any, int] = {}
        self.lost = [0] * len(jobs)

    def run(self, limit: int) -> dict[str, JobResult]:
        """Return the results by the names of the jobs."""
        waiting = deque(range(len(self.jobs)))
        results: dict[str, JobResult] = {}
        try:
            while waiting or self.running:
                while waiting and len(self.running) < limit:
                    index = waiting.popleft()
                    self.running[self.tasks[index].remote(self.jobs[index], self.mark)] = index
                for reference in self.ray.wait(list(self.running), timeout=1.0)[0]:
                    index = self.running.pop(reference)
                    result = self._outcome(reference, index)
                    if result is None:
                        waiting.appendleft(index)
                        continue
                    results[result.name] = result
                    self.on_done(result)
        except self.ray.exceptions.RayError as error:
            raise KDYoloError(f"the Ray cluster was lost ({_first_line(error)}); give the command again") from error
        finally:
            self._cancel()
        return results

    def _outcome(self, reference: Any, index: int) -> JobResult | None:
        """Return what came of a task, or None when it is to be sent out again."""
        job, errors = self.jobs[index], self.ray.exceptions
        gone = (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError, errors.ObjectLostError)
        try:
            return self.ray.get(reference)
        except errors.TaskCancelledError:
            return _result(job, "stopped", reason="cancelled; the same command takes it up again")
        except errors.RayTaskError as error:  # what run_job never raises: kd-yolo is missing there, or differs
            return _result(job, "failed", reason=f"a worker cannot do it: {_first_line(error.cause or error)}")
        except gone as error:
            why = {"OutOfMemoryError": "its machine ran out of memory", "NodeDiedError": "its machine was lost"}
            reason = why.get(type(error).__name__, "its worker died")
            self.lost[index] += 1
            if self.lost[index] > LOST_RETRIES:
                return _result(job, "failed", reason=f"{reason}, {self.lost[index]} times; given up")
            self.on_lost(f"{job.name}: {reason}; the run is taken up again ({self.lost[index]} of {LOST_RETRIES})")
            return None

    def _cancel(self) -> None:
        """Stop what still runs, in order: the workers end their training processes."""
        if not self.running:
            return
        with contextlib.suppress(self.ray.exceptions.RayError):
            for reference in self.running:
                self.ray.cancel(reference)
            self.ray.wait(list(self.running), num_returns=len(self.running), timeout=CANCEL_S)


def _task(ray: Any, job: Job, nodes: Sequence[Mapping[str, float]]) -> Any:
    """Return a run's remote function with its one resource request.

    Raises:
        ConfigError: No machine of the cluster could ever take it.
    """
    able = [node for node in nodes if node.get("CPU", 0) >= job.threads and node.get("GPU", 0) >= job.gpus]
    if not able:
        most = max((node.get("CPU", 0) for node in nodes), default=0)
        gpus = sum(node.get("GPU", 0) for node in nodes)
        raise ConfigError(
            f"{job.name}: needs {job.threads} CPUs and {job.gpus} GPUs of one machine; the Ray cluster's largest has "
            f"{most:g} CPUs, and all have {gpus:g} GPUs: give threads= or device=cpu, or add a machine"
        )
    memory = min(memory_bytes(job), int(max(node.get("memory", 0) for node in able)))  # an estimate must not exclude
    # Lost runs are sent out again here, not by Ray, which would repeat one that fills a machine's memory for ever.
    options = {"num_cpus": job.threads, "num_gpus": job.gpus, "memory": memory, "max_retries": 0}
    return ray.remote(run_on_worker).options(**options, name=job.name)


@contextlib.contextmanager
def _shared_mark(jobs: Sequence[Job]) -> Iterator[Path]:
    """Leave a file beside the runs for as long as they run: who sees it sees the same folder."""
    mark = jobs[0].folder.parent / f".shared-{uuid.uuid4().hex}"
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        raise ConfigError(f"{mark.parent}: cannot be written ({error.strerror}); give another project=") from error
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


def _check_reachable(address: str) -> None:
    """Refuse an address behind which nothing listens; Ray itself would try for minutes and then end this process.

    Raises:
        ConfigError: As said, or the address is none.
    """
    if address == "local":
        return
    # What Ray does for auto; the file names the cluster that was started here last, which may be gone.
    latest = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    known = os.environ.get("RAY_ADDRESS") or (latest.read_text(encoding="utf-8") if latest.is_file() else "")
    place = known.strip() if address == "auto" else address
    if not place and address == "auto":
        return  # Ray looks at the processes of this machine
    found = re.fullmatch(r"\[?([^/\s]+?)\]?:(\d{1,5})", place)
    if found is None:
        raise ConfigError(f"address={place}: not understood; give auto, local, or HOST:PORT of the head (port 6379)")
    try:
        socket.create_connection((found[1], int(found[2])), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"address={place}: no Ray cluster there ({reason}); {HOW}") from error


def _result(job: Job, status: Status, **more: Any) -> JobResult:
    return JobResult(job.name, job.address, status, dict(job.labels), log=str(job.log), **more)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
