"""The run folder of a prediction: pictures, videos, label files, crops, JSON; each written aside and renamed."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from ultralytics.engine.results import Results
from ultralytics.utils.files import increment_path

from kd_yolo.config import Strict
from kd_yolo.errors import OutputError
from kd_yolo.files import check_writable, write_json, written_aside
from kd_yolo.inspection.sources import Frame

Image = NDArray[np.uint8]
PROJECT = "runs/anomaly"


class Saving(Strict):
    """What is written of a prediction."""

    save: bool = True
    save_txt: bool = False
    save_conf: bool = False
    save_crop: bool = False
    save_json: bool = False
    project: str | None = None
    name: str | None = None
    exist_ok: bool = False

    @property
    def writes(self) -> bool:
        """Whether anything is written."""
        return self.save or self.save_txt or self.save_crop or self.save_json


def run_folder(project: str | None, name: str | None, default: str, exist_ok: bool = False) -> Path:
    """Return a new, writable run folder: ``predict``, ``predict2``, ...

    Args:
        project: Folder of runs; default ``runs/anomaly``.
        name: Name of the run.
        default: The name where none is given.
        exist_ok: Take the folder as it is.

    Raises:
        OutputError: It cannot be written.
    """
    root = Path(project or PROJECT).expanduser().resolve()
    folder = Path(increment_path(root / (name or default), exist_ok=exist_ok, sep=""))
    check_writable(folder)
    return folder


class RunWriter:
    """Writes results as Ultralytics lays them out: pictures in the run folder, ``labels/``, ``crops/`` and ``json/``.

    Args:
        saving: What is written.
        default: Name of the run where none is given.

    Attributes:
        save_dir: The run folder, or None when nothing is written.

    Raises:
        OutputError: The folder cannot be written.
    """

    def __init__(self, saving: Saving, default: str = "predict") -> None:
        self.saving = saving
        self.save_dir: Path | None = None
        if saving.writes:
            self.save_dir = run_folder(saving.project, saving.name, default, saving.exist_ok)
        self._bases: set[str] = set()
        self._of_slot: dict[str, str] = {}
        self._videos: dict[str, tuple[Any, Path, Path]] = {}

    def write(self, frame: Frame, result: Results) -> None:
        """Write what is wanted of one result, which has a ``to_dict`` where JSON is wanted.

        Raises:
            OutputError: A file cannot be written.
        """
        if self.save_dir is None:
            return
        result.save_dir = str(self.save_dir)
        base = self._base(frame)
        stem = base if frame.number is None else f"{base}_{frame.number}"
        if self.saving.save:
            self._write_picture(frame, base, np.asarray(result.plot()))
        if self.saving.save_txt:
            self._write_labels(self.save_dir / "labels" / f"{stem}.txt", result)
        if self.saving.save_crop:
            result.save_crop(self.save_dir / "crops", f"{stem}.jpg")
        if self.saving.save_json:
            write_json(self.save_dir / "json" / f"{stem}.json", result.to_dict())

    def close(self) -> None:
        """Finish the videos."""
        for writer, aside, path in self._videos.values():
            writer.release()
            os.replace(aside, path)
        self._videos.clear()

    def _base(self, frame: Frame) -> str:
        """Return a stem that no other image of this run has: a.png and a.jpg become a and a-2."""
        if frame.slot in self._of_slot and frame.number is not None:
            return self._of_slot[frame.slot]
        stem = Path(frame.path).stem or "image"
        base, count = stem, 1
        while base in self._bases:
            count += 1
            base = f"{stem}-{count}"
        self._bases.add(base)
        self._of_slot[frame.slot] = base
        return base

    def _write_picture(self, frame: Frame, base: str, picture: Image) -> None:
        folder = self.save_dir or Path()
        if frame.number is None:
            write_picture(folder / f"{base}.jpg", picture)
            return
        if base not in self._videos:
            self._videos[base] = _new_video(folder, base, frame.fps, picture)
        self._videos[base][0].write(picture)

    def _write_labels(self, path: Path, result: Results) -> None:
        """Write the label file, also an empty one: an image that was looked at is told from one that was not."""
        with written_aside(path) as aside:
            aside.write_text("", encoding="utf-8")
            result.save_txt(aside, save_conf=self.saving.save_conf)


def write_picture(path: Path, bgr: Image) -> None:
    """Write a picture, aside and renamed.

    Raises:
        OutputError: It cannot be written.
    """
    done, code = cv2.imencode(path.suffix, bgr)
    if not done:
        raise OutputError(f"{path}: OpenCV cannot encode {path.suffix}")
    with written_aside(path) as aside:
        aside.write_bytes(code.tobytes())


def _new_video(folder: Path, base: str, fps: float, picture: Image) -> tuple[Any, Path, Path]:
    suffix, code = {"darwin": (".mp4", "avc1"), "win32": (".avi", "WMV2")}.get(sys.platform, (".avi", "MJPG"))
    aside, path = folder / f".{base}.part{suffix}", folder / f"{base}{suffix}"
    with contextlib.suppress(cv2.error):
        size = (picture.shape[1], picture.shape[0])
        writer = cv2.VideoWriter(str(aside), cv2.VideoWriter.fourcc(*code), fps, size)
        if writer.isOpened():
            return writer, aside, path
    raise OutputError(f"{path}: OpenCV cannot write this video; give save=false")
