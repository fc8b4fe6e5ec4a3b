"""ncnn folders on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_yolo.errors import BackendMissingError, ConfigError, ModelError
from kd_yolo.runtimes.base import Description, Session, description_of
from kd_yolo.runtimes.reading import check_file, folder_file, yaml_metadata

MAGIC = b"7767517"  # first line of every .param file
# What ncnn turns on by itself: float32 weights rounded to half precision, and computing in it, where the CPU can.
ROUNDING = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage")


class NcnnSession(Session):
    """An ncnn network; ncnn takes one image at a time."""

    def __init__(self, net: Any, ncnn: Any, description: Description, canvas: tuple[int, int]) -> None:
        """Take a loaded network; see ``open_session``."""
        self.net, self.ncnn, self.description, self.canvas = net, ncnn, description, canvas
        self.entry, self.exit = net.input_names()[0], net.output_names()[0]
        self.runtime = "ncnn CPU"

    @property
    def fixed_batch(self) -> int | None:
        """Images that a call of ``infer`` takes: any number, one after the other."""
        return None

    def infer(self, pixels: Tensor) -> Tensor:
        """Run the network on every image; see ``Session.infer``."""
        images = pixels.float().contiguous().cpu().numpy()
        return torch.from_numpy(np.stack([self._infer_one(image) for image in images]))

    def _infer_one(self, image: Any) -> Any:
        with self.net.create_extractor() as extractor:
            extractor.input(self.entry, self.ncnn.Mat(image))
            status, output = extractor.extract(self.exit)
            if status != 0:
                raise ModelError(f"{self.runtime}: the network stopped with status {status}; export it again")
            return np.array(output)  # a copy: the extractor owns the memory


def describe(path: Path, task: str | None = "detect") -> Description:
    """Read ``metadata.yaml`` of an ncnn folder; ncnn is not needed.

    Args:
        path: The folder, or the ``.param`` file in it.
        task: See ``kd_yolo.runtimes.describe``.

    Raises:
        ModelError: As ``description_of``, or one of the folder's files is missing, empty or damaged.
    """
    graph = folder_file(path, "*.ncnn.param")
    check_file(graph.with_suffix(".bin"), graph.parent)
    with graph.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise ModelError(f"{path}: its {graph.name} is not an ncnn graph; export it again")
    return description_of("ncnn", yaml_metadata(graph.parent), path, task)


def open_session(
    path: Path,
    imgsz: Any,
    batch: int | None,
    device: str,
    threads: int | None,
    provider: str | None,
    task: str | None = "detect",
) -> NcnnSession:
    """Open an ncnn folder; see ``kd_yolo.runtimes.open_session``."""
    if provider is not None:
        raise ConfigError(f"provider={provider}: is for ONNX files; leave it out for {path}")
    if str(device).strip().lower() != "cpu":
        raise ConfigError(f"device={device}: {path} is an ncnn model, which runs on the CPU here; use device=cpu")
    description = describe(path, task)
    canvas = description.check(path, imgsz, batch)
    ncnn = _ncnn(path)
    graph = folder_file(path, "*.ncnn.param")
    net = ncnn.Net()
    net.opt.use_vulkan_compute = False
    net.opt.num_threads = threads or torch.get_num_threads()
    if description.precision == "fp32":
        for option in ROUNDING:
            setattr(net.opt, option, False)
    # An unread weight is a crash later on, not an error: both states must be looked at.
    for read, file in ((net.load_param, graph), (net.load_model, graph.with_suffix(".bin"))):
        if read(str(file)) != 0:
            raise ModelError(f"{path}: its {file.name} is truncated or damaged; copy it again, or export it again")
    if len(net.input_names()) != 1 or len(net.output_names()) != 1:
        raise ModelError(
            f"{path}: is not a detector with one image input and one output (inputs {list(net.input_names())}, "
            f"outputs {list(net.output_names())})"
        )
    return NcnnSession(net, ncnn, description, canvas)


def _ncnn(path: Path) -> Any:
    try:
        import ncnn
    except ImportError as error:
        raise BackendMissingError(f"{path}: needs ncnn; run: pip install 'kd-yolo[ncnn]'") from error
    return ncnn
