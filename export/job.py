"""The checked arguments of one export: everything that can be refused before a model is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_yolo.export.formats import DYNAMIC, NMS, NMS_FREE, OPSET, SIMPLIFY, Format, find_format

from kd_yolo.errors import BackendMissingError, ConfigError

if TYPE_CHECKING:
    from kd_yolo.targets import Target

MAX_DROP = 0.5
"""Points of mAP50-95 that int8 may cost."""

PRECISIONS = {None: "fp32", 32: "fp32", 16: "fp16", 8: "int8"}
QUANTIZE = {"fp32": None, "fp16": 16, "int8": 8}
"""Ultralytics' key for a precision."""


@dataclass(frozen=True)
class Job:
    """What to export and how.

    Attributes:
        source: The checkpoint.
        format: Target format.
        out: Final file or folder.
        precision: ``fp32``, ``fp16`` or ``int8``.
        imgsz: Wanted canvas, or None for the checkpoint's own.
        batch: Images per call (the largest one when dynamic).
        dynamic: Leave batch and canvas free.
        opset: ONNX operator set, or None for Ultralytics' choice.
        simplify: Simplify the graph with onnxslim.
        nms_inside: Put NMS into the graph.
        nms_free: Take the one-to-one head; None for what the checkpoint has.
        target: GPU that an engine is built for without that GPU, or None.
        data: Resolved data YAML, or None.
        split: Split that int8 is judged on.
        max_drop: Points of mAP50-95 that int8 may cost.
        calibration_images: Number of images that int8 is calibrated with, or None for its own choice.
        trust: Load foreign classes from the checkpoint.
    """

    source: Path
    format: Format
    out: Path
    precision: str
    imgsz: int | Sequence[int] | None
    batch: int
    dynamic: bool
    opset: int | None
    simplify: bool
    nms_inside: bool
    nms_free: bool | None
    target: Target | None
    data: str | None
    split: str
    max_drop: float
    calibration_images: int | None
    trust: bool

    @property
    def parity_path(self) -> Path:
        """Return the file that holds the proof."""
        return self.out.with_name(f"{self.out.name}.parity.json")

    def parity_plan(self, canvas: tuple[int, int], stride: int) -> list[tuple[tuple[int, int], int]]:
        """Return the canvases and batch sizes that the gate runs: a dynamic graph must hold at more than one."""
        if not self.dynamic:
            return [(canvas, self.batch)]
        height, width = canvas
        # An NMS inside is unrolled over the batch, so that ``batch`` is its largest.
        other = min(2, self.batch) if self.nms_inside else self.batch + 2
        return [(canvas, self.batch), ((height, width + stride), other)]


def make_job(
    model: str | Path,
    format: str = "onnx",
    out: str | Path | None = None,
    imgsz: int | Sequence[int] | None = None,
    batch: int = 1,
    dynamic: bool = False,
    quantize: int | None = None,
    target: str | None = None,
    nms: bool = False,
    nms_free: bool | None = None,
    opset: int | None = None,
    simplify: bool = True,
    data: str | Path | None = None,
    split: str = "val",
    max_drop: float = MAX_DROP,
    calibration_images: int | None = None,
    trust: bool = False,
) -> Job:
    """Return a checked job; arguments as for ``kd_yolo.export.export``.

    Raises:
        ConfigError: An argument is not acceptable, or means nothing to the format.
        BackendMissingError: A package that makes or runs the format is missing.
    """
    chosen, path = find_format(format), Path(model).expanduser().absolute()
    precision = _precision(chosen, quantize)
    given = {DYNAMIC: dynamic, NMS: nms, NMS_FREE: nms_free, OPSET: opset is not None, SIMPLIFY: not simplify}
    _refuse_unused(chosen, given | {"target": target is not None})
    _check_int8(chosen, precision, data, max_drop, calibration_images)
    gpu = _target_of(chosen, target, nms)
    return Job(
        source=path,
        format=chosen,
        out=_out(path, out, chosen, precision, gpu),
        precision=precision,
        imgsz=imgsz,
        batch=check_batch(batch, chosen),
        dynamic=dynamic,
        opset=check_opset(opset),
        simplify=simplify,
        nms_inside=nms,
        nms_free=nms_free,
        target=gpu,
        data=None if data is None else str(data),
        split=split,
        max_drop=float(max_drop),
        calibration_images=calibration_images,
        trust=trust,
    )


def check_batch(batch: int, format: Format) -> int:
    """Return a batch size.

    Raises:
        ConfigError: Not a whole number of at least 1, or more than the format takes.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ConfigError(f"batch={batch}: must be a whole number of at least 1")
    if format.max_batch is not None and batch > format.max_batch:
        raise ConfigError(f"batch={batch}: {format.name} takes one image per call; leave batch= out")
    return batch


def check_opset(opset: int | None) -> int | None:
    """Return an ONNX operator set, or None for the default.

    Raises:
        ConfigError: Too old for a detector, or newer than the installed onnx.
    """
    if opset is None:
        return None
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if isinstance(opset, bool) or not isinstance(opset, int) or not 11 <= opset <= newest:
        raise ConfigError(f"opset={opset}: must be between 11 and {newest}, which the installed onnx knows")
    return opset


def require_packages(format: Format) -> None:
    """Check before Ultralytics does, which would install what it misses.

    Raises:
        BackendMissingError: A package that makes or runs the format is missing; the message names the extra.
    """
    missing = [name for name in format.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendMissingError(
            f"export to {format.name} needs {', '.join(missing)}; run: pip install 'kd-yolo[{format.extra}]'"
        )


def _precision(format: Format, quantize: Any) -> str:
    if isinstance(quantize, bool) or quantize not in PRECISIONS:
        raise ConfigError(f"quantize={quantize}: must be 16 (float16) or 8 (int8); leave it out for float32")
    precision = PRECISIONS[quantize]
    if quantize is None:
        return format.precisions[0]
    if precision not in format.precisions:
        raise ConfigError(
            f"quantize={quantize}: {format.name} has {', '.join(format.precisions)} here, not {precision}"
        )
    return precision


def _refuse_unused(format: Format, given: Mapping[str, bool | None]) -> None:
    """Refuse what a format would silently drop, and what contradicts itself."""
    for key, there in given.items():
        if there and key not in format.keys:
            able = ", ".join(sorted(format.keys)) or "none of dynamic, nms, nms_free, opset, simplify, target"
            raise ConfigError(f"{key}=: means nothing to format={format.name}; leave it out (it takes {able})")
    if given[NMS] and given[NMS_FREE]:
        raise ConfigError("nms=true puts NMS into the graph and nms_free=true needs none; choose one")


def _check_int8(format: Format, precision: str, data: Any, max_drop: float, calibration_images: int | None) -> None:
    if isinstance(max_drop, bool) or not isinstance(max_drop, int | float) or not 0 <= max_drop <= 100:
        raise ConfigError(f"max_drop={max_drop}: must be points of mAP50-95 from 0 to 100")
    count = calibration_images
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 8):
        raise ConfigError(f"calibration_images={count}: must be a whole number of at least 8")
    if precision != "int8":
        for key, there in (("max_drop", max_drop != MAX_DROP), ("calibration_images", count is not None)):
            if there:
                raise ConfigError(f"{key}=: means something to quantize=8 only; leave it out")
        return
    if data is None and (format.checked or "data" in format.keys):
        raise ConfigError(
            "quantize=8 needs data=: the training images calibrate it, and the validation images judge what it costs"
        )


def _target_of(format: Format, target: str | None, nms: bool) -> Target | None:
    """Return the GPU to build for, if it can be, or None for the one here; check that all packages are there."""
    if target is None:
        _require_local_gpu(format)
        require_packages(format)
        return None
    from kd_yolo.targets import load_target

    found = load_target(target)
    if found.compute_capability is None:
        raise ConfigError(f"target={target}: {found.title} is no GPU; an engine needs one, for example rtx3070ti")
    if nms:
        raise ConfigError(
            "nms=true: TensorRT for RTX, which target= builds with, takes no NMS inside of the graph; leave nms= out, "
            "or use nms_free=true with a model that has such a head"
        )
    require_packages(format)
    from kd_yolo.export.tensorrt_engine import check_target

    check_target(found)
    return found


def _require_local_gpu(format: Format) -> None:
    """Refuse an engine without a target where it cannot be built."""
    if format.name == "engine":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(
                "format=engine: this machine has no CUDA GPU; run it on the machine that has the GPU, or name the GPU "
                "with target=rtx3070ti (or another of kd-yolo targets), which builds for TensorRT for RTX without one"
            )


def _out(source: Path, out: str | Path | None, format: Format, precision: str, target: Target | None) -> Path:
    """Return the final path: beside the checkpoint, named by target and precision, or what was asked for."""
    if out is None:
        words = [source.stem, *([target.name] if target else []), *([precision] if precision != "fp32" else [])]
        path = source.with_name("_".join(words) + format.suffix)
    else:
        path = Path(out).expanduser().absolute()
    if format.name == "bundle":
        named = path.suffix == "" or not path.exists()
    else:
        named = path.name.endswith(format.suffix) and path.name != format.suffix
    if not named:
        kind = {None: "result", True: "folder", False: "file"}[format.folder]
        article = "an" if format.name[0] in "aeiou" else "a"
        raise ConfigError(f"out={out}: {article} {format.name} {kind} ends in {format.suffix}")
    _refuse_foreign(path, format)
    return path


def _refuse_foreign(path: Path, format: Format) -> None:
    """Refuse to replace what no export wrote: a folder is replaced as a whole."""
    if path.is_dir():
        proven = path.with_name(f"{path.name}.parity.json").exists()
        model = format.folder is not False and any(path.glob("*.xml" if format.name == "openvino" else "*.param"))
        if any(path.iterdir()) and not proven and not model:
            raise ConfigError(f"{path}: is a folder with other things in it; choose another with out=")
        if format.folder is False:
            raise ConfigError(f"{path}: is a folder, but a file is to be written there; choose another with out=")
    elif path.exists() and format.folder:
        raise ConfigError(f"{path}: is a file, but a folder is to be written there; choose another with out=")
