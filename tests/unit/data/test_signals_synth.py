from __future__ import annotations

import numpy as np
import pytest

from kd_yolo.data import signals_synth
from kd_yolo.data.signals_synth import LENGTH_S, RATE_HZ, Block, bar_modes, knock, make_block


def test_bar_modes__thin_bar_of_the_textbook() -> None:
    # first bending mode of a free slender bar: f = 22.373 / (2 pi L**2) sqrt(E I / (rho A)), radius = h / sqrt(12);
    # 1 m long, 10 mm high, 5000 m/s: 22.373 / 6.28319 * 5000 * 0.01 / 3.4641 = 51.39 Hz; length mode 5000 / 2 = 2500 Hz
    hz, order = bar_modes(1.0, 0.02, 0.01, 5000.0, 3100.0)
    assert hz.shape == order.shape == (18,)
    assert np.abs(hz - 51.39).min() < 0.05
    assert np.abs(hz - 2500).min() < 1e-6
    assert np.abs(hz - 2 * 51.39).min() < 0.5  # twice as wide as high: the other plane


def test_bar_modes__thick_bars_sound_lower_than_the_slender_formula() -> None:
    slender = 22.373 / (2 * np.pi * 0.3**2) * 3900 * 0.05 / np.sqrt(12)
    hz, _ = bar_modes(0.3, 0.05, 0.034, 3900.0, 2450.0)
    assert 0.85 * slender < hz[0] < 0.97 * slender


@pytest.mark.parametrize("seed", range(10))
def test_make_block__crack_lowers_splits_damps_and_buzzes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals_synth, "RATE_HZ", 10**6)  # else a lowered mode may come below half the sampling rate
    sound = make_block(np.random.default_rng(seed), cracked=False)
    cracked = make_block(np.random.default_rng(seed), cracked=True)  # the same part, had it a crack
    assert sound.buzz == 0
    assert cracked.buzz > 0.01
    assert cracked.hz.size > sound.hz.size
    count = sound.hz.size
    assert (cracked.hz[:count] <= sound.hz).all()
    assert (cracked.hz[:count] > 0.9 * sound.hz).all()
    loss, more = sound.decay / sound.hz, cracked.decay[:count] / cracked.hz[:count]
    assert (more >= loss * (1 - 1e-9)).all()
    assert more.mean() > 1.3 * loss.mean()


def test_make_block__parts_differ_as_much_as_a_small_crack_does() -> None:
    first = [make_block(np.random.default_rng(seed), cracked=False).hz[0] for seed in range(200)]
    spread = float(np.std(first) / np.mean(first))
    assert spread > signals_synth.CRACK_DROP[0] / 2
    assert spread < signals_synth.CRACK_DROP[1]


@pytest.mark.parametrize("cracked", [False, True])
def test_knock__bounded_finite_and_dying_away(cracked: bool) -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed)
        wave = knock(rng, make_block(rng, cracked=cracked))
        assert wave.shape == (int(RATE_HZ * LENGTH_S),)
        assert np.isfinite(wave).all()
        assert np.abs(wave).max() <= 1
        early, late = wave[int(0.02 * RATE_HZ) : int(0.18 * RATE_HZ)], wave[-int(0.1 * RATE_HZ) :]
        assert early.std() > 2 * late.std()


def test_knock__no_two_alike_and_the_same_from_the_same_seed() -> None:
    block = make_block(np.random.default_rng(0), cracked=True)
    first, again = (knock(np.random.default_rng(5), block) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, knock(np.random.default_rng(6), block))


def test_knock__breathing_crack_adds_frequencies_that_no_mode_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals_synth, "SIGNAL_TO_NOISE_DB", (120.0, 121.0))
    levels = {}
    for buzz in (0.0, 0.3):
        block = Block(np.array([1000.0, 1700.0]), np.array([20.0, 20.0]), np.ones(2), buzz)
        wave = knock(np.random.default_rng(1), block)[2000:]
        power = np.abs(np.fft.rfft(wave * np.hanning(wave.size))) ** 2
        hz = np.fft.rfftfreq(wave.size, 1 / RATE_HZ)
        near = power[np.abs(hz - 1000) < 30].max()
        levels[buzz] = max(power[np.abs(hz - f) < 30].max() for f in (700, 2700)) / near  # difference and sum
    assert levels[0.3] > 100 * levels[0.0]
