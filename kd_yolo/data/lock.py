"""One process at a time: runs that start together must not make the same data set twice over each other."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from kd_yolo.errors import OutputError

POLL_S = 0.2


@contextlib.contextmanager
def locked(file: Path, patience_s: float = 1800.0) -> Iterator[None]:
    """Hold a lock file; wait while another living process holds it, take it over from a dead one.

    Args:
        file: The lock file.
        patience_s: How long to wait, seconds.

    Raises:
        OutputError: The folder cannot be written to, or the lock is still held after ``patience_s``.
    """
    end = time.monotonic() + patience_s
    while not _taken(file):
        if not _holder_lives(file):
            file.unlink(missing_ok=True)
        elif time.monotonic() > end:
            raise OutputError(f"{file}: held by another process for {patience_s:g} s; stop it or remove this file")
        else:
            time.sleep(POLL_S)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _taken(file: Path) -> bool:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        if file.parent.is_dir():
            return False
        raise OutputError(f"{file.parent}: exists and is not a folder; choose another data folder") from None
    except OSError as error:
        message = f"{file.parent}: not writable ({error.strerror}); set KD_YOLO_DATA to another folder"
        raise OutputError(message) from error
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write(str(os.getpid()))
    return True


def _holder_lives(file: Path) -> bool:
    """Tell whether the process named in the file runs; a file just created and still empty counts as held."""
    try:
        text = file.read_text(encoding="utf-8")
        age_s = time.time() - file.stat().st_mtime
    except OSError:
        return True  # gone in the meantime: the next attempt will tell
    if not text.strip().isdigit():
        return age_s < 10
    return bool(psutil.pid_exists(int(text)))
