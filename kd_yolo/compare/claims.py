"""Which process does a run, when several processes or machines share a folder.

The claim is a file with host, process and training process. It is alive while one of these processes lives (same host)
or while its time stamp is renewed (other hosts). The clock is the file system's, not the machines'.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from kd_yolo.errors import OutputError
from kd_yolo.files import written_aside

CLAIM_FILE = "claim.json"
BEAT_S = 10.0
SILENT_S = 120.0  # without a beat for so long, a claim of another host is given up for lost
TAKEOVER_S = 30.0


class ClaimedElsewhere(Exception):  # noqa: N818 - a state, not an error
    """Another living process holds the claim; the message says which."""


class Claim:
    """A held claim; a context manager. A thread renews its time stamp.

    Raises:
        ClaimedElsewhere: On entering, when another living process holds it.
        OutputError: On entering, when the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / CLAIM_FILE
        self._content: dict[str, Any] = {"host": socket.gethostname(), **_identity(os.getpid()), "id": uuid.uuid4().hex}
        self._left = threading.Event()
        self._beater: threading.Thread | None = None

    def __enter__(self) -> Claim:
        """Take the claim."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if not self._created() and not self._taken_over():
                raise ClaimedElsewhere(f"process {_shown(_read(self.file))} is doing it")
        except OSError as error:
            raise OutputError(f"{self.file}: cannot be written ({error.strerror}); choose another project=") from error
        self._beater = threading.Thread(target=self._beat, daemon=True)
        self._beater.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the claim back."""
        self._left.set()
        if self._beater is not None:
            self._beater.join()
        if _read(self.file).get("id") == self._content["id"]:
            self.file.unlink(missing_ok=True)

    def add_child(self, pid: int) -> None:
        """Record the training process: should this process be killed, the claim lives as long as that one."""
        self._content["child"] = _identity(pid)
        with written_aside(self.file) as aside:
            aside.write_text(json.dumps(self._content), encoding="utf-8")

    def _created(self) -> bool:
        try:
            handle = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(self._content))
        return True

    def _taken_over(self) -> bool:
        """Replace a dead claim; the right to do so is a second exclusive file, held for an instant."""
        if not _is_dead(self.file):
            return False
        right = self.file.with_name(f"{self.file.name}.takeover")
        if right.exists() and _age_s(right) > TAKEOVER_S:  # its holder was killed in that instant
            right.unlink(missing_ok=True)
        try:
            os.close(os.open(right, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        try:
            if not _is_dead(self.file):
                return False
            with written_aside(self.file) as aside:
                aside.write_text(json.dumps(self._content), encoding="utf-8")
            return True
        finally:
            right.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._left.wait(BEAT_S):
            try:
                os.utime(self.file)
            except OSError:  # a network file system that is away for a moment; the next beat tells again
                continue


def _identity(pid: int) -> dict[str, Any]:
    """Return what names a process beyond the reuse of its number."""
    try:
        return {"pid": pid, "created": psutil.Process(pid).create_time()}
    except psutil.Error:
        return {"pid": pid, "created": None}


def _is_dead(file: Path) -> bool:
    content = _read(file)
    if not content:  # being written, or left by a process that died while writing
        return file.exists() and _age_s(file) > TAKEOVER_S
    if content.get("host") == socket.gethostname():
        return not any(_lives(one) for one in (content, content.get("child") or {}))
    return _age_s(file) > SILENT_S


def _lives(identity: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(int(identity["pid"]))
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        created = identity.get("created")
        return created is None or abs(process.create_time() - created) < 2
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _age_s(file: Path) -> float:
    """Return seconds since a file was touched, by the clock of its file system."""
    probe = file.with_name(f".clock-{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime - file.stat().st_mtime
    except OSError:
        return 0.0  # gone in the meantime: the next attempt will tell
    finally:
        probe.unlink(missing_ok=True)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _shown(content: dict[str, Any]) -> str:
    return f"{content.get('pid', '?')} on {content.get('host', '?')}"
