"""One ``kd-yolo train task=anomaly`` command: a category, or all of them; started, resumed, judged and tabulated."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from ultralytics.cfg import get_cfg
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import init_seeds

from kd_yolo.anomaly.checkpoint import load_anomaly
from kd_yolo.anomaly.dataset import AnomalyDataset
from kd_yolo.anomaly.evaluate import judge, table
from kd_yolo.anomaly.layout_source import find_source
from kd_yolo.anomaly.layouts import AnomalyData, AnomalySample, categories, read_anomaly_data
from kd_yolo.anomaly.metrics import KEYS, AnomalyMetrics
from kd_yolo.anomaly.model import AnomalyModel
from kd_yolo.anomaly.settings import STOCK_DEFAULTS, AnomalyConfig, epochs_for
from kd_yolo.anomaly.spec import AnomalySpec, load_spec
from kd_yolo.config import validate
from kd_yolo.devices import parse_device
from kd_yolo.errors import ConfigError, DataError, TeacherError
from kd_yolo.files import sha256, write_json, write_text
from kd_yolo.resources import load_yaml
from kd_yolo.tasks.anomaly import AnomalyTrainer, Views
from kd_yolo.tasks.run_folder import RUN_FILE, find_run, new_run_dir

DONE_FILE = "result.json"
RESUMED = "resumed"
"""What stands for ``data`` where a run is resumed."""
LEAST_HELD_OUT = 2


@dataclass(frozen=True)
class AnomalyReport:
    """What a training command leaves.

    Attributes:
        run_dir: The run folder.
        results: By category: checkpoint, metrics on its test images (None without labelled ones), thresholds, times.
    """

    run_dir: Path
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"task": "anomaly", "run_dir": str(self.run_dir), "categories": self.results, "mean": self._mean()}

    def to_markdown(self) -> str:
        """Return a row for each category and their mean."""
        judged = {name: _metrics(one["metrics"]) for name, one in self.results.items() if one["metrics"]}
        return table(judged) if judged else "no labelled test images: nothing to judge"

    def _mean(self) -> dict[str, float] | None:
        judged = [one["metrics"] for one in self.results.values() if one["metrics"]]
        defined = {key: [one[key] for one in judged if one[key] is not None] for key in KEYS}
        return {key: float(sum(values) / len(values)) for key, values in defined.items() if values} or None


def train_anomaly(config: AnomalyConfig, stock: Mapping[str, Any], overrides: Mapping[str, Any]) -> AnomalyReport:
    """Train, calibrate and judge an anomaly model on one category or on every one.

    Args:
        config: Our keys.
        stock: Stock training arguments.
        overrides: Keys of ``AnomalySpec`` that replace those of the model's file.

    Raises:
        KDYoloError: Anything wrong with the input, before anything is trained.
    """
    if config.resume is not False:
        run_dir, plan = _resumed(config, stock, overrides)
    else:
        run_dir, plan = _started(config, stock, overrides)
    given = validate(AnomalyConfig, plan["config"], where=RUN_FILE)
    spec = validate(AnomalySpec, plan["spec"], where=RUN_FILE)
    names = plan["categories"]
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        folder = run_dir / name if len(names) > 1 else run_dir
        results[name] = _category(folder, name, given, spec, plan["stock"])
        report = AnomalyReport(run_dir, results)
        write_text(run_dir / "categories.md", report.to_markdown() + "\n")
    write_json(run_dir / "report.json", report.to_dict())
    return report


def hold_out(
    samples: list[AnomalySample], share: float, where: str = ""
) -> tuple[list[AnomalySample], list[AnomalySample]]:
    """Split normals into those to train on and those to calibrate on; the same for every seed.

    Args:
        samples: Normal images in a fixed order.
        share: Of the images to keep back.
        where: What they are, for the message.

    Raises:
        DataError: There are too few images for both.
    """
    rows = list(range(len(samples)))
    random.Random(0).shuffle(rows)
    count = max(LEAST_HELD_OUT, round(len(rows) * share))
    if len(rows) - count < LEAST_HELD_OUT:
        raise DataError(
            f"{where}{len(rows)} normal images are too few to train and calibrate on; at least 4 are needed"
        )
    kept = set(rows[:count])
    return [s for i, s in enumerate(samples) if i not in kept], [s for i, s in enumerate(samples) if i in kept]


def _started(
    config: AnomalyConfig, stock: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[Path, dict[str, Any]]:
    """Check every input, create the run folder and write the plan."""
    spec, imgsz = _spec(config, stock, overrides)
    _check_stock(stock)
    parse_device(str(stock.get("device", STOCK_DEFAULTS["device"])))
    if config.category == "all":
        found = [read_anomaly_data(config.data, name) for name in categories(config.data)]
    else:
        found = [read_anomaly_data(config.data, config.category)]
    for data in found:
        hold_out(data.train, config.holdout, f"{data.root}: ")
    AnomalyModel(spec, trust=config.trust)  # a missing or random teacher is refused before anything is written
    run_dir = new_run_dir(stock, "anomaly", stale=("*",))
    place = {"project", "name", "exist_ok"}
    plan = {
        "kd_yolo_run": 1,
        "task": "anomaly",
        "config": {**config.model_dump(), "data": _absolute_data(config.data), "resume": False},
        "spec": spec.model_dump(),
        "teacher_sha256": _teacher_hash(spec.teacher),
        "categories": [data.category for data in found],
        "stock": {**STOCK_DEFAULTS, **{key: value for key, value in stock.items() if key not in place}, "imgsz": imgsz},
    }
    write_text(run_dir / RUN_FILE, yaml.safe_dump(plan, sort_keys=False))
    return run_dir, plan


def _spec(config: AnomalyConfig, stock: Mapping[str, Any], overrides: Mapping[str, Any]) -> tuple[AnomalySpec, int]:
    """Return the structure, files in it by their absolute paths, and the canvas: the user's, else the model file's."""
    given = {**({"teacher": config.teacher} if config.teacher else {}), **overrides}
    spec = load_spec(config.model, given)
    imgsz = int(stock.get("imgsz", spec.imgsz))
    prefix, sign, file = spec.teacher.rpartition("=")
    teacher = Path(file).expanduser()
    places = {"teacher": f"{prefix}{sign}{teacher.absolute()}"} if teacher.is_file() else {}
    student = Path(spec.student).expanduser()
    places |= {"student": str(student.absolute())} if student.is_file() else {}
    return load_spec(config.model, {**given, **places, "imgsz": imgsz}), imgsz


def _teacher_hash(teacher: str) -> str | None:
    """Return the hash of the teacher's file, if it is one: a resumed run must not go on with another."""
    file = Path(teacher.rpartition("=")[2])
    return sha256(file) if file.is_file() else None


def _absolute_data(data: str) -> str:
    """Return the absolute path of a user's file or folder; a built-in name stays one where a folder has that name."""
    given = Path(data).expanduser()
    if given.is_file() or (given.is_dir() and find_source(data).root == given.resolve()):
        return str(given.absolute())
    return data


def _check_stock(stock: Mapping[str, Any]) -> None:
    try:
        get_cfg(overrides=dict(stock))
    except (TypeError, ValueError, SyntaxError) as error:
        raise ConfigError(str(error).splitlines()[0]) from error


def _resumed(
    config: AnomalyConfig, stock: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[Path, dict[str, Any]]:
    given = [*(config.model_fields_set - {"resume", "data"}), *(set(stock) - {"project", "name"})]
    given += ["data"] if config.data != RESUMED else []
    given += [f"kd.{key}" for key in overrides]
    if given:
        raise ConfigError(f"{sorted(given)[0]}: a resumed run keeps its own settings; drop it, or start a new run")
    run_dir = find_run(config.resume, stock, "anomaly")
    plan = load_yaml(run_dir / RUN_FILE)
    teacher = plan["spec"]["teacher"]
    if plan.get("teacher_sha256") != _teacher_hash(teacher):
        raise TeacherError(
            f"{teacher}: the teacher's file has changed since this run began; put it back, or start anew"
        )
    LOGGER.info(f"Resuming {run_dir}")
    return run_dir, plan


def _category(
    folder: Path, name: str, config: AnomalyConfig, spec: AnomalySpec, stock: Mapping[str, Any]
) -> dict[str, Any]:
    """Train and judge one category, or return its recorded result."""
    done = folder / DONE_FILE
    if done.is_file():
        LOGGER.info(f"{name}: already done")
        return dict(json.loads(done.read_text(encoding="utf-8")))
    data = read_anomaly_data(config.data, name)
    LOGGER.info(data.describe())
    started = time.time()
    best, last = folder / "weights" / "best.pt", folder / "weights" / "last.pt"
    if not _calibrated(best):
        _train(folder, data, config, spec, stock, resume=last.is_file())
    trained_s = time.time() - started
    model, content = load_anomaly(best)
    result = {
        "category": name,
        "best": str(best),
        "best_sha256": sha256(best),
        "metrics": _judged(folder, model, data, stock),
        "calibration": content["kd_yolo"]["calibration"],
        "images": len(data.train),
        "seconds": round(trained_s, 1),
    }
    write_json(done, result)
    return result


def _train(
    folder: Path, data: AnomalyData, config: AnomalyConfig, spec: AnomalySpec, stock: Mapping[str, Any], resume: bool
) -> None:
    train, held_out = hold_out(data.train, config.holdout)
    init_seeds(int(stock["seed"]) + 1, deterministic=bool(stock["deterministic"]))  # the student's random weights
    net = AnomalyModel(spec, trust=config.trust)
    arguments = {
        **stock,
        "epochs": epochs_for(len(train), int(stock["batch"]), stock.get("epochs")),
        "model": config.model,
        "data": config.data,
        "project": str(folder.parent),
        "name": folder.name,
        "exist_ok": True,
        "resume": resume,
    }
    views = Views(config.flips, config.brightness)
    trainer = AnomalyTrainer(net, train, held_out, views, arguments, data.category)
    trainer.train()


def _judged(folder: Path, model: AnomalyModel, data: AnomalyData, stock: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the metrics on the labelled test images, which took part in no choice; None when there are none."""
    calibration = model.calibration
    if not data.test or calibration is None:
        return None
    device = parse_device(str(stock["device"]))
    model = model.to(device)

    def run(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = model(images.to(device))
        return maps.cpu(), model.image_scores(maps).cpu()

    dataset = AnomalyDataset(data.test, int(stock["imgsz"]))
    plots = folder if stock["plots"] else None
    judged = judge(run, dataset, calibration, int(stock["batch"]), plots, f"{data.name} {data.category}")
    normal, anomalous = judged.flagged
    shares = {"normal": normal, "anomalous": anomalous}
    said = " and ".join(f"{share:.0%} of {what}" for what, share in shares.items() if share is not None)
    LOGGER.info(f"above the threshold: {said} test images")
    counts = {"images": judged.metrics.images, "anomalies": judged.metrics.anomalies}
    flagged = {f"flagged_{what}": share for what, share in shares.items() if share is not None}
    figures = {key: None if math.isnan(value) else value for key, value in judged.metrics.results_dict.items()}
    return {**figures, **counts, **flagged}


def _calibrated(best: Path) -> bool:
    return best.is_file() and load_anomaly(best)[0].calibration is not None


def _metrics(values: Mapping[str, Any]) -> AnomalyMetrics:
    image, pixel, pro, image_f1, pixel_f1 = (math.nan if values[key] is None else values[key] for key in KEYS)
    return AnomalyMetrics(
        image, pixel, pro, image_f1, pixel_f1, images=int(values["images"]), anomalies=int(values["anomalies"])
    )
