"""Run one training process to its end, watch it, and measure what it used."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_yolo.compare.claims import Claim

POLL_S = 0.2
GRACE_S = 10.0


@dataclass(frozen=True)
class Usage:
    """What a process used.

    Attributes:
        exit_status: Its exit status; negative when a signal ended it.
        wall_s: Seconds by the clock.
        cpu_s: CPU seconds of it and the processes it waited for, or None where the system does not tell.
        peak_rss_mb: Largest resident memory of any one of them, 10^6 bytes, or None.
        stopped: Whether it was ended on request.
    """

    exit_status: int
    wall_s: float
    cpu_s: float | None
    peak_rss_mb: float | None
    stopped: bool


def run_child(
    command: Sequence[str], environment: Mapping[str, str], log: Path, claim: Claim, stop: threading.Event
) -> Usage:
    """Run a command with all its output appended to ``log``.

    It gets a session of its own, so that Ctrl-C in a terminal reaches this process alone, which then ends it in order.
    """
    began = time.monotonic()
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"$ {' '.join(command)}\n")
        stream.flush()
        child = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    watched = _Child(child)
    try:
        claim.add_child(child.pid)
        while not watched.has_ended() and not stop.wait(POLL_S):
            pass
    finally:  # also when this thread is interrupted: no training process may outlive it unclaimed
        stopped = child.returncode is None
        if stopped:
            watched.end()
    status = child.returncode if child.returncode is not None else 0
    return Usage(status, time.monotonic() - began, watched.cpu_s, watched.peak_rss_mb, stopped)


class _Child:
    """A child whose figures are read at the moment that it ends; Windows does not keep them."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.cpu_s: float | None = None
        self.peak_rss_mb: float | None = None

    def has_ended(self) -> bool:
        """Look once, without waiting."""
        if not hasattr(os, "wait4"):
            return self.process.poll() is not None
        if self.process.returncode is not None:
            return True
        pid, status, used = os.wait4(self.process.pid, os.WNOHANG)
        if pid == 0:
            return False
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu_s = used.ru_utime + used.ru_stime
        self.peak_rss_mb = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
        return True

    def end(self) -> None:
        """End the child and all that it started; politely first."""
        for force in (False, True):
            with contextlib.suppress(ProcessLookupError):
                self._signal(force)
            last = time.monotonic() + GRACE_S
            while time.monotonic() < last:
                if self.has_ended():
                    return
                time.sleep(POLL_S / 2)

    def _signal(self, force: bool) -> None:
        if hasattr(os, "killpg"):
            os.killpg(self.process.pid, signal.SIGKILL if force else signal.SIGTERM)
        else:
            self.process.kill()
