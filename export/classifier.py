"""Export a classifier: deploy, make, prove, publish. The proof is the class probabilities of the training form."""

from __future__ import annotations

import datetime
import inspect
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kd_yolo.export.job import Job, make_job
from kd_yolo.export.publish import publish
from kd_yolo.export.stock import failures_in_one_line, quiet
from numpy.typing import NDArray
from ultralytics import YOLO
from ultralytics.nn.tasks import ClassificationModel

from kd_yolo.checkpoints import serialize
from kd_yolo.classify.checkpoints import load_classifier
from kd_yolo.classify.deploy import logits, merge_classifier
from kd_yolo.errors import ConfigError, ExportError, nearest
from kd_yolo.files import sha256, size_mb
from kd_yolo.images import textured_images, to_canvas
from kd_yolo.inference import check_canvas
from kd_yolo.provenance import versions
from kd_yolo.tables import PairReport

Pixels = NDArray[np.float32]
CHECK_IMAGES = 8
TOLERANCE = 1e-4
"""On a class probability, float32 in another runtime against float32 in PyTorch."""
STRIDE = 32
MEANINGLESS = ("nms", "nms_free", "target", "max_drop", "calibration_images", "split", "category", "data", "dynamic")
"""Keys of a detector's export that say nothing here; the proof needs no images of the data set."""


@dataclass(frozen=True)
class ClassifyExportReport(PairReport):
    """What was exported and how it was proven.

    Attributes:
        path: The exported file or folder.
        parity_path: The JSON file beside it, which holds this report.
        format: ``onnx``, ``openvino`` or ``torchscript``.
        task: ``classify``.
        precision: ``fp32``.
        source: The checkpoint.
        source_sha256: Its hash.
        sha256: Hash of the exported file or folder.
        canvas: Height and width in pixels.
        batch: Images per call.
        size_mb: Size of the file or folder in 10^6 bytes.
        names: Class names.
        probability_error: Largest difference of any class probability from the training form in float32.
        probability_tolerance: Bound on it.
        check_images: Number of images it was measured on.
        passed: True; without that there is no report.
        versions: Versions of what made and checked the file.
        created: Local time, ISO 8601.
    """

    path: Path
    parity_path: Path
    format: str
    task: str
    precision: str
    source: Path
    source_sha256: str
    sha256: str
    canvas: tuple[int, int]
    batch: int
    size_mb: float
    names: dict[int, str]
    probability_error: float
    probability_tolerance: float
    check_images: int
    passed: bool
    versions: dict[str, str]
    created: str

    def rows(self) -> list[tuple[str, str]]:
        """Return what people want to know first."""
        height, width = self.canvas
        return [
            ("exported", f"{self.path} ({self.format}, {self.precision}, {self.size_mb:.1f} MB)"),
            ("input", f"batch {self.batch}, {height}x{width}"),
            ("against training form", f"{self.probability_error:.1e} in probability ({self.check_images} images)"),
        ]


def export_classifier(
    model: str | Path, format: str, quantize: int | None, arguments: Mapping[str, Any]
) -> ClassifyExportReport:
    """Merge a classifier, export it, and prove that the artifact gives the training form's probabilities to 1e-4.

    Args:
        model: A classifier's checkpoint, trained or deployed.
        format: ``onnx``, ``openvino`` or ``torchscript``.
        quantize: 32 or None; for other precisions deploy it and use Ultralytics' exporter.
        arguments: Keys of ``kd_yolo.export.export``: ``out``, ``imgsz``, ``batch``, ``opset``, ``simplify``, ``trust``.

    Raises:
        CheckpointError: The checkpoint cannot be loaded.
        ConfigError: An argument is not acceptable, or means nothing to a classifier.
        ExportError: The export failed, or the artifact is not the model; nothing is left under the final name.
    """
    job = _job(model, format, quantize, arguments)
    source, checkpoint = load_classifier(job.source, trust=job.trust)
    canvas = check_canvas(source.args.get("imgsz") or 224 if job.imgsz is None else job.imgsz, STRIDE)
    deployed, _ = merge_classifier(source)
    deployed.task, deployed.args = "classify", source.args
    with tempfile.TemporaryDirectory(prefix="kd-yolo-export-", ignore_cleanup_errors=True) as folder:
        file = Path(folder) / f"{job.source.stem}.pt"
        file.write_bytes(serialize(deployed, checkpoint, {"task": "classify"}))
        made = _made(job, file, canvas)
        report = _proven(job, made, source, canvas)
        publish(made, job.out, job.parity_path, report.to_dict())
    return report


def _job(model: str | Path, format: str, quantize: int | None, arguments: Mapping[str, Any]) -> Job:
    """Return a checked job; what only detectors have is refused."""
    defaults = inspect.signature(make_job).parameters
    rest: dict[str, Any] = {}
    for key, value in arguments.items():
        if key in MEANINGLESS:
            if value not in {None, False} and (key not in defaults or value != defaults[key].default):
                raise ConfigError(f"{key}=: means nothing to the export of a classifier; leave it out")
        elif key not in defaults:
            raise ConfigError(f"export: unknown key '{key}'{nearest(key, defaults)}")
        else:
            rest[key] = value
    if quantize not in {None, 32}:
        raise ConfigError(
            f"quantize={quantize}: classifiers are exported in float32; for others run kd-yolo deploy and then "
            "Ultralytics' own exporter"
        )
    job = make_job(model, format, **rest)
    if job.format.name not in RUNTIMES:
        raise ConfigError(f"format={format}: a classifier is exported to {', '.join(RUNTIMES)}")
    return job


def _made(job: Job, file: Path, canvas: tuple[int, int]) -> Path:
    keys: dict[str, Any] = {"format": job.format.name, "imgsz": list(canvas), "batch": job.batch, "device": "cpu"}
    if job.format.name == "onnx":
        keys |= {"opset": job.opset, "simplify": job.simplify}
    with failures_in_one_line(), quiet():
        made = Path(YOLO(file, task="classify").export(**keys))
    if not made.exists():
        raise ExportError(f"export failed: Ultralytics wrote no {made.name}")
    return made


def _proven(job: Job, made: Path, source: ClassificationModel, canvas: tuple[int, int]) -> ClassifyExportReport:
    """Compare the artifact with the training form.

    Raises:
        ExportError: It is not the model.
    """
    images = to_canvas(textured_images(CHECK_IMAGES), canvas, 3).float()
    with torch.no_grad():
        expected = logits(source, images).softmax(1).numpy()
    with failures_in_one_line():
        run = RUNTIMES[job.format.name](made)
        found = _in_portions(run, images.numpy(), job.batch)
    same_shape = found.shape == expected.shape
    error = float(np.abs(found - expected).max()) if same_shape else float("inf")
    if not error <= TOLERANCE:  # also true for NaN
        raise ExportError(
            f"{job.out.name}: not written, its probabilities differ from the trained classifier's by {error:.3g} "
            f"(bound {TOLERANCE:g})"
        )
    return ClassifyExportReport(
        path=job.out,
        parity_path=job.parity_path,
        format=job.format.name,
        task="classify",
        precision=job.precision,
        source=job.source,
        source_sha256=sha256(job.source),
        sha256=sha256(made),
        canvas=canvas,
        batch=job.batch,
        size_mb=size_mb(made),
        names={int(key): str(name) for key, name in source.names.items()},
        probability_error=error,
        probability_tolerance=TOLERANCE,
        check_images=CHECK_IMAGES,
        passed=True,
        versions=versions(),
        created=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    )


def _in_portions(run: Callable[[Pixels], Any], images: Pixels, batch: int) -> Pixels:
    """Return the outputs for all images, fed in full batches; the last one is filled up with its first image."""
    found = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        filled = np.concatenate((part, np.repeat(part[:1], batch - len(part), axis=0)))
        found.append(np.asarray(run(np.ascontiguousarray(filled)))[: len(part)])
    return np.concatenate(found)


def _onnx(path: Path) -> Callable[[Pixels], Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda pixels: session.run(None, {name: pixels})[0]


def _openvino(path: Path) -> Callable[[Pixels], Any]:
    import openvino

    # The default on a CPU with AMX is bfloat16, which no float32 file can be proven in.
    compiled = openvino.Core().compile_model(next(path.glob("*.xml")), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda pixels: compiled(pixels)[0]


def _torchscript(path: Path) -> Callable[[Pixels], Any]:
    network = torch.jit.load(str(path), map_location="cpu").eval()

    def run(pixels: Pixels) -> Any:
        with torch.no_grad():
            output = network(torch.from_numpy(pixels))
        return (output[0] if isinstance(output, (tuple, list)) else output).numpy()

    return run


RUNTIMES: dict[str, Callable[[Path], Callable[[Pixels], Any]]] = {
    "onnx": _onnx,
    "openvino": _openvino,
    "torchscript": _torchscript,
}
"""What proves each format: opens an artifact and returns the function that runs it."""
