"""``kd-yolo val`` with an anomaly model: metrics on labelled images, and thresholds from a labelled validation set."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor
from ultralytics.utils import LOGGER

from kd_yolo.anomaly.calibration import Calibration
from kd_yolo.anomaly.checkpoint import load_anomaly, save_anomaly
from kd_yolo.anomaly.dataset import AnomalyDataset
from kd_yolo.anomaly.evaluate import judge
from kd_yolo.anomaly.layouts import AnomalyData, categories, read_anomaly_data, same_category
from kd_yolo.config import Strict
from kd_yolo.errors import CheckpointError, ConfigError, DataError
from kd_yolo.files import write_json, write_text
from kd_yolo.inspection.origin import BEST, origin_of, run_checkpoints
from kd_yolo.inspection.predict import anomaly_keys, open_checked
from kd_yolo.inspection.validate_report import CategoryReport, ValReport
from kd_yolo.inspection.writing import run_folder
from kd_yolo.runtimes.anomaly_session import AnomalySession

ALL = "all"


class ValKeys(Strict):
    """Keys of ``kd-yolo val`` with an anomaly model."""

    model: str = Field(min_length=1, description="anomaly checkpoint, exported file, or folder of a training run")
    data: str = Field(min_length=1, description="mvtec, btad, magnetic-tile, surface-synth, a YAML file or a folder")
    category: str | None = Field(default=None, description="which category; all for every one; default the model's")
    split: Literal["test", "val"] = Field(default="test", description="which labelled images are judged")
    threshold: Literal["own", "f1"] = Field(default="own", description="f1: those of the best F1 on the val images")
    out: str | None = Field(default=None, description="threshold=f1: checkpoint to write with the new thresholds")
    imgsz: int | list[int] | None = Field(default=None, description="canvas, pixels; default the model's")
    batch: int = Field(default=16, ge=1)
    device: str = "cpu"
    threads: int | None = Field(default=None, ge=1)
    plots: bool = True
    project: str | None = None
    name: str | None = None
    exist_ok: bool = False
    trust: bool = False

    @field_validator("model", "data", "category", "out", "device", "project", "name", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, (Path, int, float)) and not isinstance(value, bool) else value


def val_anomaly(model: str | Path, data: str | Path, **keys: Any) -> ValReport:
    """Judge an anomaly model on labelled images.

    Args:
        model: Anomaly checkpoint, exported file, or the folder of a training run.
        data: Built-in name, YAML file or folder.
        **keys: See ``ValKeys``.

    Raises:
        KDYoloError: Anything wrong with the input, before anything is written.
    """
    given = anomaly_keys(ValKeys, {**keys, "model": model, "data": data}, "val")
    if given.out is not None and (given.threshold == "own" or given.category == ALL or not given.out.endswith(".pt")):
        raise ConfigError(f"out={given.out}: needs threshold=f1, one category and a name that ends in .pt")
    if given.threshold == "f1" and given.split == "val":
        raise ConfigError(
            "split=val: these images give the thresholds of threshold=f1; leave split out to judge on test"
        )
    if given.out is not None and given.imgsz is not None:
        raise ConfigError(f"out={given.out}: its thresholds belong to the model's own canvas; leave imgsz out")
    plan = _plan(given)
    for _, one in plan.values():
        _labelled(one, given.split)
        if given.threshold == "f1":
            _labelled_val(one)
    sessions = {name: open_checked(file, given.imgsz, given.device, given.threads) for name, (file, _) in plan.items()}
    if given.out is not None and next(iter(plan.values()))[0].suffix != ".pt":
        raise ConfigError(f"out={given.out}: only a checkpoint can be given new thresholds; export it after that")
    save_dir = run_folder(given.project, given.name, "val", given.exist_ok)
    results = {}
    for name, (file, one) in plan.items():
        folder = save_dir / name if len(plan) > 1 else save_dir
        results[name] = _judged(sessions[name], file, one, given, folder)
    out = _written(given, plan, results)
    report = ValReport(given.split, save_dir, results, out)
    write_text(save_dir / "categories.md", report.to_markdown() + "\n")
    write_json(save_dir / "report.json", report.to_dict())
    return report


def f1_thresholds(session: AnomalySession, data: AnomalyData, batch: int = 16) -> Calibration:
    """Return the model's calibration with the thresholds of the best F1 on the labelled validation images.

    The pixel threshold stays where no validation image has a mask.

    Args:
        session: The model.
        data: The category; only ``data.val`` is looked at, never the test images.
        batch: Images per call.

    Raises:
        DataError: There are no validation images, or none of them is anomalous or normal.
    """
    _labelled_val(data)
    dataset = AnomalyDataset(data.val, session.canvas)
    judged = judge(runner(session), dataset, session.thresholds, batch, title=f"{data.category} val")
    metrics = judged.metrics
    image = _below(metrics.image_f1_threshold, judged.scores)
    pixel = metrics.pixel_f1_threshold
    return dataclasses.replace(
        session.thresholds,
        threshold_image=image,
        threshold_pixel=session.thresholds.threshold_pixel if np.isnan(pixel) else _just_below(pixel),
        score_max=max(session.thresholds.score_max, image),
    )


def runner(session: AnomalySession) -> Any:
    """Return a session in the form that ``kd_yolo.anomaly.evaluate.judge`` runs."""

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        maps = session.maps(images)
        return torch.from_numpy(maps), torch.from_numpy(session.scores(maps))

    return run


Plan = Mapping[str, tuple[Path, AnomalyData]]


def _plan(given: ValKeys) -> dict[str, tuple[Path, AnomalyData]]:
    """Return by category which file is judged on which images."""
    place = Path(given.model).expanduser()
    several = run_checkpoints(place) if place.is_dir() else {}
    place = several.pop("", place)
    known = categories(given.data) if given.category == ALL or several else []
    if given.category == ALL and len(known) > 1:
        lacking = [name for name in known if name not in several]
        if lacking:
            raise ConfigError(
                f"category=all: {place} has no {lacking[0]}/{BEST}; give the folder of a run with category=all, or one "
                f"category=NAME"
            )
        return {name: (several[name], read_anomaly_data(given.data, name)) for name in known}
    if several:
        wanted = given.category if given.category not in {None, ALL} else (known[0] if len(known) == 1 else None)
        wanted = next((name for name in several if wanted is not None and same_category(name, wanted)), None)
        if wanted is None:
            raise ConfigError(f"{place}: holds models of {', '.join(several)}; give category= one of them, or all")
        return {str(wanted): (several[str(wanted)], read_anomaly_data(given.data, wanted))}
    data = _data_for(place, given)
    return {data.category: (place, data)}


def _data_for(file: Path, given: ValKeys) -> AnomalyData:
    """Return the images for one model: of its own category, and of no other of the same data set."""
    if not file.exists():
        raise CheckpointError(f"model={file}: no such file or folder")
    origin = origin_of(file)
    wanted = given.category
    if wanted is None and origin.category in categories(given.data):
        wanted = origin.category
    data = read_anomaly_data(given.data, None if wanted == ALL else wanted)
    if origin.category is not None and origin.category.lower() != data.category.lower():
        text = f"{file}: was trained on the category '{origin.category}'"
        if origin.data is not None and Path(origin.data).stem == data.name:
            raise ConfigError(f"{text}, category={data.category} is another; give category={origin.category}")
        LOGGER.warning(f"{text} of {origin.data or 'unknown data'}; it is judged on '{data.category}' of {data.name}")
    return data


def _labelled(data: AnomalyData, split: str) -> AnomalyData:
    images = data.test if split == "test" else data.val
    if not images:
        other = "; split=test has some" if split == "val" and data.test else ""
        raise DataError(f"{data.root}: has no labelled {split} images to judge a model on{other}")
    if len({sample.label for sample in images}) == 1:
        kind = "anomalous" if images[0].label else "normal"
        LOGGER.warning(f"{data.root}: all {split} images are {kind}; AUROC is not defined")
    return data


def _labelled_val(data: AnomalyData) -> None:
    labels = {sample.label for sample in data.val}
    if not labels:
        raise DataError(
            f"threshold=f1: {data.root} has no labelled validation images, and test images are never used for it; name "
            f"their folder with val: in the YAML file of data="
        )
    if labels != {0, 1}:
        lacking = "no anomalous images" if labels == {0} else "no normal images"
        raise DataError(f"threshold=f1: the validation images of {data.root} hold {lacking}; both kinds are needed")


def _judged(session: AnomalySession, file: Path, data: AnomalyData, given: ValKeys, folder: Path) -> CategoryReport:
    limits: Calibration = session.thresholds
    source = "of the model's calibration"
    if given.threshold == "f1":
        limits = f1_thresholds(session, data, given.batch)
        source = f"of the best F1 on {len(data.val)} validation images"
    dataset = AnomalyDataset(data.test if given.split == "test" else data.val, session.canvas, cache=False)
    plots = folder if given.plots else None
    judged = judge(runner(session), dataset, limits, given.batch, plots, f"{data.name} {data.category}")
    return CategoryReport(file, judged.metrics, *judged.flagged, limits.threshold_image, limits.threshold_pixel, source)


def _written(given: ValKeys, plan: Plan, results: Mapping[str, CategoryReport]) -> Path | None:
    """Write a copy of the checkpoint with the new thresholds."""
    if given.out is None:
        return None
    (name, (file, data)), *_ = plan.items()
    model, content = load_anomaly(file)
    if model.calibration is None:
        raise CheckpointError(f"{file}: is not calibrated")
    found = results[name]
    model.calibration = dataclasses.replace(
        model.calibration,
        threshold_image=found.threshold_image,
        threshold_pixel=found.threshold_pixel,
        score_max=max(model.calibration.score_max, found.threshold_image),
    )
    out = Path(given.out).expanduser()
    note = {"thresholds": f"best F1 on {len(data.val)} validation images of {data.name}/{data.category}"}
    save_anomaly(out, model, content["train_args"], {**content["extra"], **note})
    return out


def _below(threshold: float, scores: np.typing.NDArray[np.float32]) -> float:
    """Return a limit that scores of ``threshold`` are above, half way to the next lower score."""
    lower = scores[scores < threshold]
    return float(np.float32((threshold + float(lower.max())) / 2)) if len(lower) else _just_below(threshold)


def _just_below(threshold: float) -> float:
    return float(np.nextafter(np.float32(threshold), np.float32(-np.inf)))
