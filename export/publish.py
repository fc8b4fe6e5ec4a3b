"""Give a finished artifact its name, in one step, its proof beside it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kd_yolo.files import folder_aside, write_json, written_aside


def publish(made: Path, path: Path, parity_path: Path, content: Any) -> None:
    """Copy an artifact to its final name; it never stands there without its proof, nor the proof without it.

    Args:
        made: File or folder in the temporary folder.
        path: Final name.
        parity_path: JSON file beside it.
        content: Plain data of the proof.

    Raises:
        OutputError: It cannot be written; what was there before stays.
    """
    with _kept(parity_path):
        if made.is_dir():
            with folder_aside(path) as aside:
                shutil.copytree(made, aside, dirs_exist_ok=True)
                write_json(parity_path, content)
        else:
            with written_aside(path) as aside:
                aside.write_bytes(made.read_bytes())
                write_json(parity_path, content)


@contextlib.contextmanager
def _kept(path: Path) -> Iterator[None]:
    """Bring back an old proof when the artifact that a new one speaks of did not get its name."""
    before = path.read_bytes() if path.is_file() else None
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if before is None:
                path.unlink(missing_ok=True)
            elif path.read_bytes() != before:
                with written_aside(path) as aside:
                    aside.write_bytes(before)
        raise
