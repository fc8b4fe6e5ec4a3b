"""Where images to inspect come from: everything that Ultralytics reads, as frames in batches."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PillowImage
from ultralytics.data.build import load_inference_source
from ultralytics.data.loaders import LoadImagesAndVideos, LoadStreams

from kd_yolo.errors import ConfigError, DataError

STREAM_FPS = 30.0  # what Ultralytics writes streams at
SHOWN = 120


@dataclass(frozen=True)
class Frame:
    """One image.

    Attributes:
        image: BGR, uint8 of shape (H, W, 3).
        path: File it is from, or a made-up name such as ``image0.jpg``.
        number: Which frame of a video or stream, from 1; None for a still image.
        slot: What frames of one video or stream have in common.
        fps: Frames per second of that video.
    """

    image: NDArray[np.uint8]
    path: str
    number: int | None = None
    slot: str = ""
    fps: float = STREAM_FPS


def read_frames(source: Any, batch: int = 1, vid_stride: int = 1) -> Iterator[list[Frame]]:
    """Read a source in batches.

    Args:
        source: Image, folder, pattern with ``*``, text file of paths, video, camera number, stream address, BGR array,
            Pillow image, tensor (B, 3, H, W), or a list of them.
        batch: Images a batch; of streams, one image of each at a time.
        vid_stride: Every which frame of a video is read.

    Yields:
        Lists of frames.

    Raises:
        ConfigError: There is nothing at the source.
        DataError: Nothing in it can be read, or a stream breaks off.
    """
    check_source(source)
    if isinstance(source, torch.Tensor):
        source = _arrays(source)
    parts = list(source) if isinstance(source, (list, tuple)) else [source]
    chains = (_renamed(_read(part, 1, vid_stride), index) for index, part in enumerate(parts))
    groups = _read(parts[0], batch, vid_stride) if len(parts) == 1 else _grouped(itertools.chain(*chains), batch)
    empty = True
    for group in groups:
        empty = False
        yield group
    if empty:
        raise DataError(f"source={_shown(source)}: no image in it can be read; look at the warnings above")


def check_source(source: Any) -> None:
    """Refuse what cannot be a source, before anything is opened.

    Raises:
        ConfigError: A file or folder is not there, or the type is wrong.
    """
    if isinstance(source, torch.Tensor):
        _check_tensor(source)
        return
    parts = list(source) if isinstance(source, (list, tuple)) else [source]
    if not parts:
        raise ConfigError("source=[]: the list is empty; give at least one image")
    for part in parts:
        if isinstance(part, (str, Path, int)) and not isinstance(part, bool):
            _check_place(str(part))
        elif part is None:
            raise ConfigError("missing key 'source'; give an image, folder, video or camera number")
        elif isinstance(part, np.ndarray):
            if part.dtype != np.uint8 or part.ndim not in {2, 3}:
                raise ConfigError(f"source: an array must be uint8 of shape (H, W, 3), not {part.dtype} {part.shape}")
        elif not isinstance(part, PillowImage.Image):
            raise ConfigError(f"source: {type(part).__name__} is no image, path, array or list of them")


def _check_place(text: str) -> None:
    if not text:
        raise ConfigError("missing key 'source'; give an image, folder, video or camera number")
    elsewhere = "://" in text or "*" in text or text.isdigit() or text.lower().split(" ")[0] == "screen"
    if not elsewhere and not Path(text).expanduser().exists():
        raise ConfigError(f"source={text}: no such file or folder")


def _check_tensor(images: torch.Tensor) -> None:
    """Refuse anything but RGB images in [0, 1]."""
    shaped = images.ndim in {3, 4} and images.shape[-3] == 3 and images.numel() > 0
    if not shaped or not images.is_floating_point() or not 0 <= float(images.min()) <= float(images.max()) <= 1:
        raise ConfigError("source: a tensor must be (B, 3, H, W), RGB, float in [0, 1]")


def _read(source: Any, batch: int, vid_stride: int) -> Iterator[list[Frame]]:
    """Yield the batches of Ultralytics' loader of one source."""
    given = str(Path(source).expanduser()) if isinstance(source, (str, Path)) and "://" not in str(source) else source
    with _one_line(source):
        loader = load_inference_source(given, batch=batch, vid_stride=vid_stride)
        iterator = iter(loader)
    try:
        while True:
            with _one_line(source):
                group = next(iterator, None)
            if group is None:
                return
            yield _framed(loader, *group)
    finally:
        close = getattr(loader, "close", None)
        if close is not None:
            close()


def _framed(loader: Any, paths: list[str], images: list[NDArray[np.uint8]], notes: list[str]) -> list[Frame]:
    frames = []
    for index, (path, image, note) in enumerate(zip(paths, images, notes, strict=True)):
        frame = Frame(np.ascontiguousarray(image), str(path))
        if isinstance(loader, LoadStreams):
            number, rate = loader.count + 1, loader.fps[index]
            frame = replace(frame, number=number, slot=f"{index} {path}", fps=float(rate) or STREAM_FPS)
        elif isinstance(loader, LoadImagesAndVideos) and loader.mode == "video":
            match = re.search(r"frame (\d+)/", note)
            rate = loader.fps / loader.vid_stride  # skipped frames must not shorten a written video
            frame = replace(frame, number=int(match[1]) if match else 1, slot=str(path), fps=rate or STREAM_FPS)
        elif hasattr(loader, "sct"):  # the screen
            frame = replace(frame, number=loader.frame, slot=str(path))
        frames.append(frame)
    return frames


def _renamed(groups: Iterator[list[Frame]], index: int) -> Iterator[Frame]:
    """Give the images of a list the names they would have if all were arrays: image0.jpg, image1.jpg, ..."""
    for frame in itertools.chain.from_iterable(groups):
        yield replace(frame, path=f"image{index}.jpg") if frame.path == "image0.jpg" else frame


def _grouped(frames: Iterable[Frame], batch: int) -> Iterator[list[Frame]]:
    iterator = iter(frames)
    while group := list(itertools.islice(iterator, batch)):
        yield group


def _arrays(images: torch.Tensor) -> list[NDArray[np.uint8]]:
    """Turn RGB tensors in [0, 1] into BGR arrays, in which all other sources are."""
    values = images[None] if images.ndim == 3 else images
    pixels = (values.detach().cpu().float() * 255).round().clamp(0, 255).byte().flip(1).permute(0, 2, 3, 1)
    return [one.contiguous().numpy() for one in pixels]


@contextmanager
def _one_line(source: Any) -> Iterator[None]:
    """Turn what a loader raises into one line that names the source."""
    try:
        yield
    except (OSError, TypeError, ValueError, NotImplementedError) as error:  # FileNotFoundError, ConnectionError too
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(f"source={_shown(source)}: {text}") from error


def _shown(source: Any) -> str:
    text = str(source) if isinstance(source, (str, Path, int)) else type(source).__name__
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
