"""Time artifacts in interleaved rounds, each in its own process, and judge them on the same canvas."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_yolo.bench.affinity import usable_cores
from kd_yolo.bench.against import OldReport, changes, check_same, load_old
from kd_yolo.bench.measure import estimates, measure, one_canvas, open_all
from kd_yolo.bench.pool import worker_pool
from kd_yolo.bench.report import BenchReport
from kd_yolo.bench.settings import Plan, make_plan, make_settings
from kd_yolo.bench.writing import save
from kd_yolo.errors import ConfigError
from kd_yolo.files import check_writable
from kd_yolo.targets import Target, load_target

IMAGES = 32


def benchmark(
    models: Sequence[str | Path],
    imgsz: int | Sequence[int] | None = None,
    batch: int = 1,
    data: str | Path | None = None,
    split: str = "val",
    out: str | Path | None = None,
    trust: bool = False,
    **settings: Any,
) -> BenchReport:
    """Time, weigh and judge artifacts under the same conditions.

    Rounds are interleaved: every artifact is timed once before any is timed again, and each round starts with another
    one, so that a machine that slows down slows all of them down and ratios hold.

    Args:
        models: ``.pt`` checkpoints (in their deployed form, in PyTorch) and exported files; ``FILE@RUNTIME`` chooses
            how a file is run, see ``kd_yolo.bench.runners.RUNTIMES``.
        imgsz: Canvas: a side, or height and width; default the artifacts' own, which must then agree.
        batch: Images per call.
        data: Data set: its images are shown, and mAP is reported (AUROC, if all models are anomaly models; ``category``
            then says of which part). Without it, synthetic images, no accuracy, and models of both tasks may be mixed.
        split: Split of ``data`` for images and mAP.
        out: Folder for ``benchmark.json``, ``.csv``, ``.md`` and ``.png``.
        trust: Load foreign classes from checkpoints, which runs code in them.
        **settings: Fields of ``kd_yolo.bench.settings.Settings``: ``rounds``, ``iterations``, ``stream``, ``threads``,
            ``affinity``, ``device``, ``targets``, ``against`` and ``category``.

    Raises:
        ConfigError: An argument is not acceptable, canvases differ, ``against`` was measured otherwise, or ``data`` is
            to judge detectors and anomaly models at once.
        BackendMissingError: A runtime or provider is missing, or silently fell back to another one.
        DataError: An artifact's classes are not the data set's.
        KDYoloError: An artifact, the data or the folder cannot be used.
    """
    from kd_yolo.bench.runners import parse_choice

    chosen = make_settings(settings)
    plan = make_plan(chosen, batch, data, split)
    choices = [parse_choice(text) for text in ([models] if isinstance(models, (str, Path)) else models)]
    if not choices:
        raise ConfigError("model: give at least one checkpoint or exported file")
    targets = [load_target(target) for target in chosen.targets]
    earlier = None if chosen.against is None else (load_old(Path(chosen.against)), Path(chosen.against))
    if out is not None:
        check_writable(Path(out))
    loading = {"imgsz": imgsz if imgsz is None or isinstance(imgsz, int) else list(imgsz), "trust": trust}
    report = _run(choices, plan, loading, targets, earlier)
    return report if out is None else save(report, Path(out))


def _run(
    choices: Sequence[Any],
    plan: Plan,
    loading: dict[str, Any],
    targets: Sequence[Target],
    earlier: tuple[OldReport, Path] | None,
) -> BenchReport:
    """Measure artifacts and gather the conditions they were measured under."""
    if earlier is not None:
        check_same(*earlier, {"batch": plan.batch, "threads": plan.threads})
    anomaly = _one_task(choices, plan)
    files, synthetic, shown, resolved = _anomaly_pictures(plan) if anomaly else _pictures(plan.data, plan.split)
    spec = {**loading, "batch": plan.batch, "device": plan.device, "threads": plan.threads, "cores": plan.cores}
    with worker_pool(choices, plan.threads) as workers:
        opened = open_all(workers, {**spec, "images": files, "synthetic": synthetic})
        canvas = one_canvas(workers, opened)
        environment = _environment(opened)
        if earlier is not None:
            check_same(*earlier, {"canvas": canvas, **{key: environment[key] for key in ("cpu", "gpu")}})
        if resolved is not None and not anomaly:
            _check_classes(choices, opened, resolved)
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        rows = measure(workers, opened, plan, resolved)
        bounds = estimates(workers, opened, rows, targets, plan)
    confidence, iou = _selection()
    return BenchReport(
        rows=rows,
        canvas=canvas,
        batch=plan.batch,
        device=plan.device,
        threads=plan.threads,
        affinity=plan.cores,
        rounds=plan.rounds,
        iterations=plan.iterations,
        images=shown,
        data=plan.data,
        split=plan.split,
        confidence=confidence,
        iou=iou,
        environment=environment,
        load_average=load,
        created=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        estimates=bounds,
        against=None if earlier is None else str(earlier[1]),
        changes=[] if earlier is None else changes(earlier[0], rows, plan.data, plan.split),
    )


def _check_classes(choices: Sequence[Any], opened: Sequence[dict[str, Any]], data: str) -> None:
    """Refuse foreign classes before anything is timed."""
    from kd_yolo.runtimes import check_same_classes

    for choice, facts in zip(choices, opened, strict=True):
        check_same_classes(dict(enumerate(facts["names"])), data, choice.path)


def _one_task(choices: Sequence[Any], plan: Plan) -> bool:
    """Return whether data are given and all are anomaly models; one data set cannot judge both tasks."""
    if plan.data is None:
        return False
    from kd_yolo.runtimes.anomaly_session import is_anomaly_file

    found = [is_anomaly_file(choice.path) for choice in choices]
    if any(found) and not all(found):
        raise ConfigError("data=: judges detectors or anomaly models, not both; leave it out to time them together")
    if plan.category is not None and not any(found):
        raise ConfigError("category=: is for anomaly models; leave it out for detectors")
    return any(found)


def _anomaly_pictures(plan: Plan) -> tuple[list[str], int, str, str | None]:
    """Return what ``_pictures`` does, for the test images of a category."""
    from kd_yolo.bench.anomaly_runner import anomaly_files

    files = anomaly_files(str(plan.data), plan.category, IMAGES)
    part = "" if plan.category is None else f" {plan.category}"
    return [str(file.absolute()) for file in files], 0, f"{len(files)} of {plan.data}{part}", plan.data


def _selection() -> tuple[float, float]:
    """Return the threshold and overlap bound that post-processing uses."""
    from kd_yolo.inference import CONFIDENCE, NMS_IOU

    return CONFIDENCE, NMS_IOU


def _pictures(data: str | None, split: str) -> tuple[list[str], int, str, str | None]:
    """Return image files, the number of synthetic images, a description of both, and the resolved data YAML."""
    if data is None:
        return [], IMAGES, f"{IMAGES} synthetic", None
    from kd_yolo.data.datasets import resolve_dataset
    from kd_yolo.images import dataset_files, spread

    resolved = resolve_dataset(data)
    files = spread(dataset_files(resolved, split), IMAGES)
    return [str(file.absolute()) for file in files], 0, f"{len(files)} of {data}", str(resolved)


def _environment(opened: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the workers share, with the versions of all of them."""
    merged: dict[str, Any] = dict(opened[0]["environment"])
    merged["cores_usable"] = len(usable_cores())  # of this process: the others are bound
    merged["versions"] = {key: value for answer in opened for key, value in answer["environment"]["versions"].items()}
    return merged
