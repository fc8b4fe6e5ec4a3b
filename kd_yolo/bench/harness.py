"""Time artifacts in interleaved rounds, each in its own process, and judge them on the same canvas."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_yolo.bench.pool import WorkerProcess, worker_pool
from kd_yolo.bench.report import BenchReport, BenchRow, save
from kd_yolo.bench.timing import WarmUp, images_per_second, spread_of_rounds, summarize_stages
from kd_yolo.errors import ConfigError
from kd_yolo.files import check_writable

IMAGES = 32
ROUNDS = 10
ITERATIONS = 20


def benchmark(
    models: Sequence[str | Path],
    imgsz: int | None = None,
    batch: int = 1,
    data: str | Path | None = None,
    split: str = "val",
    rounds: int = ROUNDS,
    iterations: int = ITERATIONS,
    threads: int | None = None,
    device: str = "cpu",
    out: str | Path | None = None,
    trust: bool = False,
) -> BenchReport:
    """Time, weigh and judge artifacts under the same conditions.

    Rounds are interleaved: every artifact is timed once before any is timed again, and each round starts with another
    one, so that a machine that slows down slows all of them down and ratios hold.

    Args:
        models: ``.pt`` checkpoints (in their deployed form, in PyTorch) and ``.onnx`` files (in ONNX Runtime).
        imgsz: Side of the canvas; default the artifacts' own, which must then agree.
        batch: Images per call.
        data: Data set: its images are shown, and mAP is reported. Without it, synthetic images and no mAP.
        split: Split of ``data`` for images and mAP.
        rounds: Interleaved rounds.
        iterations: Timed calls per artifact and round.
        threads: CPU threads of every runtime; default the usable physical cores.
        device: ``cpu`` or a CUDA number.
        out: Folder for ``benchmark.json``, ``.csv``, ``.md`` and ``.png``.
        trust: Load foreign classes from checkpoints, which runs code in them.

    Raises:
        ConfigError: An argument is not acceptable, or canvases differ.
        BackendMissingError: A runtime or provider is missing, or silently fell back to another one.
        KDYoloError: An artifact, the data or the folder cannot be used.
    """
    artifacts = _check_models(models)
    _check_counts(batch=batch, rounds=rounds, iterations=iterations, threads=threads or 1)
    if out is not None:
        check_writable(Path(out))
    plan = _Plan(batch, rounds, iterations, threads or _usable_cores(), str(device), data, split)
    report = _run(artifacts, plan, {"imgsz": imgsz, "trust": trust})
    return report if out is None else save(report, Path(out))


@dataclass(frozen=True)
class _Plan:
    """Checked arguments of one benchmark."""

    batch: int
    rounds: int
    iterations: int
    threads: int
    device: str
    data: str | Path | None
    split: str


def _run(artifacts: Sequence[Path], plan: _Plan, loading: dict[str, Any]) -> BenchReport:
    """Measure artifacts and gather the conditions they were measured under."""
    files, synthetic, shown, resolved = _pictures(plan.data, plan.split)
    spec = {**loading, "batch": plan.batch, "device": plan.device, "threads": plan.threads}
    with worker_pool(artifacts, plan.threads) as workers:
        opened = _open(workers, {**spec, "images": files, "synthetic": synthetic})
        canvas = _one_canvas(artifacts, opened)
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        rows = _measure(workers, opened, plan, resolved)
    confidence, iou = _selection()
    return BenchReport(
        rows=rows,
        canvas=canvas,
        batch=plan.batch,
        device=plan.device,
        threads=plan.threads,
        rounds=plan.rounds,
        iterations=plan.iterations,
        images=shown,
        data=None if plan.data is None else str(plan.data),
        split=plan.split,
        confidence=confidence,
        iou=iou,
        environment=_environment(opened),
        load_average=load,
        created=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    )


def _open(workers: Sequence[WorkerProcess], spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Load every artifact in its process; return what each says about itself."""
    opened = []
    for worker in workers:
        _say(f"opening {worker.artifact}")
        opened.append(worker.ask("open", artifact=str(worker.artifact), **spec))
    return opened


def _measure(
    workers: Sequence[WorkerProcess], opened: Sequence[dict[str, Any]], plan: _Plan, data: str | None
) -> list[BenchRow]:
    """Warm up, time, weigh and judge opened artifacts."""
    warm = [WarmUp(**worker.ask("warm")) for worker in workers]
    timed = _rounds(workers, plan.rounds, plan.iterations)
    memory = [worker.ask("memory") for worker in workers]
    accuracy = _accuracy(workers, data, plan.split)
    everything = zip(workers, opened, timed, warm, memory, accuracy, strict=True)
    return [
        _row(worker.artifact, facts, calls, state, used, judged, plan.batch)
        for worker, facts, calls, state, used, judged in everything
    ]


def _check_models(models: Sequence[str | Path]) -> list[Path]:
    if isinstance(models, (str, Path)):
        models = [models]
    if not models:
        raise ConfigError("model: give at least one checkpoint or exported file")
    return [Path(model).expanduser() for model in models]


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value}: must be a whole number of at least 1")


def _selection() -> tuple[float, float]:
    """Return the threshold and overlap bound that post-processing uses."""
    from kd_yolo.inference import CONFIDENCE, NMS_IOU

    return CONFIDENCE, NMS_IOU


def _usable_cores() -> int:
    """Return the physical cores that this process may use: hyper-threads share what inference needs."""
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1
    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))


def _pictures(data: str | Path | None, split: str) -> tuple[list[str], int, str, str | None]:
    """Return image files, the number of synthetic images, a description of both, and the resolved data YAML."""
    if data is None:
        return [], IMAGES, f"{IMAGES} synthetic", None
    from kd_yolo.data.datasets import resolve_dataset
    from kd_yolo.images import dataset_files, spread

    resolved = resolve_dataset(str(data))
    files = spread(dataset_files(resolved, split), IMAGES)
    return [str(file.absolute()) for file in files], 0, f"{len(files)} of {data}", str(resolved)


def _one_canvas(artifacts: Sequence[Path], opened: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Return the canvas that all artifacts share."""
    canvases = [tuple(answer["canvas"]) for answer in opened]
    for path, canvas in zip(artifacts, canvases, strict=True):
        if canvas != canvases[0]:
            raise ConfigError(
                f"{path}: its canvas is {canvas[0]}x{canvas[1]}, that of {artifacts[0]} is "
                f"{canvases[0][0]}x{canvases[0][1]}; numbers on different canvases do not compare, give imgsz="
            )
    return canvases[0][0], canvases[0][1]


def _rounds(workers: Sequence[WorkerProcess], rounds: int, iterations: int) -> list[list[list[list[float]]]]:
    """Return by artifact, round and call the milliseconds of each stage."""
    timed: list[list[list[list[float]]]] = [[] for _ in workers]
    for turn in range(rounds):
        _say(f"round {turn + 1} of {rounds}")
        for offset in range(len(workers)):
            index = (turn + offset) % len(workers)
            timed[index].append(workers[index].ask("round", calls=iterations)["calls"])
    return timed


def _accuracy(workers: Sequence[WorkerProcess], data: str | None, split: str) -> list[dict[str, Any]]:
    """Validate one artifact after the other, after all timing is done."""
    if data is None:
        return [{} for _ in workers]
    found = []
    for worker in workers:
        _say(f"validating {worker.artifact}")
        found.append(worker.ask("accuracy", data=data, split=split))
    return found


def _row(
    path: Path,
    facts: dict[str, Any],
    rounds: list[list[list[float]]],
    warm: WarmUp,
    memory: dict[str, Any],
    accuracy: dict[str, Any],
    batch: int,
) -> BenchRow:
    calls = [call for one in rounds for call in one]
    kept = {key: facts[key] for key in ("runtime", "precision", "head", "size_mb", "params", "gflops")}
    return BenchRow(
        artifact=str(path),
        **kept,
        latency_ms=summarize_stages(calls),
        fps=images_per_second(calls, batch),
        samples=len(calls),
        warmup_calls=warm.calls,
        warmup_stable=warm.stable,
        round_spread=spread_of_rounds(rounds),
        **memory,
        map50=accuracy.get("map50"),
        map50_95=accuracy.get("map50_95"),
    )


def _environment(opened: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the workers share, with the versions of all of them."""
    merged: dict[str, Any] = dict(opened[0]["environment"])
    merged["versions"] = {key: value for answer in opened for key, value in answer["environment"]["versions"].items()}
    return merged


def _say(text: str) -> None:
    """Report progress where it cannot mix with results."""
    print(f"benchmark: {text}", file=sys.stderr, flush=True)
