"""The Ray engine on a real cluster of two nodes on this machine: workers and nodes die, nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'kd-yolo[ray]')")

from kd_yolo.compare.claims import CLAIM_FILE  # noqa: E402
from kd_yolo.compare.job import Job, JobResult  # noqa: E402
from kd_yolo.compare.ray_engine import execute  # noqa: E402

EPOCHS = 4
# In place of `python -m kd_yolo train`: as many epochs, one line each; taken up again, it goes on after the last line.
# With HOLD it stops after two epochs until that file is there; taken up again, it does not.
TRAINING = (
    f"EPOCHS = {EPOCHS}"
    + """
import json, os, sys, time
from pathlib import Path
keys = dict(word.split("=", 1) for word in sys.argv[2:])
folder = Path(keys["resume"]) if "resume" in keys else Path(keys["project"]) / keys["name"]
folder.mkdir(parents=True, exist_ok=True)
if keys.get("box") == "wrong":
    with (folder / "starts").open("a") as stream:
        stream.write("x")
    print("kd-yolo: box=wrong is not valid", file=sys.stderr)
    sys.exit(2)
(folder / "run.yaml").write_text("stock: {}\\nmethod: {name: none}\\n")
with (folder / "starts").open("a") as stream:
    stream.write(json.dumps({"pid": os.getpid(), "worker": os.getppid()}) + "\\n")
epochs = folder / "epochs"
for epoch in range(len(epochs.read_text().splitlines()) if epochs.exists() else 0, EPOCHS):
    time.sleep(0.1)
    with epochs.open("a") as stream:
        stream.write(f"{epoch} {os.getpid()}\\n")
    while epoch == 1 and "HOLD" in os.environ and "resume" not in keys and not Path(os.environ["HOLD"]).exists():
        time.sleep(0.05)
(folder / "weights").mkdir(exist_ok=True)
(folder / "weights" / "best.pt").write_bytes(b"weights")
score = {"metrics/mAP50-95(B)": int(folder.name.split("-")[1]) / 10}
(folder / "report.json").write_text(json.dumps({"phases": [{"metrics": score, "seconds": 1.0}]}))
"""
)


@dataclass
class Nodes:
    """Two nodes with one processor each."""

    address: str
    cluster: Any
    second: Any
    program: Path

    def jobs(self, folder: Path, count: int, hold: tuple[int, ...] = (), **arguments: Any) -> list[Job]:
        keys, places = {"method": "none", **arguments}, [folder / "runs" / f"run-{i}" for i in range(count)]
        plain = {"PYTHONPATH": str(self.program)}
        held = {**plain, "HOLD": str(folder / "go")}
        return [Job(f.name, f.name, f, keys, held if i in hold else plain) for i, f in enumerate(places)]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Start the cluster; the program that its workers start for a training is the one above."""
    from ray.cluster_utils import Cluster

    program = tmp_path_factory.mktemp("program")
    (program / "kd_yolo").mkdir()
    (program / "kd_yolo" / "__init__.py").touch()
    (program / "kd_yolo" / "__main__.py").write_text(TRAINING)
    before = Path.cwd()
    os.chdir(program)  # workers start here, and -m looks here first
    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        second = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        yield Nodes(cluster.address, cluster, second, program)
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]
        os.chdir(before)


@pytest.fixture(scope="module")
def connection(nodes: Nodes) -> Iterator[None]:
    """Connect once for several tests, whose workers can then be used again."""
    ray.init(address=nodes.address, log_to_driver=False)
    yield
    ray.shutdown()


def starts(job: Job) -> list[dict[str, int]]:
    file = job.folder / "starts"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def epochs(job: Job) -> list[int]:
    file = job.folder / "epochs"
    return [int(line.split()[0]) for line in file.read_text().splitlines()] if file.is_file() else []


def wait_for(condition: Callable[[], Any], limit_s: float = 300) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def in_background(action: Callable[[], None]) -> Callable[[], None]:
    """Start ``action`` in a thread; return what waits for it and raises what it raised."""
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            action()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()

    def join() -> None:
        thread.join()
        if raised:
            raise raised[0]

    return join


def check_all_done(jobs: list[Job], results: list[JobResult]) -> None:
    assert [result.name for result in results] == [job.name for job in jobs]
    assert {(result.status, result.reason) for result in results} == {("done", "")}
    assert [result.record["metrics"]["mAP50-95"] for result in results] == [i / 10 for i in range(len(jobs))]
    assert all(epochs(job) == list(range(EPOCHS)) for job in jobs)  # none lost, none twice


def test_execute__a_killed_worker_loses_nothing(nodes: Nodes, tmp_path: Path) -> None:
    jobs = nodes.jobs(tmp_path, 4, hold=(1,))
    lost: list[str] = []
    done: list[str] = []

    def kill() -> None:
        wait_for(lambda: len(epochs(jobs[1])) == 2)
        os.kill(starts(jobs[1])[0]["worker"], signal.SIGKILL)

    join = in_background(kill)
    results = execute(jobs, on_done=lambda result: done.append(result.name), address=nodes.address, on_lost=lost.append)
    join()
    assert not ray.is_initialized()
    check_all_done(jobs, results)
    assert sorted(done) == [job.name for job in jobs]
    assert lost == ["run-1: its worker died; the run is taken up again (1 of 3)"]
    # The training went down with its worker rather than beside the run that was given its processor.
    assert [len(starts(job)) for job in jobs] == [1, 2, 1, 1]
    first, again = starts(jobs[1])
    assert first["worker"] != again["worker"]
    assert results[1].record["cost"]["attempts"] == 2
    # The training went down with its worker rather than beside the run that was given its processor.
    written_by_first = [
        x for x in (jobs[1].folder / "epochs").read_text().splitlines() if x.endswith(f" {first['pid']}")
    ]
    assert 2 <= len(written_by_first) < EPOCHS
    assert not lives(first["pid"])

    again_results = execute(jobs, address="needs no cluster")
    check_all_done(jobs, again_results)
    assert not any(result.fresh for result in again_results)
    assert [len(starts(job)) for job in jobs] == [1, 2, 1, 1]


def test_execute__bad_input_is_not_tried_again(nodes: Nodes, connection: None, tmp_path: Path) -> None:
    job = nodes.jobs(tmp_path, 1, box="wrong")[0]
    result = execute([job], address=nodes.address)[0]
    assert (result.status, result.reason) == ("failed", "box=wrong is not valid (exit status 2)")
    assert (job.folder / "starts").read_text() == "x"


def test_execute__interrupted_and_taken_up_again(nodes: Nodes, connection: None, tmp_path: Path) -> None:
    jobs = nodes.jobs(tmp_path, 3, hold=(1, 2))

    def interrupt(result: JobResult) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(jobs, on_done=interrupt, address=nodes.address)
    assert not any(lives(start["pid"]) for job in jobs for start in starts(job))
    assert not any((job.folder / CLAIM_FILE).exists() for job in jobs)
    assert [len(epochs(job)) == EPOCHS for job in jobs] == [True, False, False]
    (tmp_path / "go").touch()
    check_all_done(jobs, execute(jobs, workers=2, address=nodes.address))


def test_execute__a_lost_machine_loses_nothing(nodes: Nodes, connection: None, tmp_path: Path) -> None:
    jobs = nodes.jobs(tmp_path, 3, hold=(0, 1, 2))
    lost: list[str] = []

    def take_away() -> None:
        wait_for(lambda: sum(len(epochs(job)) == 2 for job in jobs) == 2)  # one on each node
        first = [starts(job)[0]["pid"] for job in jobs if starts(job)]
        nodes.cluster.remove_node(nodes.second, allow_graceful=False)
        wait_for(lambda: not all(map(lives, first)))  # what it was training is gone with it
        (tmp_path / "go").touch()

    join = in_background(take_away)
    results = execute(jobs, address=nodes.address, on_lost=lost.append)
    join()
    check_all_done(jobs, results)
    assert len(lost) == 1
    assert sorted(len(starts(job)) for job in jobs) == [1, 1, 2]
