"""Run an anomaly model from whatever file it is in: a checkpoint, or what ``export`` made of one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_yolo.anomaly.calibration import Calibration
from kd_yolo.anomaly.checkpoint import is_anomaly, load_anomaly
from kd_yolo.anomaly.maps import image_scores
from kd_yolo.anomaly.merging import deployed
from kd_yolo.anomaly.model import AnomalyModel
from kd_yolo.devices import parse_device
from kd_yolo.errors import CheckpointError, KDYoloError, ModelError
from kd_yolo.files import sha256
from kd_yolo.runtimes.base import Description, Session
from kd_yolo.runtimes.opening import describe, open_session

ENTRY = "anomaly"
"""Key of the thresholds in our metadata entry."""
NUMBERS = ("threshold_image", "threshold_pixel", "score_min", "score_max")


@dataclass(frozen=True)
class Thresholds(Calibration):
    """What turns the maps of a file into decisions; the level quantiles of an exported file are in its graph alone.

    Attributes:
        score: ``max`` or ``topk``, how a map becomes an image score.
        top_fraction: Share of the pixels that ``topk`` averages.
        fuse: ``mean`` or ``product``, how the levels became one map; for information.
        taps: Strides of the compared levels, in pixels; for information.
        teacher: Name of the teacher; for information.
    """

    score: str
    top_fraction: float
    fuse: str
    taps: list[int]
    teacher: str

    def to_dict(self) -> dict[str, Any]:
        """Return what an exported file carries: everything but the level quantiles."""
        return {key: value for key, value in asdict(self).items() if not key.startswith("level_")}


class AnomalySession:
    """An anomaly model, opened and ready.

    Args:
        path: The file or folder.
        session: The network in its runtime.
        thresholds: What its maps mean.

    Attributes:
        description: What the file says about itself.
        thresholds: Thresholds, score range and kind of score.
        runtime: For example ``onnxruntime CPUExecutionProvider`` or ``torch cpu``.
        canvas: Height and width of the calls to come, in pixels.
    """

    def __init__(self, path: Path, session: Session, thresholds: Thresholds) -> None:
        self.path, self.session, self.thresholds = path, session, thresholds
        self.description, self.runtime, self.canvas = session.description, session.runtime, session.canvas

    def maps(self, images: NDArray[np.float32] | Tensor) -> NDArray[np.float32]:
        """Return the anomaly maps (B, 1, H, W), float32, of any number of images (B, 3, H, W), float32 RGB in [0, 1].

        A file with a fixed batch is fed in portions.

        Raises:
            ConfigError: The images are on a canvas, or have channels, that the file does not take.
            ModelError: The file's output is no anomaly map.
        """
        pixels = torch.from_numpy(np.ascontiguousarray(images)) if isinstance(images, np.ndarray) else images
        found: NDArray[np.float32] = self.session(pixels.float()).cpu().numpy()
        return found

    def scores(self, maps: NDArray[np.float32] | Tensor) -> NDArray[np.float32]:
        """Return the image scores (B,), float32, of maps (B, 1, H, W)."""
        values = torch.from_numpy(maps) if isinstance(maps, np.ndarray) else maps
        found: NDArray[np.float32] = image_scores(values, self.thresholds.score, self.thresholds.top_fraction).numpy()
        return found


class CheckpointMaps(Session):
    """A checkpoint in its deployed form, in PyTorch."""

    def __init__(self, model: AnomalyModel, description: Description, canvas: tuple[int, int], device: str) -> None:
        """Take a deployed model; see ``open_checkpoint``."""
        self.device = parse_device(device)
        self.model = model.to(self.device)
        self.description, self.canvas, self.runtime = description, canvas, f"torch {self.device}"

    @torch.inference_mode()
    def infer(self, pixels: Tensor) -> Tensor:
        """Run the network; see ``Session.infer``."""
        maps: Tensor = self.model(pixels.to(self.device, torch.float32))
        return maps.to(pixels.device)

    def sync(self) -> None:
        """Wait for CUDA."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_device_memory_mb(self) -> float | None:
        """Return what PyTorch's allocator held at most."""
        return torch.cuda.max_memory_allocated(self.device) / 1e6 if self.device.type == "cuda" else None


def open_anomaly(
    path: str | Path,
    imgsz: Any = None,
    batch: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    provider: str | None = None,
) -> AnomalySession:
    """Open an anomaly checkpoint, ONNX file, OpenVINO folder or engine.

    Args:
        path: The file or folder.
        imgsz: Canvas of the calls to come: a side, or height and width; default the file's own.
        batch: Images per call; default the file's own, or any number.
        device: ``cpu``, ``cuda`` or a CUDA number; for OpenVINO also ``intel:gpu`` and ``intel:npu``.
        threads: CPU threads; for a checkpoint PyTorch's setting of the whole process, which stays.
        provider: As for ``kd_yolo.runtimes.open_session``.

    Raises:
        CheckpointError: A ``.pt`` file is damaged, for another task, or not calibrated.
        ModelError: An exported file is damaged, for another task, from a newer version, or without thresholds.
        ConfigError: It cannot take that canvas or batch, or the device is not there.
        BackendMissingError: Its runtime is missing.
    """
    file = Path(path).expanduser()
    if file.suffix == ".pt":
        if threads is not None:
            torch.set_num_threads(threads)
        return open_checkpoint(file, imgsz, device)
    session = open_session(file, imgsz, batch, device, threads, provider, task="anomaly")
    return AnomalySession(file, session, thresholds_in(session.description, file))


def open_checkpoint(path: Path, imgsz: Any = None, device: str = "cpu") -> AnomalySession:
    """Open a checkpoint in its deployed form; see ``open_anomaly``."""
    model, content = load_anomaly(path)
    thresholds = thresholds_of(model, path)
    description = Description(
        format="pt",
        names=dict(model.names),
        stride=model.stride,
        channels=3,
        canvas=canvas_of(model, content),
        batch=1,
        dynamic=True,
        precision="fp32",
        head="map",
        own={"version": content["kd_yolo"]["version"], "source_sha256": sha256(path), ENTRY: thresholds.to_dict()},
        task="anomaly",
    )
    canvas = description.check(path, imgsz)
    return AnomalySession(path, CheckpointMaps(deployed(model), description, canvas, device), thresholds)


def is_anomaly_file(path: str | Path) -> bool:
    """Return whether a file or folder is an anomaly checkpoint or an exported anomaly model; never raises."""
    file = Path(path).expanduser()
    if file.suffix == ".pt":
        return is_anomaly(file)
    try:
        return describe(file, task=None).task == "anomaly"
    except (KDYoloError, OSError):
        return False


def thresholds_of(model: AnomalyModel, name: str | Path) -> Thresholds:
    """Return the thresholds of a model.

    Raises:
        CheckpointError: It is not calibrated; ``name`` is what the message calls it.
    """
    if model.calibration is None:
        raise CheckpointError(f"{name}: is not calibrated, so it has no thresholds; take best.pt of a finished run")
    spec = model.spec
    return Thresholds(
        **asdict(model.calibration),
        score=spec.score,
        top_fraction=spec.top_fraction,
        fuse=spec.fuse,
        taps=list(spec.levels),
        teacher=spec.teacher if spec.teacher.partition(":")[0] in {"timm", "torchvision"} else Path(spec.teacher).name,
    )


def canvas_of(model: AnomalyModel, content: Mapping[str, Any]) -> tuple[int, int]:
    """Return the canvas that a checkpoint was trained on, as height and width."""
    given = content.get("train_args", {}).get("imgsz", model.spec.imgsz)
    height, width = (given, given) if isinstance(given, int) else given
    return int(height), int(width)


def thresholds_in(description: Description, name: str | Path) -> Thresholds:
    """Return the thresholds that an exported file carries.

    Raises:
        ModelError: They are missing or damaged.
    """
    entry = description.own.get(ENTRY)
    if not isinstance(entry, Mapping):
        raise ModelError(f"{name}: carries no thresholds; export it again with kd-yolo export")
    try:
        found = Thresholds(
            level_low=[],
            level_high=[],
            **{key: float(entry[key]) for key in NUMBERS},
            score=str(entry["score"]),
            top_fraction=float(entry["top_fraction"]),
            fuse=str(entry["fuse"]),
            taps=[int(stride) for stride in entry["taps"]],
            teacher=str(entry["teacher"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{name}: its thresholds are damaged ({error!r}); export it again") from error
    sound = all(math.isfinite(getattr(found, key)) for key in NUMBERS)
    if not sound or found.score not in {"max", "topk"} or not 0 < found.top_fraction <= 1:
        raise ModelError(f"{name}: its thresholds are damaged ({found.to_dict()}); export it again")
    return found
