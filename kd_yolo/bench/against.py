"""What changed since an earlier benchmark, and whether the change is more than noise."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kd_yolo.bench.timing import WHOLE, spread
from kd_yolo.errors import ConfigError

Verdict = Literal["faster", "slower", "within noise"]
SAMPLES = 4000
SEED = 0


class OldRow(BaseModel):
    """One row of an earlier ``benchmark.json``; what else it holds is not needed."""

    model_config = ConfigDict(frozen=True)

    artifact: str
    runtime: str
    precision: str
    rounds_ms: dict[str, list[float]] = Field(min_length=1)
    map50: float | None = None
    map50_95: float | None = None


class OldReport(BaseModel):
    """An earlier ``benchmark.json``."""

    model_config = ConfigDict(frozen=True)

    rows: list[OldRow] = Field(min_length=1)
    canvas: tuple[int, int]
    batch: int
    threads: int
    device: str
    data: str | None
    split: str
    environment: dict[str, Any]


@dataclass(frozen=True)
class Shift:
    """Change of a latency.

    Attributes:
        before_ms: Median of the earlier rounds' medians.
        now_ms: The same now.
        change: now / before - 1.
        low: Lower end of the 95 % interval of the change, by bootstrap over rounds.
        high: Upper end.
        band: Half of how far the rounds were apart within the worse of both runs, relative to their median.
        verdict: ``faster`` or ``slower`` when the interval leaves 0 out and the change is larger than the band.
    """

    before_ms: float
    now_ms: float
    change: float
    low: float
    high: float
    band: float
    verdict: Verdict


@dataclass(frozen=True)
class Change:
    """Change of a row.

    Attributes:
        artifact: As given now.
        runtime: What ran it.
        whole: Change of the whole latency; None for a row that the earlier benchmark does not have.
        inference: Change of the inference alone, or None.
        map50: Change of mAP50 in points, or None when one of both has none or the data differ.
        map50_95: The same for mAP50-95.
    """

    artifact: str
    runtime: str
    whole: Shift | None
    inference: Shift | None
    map50: float | None
    map50_95: float | None


def load_old(path: Path) -> OldReport:
    """Read an earlier ``benchmark.json``.

    Raises:
        ConfigError: The file is missing, or not what this version writes.
    """
    try:
        return OldReport.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"against={path}: cannot be read ({error.strerror}); give a benchmark.json") from error
    except (ValidationError, ValueError) as error:
        raise ConfigError(
            f"against={path}: is not a benchmark.json with the times of its rounds; measure the old files again"
        ) from error


def check_same(old: OldReport, path: Path, now: Mapping[str, Any]) -> None:
    """Refuse to compare what was measured under other conditions.

    Args:
        old: The earlier benchmark.
        path: Its file, for messages.
        now: Conditions known so far, by name: ``batch``, ``threads``, ``canvas``, ``cpu``, ``gpu`` (None on a CPU).

    Raises:
        ConfigError: One of them differs; the message names it with both values.
    """
    then = {"batch": old.batch, "threads": old.threads, "canvas": old.canvas, "cpu": old.environment.get("cpu")}
    then["gpu"] = old.environment.get("gpu") if old.device != "cpu" else None
    for name, value in now.items():
        if then[name] != value:
            raise ConfigError(
                f"against={path}: was measured at {name} {_shown(then[name])}, this is {_shown(value)}; "
                "numbers under other conditions do not compare"
            )


def changes(old: OldReport, rows: Sequence[Any], data: str | None, split: str) -> list[Change]:
    """Compare rows with those of an earlier benchmark.

    A row's partner has the same file name, runtime and precision; the same path goes first when several have.

    Args:
        old: The earlier benchmark.
        rows: ``BenchRow`` objects.
        data: Data set of the accuracy now.
        split: Its split now.
    """
    judged_alike = (old.data, old.split) == (data, split)
    return [_change(row, _partner(row, old.rows), judged_alike) for row in rows]


def shift(before: Sequence[float], now: Sequence[float]) -> Shift:
    """Compare the medians of the rounds of two runs, in milliseconds.

    Rounds are drawn with replacement from each run on its own: those of two runs are not pairs, for nothing but their
    number connects them.
    """
    old, new = np.asarray(before), np.asarray(now)
    rng = np.random.default_rng(SEED)
    ratios = _medians(rng, new) / _medians(rng, old) - 1
    low, high = (float(value) for value in np.quantile(ratios, (0.025, 0.975)))
    middle = statistics.median(now) / statistics.median(before) - 1
    band = max(spread(before), spread(now)) / 2
    verdict: Verdict = "within noise"
    if abs(middle) > band and (low > 0 or high < 0):
        verdict = "slower" if middle > 0 else "faster"
    return Shift(statistics.median(before), statistics.median(now), middle, low, high, band, verdict)


def _medians(rng: np.random.Generator, rounds: NDArray[np.float64]) -> NDArray[np.float64]:
    drawn = rng.choice(rounds, size=(SAMPLES, len(rounds)))
    return np.asarray(np.median(drawn, axis=1), np.float64)


def _partner(row: Any, old: Sequence[OldRow]) -> OldRow | None:
    alike = [
        one
        for one in old
        if (Path(one.artifact).name, one.runtime, one.precision)
        == (Path(row.artifact).name, row.runtime, row.precision)
    ]
    exact = [one for one in alike if one.artifact == row.artifact]
    return exact[0] if exact else alike[0] if len(alike) == 1 else None


def _change(row: Any, before: OldRow | None, judged_alike: bool) -> Change:
    if before is None:
        return Change(row.artifact, row.runtime, None, None, None, None)
    points: dict[str, float | None] = {}
    for name in ("map50", "map50_95"):
        then, now = getattr(before, name), getattr(row, name)
        points[name] = 100 * (now - then) if judged_alike and then is not None and now is not None else None
    times = {name: shift(before.rounds_ms[name], row.rounds_ms[name]) for name in (WHOLE, "inference")}
    return Change(row.artifact, row.runtime, times[WHOLE], times["inference"], **points)


def _shown(value: Any) -> str:
    return f"{value[0]}x{value[1]}" if isinstance(value, tuple) else str(value)
