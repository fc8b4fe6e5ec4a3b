"""Timing without side effects: stages, warm-up, percentiles. The clock is an argument, so that tests can be exact.

No sample is ever dropped: the slow tail is what a production line feels.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Clock = Callable[[], float]
"""Returns seconds; only differences matter."""

STAGES = ("preprocess", "inference", "postprocess")
WHOLE = "whole"


@dataclass(frozen=True)
class Summary:
    """Distribution of samples in milliseconds.

    Attributes:
        p50: Median.
        p90: 90th percentile.
        p99: 99th percentile.
        mean: Arithmetic mean of all samples.
        fastest: Smallest sample.
        slowest: Largest sample.
    """

    p50: float
    p90: float
    p99: float
    mean: float
    fastest: float
    slowest: float

    def to_dict(self) -> dict[str, float]:
        """Return the fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class WarmUp:
    """How a warm-up ended.

    Attributes:
        calls: Untimed calls.
        stable: Whether two blocks in a row took the same time; False when the limit came first.
    """

    calls: int
    stable: bool


class StageTimer:
    """Runs the stages of a detector one after another and measures each.

    Args:
        stages: One function a stage; each gets what the one before returned, the first gets None.
        sync: Waits until the device is idle; called before the first stage and after every stage, never in between.
        clock: Returns seconds.
    """

    def __init__(self, stages: Sequence[Callable[[Any], Any]], sync: Callable[[], None], clock: Clock) -> None:
        self.stages = stages
        self.sync = sync
        self.clock = clock

    def call(self) -> list[float]:
        """Run all stages once; return the milliseconds of each."""
        value: Any = None
        self.sync()
        marks = [self.clock()]
        for stage in self.stages:
            value = stage(value)
            self.sync()
            marks.append(self.clock())
        return [(after - before) * 1e3 for before, after in itertools.pairwise(marks)]

    def warm_up(self, block: int = 5, tolerance: float = 0.05, limit: int = 100, least_s: float = 0.3) -> WarmUp:
        """Call until two blocks in a row have nearly the same median, for at least ``least_s`` seconds.

        Args:
            block: Calls a block.
            tolerance: Accepted relative difference of two medians.
            limit: Largest number of calls.
            least_s: Shortest duration; caches, clocks and thread pools need time, not calls.
        """
        start, before, calls = self.clock(), float("inf"), 0
        while calls < limit:
            median = statistics.median(sum(self.call()) for _ in range(block))
            calls += block
            if self.clock() - start >= least_s and abs(before - median) <= tolerance * median:
                return WarmUp(calls, True)
            before = median
        return WarmUp(calls, False)

    def round(self, calls: int, settle: int = 2) -> list[list[float]]:
        """Return the milliseconds of each stage for ``calls`` calls, after ``settle`` untimed ones.

        Between two rounds another process had the caches, so the first calls of a round measure that process.
        """
        for _ in range(settle):
            self.call()
        return [self.call() for _ in range(calls)]

    def stream(self, calls: int) -> float:
        """Return the seconds of ``calls`` calls on end, the device awaited only after the last one."""
        self.call()
        self.sync()
        start = self.clock()
        for _ in range(calls):
            value: Any = None
            for stage in self.stages:
                value = stage(value)
        self.sync()
        return self.clock() - start


def percentile(samples: Sequence[float], share: float) -> float:
    """Return a percentile by linear interpolation between the two nearest ranks.

    Args:
        samples: At least one sample, in any order.
        share: 0 for the smallest, 1 for the largest.
    """
    ordered = sorted(samples)
    position = (len(ordered) - 1) * share
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarize(samples: Sequence[float]) -> Summary:
    """Describe samples in milliseconds."""
    return Summary(
        p50=percentile(samples, 0.50),
        p90=percentile(samples, 0.90),
        p99=percentile(samples, 0.99),
        mean=statistics.fmean(samples),
        fastest=min(samples),
        slowest=max(samples),
    )


def summarize_stages(calls: Sequence[Sequence[float]]) -> dict[str, Summary]:
    """Describe every stage and the whole, from the milliseconds of each stage by call."""
    by_stage = {name: [call[index] for call in calls] for index, name in enumerate(STAGES)}
    return {name: summarize(samples) for name, samples in by_stage.items()} | {
        WHOLE: summarize([sum(call) for call in calls])
    }


def round_medians(rounds: Sequence[Sequence[Sequence[float]]]) -> dict[str, list[float]]:
    """Return the median of every round, by stage and for the whole, from the milliseconds by round, call and stage."""
    medians = {
        name: [statistics.median(call[index] for call in calls) for calls in rounds]
        for index, name in enumerate(STAGES)
    }
    return medians | {WHOLE: [statistics.median(sum(call) for call in calls) for calls in rounds]}


def spread(medians: Sequence[float]) -> float:
    """Return (largest - smallest) / median of the rounds' medians: how much the machine itself wavered."""
    return (max(medians) - min(medians)) / statistics.median(medians)
