"""What an anomaly model is made of, as checked plain data, and the built-in presets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from kd_yolo.config import Strict, validate
from kd_yolo.errors import ConfigError, nearest
from kd_yolo.resources import builtin_root, load_yaml

STRIDES = (2, 4, 8, 16, 32)


class AnomalySpec(Strict):
    """Structure, loss and score of an HKT model (Xu, Jiang, J. Imaging 2025, 11(4), 102).

    Of the paper are: the frozen pretrained teacher, supervision of every student level by the teacher's highest layer
    through one projector per level, CBAM in the student, and two more convolutions for HKT+. All numbers here, the side
    of the projectors and the distance are our choice; the paper's abstract does not say them.
    """

    student: str = Field(default="yolo26n-cls", min_length=1, description="YOLO backbone: yolo26n-cls, lightnet-n, ...")
    teacher: str = Field(default="efficientnet-lite0", min_length=1, description="pretrained backbone, or a .pt file")
    taps: list[int] = Field(default=[4, 8, 16], min_length=1, description="strides that are compared, in pixels")
    cbam: Literal["stage", "block", "none"] = Field(default="stage", description="attention after each tap, or inside")
    projector: Literal["student", "teacher-frozen", "teacher-anchored"] = Field(
        default="student", description="which side is projected; teacher-anchored needs same > 0"
    )
    plus: bool = Field(default=False, description="HKT+: one more level of two convolutions")
    plus_targets: Literal["split", "top"] = Field(
        default="split", description="what the levels below the added one learn: the top without it, or with it"
    )
    plus_depth: int | None = Field(
        default=None, ge=1, description="teacher blocks of the added stage; default one of a ResNet, else all"
    )
    cross: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="weight of the cross-layer loss")
    same: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="weight of the same-layer loss")
    floor: float = Field(
        default=0.0, ge=0, le=100, allow_inf_nan=False, description="constant in the cosine; 0: none, large: squares"
    )
    hard_quantile: float | None = Field(
        default=None, gt=0, lt=1, description="average only the worst positions, for example 0.999"
    )
    maps: Literal["auto", "cross", "same", "both"] = Field(
        default="auto", description="which distances make the map; auto: cross if it is trained, else same"
    )
    fuse: Literal["mean", "product"] = Field(default="mean", description="how the levels' maps become one")
    score: Literal["max", "topk"] = Field(default="max", description="image score: largest pixel, or mean of the top")
    top_fraction: float = Field(default=0.001, gt=0, le=1, description="share of the pixels that score=topk averages")
    imgsz: int = Field(default=256, ge=32, multiple_of=32, description="canvas that sigma_px is scaled to")
    sigma_px: float = Field(default=4.0, ge=0, le=64, description="Gaussian blur of the map, in pixels at 256; 0: none")
    threshold_quantile: float = Field(default=0.995, gt=0, lt=1, description="of the held-out normal scores")
    threshold_margin: float = Field(default=0.05, ge=0, le=10, description="added to it, relative")

    @field_validator("taps")
    @classmethod
    def _known_strides(cls, taps: list[int]) -> list[int]:
        if any(stride not in STRIDES for stride in taps):
            raise ValueError(f"strides are {', '.join(map(str, STRIDES))}")
        if sorted(set(taps)) != taps:
            raise ValueError("give each stride once, the smallest first")
        return taps

    @model_validator(mode="after")
    def _consistent(self) -> AnomalySpec:
        if self.cross == 0 and self.same == 0:
            raise ValueError("cross=0 and same=0: nothing would be learned; one of them must be above 0")
        if self.projector == "teacher-anchored" and self.same == 0:
            raise ValueError(
                "projector=teacher-anchored needs same > 0: a trained projector on the teacher's side alone collapses "
                "to a constant"
            )
        if self.plus and self.taps[-1] == STRIDES[-1]:
            raise ValueError(f"plus=true adds a level after the last tap, which must be below {STRIDES[-1]}")
        for name, weight in (("cross", self.cross), ("same", self.same)):
            if self.maps in {name, "both"} and weight == 0:
                raise ValueError(f"maps={self.maps} reads distances that {name}=0 does not train")
        return self

    @property
    def levels(self) -> list[int]:
        """Return the strides of all levels, that of HKT+ included."""
        return [*self.taps, 2 * self.taps[-1]] if self.plus else list(self.taps)

    @property
    def map_kinds(self) -> tuple[str, ...]:
        """Return which distances make the map: ``cross``, ``same`` or both."""
        if self.maps == "both":
            return ("cross", "same")
        if self.maps == "auto":
            return ("cross",) if self.cross > 0 else ("same",)
        return (self.maps,)

    def target_stride(self, stride: int) -> int:
        """Return the stride of the teacher map that the cross-layer loss gives to the level of ``stride``."""
        if self.plus and (self.plus_targets == "top" or stride == self.levels[-1]):
            return self.levels[-1]
        return self.taps[-1]

    @property
    def teacher_strides(self) -> list[int]:
        """Return the strides of the teacher maps that the losses read, ascending."""
        strides = {self.target_stride(stride) for stride in self.levels} if self.cross > 0 else set()
        return sorted(strides | (set(self.levels) if self.same > 0 else set()))


def preset_names() -> list[str]:
    """Return the names of the built-in anomaly models."""
    return sorted(path.stem for path in (builtin_root() / "models" / "anomaly").glob("*.yaml"))


def load_spec(name: str | Path, overrides: Mapping[str, Any] | None = None) -> AnomalySpec:
    """Read a preset or a YAML file, and apply overrides.

    Args:
        name: ``hkt``, ``hkt-plus``, ``hkt-hybrid``, ``same-layer``, or a YAML file with keys of ``AnomalySpec``.
        overrides: Values that replace those of the file.

    Raises:
        ConfigError: No such preset or file, an unknown key, or a value that is not valid.
    """
    path = _find(str(name))
    content = load_yaml(path)
    validate(AnomalySpec, content, where=path.name)  # so that a fault of the file is not blamed on the overrides
    return validate(AnomalySpec, {**content, **dict(overrides or {})}, where=Path(name).stem)


def _find(name: str) -> Path:
    local = Path(name).expanduser()
    if local.suffix in {".yaml", ".yml"} and local.is_file():
        return local.resolve()
    stem = local.stem if local.suffix in {".yaml", ".yml"} else local.name
    builtin = builtin_root() / "models" / "anomaly" / f"{stem}.yaml"
    if str(local.parent) == "." and builtin.is_file():
        return builtin
    known = preset_names()
    raise ConfigError(
        f"anomaly model '{name}' not found: no YAML file of that name, and built-in are {', '.join(known)}"
        f"{nearest(stem, known)}"
    )
