"""One run, one process: claims on a shared folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from kd_yolo.compare import claims
from kd_yolo.compare.claims import CLAIM_FILE, Claim, ClaimedElsewhere
from kd_yolo.errors import OutputError


def left_behind(folder: Path, **given: Any) -> Path:
    """Write the claim of some other process."""
    folder.mkdir(exist_ok=True)
    file = folder / CLAIM_FILE
    file.write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1, "id": "other", **given}))
    return file


def test_claim__second_is_refused_until_the_first_is_given_back(tmp_path: Path) -> None:
    with Claim(tmp_path / "run"):
        with pytest.raises(ClaimedElsewhere, match=str(os.getpid())), Claim(tmp_path / "run"):
            pass
        assert (tmp_path / "run" / CLAIM_FILE).is_file()
    assert not (tmp_path / "run" / CLAIM_FILE).exists()
    with Claim(tmp_path / "run"):
        pass


def test_claim__given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Claim(tmp_path):
        raise ZeroDivisionError
    assert not (tmp_path / CLAIM_FILE).exists()


def test_claim__dead_process_is_taken_over(tmp_path: Path) -> None:
    left_behind(tmp_path)
    with Claim(tmp_path) as claim:
        assert json.loads(claim.file.read_text())["pid"] == os.getpid()


def test_claim__reused_process_number_is_no_life(tmp_path: Path) -> None:
    created = psutil.Process().create_time()
    left_behind(tmp_path, pid=os.getpid(), created=created - 1000)
    with Claim(tmp_path):
        pass
    left_behind(tmp_path, pid=os.getpid(), created=created)
    with pytest.raises(ClaimedElsewhere), Claim(tmp_path):
        pass


def test_claim__training_that_outlives_its_watcher_keeps_it(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        left_behind(tmp_path, child={"pid": child.pid, "created": psutil.Process(child.pid).create_time()})
        with pytest.raises(ClaimedElsewhere), Claim(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()
    with Claim(tmp_path):
        pass


def test_claim__other_host_by_its_heart_beat(tmp_path: Path) -> None:
    file = left_behind(tmp_path, host="elsewhere")
    with pytest.raises(ClaimedElsewhere, match="elsewhere"), Claim(tmp_path):
        pass
    long_ago = time.time() - claims.SILENT_S - 5
    os.utime(file, (long_ago, long_ago))
    with Claim(tmp_path):
        pass


def test_claim__heart_beats_while_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 0.05)
    with Claim(tmp_path) as claim:
        os.utime(claim.file, (1, 1))
        deadline = time.monotonic() + 10
        while claim.file.stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert claim.file.stat().st_mtime > 2


def test_claim__half_written_file_is_given_time(tmp_path: Path) -> None:
    file = left_behind(tmp_path)
    file.write_text('{"host"')
    with pytest.raises(ClaimedElsewhere), Claim(tmp_path):
        pass
    os.utime(file, (1, 1))
    with Claim(tmp_path):
        pass


def test_claim__of_many_at_once_one_gets_a_dead_one(tmp_path: Path) -> None:
    left_behind(tmp_path)
    start, got, release = threading.Barrier(8), [], threading.Event()

    def attempt() -> None:
        start.wait()
        try:
            with Claim(tmp_path):
                got.append(1)
                release.wait(10)
        except ClaimedElsewhere:
            return

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while sum(thread.is_alive() for thread in threads) > 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    release.set()
    for thread in threads:
        thread.join()
    assert len(got) <= 1  # with the dead one half replaced all may give up for now; never do two go on
    with Claim(tmp_path):
        pass


def test_claim__unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="another project"), Claim(tmp_path / "file" / "run"):
        pass
