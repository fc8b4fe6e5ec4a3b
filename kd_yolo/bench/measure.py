"""Drive the processes that hold the artifacts: open, warm up, time in interleaved rounds, stream, weigh, judge."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kd_yolo.bench.layers import Layer
from kd_yolo.bench.pool import WorkerProcess
from kd_yolo.bench.report import BenchRow
from kd_yolo.bench.roofline import PRECISIONS, Estimate, estimate, is_device
from kd_yolo.bench.settings import Plan
from kd_yolo.bench.timing import WHOLE, round_medians, spread, summarize_stages
from kd_yolo.errors import ConfigError
from kd_yolo.targets import Target


def open_all(workers: Sequence[WorkerProcess], spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Load every artifact in its process; return what each says about itself."""
    opened = []
    for worker in workers:
        say(f"opening {worker.choice}")
        opened.append(worker.ask("open", artifact=str(worker.choice.path), runtime=worker.choice.runtime, **spec))
    share_complexity(opened)
    return opened


def share_complexity(opened: Sequence[dict[str, Any]]) -> None:
    """Give parameters and GFLOPs of a checkpoint or its graph to files of the same checkpoint that hide theirs."""
    for name in ("params", "gflops"):
        known = {_network(facts): facts[name] for facts in opened if facts[name] is not None and facts["source"]}
        for facts in opened:
            if facts[name] is None:
                facts[name] = known.get(_network(facts))


def one_canvas(workers: Sequence[WorkerProcess], opened: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Return the canvas that all artifacts share.

    Raises:
        ConfigError: They do not.
    """
    canvases = [tuple(answer["canvas"]) for answer in opened]
    for worker, canvas in zip(workers, canvases, strict=True):
        if canvas != canvases[0]:
            raise ConfigError(
                f"{worker.choice}: its canvas is {canvas[0]}x{canvas[1]}, that of {workers[0].choice} is "
                f"{canvases[0][0]}x{canvases[0][1]}; numbers on different canvases do not compare, give imgsz="
            )
    return canvases[0][0], canvases[0][1]


def measure(
    workers: Sequence[WorkerProcess], opened: Sequence[dict[str, Any]], plan: Plan, data: str | None
) -> list[BenchRow]:
    """Warm up, time, weigh and judge opened artifacts."""
    warm = [worker.ask("warm") for worker in workers]
    timed = _rounds(workers, plan.rounds, plan.iterations)
    streams = []
    for worker in workers:
        say(f"streaming {plan.stream} images through {worker.choice}")
        streams.append(worker.ask("stream", images=plan.stream))
    memory = [worker.ask("memory") for worker in workers]
    accuracy = _accuracy(workers, data, plan)
    everything = zip(workers, opened, warm, timed, streams, memory, accuracy, strict=True)
    return [
        BenchRow(
            artifact=str(worker.choice.path),
            **{key: facts[key] for key in ("runtime", "precision", "head", "size_mb", "params", "gflops")},
            latency_ms=summarize_stages([call for one in rounds for call in one]),
            rounds_ms=round_medians(rounds),
            samples=sum(map(len, rounds)),
            warmup_calls=state["calls"],
            warmup_stable=state["stable"],
            round_spread=spread(round_medians(rounds)[WHOLE]),
            **stream,
            **used,
            map50=judged.get("map50"),
            map50_95=judged.get("map50_95"),
            image_auroc=judged.get("image_auroc"),
            pixel_auroc=judged.get("pixel_auroc"),
        )
        for worker, facts, state, rounds, stream, used, judged in everything
    ]


def estimates(
    workers: Sequence[WorkerProcess],
    opened: Sequence[dict[str, Any]],
    rows: Sequence[BenchRow],
    targets: Sequence[Target],
    plan: Plan,
) -> list[Estimate]:
    """Return lower bounds of every network on every target in every precision, measurements beside them."""
    found: list[Estimate] = []
    for index, layers in _networks(workers, opened):
        for target in targets:
            for precision in PRECISIONS:
                one = estimate(layers, target, precision, rows[index].artifact, plan.batch, plan.threads)
                found.append(_with_measurement(one, target, opened, rows, index))
    return found


def say(text: str) -> None:
    """Report progress where it cannot mix with results."""
    print(f"benchmark: {text}", file=sys.stderr, flush=True)


def _networks(workers: Sequence[WorkerProcess], opened: Sequence[dict[str, Any]]) -> list[tuple[int, list[Layer]]]:
    """Return the layers of every network that differs, with the first artifact that shows them; floats go first."""
    order = sorted(range(len(workers)), key=lambda index: (opened[index]["precision"] == "int8", index))
    found: list[tuple[int, list[Layer]]] = []
    seen: set[tuple[str, str]] = set()
    for index in order:
        network = _network(opened[index])
        if network[0] and network in seen:
            continue
        layers = workers[index].ask("layers")["layers"]
        if layers is not None:
            seen.add(network)
            found.append((index, [Layer(**layer) for layer in layers]))
    return found


def _network(facts: dict[str, Any]) -> tuple[str, str]:
    """Return what two files share that hold the same network: the checkpoint, empty if unknown, and the head."""
    return str(facts["source"] or ""), str(facts["head"])


def _with_measurement(
    one: Estimate, target: Target, opened: Sequence[dict[str, Any]], rows: Sequence[BenchRow], index: int
) -> Estimate:
    """Put the fastest measured inference of the same network beside an estimate for this very processor."""
    on_cpu = target.compute_capability is None
    measured = [
        (row.latency_ms["inference"].p50, row.runtime)
        for facts, row in zip(opened, rows, strict=True)
        if row.precision == one.precision
        and (_network(facts) == _network(opened[index]) if facts["source"] else facts is opened[index])
        and (facts["environment"]["gpu"] is None) == on_cpu
        and is_device(target, facts["environment"]["cpu" if on_cpu else "gpu"])
    ]
    best, runtime = min(measured, default=(None, None))
    return replace(one, measured_ms=best, measured_by=runtime)


def _rounds(workers: Sequence[WorkerProcess], rounds: int, iterations: int) -> list[list[list[list[float]]]]:
    """Return by artifact, round and call the milliseconds of each stage."""
    timed: list[list[list[list[float]]]] = [[] for _ in workers]
    for turn in range(rounds):
        say(f"round {turn + 1} of {rounds}")
        for offset in range(len(workers)):
            index = (turn + offset) % len(workers)
            timed[index].append(workers[index].ask("round", calls=iterations)["calls"])
    return timed


def _accuracy(workers: Sequence[WorkerProcess], data: str | None, plan: Plan) -> list[dict[str, Any]]:
    """Validate one artifact after the other, after all timing is done."""
    if data is None:
        return [{} for _ in workers]
    found = []
    for worker in workers:
        say(f"validating {worker.choice}")
        found.append(worker.ask("accuracy", data=data, split=plan.split, category=plan.category))
    return found
