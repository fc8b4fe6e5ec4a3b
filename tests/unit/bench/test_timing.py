from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_yolo.bench.timing import (
    STAGES,
    WHOLE,
    StageTimer,
    percentile,
    round_medians,
    spread,
    summarize,
    summarize_stages,
)


class FakeClock:
    """A clock that moves only when a stage says so; a power of two keeps the arithmetic exact."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        self.log.append("clock")
        return self.now

    def sync(self) -> None:
        self.log.append("sync")

    def stage(self, name: str, durations_ms: Iterator[float] | float) -> Callable[[Any], str]:
        def run(value: Any) -> str:
            self.log.append(f"{name}({value})")
            duration = durations_ms if isinstance(durations_ms, (int, float)) else next(durations_ms)
            self.now += duration / 1024
            return name

        return run


MS = 1000 / 1024  # what one tick of 1 / 1024 s is in milliseconds


def timer_of(*durations: Iterator[float] | float) -> tuple[StageTimer, FakeClock]:
    clock = FakeClock()
    stages = [clock.stage(name, duration) for name, duration in zip("abc", durations, strict=False)]
    return StageTimer(stages, clock.sync, clock), clock


def test_call__exact_times_and_order() -> None:
    timer, clock = timer_of(1.0, 20.0, 3.0)
    assert timer.call() == [1 * MS, 20 * MS, 3 * MS]
    assert clock.log == ["sync", "clock", "a(None)", "sync", "clock", "b(a)", "sync", "clock", "c(b)", "sync", "clock"]


def test_call__sync_waits_inside_the_measured_time() -> None:
    """A device that works on after the call returned is still being timed."""
    clock = FakeClock()
    pending = [0.0]

    def launch(value: Any) -> None:
        pending[0] = 8 / 1024

    def sync() -> None:
        clock.now += pending[0]
        pending[0] = 0.0

    assert StageTimer([launch], sync, clock).call() == [8 * MS]


def test_round__settling_calls_are_not_samples() -> None:
    timer, clock = timer_of(iter([100.0, 50.0, 1.0, 2.0, 3.0]))
    assert timer.round(3, settle=2) == [[1 * MS], [2 * MS], [3 * MS]]
    assert clock.log.count("a(None)") == 5


def test_round__slow_calls_stay_in() -> None:
    timer, _ = timer_of(iter([1.0] * 9 + [1000.0]))
    calls = timer.round(10, settle=0)
    assert summarize([call[0] for call in calls]).slowest == 1000 * MS


def test_warm_up__stops_when_two_blocks_agree() -> None:
    # blocks of two calls: medians 80, 40, 20, 20 -> the fourth agrees with the third
    durations = iter([80.0, 80.0, 40.0, 40.0, 20.0, 20.0, 20.0, 20.0, 1.0])
    timer, _ = timer_of(durations)
    state = timer.warm_up(block=2, tolerance=0.05, limit=100, least_s=0.0)
    assert (state.calls, state.stable) == (8, True)
    assert next(durations) == 1.0


def test_warm_up__lasts_as_long_as_asked() -> None:
    timer, clock = timer_of(10.0)
    state = timer.warm_up(block=5, limit=1000, least_s=0.5)
    assert state.stable
    assert 0.5 <= clock.now <= 0.5 + 5 * 10 / 1024


def test_warm_up__gives_up_at_the_limit() -> None:
    timer, _ = timer_of(float(2**index) for index in range(1000))
    state = timer.warm_up(block=2, limit=20, least_s=0.0)
    assert (state.calls, state.stable) == (20, False)


def test_percentile__golden() -> None:
    # Four samples: rank 0.9 * 3 = 2.7 lies 70 % of the way from the third to the fourth: 30 + 0.7 * 10
    samples = [40.0, 10.0, 30.0, 20.0]
    assert percentile(samples, 0.0) == 10
    assert percentile(samples, 0.5) == 25
    assert percentile(samples, 0.9) == pytest.approx(37)
    assert percentile(samples, 1.0) == 40
    assert percentile([5.0], 0.99) == 5


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=50), st.floats(0, 1))
def test_percentile__equals_numpy(samples: list[float], share: float) -> None:
    assert percentile(samples, share) == pytest.approx(float(np.quantile(samples, share)))


def test_summarize__every_sample_counts() -> None:
    samples = [float(value) for value in range(1, 102)]
    random.Random(0).shuffle(samples)
    found = summarize(samples)
    assert (found.p50, found.p90, found.p99) == (51, 91, 100)
    assert (found.mean, found.fastest, found.slowest) == (51, 1, 101)


def test_summarize_stages__whole_is_the_sum_by_call() -> None:
    # the slow pre-processing and the slow inference are in different calls: the whole's p99 is not the sum of both p99
    calls = [[9.0, 1.0, 1.0], [1.0, 9.0, 1.0], [1.0, 1.0, 1.0]]
    found = summarize_stages(calls)
    assert set(found) == {*STAGES, WHOLE}
    assert found["preprocess"].slowest == found["inference"].slowest == 9
    assert (found[WHOLE].fastest, found[WHOLE].slowest) == (3, 11)


def test_round_medians__by_stage_and_whole() -> None:
    # the whole of a call is the sum of its stages: 4, 9, 5 -> 5; it is not the sum of the stages' medians, 1 + 2 + 2
    rounds = [[[1.0, 2.0, 1.0], [1.0, 2.0, 6.0], [2.0, 1.0, 2.0]], [[3.0, 3.0, 3.0]]]
    found = round_medians(rounds)
    assert found == {
        "preprocess": [1.0, 3.0],
        "inference": [2.0, 3.0],
        "postprocess": [2.0, 3.0],
        "whole": [5.0, 9.0],
    }


def test_spread__golden() -> None:
    assert spread([11.0, 22.0, 12.0]) == pytest.approx(11 / 12)  # (22 - 11) / 12
    assert spread([5.0]) == 0


def test_stream__waits_for_the_device_only_at_the_end() -> None:
    timer, clock = timer_of(1.0, 20.0, 3.0)
    assert timer.stream(5) == 5 * 24 / 1024
    assert clock.log[-18:] == ["clock", *["a(None)", "b(a)", "c(b)"] * 5, "sync", "clock"]


def test_stream__what_the_device_still_does_counts() -> None:
    clock = FakeClock()
    pending = [0.0]

    def launch(value: Any) -> None:
        pending[0] += 8 / 1024

    def sync() -> None:
        clock.now += pending[0]
        pending[0] = 0.0

    assert StageTimer([launch], sync, clock).stream(4) == 4 * 8 / 1024


def test_call__real_clock_measures_a_known_wait() -> None:
    import time

    def busy(_: Any) -> None:
        end = time.perf_counter() + 0.005
        while time.perf_counter() < end:
            pass

    timer = StageTimer([busy], lambda: None, time.perf_counter)
    assert 5.0 <= min(call[0] for call in timer.round(60)) < 7.0  # the fastest: the machine may be busy
