"""The Ray engine without Ray: addresses, resource requests, lost runs, interruption; a stand-in plays the cluster."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kd_yolo.compare import ray_engine
from kd_yolo.compare.job import Job, JobResult
from kd_yolo.errors import BackendMissingError, ConfigError, KDYoloError


class RayError(Exception): ...


class TaskCancelledError(RayError): ...


class RayTaskError(RayError):
    cause: Exception | None = None


class WorkerCrashedError(RayError): ...


class NodeDiedError(RayError): ...


class OutOfMemoryError(RayError): ...


class ObjectLostError(RayError): ...


ERRORS = (RayError, TaskCancelledError, RayTaskError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)
EXCEPTIONS = SimpleNamespace(**{error.__name__: error for error in (*ERRORS, ObjectLostError)})


class FakeRay:
    """A cluster on which every task ends at once, as ``outcomes`` says: by job, what each sending comes to."""

    exceptions = EXCEPTIONS

    def __init__(
        self, outcomes: dict[str, list[Any]] | None = None, nodes: list[dict[str, float]] | None = None
    ) -> None:
        self.outcomes: dict[str, list[Any]] = outcomes or {}
        self.resources = [{"CPU": 2.0, "memory": 8e9}] if nodes is None else nodes
        self.sent: list[str] = []
        self.comes_to: dict[str, tuple[Job, Any]] = {}
        self.options_given: list[dict[str, Any]] = []
        self.cancelled: list[Any] = []
        self.most_at_once = 0

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": node} for node in self.resources]

    def remote(self, function: Callable[..., Any]) -> Any:
        def options(**given: Any) -> Any:
            self.options_given.append(given)
            return SimpleNamespace(remote=self.send)

        return SimpleNamespace(options=options)

    def send(self, job: Job, mark: Path) -> Any:
        assert mark.is_file()
        self.sent.append(job.name)
        left = self.outcomes.get(job.name, [])
        reference = f"{len(self.sent)}:{job.name}"
        self.comes_to[reference] = (job, left.pop(0) if left else "done")
        return reference

    def wait(self, references: list[Any], num_returns: int = 1, timeout: float = 0) -> tuple[list[Any], list[Any]]:
        self.most_at_once = max(self.most_at_once, len(references))
        return references[-num_returns:], references[:-num_returns]  # the last first: results come in any order

    def get(self, reference: Any) -> JobResult:
        job, outcome = self.comes_to[reference]
        if isinstance(outcome, BaseException):
            raise outcome
        return JobResult(job.name, job.address, outcome, job.labels)

    def cancel(self, reference: Any) -> None:
        self.cancelled.append(self.comes_to[reference][0].name)


def make_jobs(tmp_path: Path, count: int = 4, **more: Any) -> list[Job]:
    return [Job(f"run-{i}", f"{i}" * 64, tmp_path / "runs" / f"run-{i}", {"batch": 16}, **more) for i in range(count)]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeRay]:
    """Return a function that puts a stand-in in Ray's place."""

    def install(*given: Any, **named: Any) -> FakeRay:
        fake = FakeRay(*given, **named)
        monkeypatch.setitem(sys.modules, "ray", fake)
        return fake

    return install


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Forget every cluster of this machine; return the folder in which Ray would note the latest."""

    def init(**options: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance. Please specify --address")

    fake = SimpleNamespace(is_initialized=lambda: False, init=init, exceptions=EXCEPTIONS)
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    return tmp_path / "ray"


@pytest.fixture
def closed_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_import__leaves_ray_alone() -> None:
    code = "import sys, kd_yolo.compare.ray_engine; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_execute__ray_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendMissingError, match=r"pip install 'kd-yolo\[ray\]'") as caught:
        ray_engine.execute(make_jobs(tmp_path))
    assert caught.value.exit_status == 2
    assert not (tmp_path / "runs").exists()


def test_connected__no_cluster_here(no_cluster: Path) -> None:
    told = r"address=auto: no Ray cluster there \(Could not find any running Ray instance\); start one with `ray start"
    with pytest.raises(ConfigError, match=told) as caught, ray_engine.connected("auto"):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["address", "environment", "file"])
def test_connected__nothing_listens(
    no_cluster: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    place = f"127.0.0.1:{closed_port}"
    if where == "environment":
        monkeypatch.setenv("RAY_ADDRESS", place)
    if where == "file":  # the cluster that was started here last is gone
        no_cluster.mkdir()
        (no_cluster / "ray_current_cluster").write_text(place + "\n")
    began = time.monotonic()
    with (
        pytest.raises(ConfigError, match=f"address={place}: no Ray cluster there"),
        ray_engine.connected(place if where == "address" else "auto"),
    ):
        pass
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("address", ["nonsense", "ray://127.0.0.1:10001", "host:", "host:port", "127.0.0.1:6379/x"])
def test_connected__address_is_none(no_cluster: Path, address: str) -> None:
    with (
        pytest.raises(ConfigError, match="not understood; give auto, local, or HOST:PORT"),
        ray_engine.connected(address),
    ):
        pass


def test_execute__nothing_to_do_needs_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert ray_engine.execute([]) == []


def test_execute__one_request_a_run(tmp_path: Path, cluster: Callable[..., FakeRay]) -> None:
    fake = cluster(nodes=[{"CPU": 4.0, "GPU": 2.0, "memory": 3e9}, {"CPU": 8.0, "memory": 64e9}])
    jobs = [*make_jobs(tmp_path, 1, threads=2, gpus=1), *make_jobs(tmp_path, 1, threads=6)]
    ray_engine.execute(jobs)
    asked = [
        {key: given[key] for key in ("num_cpus", "num_gpus", "memory", "max_retries")} for given in fake.options_given
    ]
    # the only machine with a GPU has 3 GB, so the 4 GB that are estimated do not exclude it;
    # 1 GB + 800 B x 16 x 640^2 = 6.24 GB for the other, whose canvas is the default
    assert asked[0] == {"num_cpus": 2, "num_gpus": 1, "memory": 3_000_000_000, "max_retries": 0}
    assert asked[1] == {"num_cpus": 6, "num_gpus": 0, "memory": 6_242_880_000, "max_retries": 0}


@pytest.mark.parametrize(("more", "word"), [({"threads": 3}, "3 CPUs"), ({"gpus": 1}, "1 GPUs")])
def test_execute__no_machine_is_able(
    tmp_path: Path, cluster: Callable[..., FakeRay], more: dict[str, int], word: str
) -> None:
    fake = cluster()
    with pytest.raises(ConfigError, match=f"run-0: needs .*{word}.* largest has 2 CPUs"):
        ray_engine.execute(make_jobs(tmp_path, **more))
    assert fake.sent == []
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("batch", "imgsz", "gpus", "gigabytes"),
    [(1, 32, 0, 2.0), (-1, 224, 0, 2.0), (16, 640, 0, 6.24), (16, [320, 640], 0, 6.24), (0.7, 640, 1, 4.0)],
)
def test_memory_bytes__grows_with_the_batch(batch: Any, imgsz: Any, gpus: int, gigabytes: float) -> None:
    job = Job("a", "b", Path("/c"), {"batch": batch, "imgsz": imgsz}, gpus=gpus)
    assert ray_engine.memory_bytes(job) / 1e9 == pytest.approx(gigabytes, abs=0.01)


@pytest.mark.parametrize(("workers", "at_once"), [(0, 5), (1, 1), (3, 3), (9, 5)])
def test_execute__keeps_order_and_limit(
    tmp_path: Path, cluster: Callable[..., FakeRay], workers: int, at_once: int
) -> None:
    fake = cluster()
    seen: list[str] = []
    results = ray_engine.execute(
        make_jobs(tmp_path, 5), workers=workers, on_done=lambda result: seen.append(result.name)
    )
    assert [result.name for result in results] == [f"run-{i}" for i in range(5)]
    assert sorted(seen) == sorted(fake.sent) == [f"run-{i}" for i in range(5)]
    assert fake.most_at_once == at_once
    assert fake.cancelled == []
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("lost", [WorkerCrashedError, NodeDiedError, OutOfMemoryError, ObjectLostError])
def test_execute__a_lost_run_is_sent_again(
    tmp_path: Path, cluster: Callable[..., FakeRay], lost: type[Exception]
) -> None:
    fake = cluster({"run-1": [lost(), lost()]})
    lines: list[str] = []
    results = ray_engine.execute(make_jobs(tmp_path), on_lost=lines.append)
    assert {result.status for result in results} == {"done"}
    assert fake.sent.count("run-1") == 3
    assert len(fake.sent) == 6
    assert [line.split(" (")[1] for line in lines] == ["1 of 3)", "2 of 3)"]


def test_execute__a_run_that_is_always_lost_is_given_up(tmp_path: Path, cluster: Callable[..., FakeRay]) -> None:
    fake = cluster({"run-1": [OutOfMemoryError("x")] * 9})
    results = ray_engine.execute(make_jobs(tmp_path), on_lost=lambda line: None)
    assert [result.status for result in results] == ["done", "failed", "done", "done"]
    assert results[1].reason == "its machine ran out of memory, 4 times; given up"
    assert fake.sent.count("run-1") == 1 + ray_engine.LOST_RETRIES


def test_execute__a_run_that_fails_is_not_sent_again(tmp_path: Path, cluster: Callable[..., FakeRay]) -> None:
    missing = RayTaskError("trace\nback")
    missing.cause = ModuleNotFoundError("No module named 'kd_yolo'")
    fake = cluster({"run-0": ["failed"], "run-2": [missing], "run-3": [TaskCancelledError()]})
    results = ray_engine.execute(make_jobs(tmp_path))
    assert [result.status for result in results] == ["failed", "done", "failed", "stopped"]
    assert results[2].reason == "a worker cannot do it: No module named 'kd_yolo'"
    assert len(fake.sent) == 4


def test_execute__interrupted_cancels_what_runs(tmp_path: Path, cluster: Callable[..., FakeRay]) -> None:
    def interrupt(result: JobResult) -> None:
        raise KeyboardInterrupt

    fake = cluster()
    with pytest.raises(KeyboardInterrupt):
        ray_engine.execute(make_jobs(tmp_path), on_done=interrupt)
    assert sorted(fake.cancelled) == ["run-0", "run-1", "run-2"]


def test_execute__cluster_lost(tmp_path: Path, cluster: Callable[..., FakeRay]) -> None:
    cluster({"run-1": [RayError("head is gone.\nmore")]})
    with pytest.raises(KDYoloError, match=r"the Ray cluster was lost \(head is gone\); give the command again"):
        ray_engine.execute(make_jobs(tmp_path))
