"""The words of ``kd-yolo data convert from=classes``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from kd_yolo.classify.data import to_classification
from kd_yolo.config import Strict, validate
from kd_yolo.data.progress import stderr_progress
from kd_yolo.data.splits import parse_split


class ClassesKeys(Strict):
    """Keys of ``kd-yolo data convert from=classes``."""

    from_: Literal["classes"] = Field(alias="from", description="give from=classes")
    src: str = Field(min_length=1, description="detection data set, or folder of class folders; give src=FOLDER")
    out: str = Field(min_length=1, description="folder to write; give out=FOLDER")
    kind: Literal["auto", "class", "defect", "folder"] = Field(default="auto", description="how classes are found")
    split: str | None = Field(default=None, description="of a plain folder: 0.8/0.1/0.1, kfold:5:0 or lists")
    group: str | None = Field(default=None, description="of a plain folder: what stays together, REGEX or similar")
    seed: int = Field(default=0, ge=0)
    mode: Literal["copy", "link"] = "copy"


def convert_classes(values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Do what ``kd-yolo data convert from=classes key=value ...`` asks for; return text for people and plain data.

    Raises:
        KDYoloError: A wrong key, or as ``to_classification``.
    """
    keys = validate(ClassesKeys, values, where="data convert from=classes")
    given = keys.split is not None or keys.group is not None or keys.seed != 0
    split = parse_split(keys.split or "auto", keys.seed, keys.group) if given else None
    progress = stderr_progress(f"{keys.src}: placing images")
    report = to_classification(keys.src, keys.out, keys.kind, split, keys.mode, progress)
    return report.to_text(), report.to_dict()
