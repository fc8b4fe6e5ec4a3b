"""Write results so that a crash never leaves half a file: write aside, then rename."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kd_yolo.errors import OutputError


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` on success, remove it on failure.

    Raises:
        OutputError: The folder cannot be created or written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent}: cannot create this folder ({error.strerror}); choose another") from error
    aside = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield aside
        with aside.open("rb") as stream:
            os.fsync(stream.fileno())  # the rename must never reach the disk before the content
        os.replace(aside, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``; rename it to ``path`` on success, remove it on failure.

    A folder that was there before is replaced only then, and comes back if the rename fails.

    Raises:
        OutputError: The folder cannot be created or written to, or a file has that name.
    """
    path = path.absolute()
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path}: is a file, but a folder is to be written there; choose another name")
    aside, before = (path.with_name(f".{path.name}.{os.getpid()}.{word}") for word in ("part", "before"))
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        if path.exists():
            os.replace(path, before)
        try:
            os.replace(aside, path)
        except OSError:
            if before.exists():
                os.replace(before, path)
            raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({_reason(error)})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if path.exists():  # otherwise what was there before could not be put back, and is all that there is
            shutil.rmtree(before, ignore_errors=True)


def _reason(error: OSError) -> str:
    """Return what went wrong; ``shutil.copytree`` gathers one reason a file in a list."""
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
        return str(error.args[0][0][2])
    return error.strerror or str(error)


def absolute(word: str | bool) -> str:
    """Return an existing file's absolute path, for runs in other folders; a name stays a name."""
    path = Path(str(word)).expanduser()
    return str(path.absolute()) if path.is_file() else str(word)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically, indented and with a final newline."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal text; of a folder, that of its files' names and hashes."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()} {sha256(file)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def size_mb(path: Path) -> float:
    """Return the size of a file, or of all files in a folder, in 10^6 bytes."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files) / 1e6


def check_writable(folder: Path) -> None:
    """Create ``folder`` and prove that a file can be written into it.

    Raises:
        OutputError: It cannot; the message names the folder.
    """
    probe = folder / f".write-test-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
    except OSError as error:
        raise OutputError(f"{folder}: not writable ({error.strerror}); choose another with project=FOLDER") from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
