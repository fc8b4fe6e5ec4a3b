#!/usr/bin/env python3
"""Find anomalies in images and folders with the model in this folder; see README.md.

Needs Python 3.9 or newer with numpy, opencv-python and onnxruntime. Exit status: 0 done, 2 bad input or a missing
package (the last line on stderr says which), 130 stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")  # what cannot be read is said in one line, below
try:
    import numpy as np  # noqa: I001 (before OpenCV, which prints advice of its own when it is missing)
    import cv2
    import onnxruntime
    from numpy.typing import NDArray
except ImportError as missing:
    print(f"detect.py: {missing}; run: pip install -r requirements.txt", file=sys.stderr)
    raise SystemExit(2) from None

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
IMAGES = {".bmp", ".jpeg", ".jpg", ".jp2", ".png", ".tif", ".tiff", ".webp"}
BITS = 22  # of the fixed-point weights with which images are shrunk
BLEND = 0.5  # share of the heat map in an overlay

Image = NDArray[np.uint8]  # (H, W, 3) BGR
Map = NDArray[np.float32]  # (H, W)


class InputError(Exception):
    """Something that whoever called can put right; printed as one line."""


class Finding(NamedTuple):
    """What the model says of one image.

    Attributes:
        score: Of the image.
        threshold: Scores above it are anomalous.
        is_anomaly: Whether it is above.
        normalised: The score for display, 0 to 1, where 0.5 is the threshold.
        map: Anomaly map at the image's size.
        mask: Pixels above the pixel threshold.
    """

    score: float
    threshold: float
    is_anomaly: bool
    normalised: float
    map: Map
    mask: NDArray[np.bool_]


class Detector:
    """The model of a bundle, opened; raises InputError for a missing or damaged file or a missing provider."""

    def __init__(self, folder: Path, provider: str = "cpu", threads: int = 0) -> None:
        """Take the bundle's folder, a key of ``PROVIDERS``, and CPU threads (0: ONNX Runtime decides)."""
        model = folder / "model.onnx"
        try:
            about = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
            told = about["anomaly"]
            self.canvas, self.batch = tuple(about["canvas"]), int(about["batch"])
            self.threshold, self.pixel_threshold = float(told["threshold_image"]), float(told["threshold_pixel"])
            self.width = max(float(told["score_max"]) - float(told["score_min"]), float(np.finfo(np.float32).tiny))
            self.top = float(told["top_fraction"]) if told["score"] == "topk" else None
            intact = hashlib.sha256(model.read_bytes()).hexdigest() == about["model_sha256"]
        except OSError as error:
            raise InputError(f"{error.filename}: {error.strerror}; copy the whole bundle again") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder / 'metadata.json'}: damaged ({error!r}); copy the whole bundle again") from error
        if not intact:
            raise InputError(f"{model}: damaged, or not the model of metadata.json; copy the whole bundle again")
        self.session = open_session(model, provider, threads)
        self.entry = self.session.get_inputs()[0].name

    def detect(self, image: Image, threshold: float | None = None) -> Finding:
        """Return what the model says of one image; ``threshold`` replaces the model's own image threshold."""
        pixels = np.zeros((self.batch, 3, *self.canvas), np.float32)  # black ones fill a fixed batch
        pixels[0] = stretch(image, self.canvas)[..., ::-1].transpose(2, 0, 1)
        try:
            found = self.session.run(None, {self.entry: pixels / np.float32(255)})[0][0, 0]
        except Exception as error:  # onnxruntime's classes share no public base
            raise InputError(f"the model failed: {str(error).splitlines()[0][:200]}") from error
        score = self.score(found)
        limit = self.threshold if threshold is None else threshold
        shown = min(max((score - limit) / self.width + 0.5, 0.0), 1.0)
        sized: Any = cv2.resize(found, (image.shape[1], image.shape[0]), interpolation=cv2.INTER_LINEAR)
        return Finding(score, limit, score > limit, shown, sized, sized > self.pixel_threshold)

    def score(self, found: Map) -> float:
        """Return the score of an image from its map on the canvas."""
        if self.top is None:
            return float(found.max())
        values = np.sort(found, axis=None)[::-1][: max(1, math.ceil(self.top * found.size))]
        return float(values.mean())


def open_session(model: Path, provider: str, threads: int) -> Any:
    """Return an ONNX Runtime session on the provider that was asked for, or nothing."""
    wanted = PROVIDERS[provider]
    available = onnxruntime.get_available_providers()
    if wanted not in available:
        raise InputError(f"--provider {provider}: this onnxruntime lacks it (it has: {', '.join(available)})")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    chosen = (wanted, {"use_tf32": "0"} if provider == "cuda" else {})  # float32 as it was proven
    try:
        session = onnxruntime.InferenceSession(str(model), options, providers=[chosen])
    except Exception as error:  # onnxruntime's classes share no public base
        raise InputError(f"cannot open {model}: {str(error).splitlines()[0][:200]}") from error
    if session.get_providers()[0] != wanted:
        raise InputError(f"--provider {provider}: onnxruntime could not start it; are its libraries installed?")
    return session


def stretch(image: Image, canvas: Sequence[int]) -> Image:
    """Resize to (height, width) without keeping proportions: bilinear with antialiasing, as in training.

    The weights are those of Pillow's bilinear filter in its fixed-point arithmetic: pixels are the same, or differ by
    one level where a newer Pillow takes the axes in another order.
    """
    for axis, size in ((1, canvas[1]), (0, canvas[0])):
        if image.shape[axis] != size:
            image = shrink(image, axis, size)
    return image


def shrink(image: Image, axis: int, size: int) -> Image:
    """Resize one axis of an image."""
    ratio = image.shape[axis] / size
    reach = max(ratio, 1.0)  # of the triangle to each side, in pixels of the image
    centres = (np.arange(size) + 0.5) * ratio
    first = np.maximum((centres - reach + 0.5).astype(np.int64), 0)
    last = np.minimum((centres + reach + 0.5).astype(np.int64), image.shape[axis])
    taps = int((last - first).max())
    places = first[:, None] + np.arange(taps)
    weights = np.clip(1 - np.abs((places - centres[:, None] + 0.5) * (1 / reach)), 0, None)
    weights[places >= last[:, None]] = 0
    weights /= np.cumsum(weights, 1)[:, -1:]  # summed one by one, as Pillow does: the last bit counts
    fixed = np.floor(0.5 + weights * (1 << BITS)).astype(np.int32)
    shape = [1, 1, 1]
    shape[axis] = size
    total: Any = np.int32(1 << (BITS - 1))
    for tap in range(taps):
        source = np.take(image, np.minimum(places[:, tap], image.shape[axis] - 1), axis)
        total = total + source.astype(np.int32) * fixed[:, tap].reshape(shape)
    return np.clip(total >> BITS, 0, 255).astype(np.uint8)


def overlay(image: Image, finding: Finding, pixel_threshold: float, width: float) -> Image:
    """Return an image with its heat map over it and the pixels above the threshold outlined."""
    shown = np.clip((finding.map - pixel_threshold) / width + 0.5, 0, 1)
    heat: Any = cv2.applyColorMap((255 * shown).astype(np.uint8), cv2.COLORMAP_JET)
    picture: Any = cv2.addWeighted(image, 1 - BLEND, heat, BLEND, 0)
    edges, _ = cv2.findContours(finding.mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(picture, edges, -1, (255, 255, 255), max(1, round(min(image.shape[:2]) / 300)))
    result: Image = picture
    return result


def read_images(source: str) -> Iterator[tuple[Path, Image]]:
    """Yield an image, or the images of a folder and those below it."""
    path, seen = Path(source), False
    if not path.exists():
        raise InputError(f"--source {source}: no such file or folder")
    if path.is_file():
        yield path, read_image(path)
        return
    for file in sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGES):
        try:
            image = read_image(file)
        except InputError as error:
            print(f"detect.py: warning: {error}", file=sys.stderr)
            continue
        seen = True
        yield file, image
    if not seen:
        raise InputError(f"--source {source}: no images in it that can be read")


def read_image(path: Path) -> Image:
    """Return an image as color, whatever it is."""
    pixels: Any = None
    with contextlib.suppress(OSError, cv2.error):
        pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise InputError(f"{path}: cannot be read as an image")
    found: Image = pixels
    return found


def save(folder: Path, file: Path, source: str, picture: Image) -> None:
    """Write an overlay below ``folder`` as its image lay below the source."""
    root = Path(source) if Path(source).is_dir() else Path(source).parent
    target = (folder / file.relative_to(root)).with_suffix(".png")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(cv2.imencode(".png", picture)[1].tobytes())
    except OSError as error:
        raise InputError(f"--save {target}: {error.strerror}") from error


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError instead of printing the usage too."""
        raise InputError(f"{message}; see --help")


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="detect.py", description="Find anomalies with the model in this folder.")
    parser.add_argument("--source", required=True, help="image, or folder with those below it")
    parser.add_argument("--threshold", type=float, help="image scores above it are anomalous [the model's own]")
    parser.add_argument("--save", metavar="FOLDER", help="write heat-map overlays there, as PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON object an image")
    parser.add_argument("--provider", choices=list(PROVIDERS), default="cpu", help="what computes [cpu]")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads [ONNX Runtime's choice]")
    return parser.parse_args(words)


def run(options: argparse.Namespace) -> None:
    """Judge everything that the source gives."""
    if options.threads < 0 or (options.threshold is not None and not math.isfinite(options.threshold)):
        raise InputError("--threads must be 0 or more, and --threshold a number")
    detector = Detector(Path(__file__).resolve().parent, options.provider, options.threads)
    for file, image in read_images(options.source):
        start = time.perf_counter()
        finding = detector.detect(image, options.threshold)
        spent = 1e3 * (time.perf_counter() - start)
        if options.save:
            picture = overlay(image, finding, detector.pixel_threshold, detector.width)
            save(Path(options.save), file, options.source, picture)
        area = float(finding.mask.mean())
        if options.json:
            told = {"score": finding.score, "threshold": finding.threshold, "is_anomaly": finding.is_anomaly}
            more = {"normalised": finding.normalised, "area": area, "milliseconds": round(spent, 3)}
            print(json.dumps({"image": str(file), **told, **more}), flush=True)
            continue
        verdict = "anomaly" if finding.is_anomaly else "normal"
        numbers = f"score {finding.score:.6g}, threshold {finding.threshold:.6g}, area {area:.2%}, {spent:.1f} ms"
        print(f"{file}: {verdict} ({numbers})", flush=True)


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
