"""FCOS and RetinaNet of torchvision as teachers: dense head outputs to taps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, arange

from kd_yolo.distill.base import DetectorSpec, Taps
from kd_yolo.distill.taps import select_anchors
from kd_yolo.distill.teacher import ClassMap
from kd_yolo.distill.teachers import dense
from kd_yolo.distill.teachers.base import Teacher


class TorchvisionTeacher(Teacher):
    """Pyramid and head alone, without resizing and NMS; of a cell's anchor boxes the surest one speaks."""

    provides = frozenset({"neck", "scores", "boxes"})
    strides = (8, 16, 32, 64, 128)
    title = "a torchvision detector"

    def __init__(self, model: Any, class_map: ClassMap) -> None:
        super().__init__()
        self.model, self.class_map = model.eval().requires_grad_(False), class_map
        self.register_buffer("class_known", dense.known_classes(class_map), persistent=False)

    def describe(self, strides: Sequence[int]) -> DetectorSpec:
        """Return levels, classes and box bins, see the base class."""
        channels = dict.fromkeys(strides, int(self.model.backbone.out_channels))
        return dense.dense_spec(strides, len(self.class_map.index), channels)

    def taps(self, images: Tensor, reads: frozenset[str], strides: Sequence[int], hold: int = 1) -> Taps:
        """Run the pyramid, and the head when its answers are read, see the base class."""
        mean, std = (images.new_tensor(x) for x in (self.model.transform.image_mean, self.model.transform.image_std))
        maps = list(self.model.backbone((images - mean.view(3, 1, 1)) / std.view(3, 1, 1)).values())
        kept = [maps[self.strides.index(s)] for s in strides]
        answers = self._answers(images, maps) if reads & {"scores", "boxes"} else ()
        scores, boxes = [select_anchors(x, maps, self.strides, strides) for x in answers] or (None, None)
        return dense.dense_taps(kept, strides, scores, boxes)

    def _answers(self, images: Tensor, maps: list[Tensor]) -> tuple[Tensor, ...]:
        from torchvision.models.detection.image_list import ImageList  # here: it takes seconds to load

        out = {name: values.float() for name, values in self.model.head(maps).items()}
        logits = out["cls_logits"]
        if "bbox_ctrness" in out:  # FCOS: the score is the root of class times centre-ness
            logits = dense.product_root_logits(logits, out["bbox_ctrness"])
        scores = dense.student_classes(logits.transpose(1, 2), self.class_map)
        count = int(self.model.anchor_generator.num_anchors_per_location()[0])
        best = dense.confidence(scores, self.class_known).unflatten(1, (-1, count)).argmax(-1)
        index = (arange(best.shape[1], device=best.device) * count + best).unsqueeze(1)  # (B, 1, A)
        anchors = self.model.anchor_generator(ImageList(images, [tuple(images.shape[-2:])]), maps)[0]
        decode = getattr(self.model.box_coder, "decode_single", self.model.box_coder.decode)
        corners = decode(out["bbox_regression"].flatten(0, 1), anchors.repeat(len(images), 1)).view(len(images), -1, 4)
        corners = corners.gather(1, index.transpose(1, 2).expand(-1, -1, 4))
        sides = dense.distances(corners, *dense.anchor_grid(maps, self.strides))
        return scores.gather(2, index.expand(-1, scores.shape[1], -1)), sides
