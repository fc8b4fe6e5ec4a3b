from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kd_yolo.data.lock import locked
from kd_yolo.errors import OutputError


def test_locked__is_free_again_afterwards(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path / "a/b.lock", patience_s=0):
            assert (tmp_path / "a/b.lock").is_file()
    assert not (tmp_path / "a/b.lock").exists()
    with pytest.raises(ValueError, match="x"), locked(tmp_path / "b.lock"):
        raise ValueError("x")
    assert not (tmp_path / "b.lock").exists()


def test_locked__one_at_a_time(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        with locked(tmp_path / "b.lock"):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.02)
            inside.remove(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


def test_locked__a_dead_holder_is_passed_over(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    (tmp_path / "b.lock").write_text(done.stdout.strip())
    with locked(tmp_path / "b.lock", patience_s=0):
        pass


def test_locked__a_living_holder_is_waited_for_and_then_named(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "b.lock"),
        pytest.raises(OutputError, match=r"b\.lock: held by another process"),
        locked(tmp_path / "b.lock", patience_s=0),
    ):
        pass


def test_locked__folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(OutputError, match=r"KD_YOLO_DATA|another data folder"), locked(tmp_path / "a/b.lock"):
        pass
