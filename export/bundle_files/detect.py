#!/usr/bin/env python3
"""Detect in images, folders, videos and cameras with the model in this folder; see README.md.

Exit status: 0 done, 2 bad input or a missing package (the last line on stderr says which), 130 stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

sys.dont_write_bytecode = True  # nothing is written into the bundle
try:
    from detector import PROVIDERS, Detector, Image, InputError, Limits, Rows  # noqa: I001 (first: it quiets OpenCV)
    import cv2
    import numpy as np
except ImportError as missing:
    remedy = "copy the whole bundle again" if missing.name == "detector" else "run: pip install -r requirements.txt"
    print(f"detect.py: {missing}; {remedy}", file=sys.stderr)
    raise SystemExit(2) from None

IMAGES = {".bmp", ".jpeg", ".jpg", ".jp2", ".mpo", ".png", ".tif", ".tiff", ".webp", ".avif", ".dng", ".heic", ".heif"}
VIDEOS = {".asf", ".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}


class Frame(NamedTuple):
    """One picture: its file or camera, its number there from 1 (an image: None), its pixels, its frames per second."""

    name: str
    number: int | None
    pixels: Image
    fps: float


def is_live(source: str) -> bool:
    """Return whether a source is a camera's number or a stream's address."""
    return source.isdigit() or "://" in source


def read_frames(source: str, channels: int) -> Iterator[Frame]:
    """Yield the pictures of an image, a folder and those below it, a video, a camera's number or a stream's address."""
    path, seen = Path(source), False
    if is_live(source):
        yield from read_video(source, channels)
        raise InputError(f"--source {source}: the camera stopped")
    if not path.exists():
        raise InputError(f"--source {source}: no such file or folder")
    if path.is_file():
        yield from read_file(path, channels)
        return
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGES | VIDEOS)
    for file in files:
        try:
            for frame in read_file(file, channels):
                yield frame
                seen = True
        except InputError as error:
            print(f"detect.py: warning: {error}", file=sys.stderr)
    if not seen:
        why = "nothing in it can be read" if files else "no images or videos in it"
        raise InputError(f"--source {source}: {why}")


def read_file(path: Path, channels: int) -> Iterator[Frame]:
    """Yield an image, or the frames of a video."""
    if path.suffix.lower() in VIDEOS:
        yield from read_video(str(path), channels)
        return
    pixels: Any = None
    with contextlib.suppress(OSError, cv2.error):
        flag = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR
        pixels = cv2.imdecode(np.fromfile(path, np.uint8), flag)
    if pixels is None:
        raise InputError(f"{path}: cannot be read as an image")
    yield Frame(str(path), None, pixels.reshape(*pixels.shape[:2], channels), 0.0)


def read_video(source: str, channels: int) -> Iterator[Frame]:
    """Yield the frames of a video file, a camera or a stream."""
    capture: Any = cv2.VideoCapture(int(source) if source.isdigit() else source)
    number, fps = 0, capture.get(cv2.CAP_PROP_FPS)
    try:
        while (read := capture.read())[0]:
            number += 1
            pixels = cv2.cvtColor(read[1], cv2.COLOR_BGR2GRAY)[..., None] if channels == 1 else read[1]
            yield Frame(source, number, pixels, fps if 0 < fps < 1000 else 25.0)
    finally:
        capture.release()
    if not number:
        raise InputError(f"{'camera ' if source.isdigit() else ''}{source}: cannot be opened, or shows no picture")


class Saver:
    """Writes annotated images and videos into a folder, below it as they lay below the source."""

    def __init__(self, folder: str, source: str) -> None:
        """Take the folder to write to and the source that the pictures come from."""
        self.folder, self.root = Path(folder), Path(source) if Path(source).is_dir() else Path(source).parent
        self.video: tuple[str, Any] = ("", None)

    def add(self, frame: Frame, rows: Rows, names: dict[int, str]) -> None:
        """Draw the detections of a picture and write it."""
        live = is_live(frame.name)
        target = self.folder / ("camera.mp4" if live else Path(frame.name).relative_to(self.root))
        kinds = {".jpg", ".jpeg", ".png"} if frame.number is None else {".mp4"}
        if target.suffix.lower() not in kinds:
            target = target.with_name(target.name + (".png" if frame.number is None else ".mp4"))
        pixels = draw(frame.pixels, rows, names)
        try:
            if not live and target.exists() and target.samefile(frame.name):
                raise InputError(f"--save {self.folder}: would overwrite {frame.name}; choose another folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            if frame.number is None:
                cv2.imencode(target.suffix, pixels)[1].tofile(target)
                return
        except OSError as error:
            raise InputError(f"--save {target}: cannot be written ({error.strerror or error})") from error
        if self.video[0] != frame.name:
            self.close()
            size, code = pixels.shape[1::-1], cv2.VideoWriter.fourcc(*"mp4v")
            self.video = (frame.name, cv2.VideoWriter(str(target), code, frame.fps, size))
        if not self.video[1].isOpened():
            raise InputError(f"--save {target}: cannot be written as a video")
        self.video[1].write(pixels)

    def close(self) -> None:
        """Finish the video that is being written."""
        if self.video[1] is not None:
            self.video[1].release()


def draw(pixels: Image, rows: Rows, names: dict[int, str]) -> Any:
    """Return a copy of a picture with its detections drawn in, one colour per class."""
    drawn = cv2.cvtColor(pixels, cv2.COLOR_GRAY2BGR) if pixels.shape[2] == 1 else pixels.copy()
    for x1, y1, x2, y2, score, label in rows.tolist():
        hue = np.array([[[int(label) * 47 % 180, 200, 255]]], np.uint8)
        colour = cv2.cvtColor(hue, cv2.COLOR_HSV2BGR)[0, 0].tolist()
        cv2.rectangle(drawn, (round(x1), round(y1)), (round(x2), round(y2)), colour, 2)
        place = (round(x1), max(round(y1) - 4, 12))
        cv2.putText(drawn, f"{names[int(label)]} {score:.2f}", place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, colour, 1)
    return drawn


def show(frame: Frame, rows: Rows, spent: dict[str, float], names: dict[int, str], as_json: bool) -> None:
    """Print what was found in one picture."""
    found: list[dict[str, Any]] = [
        {"class": names[int(row[5])], "confidence": round(row[4], 6), "box_xyxy_px": [round(v, 3) for v in row[:4]]}
        for row in rows.tolist()
    ]
    if as_json:
        times = {key: round(value, 3) for key, value in spent.items()}
        line = {"image": frame.name, "frame": frame.number, "detections": found, "milliseconds": times}
        print(json.dumps(line), flush=True)
        return
    counted = ", ".join(f"{count} {name}" for name, count in Counter(item["class"] for item in found).items())
    where = frame.name if frame.number is None else f"{frame.name} frame {frame.number}"
    print(f"{where}: {counted or 'nothing'} ({sum(spent.values()):.1f} ms)", flush=True)


def benchmark(detector: Detector, images: list[Image], calls: int, limits: Limits, as_json: bool) -> None:
    """Time ``calls`` calls after a warm-up of a tenth and print milliseconds per image as percentiles."""
    groups = [images[index : index + detector.batch] for index in range(0, len(images), detector.batch)]
    spent = [detector.detect(groups[index % len(groups)], limits)[1] for index in range(-max(3, calls // 10), calls)]
    table = np.array([[*times.values(), sum(times.values())] for times in spent[-calls:]])
    rows = dict(zip(("pre", "infer", "post", "all"), np.percentile(table, (50, 90, 99), axis=0).T.round(3).tolist()))  # noqa: B905
    if as_json:
        figures = {key: {"p50": row[0], "p90": row[1], "p99": row[2]} for key, row in rows.items()}
        print(json.dumps({"provider": detector.provider, "calls": calls, "milliseconds": figures}))
        return
    print(f"{'ms per image':<14}{'p50':>9}{'p90':>9}{'p99':>9}")
    for key, row in rows.items():
        print(f"{key:<14}{row[0]:>9.3f}{row[1]:>9.3f}{row[2]:>9.3f}")


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError instead of printing the usage too."""
        raise InputError(f"{message}; see --help")


def number(low: float, high: float, kind: type[float] = float) -> Any:
    """Return a converter of command-line words to numbers from ``low`` to ``high``."""

    def convert(word: str) -> float:
        with contextlib.suppress(ValueError):
            value = kind(word)
            if low <= value <= high:
                return value
        raise argparse.ArgumentTypeError(f"'{word}' is not a number from {low:g} to {high:g}")

    return convert


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="detect.py", description="Detect with the model in this folder.")
    parser.add_argument("--source", required=True, help="image, folder, video, camera number or stream address")
    parser.add_argument("--conf", type=number(0, 1), help="lowest confidence [0.25]")
    parser.add_argument("--iou", type=number(0, 1), help="overlap above which NMS drops a box [0.7]")
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="classes to keep, names or numbers [all]")
    parser.add_argument("--save", metavar="FOLDER", help="write annotated images or videos there")
    parser.add_argument("--json", action="store_true", help="print one JSON object a picture")
    parser.add_argument("--provider", choices=["auto", *PROVIDERS], default="auto", help="what computes [auto]")
    parser.add_argument("--threads", type=number(0, 1024, int), default=0, help="CPU threads [ONNX Runtime's choice]")
    parser.add_argument("--benchmark", type=number(1, 1e6, int), metavar="N", help="time N calls on these images")
    return parser.parse_args(words)


def limits_of(options: argparse.Namespace, detector: Detector) -> Limits:
    """Return what to keep; refuses what the model cannot do."""
    known = {name: key for key, name in detector.names.items()} | {str(key): key for key in detector.names}
    for word in options.classes or ():
        if word not in known:
            raise InputError(f"--classes {word}: unknown class (known: {', '.join(detector.names.values())})")
    own = detector.limits
    limits = Limits(
        own.confidence if options.conf is None else options.conf,
        own.iou if options.iou is None else options.iou,
        [known[word] for word in options.classes] if options.classes else None,
    )
    if detector.head == "nms inside" and (limits.confidence < own.confidence or limits.iou != own.iou):
        fixed = f"--conf {own.confidence:g} or more and --iou {own.iou:g}"
        raise InputError(f"this model selects inside with fixed limits; use {fixed}, or export it without NMS inside")
    return limits


def run(options: argparse.Namespace) -> None:
    """Detect in everything that the source gives."""
    detector = Detector(Path(__file__).resolve().parent, options.provider, options.threads)
    limits = limits_of(options, detector)
    height, width = detector.canvas
    print(f"detect.py: {height}x{width} on {detector.provider} ({options.provider})", file=sys.stderr)
    frames = read_frames(options.source, detector.channels)
    if options.benchmark:
        images = [frame.pixels for frame in islice(frames, min(options.benchmark * detector.batch, 200))]
        benchmark(detector, images, options.benchmark, limits, options.json)
        return
    saver = Saver(options.save, options.source) if options.save else None
    try:
        while group := list(islice(frames, detector.batch)):
            found, spent = detector.detect([frame.pixels for frame in group], limits)
            for index, frame in enumerate(group):
                show(frame, found[index], spent, detector.names, options.json)
                if saver:
                    saver.add(frame, found[index], detector.names)
    finally:
        if saver:
            saver.close()


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a console need not know the letters of a file's name
    try:
        run(parse(words))
    except InputError as error:
        print(f"detect.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("detect.py: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
