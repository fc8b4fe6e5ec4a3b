"""An exported ONNX file as the teacher: class scores of all its anchors, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_yolo.distill.base import DetectorSpec, Taps
from kd_yolo.distill.teacher import ClassMap
from kd_yolo.distill.teachers.base import Teacher
from kd_yolo.distill.teachers.dense import (
    dense_spec,
    dense_taps,
    empty_maps,
    known_classes,
    probability_logits,
    student_classes,
)
from kd_yolo.errors import TeacherError
from kd_yolo.runtimes import Description, Session, open_session

FINEST_STRIDE = 2


class OnnxTeacher(Teacher):
    """A file with dense output (B, 4 + K, A), run by ONNX Runtime on the CPU.

    The canvas is the file's, unless it was exported with free sizes; a fixed batch is served in portions. Copies and
    pickles hold the path and open the file again.
    """

    provides = frozenset({"scores"})

    def __init__(self, path: Path, description: Description, class_map: ClassMap) -> None:
        """Open a file that ``check_dense`` let pass.

        Args:
            path: The ONNX file.
            description: What it says about itself.
            class_map: How the student's classes are found in it.

        Raises:
            ModelError: ONNX Runtime cannot open it, or its output is not what its metadata says.
            BackendMissingError: ONNX Runtime is missing.
            TeacherError: Its anchors fit no set of levels.
        """
        super().__init__()
        self.path, self.description, self.class_map = path, description, class_map
        self.register_buffer("class_known", known_classes(class_map), persistent=False)
        self._session: Session | None = None
        height, width = description.canvas
        noise = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
        output = self._run(noise)
        self.strides = anchor_strides(output.shape[-1], description.canvas, description.stride, path)
        scores = output[:, 4:]
        # Ultralytics exports sigmoids; logits of a detector are far below 0 nearly everywhere.
        self.raw_logits = bool((scores < 0).any() or (scores > 1).any())

    def describe(self, strides: Sequence[int]) -> DetectorSpec:
        """Return levels, classes and box bins, see the base class."""
        return dense_spec(strides, len(self.class_map.index))

    def taps(self, images: Tensor, reads: frozenset[str], strides: Sequence[int], hold: int = 1) -> Taps:
        """Run the file when its scores are read, see the base class."""
        maps = empty_maps(images, strides)
        if "scores" not in reads:
            return dense_taps(maps, strides, None, None)
        scores = self._run(images.float().cpu())[:, 4:]
        logits = scores if self.raw_logits else probability_logits(scores)
        cells = [int(x.shape[-2] * x.shape[-1]) for x in empty_maps(images, self.strides)]
        parts = dict(zip(self.strides, logits.split(cells, -1), strict=True))
        kept = torch.cat([parts[s] for s in strides], -1).to(images.device)
        return dense_taps(maps, strides, student_classes(kept, self.class_map), None)

    def predict(self, images: Tensor) -> Tensor:
        """Return the file's own output in the student's classes, see the base class."""
        output = self._run(images.float().cpu()).to(images.device)
        scores = output[:, 4:].sigmoid() if self.raw_logits else output[:, 4:]
        return torch.cat((output[:, :4], self.masked(student_classes(scores, self.class_map))), 1)

    @property
    def title(self) -> str:
        """Return what this teacher is, for messages."""
        return "an ONNX file"

    def __getstate__(self) -> dict[str, Any]:
        """Leave the opened file out: it cannot be copied."""
        return {**self.__dict__, "_session": None}

    def _run(self, pixels: Tensor) -> Tensor:
        if self._session is None:
            self._session = open_session(self.path)
        return self._session(pixels)


def check_dense(path: Path, description: Description) -> None:
    """Refuse a file that gives selected boxes instead of the scores of all anchors.

    Raises:
        TeacherError: As said; or the file takes no color images.
    """
    if description.head != "nms":
        what = "holds NMS" if description.head == "nms inside" else "is NMS-free"
        raise TeacherError(
            f"{path}: {what} and gives selected boxes, no scores of all anchors; export the teacher again with "
            "kd-yolo export format=onnx nms_free=false, or give its .pt file"
        )
    if description.channels != 3:
        raise TeacherError(f"{path}: takes images of {description.channels} channels; 3 are needed")


def anchor_strides(anchors: int, canvas: tuple[int, int], largest: int, name: str | Path) -> tuple[int, ...]:
    """Return the strides of a file's levels, finest first, from its number of anchors.

    Levels are taken to halve from one to the next, down from the largest stride.

    Args:
        anchors: A.
        canvas: Height and width in pixels.
        largest: The largest stride in pixels, as the file says.
        name: What the message calls the file.

    Raises:
        TeacherError: No such set of levels has that many cells.
    """
    strides: list[int] = []
    left, stride = anchors, largest
    while left > 0 and stride >= FINEST_STRIDE:
        strides.insert(0, stride)
        left -= -(-canvas[0] // stride) * -(-canvas[1] // stride)
        stride //= 2
    if left != 0:
        raise TeacherError(
            f"{name}: its {anchors} anchors at {canvas[0]}x{canvas[1]} fit no levels that halve down from stride "
            f"{largest}; give the teacher's .pt file"
        )
    return tuple(strides)
