"""A teacher that is asked once per view: what it said is kept by the content of the image.

Beyer et al. (CVPR 2022, arXiv:2106.05237, section 3) show that a teacher's answers must belong to exactly the view that
the student sees, or distillation suffers. So the key is the image tensor itself: an augmentation that never repeats is
never answered from the cache, and ``check_repeating_views`` refuses it beforehand.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kd_yolo
from kd_yolo.config import Recipe, stock_keys
from kd_yolo.distill.base import DetectorSpec, Taps
from kd_yolo.distill.teachers.base import Teacher
from kd_yolo.distill.teachers.cache_store import DiskStore, RamStore, Record, Store, compact
from kd_yolo.distill.teachers.dense import anchor_grid
from kd_yolo.errors import ConfigError

# Ultralytics' arguments that make a new view of an image every time. Flips and bgr= make a few.
VIEW_KEYS = (
    *("mosaic", "mixup", "cutmix", "copy_paste", "hsv_h", "hsv_s", "hsv_v"),
    *("degrees", "translate", "scale", "shear", "perspective", "multi_scale"),
)
# What mosaic's end switches off too.
MOSAIC_KEYS = ("mosaic", "mixup", "cutmix", "copy_paste")


class CachedTeacher(Teacher):
    """Any teacher behind a store of its answers, one record per image, so that batches may be put together anew.

    What was just computed is rounded as what is read back: a value does not depend on whether it was a hit.

    Attributes:
        hits: Images answered from the store.
        misses: Images that the teacher was asked about.
    """

    def __init__(self, inner: Teacher, store: Store, identity: Mapping[str, Any]) -> None:
        """Put a store before a teacher.

        Args:
            inner: The teacher.
            store: Where records are kept.
            identity: Plain data that every key depends on: files, classes, version.
        """
        super().__init__()
        self.inner, self.store, self.identity = inner, store, dict(identity)
        self.strides, self.provides = inner.strides, inner.provides
        self.register_buffer("class_known", inner.class_known, persistent=False)
        self.hits = self.misses = 0

    def describe(self, strides: Sequence[int]) -> DetectorSpec:
        """Return levels, classes and box bins, see the base class."""
        return self.inner.describe(strides)

    def taps(self, images: Tensor, reads: frozenset[str], strides: Sequence[int], hold: int = 1) -> Taps:
        """Answer from the store, ask the teacher for the rest, and keep that, see the base class."""
        scope = self._scope(images, reads, strides, hold)
        keys = [_key(scope, image) for image in images]
        records = [self.store.get(key) for key in keys]
        missing = [i for i, record in enumerate(records) if record is None]
        self.hits, self.misses = self.hits + len(keys) - len(missing), self.misses + len(missing)
        if missing:
            chosen = images if len(missing) == len(keys) else images[missing]
            live = self.inner.taps(chosen, reads, strides, hold)
            if not reads & {"neck", "head"}:  # a detector gives its maps anyway: of those only the sizes are kept
                live = replace(live, neck=tuple(x[:, :0] for x in live.neck))
            for i, record in zip(missing, to_records(live), strict=True):
                self.store.put(keys[i], record)
                records[i] = record
        found = [record for record in records if record is not None]
        taps = from_records(found, strides, images.device)
        if "head" not in reads:
            return taps
        cls, box = (
            [_stack(found, f"{branch}{i}", images.device) for i in range(len(strides))] for branch in ("cls", "box")
        )
        return self.inner.with_head(taps, cls, box, strides, hold)

    def predict(self, images: Tensor) -> Tensor:
        """Return what the teacher detects, not cached, see the base class."""
        return self.inner.predict(images)

    @property
    def title(self) -> str:
        """Return what this teacher is, for messages."""
        return self.inner.title

    def _scope(self, images: Tensor, reads: frozenset[str], strides: Sequence[int], hold: int) -> bytes:
        kind = images.device.type
        precision = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "float32"
        asked = [sorted(reads), list(strides), hold if "head" in reads else 0, precision]
        return json.dumps([self.identity, asked, str(images.dtype), list(images.shape[1:])], sort_keys=True).encode()


def cached(teacher: Teacher, recipe: Recipe, names: Mapping[int, str]) -> CachedTeacher:
    """Put the cache that a recipe asks for before a teacher.

    Raises:
        ConfigError: ``cache_teacher=disk`` without a folder.
        TeacherError: The folder belongs to another teacher.
    """
    identity: dict[str, Any] = {
        "version": kd_yolo.__version__,
        "teachers": [digest for _, digest in recipe.teachers],
        "merge": recipe.teacher_merge if len(recipe.teachers) > 1 else None,
        "classes": [str(names[key]) for key in sorted(names)],
    }
    if recipe.teacher_views > 1:
        identity["views"] = recipe.teacher_views
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if recipe.cache_teacher == "ram":
        return CachedTeacher(teacher, RamStore(recipe.cache_gb / processes), identity)
    if recipe.cache_dir is None:
        raise ConfigError("cache_teacher=disk needs cache_dir=FOLDER; or use cache_teacher=ram")
    return CachedTeacher(teacher, DiskStore(Path(recipe.cache_dir), recipe.cache_gb, identity, processes), identity)


def check_repeating_views(stock: Mapping[str, Any]) -> None:
    """Refuse a cache where no image is seen twice in the same way.

    Args:
        stock: The given stock training arguments; what is not given has Ultralytics' default.

    Raises:
        ConfigError: Names every argument to change.
    """
    values = {**stock_keys(), **stock}
    without_mosaic = int(values["close_mosaic"]) >= int(values["epochs"])  # Ultralytics then never opens it
    keys = [key for key in VIEW_KEYS if not (without_mosaic and key in MOSAIC_KEYS)]
    changing = [key for key in keys if _is_on(values.get(key))]
    if changing:
        listed = " ".join(f"{key}=0" for key in changing)
        raise ConfigError(
            f"cache_teacher: with random views hardly an image is seen twice; set {listed}, or leave cache_teacher out"
        )


def to_records(taps: Taps) -> list[Record]:
    """Split taps into one record per image, see ``compact``."""
    parts: dict[str, Tensor] = {f"neck{i}": x for i, x in enumerate(taps.neck)}
    parts |= {"scores": taps.scores, "boxes": taps.boxes}
    if taps.scores_one2one is not None:
        parts["scores_one2one"] = taps.scores_one2one
    if taps.head is not None:
        parts |= {f"cls{i}": x for i, x in enumerate(taps.head.cls)}
        parts |= {f"box{i}": x for i, x in enumerate(taps.head.box)}
    return [{name: compact(values[i]) for name, values in parts.items()} for i in range(len(taps.scores))]


def from_records(records: Sequence[Record], strides: Sequence[int], device: torch.device) -> Taps:
    """Put the records of a batch together, in float32."""
    neck = tuple(_stack(records, f"neck{i}", device) for i in range(len(strides)))
    anchors, stride_of = anchor_grid(neck, strides)
    one2one = _stack(records, "scores_one2one", device) if "scores_one2one" in records[0] else None
    scores, boxes = _stack(records, "scores", device), _stack(records, "boxes", device)
    return replace(Taps(neck, scores, boxes, stride_of, anchors), scores_one2one=one2one)


def _key(scope: bytes, image: Tensor) -> str:
    digest = hashlib.blake2b(scope, digest_size=20)
    digest.update(image.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _stack(records: Sequence[Record], name: str, device: torch.device) -> Tensor:
    return torch.stack([record[name].float() for record in records]).to(device)


def _is_on(value: Any) -> bool:
    """Return whether an augmentation's strength is anything but zero; scale may be a range."""
    return any(map(bool, value)) if isinstance(value, (list, tuple)) else bool(value)
