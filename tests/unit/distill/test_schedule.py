from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_yolo.config import validate
from kd_yolo.distill.schedule import Schedule
from kd_yolo.errors import ConfigError

schedules = st.builds(
    Schedule,
    warmup=st.floats(0, 1),
    final=st.floats(0, 1),
    decay=st.sampled_from(["cosine", "linear", "constant"]),
    off_last=st.sampled_from(["mosaic", None, 0]),
)


def test_factor__golden_default_of_100_epochs() -> None:
    # active: 100 - 10 = 90; warm-up: 0.1 * 100 = 10; decay over 80 epochs from 10 to 90.
    schedule = Schedule()
    assert schedule.factor(0, 100, 10) == 0.0
    assert schedule.factor(2.5, 100, 10) == 0.25
    assert schedule.factor(10, 100, 10) == 1.0
    assert schedule.factor(50, 100, 10) == pytest.approx(0.505)  # halfway: 0.01 + 0.99 * 0.5
    assert schedule.factor(70, 100, 10) == pytest.approx(0.01 + 0.99 * 0.5 * (1 - 2**-0.5))  # cos(3 pi / 4)
    assert schedule.factor(90 - 1e-9, 100, 10) == pytest.approx(0.01)
    assert schedule.factor(90, 100, 10) == 0.0
    assert schedule.factor(99.99, 100, 10) == 0.0


def test_factor__golden_linear_and_constant() -> None:
    linear = Schedule(warmup=0.0, decay="linear", final=0.2, off_last=None)
    assert [linear.factor(e, 4) for e in (0, 1, 2, 4)] == pytest.approx([1.0, 0.8, 0.6, 0.2])
    constant = Schedule(warmup=0.0, decay="constant", off_last=None)
    assert [constant.factor(e, 4, 2) for e in (0, 1.5, 3.99, 4)] == [1.0, 1.0, 1.0, 1.0]


def test_factor__full_strength_right_after_the_warm_up_of_each_decay() -> None:
    for decay in ("cosine", "linear", "constant"):
        schedule = validate(Schedule, {"decay": decay})
        assert schedule.factor(10, 100, 10) == 1.0
        assert schedule.factor(10 - 1e-9, 100, 10) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("epochs", "close_mosaic", "active"),
    [(1, 10, 1), (2, 10, 1), (3, 10, 2), (3, 0, 3), (10, 10, 5), (11, 10, 6), (19, 10, 10), (20, 10, 10), (21, 10, 11)],
)
def test_active_epochs__mosaic_tail_is_at_most_half_of_the_run(epochs: int, close_mosaic: int, active: int) -> None:
    assert Schedule().active_epochs(epochs, close_mosaic) == active


def test_active_epochs__a_number_is_taken_as_it_is() -> None:
    assert Schedule(off_last=9).active_epochs(10, close_mosaic=3) == 1
    assert Schedule(off_last=0).active_epochs(10, close_mosaic=3) == 10
    assert Schedule(off_last=None).active_epochs(10, close_mosaic=3) == 10


@pytest.mark.parametrize("epochs", [1, 9, 10])
def test_active_epochs__a_number_that_leaves_nothing_is_refused(epochs: int) -> None:
    with pytest.raises(ConfigError, match=rf"schedule.off_last=10 leaves no epoch of epochs={epochs}"):
        Schedule(off_last=10).factor(0, epochs)


@pytest.mark.parametrize(
    ("warmup", "epochs", "expected"),
    [(0.0, 100, 0.0), (0.1, 9, 0.0), (0.1, 10, 1.0), (0.1, 100, 10.0), (1.0, 100, 50.0), (1.0, 1, 0.0), (1.0, 2, 1.0)],
)
def test_warmup_epochs__at_most_half_and_none_below_one_epoch(warmup: float, epochs: int, expected: float) -> None:
    assert Schedule(warmup=warmup, off_last=None).warmup_epochs(epochs) == pytest.approx(expected)


@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize("close_mosaic", [0, 1, 10])
def test_factor__tiny_runs_start_at_full_strength(epochs: int, close_mosaic: int) -> None:
    assert Schedule().factor(0, epochs, close_mosaic) == 1.0


@given(schedule=schedules, epochs=st.integers(1, 400), close_mosaic=st.integers(0, 500), part=st.floats(0, 1))
def test_factor__always_in_0_to_1_and_some_whole_epoch_counts(
    schedule: Schedule, epochs: int, close_mosaic: int, part: float
) -> None:
    assert 0.0 <= schedule.factor(part * epochs, epochs, close_mosaic) <= 1.0
    assert max(schedule.factor(epoch, epochs, close_mosaic) for epoch in range(epochs)) > 0.0
    warm = schedule.warmup_epochs(epochs, close_mosaic)
    assert warm < schedule.active_epochs(epochs, close_mosaic)
    assert schedule.factor(warm, epochs, close_mosaic) == 1.0


@given(schedule=schedules, epochs=st.integers(1, 400), close_mosaic=st.integers(0, 500))
def test_factor__rises_in_warm_up_then_never_rises_again(schedule: Schedule, epochs: int, close_mosaic: int) -> None:
    warm = schedule.warmup_epochs(epochs, close_mosaic)
    moments = [epochs * i / 64 for i in range(65)]
    values = [(moment, schedule.factor(moment, epochs, close_mosaic)) for moment in moments]
    up = [value for moment, value in values if moment <= warm]
    down = [value for moment, value in values if moment >= warm]
    assert up == sorted(up)
    assert down == sorted(down, reverse=True)


@pytest.mark.parametrize("epoch", [-1, -0.001, float("nan")])
def test_factor__a_moment_before_the_run_is_refused(epoch: float) -> None:
    with pytest.raises(ConfigError, match="epoch="):
        Schedule().factor(epoch, 10)


@pytest.mark.parametrize("epochs", [0, -3])
def test_factor__a_run_without_epochs_is_refused(epochs: int) -> None:
    with pytest.raises(ConfigError, match=f"epochs={epochs}"):
        Schedule().factor(0, epochs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"warm_up": 0.1}, r"unknown key 'warm_up'; did you mean 'warmup'\?"),
        ({"warmup": 1.1}, "warmup=1.1"),
        ({"warmup": "0.1"}, "warmup='0.1'"),
        ({"final": -0.1}, "final=-0.1"),
        ({"final": float("nan")}, "final=nan"),
        ({"decay": "cos"}, "decay='cos'"),
        ({"off_last": -1}, "off_last=-1.*number of epochs"),
        ({"off_last": True}, "off_last=True.*number of epochs"),
        ({"off_last": 1.5}, "off_last=1.5.*number of epochs"),
        ({"off_last": "mosaics"}, "off_last='mosaics'.*mosaic or null"),
    ],
)
def test_schedule__bad_values_name_the_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^schedule: .*{message}"):
        validate(Schedule, values, where="schedule")


def test_schedule__whole_numbers_and_null_from_yaml_are_accepted() -> None:
    schedule = validate(Schedule, {"warmup": 0, "final": 1, "off_last": None})
    assert schedule.factor(0, 5) == 1.0
