"""Run the model in this folder: ``Detector(folder).detect([image], Limits())``; see README.md.

Needs Python 3.9 or newer with numpy, opencv-python and onnxruntime; letterbox, NMS and boxes are those of Ultralytics'
predictor.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")  # what cannot be read is said in one line
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
import numpy as np  # noqa: I001 (before OpenCV, which prints advice of its own when it is missing)
import cv2
import onnxruntime
from numpy.typing import NDArray

MAX_CANDIDATES, MAX_DETECTIONS = 30000, 300  # boxes that enter NMS, boxes that leave it
CLASS_OFFSET = 7680.0  # px, moves the boxes of different classes apart, so that one NMS treats each class alone
NMS_BLOCK, PADDING = 128, 114
PROVIDERS = {
    "cuda": "CUDAExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "cpu": "CPUExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
AUTO = ("cuda", "openvino", "cpu")  # not TensorRT: it builds for minutes when it first sees a model

Image = NDArray[np.uint8]  # (H, W, 3) BGR or (H, W, 1) grey
Rows = NDArray[np.float32]  # (n, 6): x1, y1, x2, y2, score, class


class InputError(Exception):
    """Something that whoever called can put right; printed as one line."""


class Limits(NamedTuple):
    """What a detection's score is above, the overlap above which NMS drops a box, and the classes to keep."""

    confidence: float = 0.25
    iou: float = 0.7
    classes: list[int] | None = None


class Detector:
    """The model of a bundle, opened; raises InputError for a missing or damaged file or a missing provider."""

    def __init__(self, folder: Path, provider: str = "auto", threads: int = 0) -> None:
        """Take the bundle's folder, ``auto`` or a key of ``PROVIDERS``, and CPU threads (0: ONNX Runtime decides)."""
        model = folder / "model.onnx"
        try:
            about = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
            self.names = {int(key): str(name) for key, name in about["names"].items()}
            self.canvas, self.channels, self.batch = tuple(about["canvas"]), int(about["channels"]), int(about["batch"])
            self.head, self.limits = about["head"], Limits(float(about["confidence"]), float(about["iou"]))
            intact = hashlib.sha256(model.read_bytes()).hexdigest() == about["model_sha256"]
        except OSError as error:
            raise InputError(f"{error.filename}: {error.strerror}; copy the whole bundle again") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder / 'metadata.json'}: damaged ({error!r}); copy the whole bundle again") from error
        if not intact:
            raise InputError(f"{model}: damaged, or not the model of metadata.json; copy the whole bundle again")
        self.session, self.provider = open_session(model, provider, threads)
        entry = self.session.get_inputs()[0]
        self.entry, self.dtype = entry.name, np.float16 if "float16" in entry.type else np.float32

    def detect(self, images: Sequence[Image], limits: Limits) -> tuple[list[Rows], dict[str, float]]:
        """Return each image's rows in image pixels, best first, and milliseconds per image of pre, infer and post."""
        start = time.perf_counter()
        pixels = to_input(images, self.canvas, max(self.batch, len(images))).astype(self.dtype, copy=False)
        ready = time.perf_counter()
        try:
            output = self.session.run(None, {self.entry: pixels})[0].astype(np.float32, copy=False)
        except Exception as error:  # onnxruntime's classes share no public base
            raise InputError(f"{self.provider} failed: {str(error).splitlines()[0][:200]}") from error
        done = time.perf_counter()
        found = [
            to_image(select(output[index], self.head, limits), self.canvas, image.shape)
            for index, image in enumerate(images)
        ]
        spent = {"pre": ready - start, "infer": done - ready, "post": time.perf_counter() - done}
        return found, {key: 1e3 * seconds / len(images) for key, seconds in spent.items()}


def open_session(model: Path, provider: str, threads: int) -> tuple[Any, str]:
    """Return an ONNX Runtime session and the provider that really runs it: what was asked for, or nothing."""
    available = [name for name, long in PROVIDERS.items() if long in onnxruntime.get_available_providers()]
    reason = f"this onnxruntime does not have it (it has: {', '.join(available)})"
    onnxruntime.set_default_logger_severity(4)  # what goes wrong is said in one line, below
    for name in [name for name in (AUTO if provider == "auto" else (provider,)) if name in available]:
        if name in {"cuda", "tensorrt"} and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # CUDA's libraries, where they were installed as Python packages
        cache = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(model.parent / "tensorrt_cache")}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        exact = {"use_tf32": "0"} if name == "cuda" else {}  # float32 as it was proven
        chosen = (PROVIDERS[name], cache if name == "tensorrt" else exact)
        reason = "onnxruntime could not start it; are its libraries installed?"
        try:
            session = onnxruntime.InferenceSession(str(model), options, providers=[chosen], enable_fallback=0)
            if session.get_providers()[0] == chosen[0]:
                return session, chosen[0]
        except Exception as error:  # onnxruntime's classes share no public base
            reason = f"cannot open {model}: {str(error).splitlines()[0][:200]}"
    raise InputError(f"--provider {provider}: {reason}; see README.md")


def fit(shape: Sequence[int], canvas: Sequence[int]) -> tuple[int, int, int, int]:
    """Return height and width of an image scaled to fit a canvas, and the padding above and left of it."""
    ratio = min(canvas[0] / shape[0], canvas[1] / shape[1])
    height, width = max(round(shape[0] * ratio), 1), max(round(shape[1] * ratio), 1)
    return height, width, round((canvas[0] - height) / 2 - 0.1), round((canvas[1] - width) / 2 - 0.1)


def letterbox(image: Image, canvas: Sequence[int]) -> Image:
    """Scale an image to fit a canvas (height, width) and centre it on grey."""
    height, width, top, left = fit(image.shape, canvas)
    scaled: Any = image
    if image.shape[:2] != (height, width):
        scaled = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    border = (top, canvas[0] - height - top, left, canvas[1] - width - left)
    if any(border):
        scaled = cv2.copyMakeBorder(scaled, *border, cv2.BORDER_CONSTANT, value=(PADDING,) * 3)
    return scaled.reshape(canvas[0], canvas[1], image.shape[2])


def to_input(images: Sequence[Image], canvas: Sequence[int], batch: int) -> NDArray[np.float32]:
    """Return images as a model reads them: (batch, C, H, W), RGB or grey, 0..1; black ones where images lack."""
    pixels = np.zeros((batch, images[0].shape[2], canvas[0], canvas[1]), np.float32)
    for index, image in enumerate(images):
        for channel, plane in enumerate(reversed(cv2.split(letterbox(image, canvas)))):
            pixels[index, channel] = plane
    pixels /= np.float32(255)
    return pixels


def select(output: Rows, head: str, limits: Limits) -> Rows:
    """Return the detections of one image on its canvas, best first.

    Args:
        output: (4 + K, A) centre, size and class scores of all anchors where ``head`` is ``nms``; otherwise ``Rows``.
        head: ``nms``, ``nms-free`` or ``nms inside``.
        limits: What to keep.
    """
    if head == "nms":
        output = output[:, output[4:].max(0) > limits.confidence]
        centre, half, scores = output[:2], output[2:4] / np.float32(2), output[4:]
        parts = (centre - half, centre + half, scores.max(0)[None], scores.argmax(0)[None].astype(np.float32))
        output = np.concatenate(parts).T
    rows = output[output[:, 4] > limits.confidence]
    if limits.classes is not None:
        rows = rows[np.isin(rows[:, 5], limits.classes)]
    if head == "nms":
        rows = rows[np.argsort(-rows[:, 4], kind="stable")[:MAX_CANDIDATES]]
        rows = rows[nms(rows[:, :4] + rows[:, 5:] * np.float32(CLASS_OFFSET), limits.iou)]
    return rows[:MAX_DETECTIONS]


def nms(boxes: NDArray[np.float32], iou: float) -> list[int]:
    """Return which boxes (n, 4), best first, greedy non-maximum suppression keeps; at most ``MAX_DETECTIONS``.

    Within a block the boxes are taken one by one; what it kept then removes from all that follow at once.
    """
    kept: list[int] = []
    rest, most = np.arange(len(boxes)), np.array([iou])  # float64, as torchvision compares
    while rest.size and len(kept) < MAX_DETECTIONS:
        block, rest = rest[:NMS_BLOCK], rest[NMS_BLOCK:]
        over = np.triu(overlap(boxes[block], boxes[block]) > most, 1)
        alive = np.ones(len(block), bool)
        for index in np.flatnonzero(over.any(1)):
            if alive[index]:
                alive &= ~over[index]
        kept += block[alive].tolist()
        if rest.size:
            rest = rest[~(overlap(boxes[block[alive]], boxes[rest]) > most).any(0)]
    return kept[:MAX_DETECTIONS]


def overlap(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the intersection over union of boxes (n, 4) and (m, 4) as (n, m); NaN where both lack an area."""
    left, top, right, bottom = first.T[:, :, None]
    x1, y1, x2, y2 = second.T
    shared = (np.minimum(right, x2) - np.maximum(left, x1)).clip(0)
    shared *= (np.minimum(bottom, y2) - np.maximum(top, y1)).clip(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: NDArray[np.float32] = shared / ((right - left) * (bottom - top) + (x2 - x1) * (y2 - y1) - shared)
    return ratio


def to_image(rows: Rows, canvas: Sequence[int], shape: Sequence[int]) -> Rows:
    """Return rows on a canvas in the pixels of the image that was fitted to it, clipped to the image."""
    height, width, top, left = fit(shape, canvas)
    gain = np.array([width / shape[1], height / shape[0]] * 2, np.float32)
    boxes = (rows[:, :4] - np.array([left, top] * 2, np.float32)) / gain
    boxes = np.clip(boxes, 0, np.array([shape[1], shape[0]] * 2, np.float32))
    return np.concatenate((boxes, rows[:, 4:]), 1)
