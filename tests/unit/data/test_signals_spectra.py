from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_yolo.data.signals_spectra import FLOOR_POWER, Kind, SpectrumSpec, picture_levels, stft_power, to_grey


def sine(hz: float, rate_hz: float, count: int, amplitude: float) -> np.ndarray:
    return np.asarray(amplitude * np.sin(2 * np.pi * hz * np.arange(count) / rate_hz + 0.3))


@pytest.mark.parametrize(("window", "hop"), [(256, 64), (250, 100), (255, 85), (64, 64)])
def test_stft_power__agrees_with_scipy(window: int, hop: int) -> None:
    scipy_signal = pytest.importorskip("scipy.signal")
    signal = np.random.default_rng(window).standard_normal(3000) + 5
    padded = np.pad(signal - signal.mean(), window // 2)
    _, _, density = scipy_signal.spectrogram(
        padded, 8000, "hann", window, window - hop, detrend=False, scaling="spectrum", mode="psd"
    )
    expected = 2 * density.T  # SciPy gives RMS**2 of each line, here the squared amplitude: twice that
    expected[:, 0] /= 2  # ... but at 0 and at half the rate there is no second half to fold over
    if window % 2 == 0:
        expected[:, -1] /= 2
    np.testing.assert_allclose(stft_power(signal, window, hop), expected, rtol=1e-9, atol=1e-15)


def test_picture_levels__averaged_spectrum_agrees_with_welch() -> None:
    scipy_signal = pytest.importorskip("scipy.signal")
    signal = np.random.default_rng(0).standard_normal(4000)
    spec = SpectrumSpec("spectrum", 8000, 256, 64, 0, 4000, 129)  # 129 columns for 129 bins: nothing is resized
    padded = np.pad(signal - signal.mean(), 128)
    _, power = scipy_signal.welch(padded, 8000, "hann", 256, 192, detrend=False, scaling="spectrum")
    expected = 10 * np.log10(2 * power)
    expected[[0, -1]] -= 10 * np.log10(2)
    levels = picture_levels(signal, spec)
    assert levels.shape == (129, 129)
    assert (levels == levels[0]).all()
    np.testing.assert_allclose(levels[0], expected, atol=1e-3)


@given(
    amplitude=st.floats(1e-3, 10),
    bin_number=st.integers(4, 120),
    offset=st.floats(-5, 5),
    rate=st.sampled_from([1e3, 4e4]),
)
@settings(max_examples=40, deadline=None)
def test_stft_power__sine_shows_its_amplitude_at_its_frequency(
    amplitude: float, bin_number: int, offset: float, rate: float
) -> None:
    signal = sine(bin_number * rate / 256, rate, 2560, amplitude) + offset
    power = stft_power(signal, 256, 64)[2:-4]  # windows that lie inside
    assert (power.argmax(axis=1) == bin_number).all()
    np.testing.assert_allclose(power[:, bin_number], amplitude**2, rtol=0.02)


def test_stft_power__impact_at_the_first_sample_counts_in_full() -> None:
    signal = np.zeros(2000)
    signal[0] = 1
    # the window's middle, 1, lies on it: amplitude 2 * 1 / sum(hann) = 2 / 128; without padding it would be nearly 0
    np.testing.assert_allclose(stft_power(signal, 256, 64).max(axis=0)[5:-1], (2 / 128) ** 2, rtol=0.01)


def test_picture_levels__frequency_upwards_and_time_to_the_right() -> None:
    first, second = sine(1000, 8000, 4000, 1), sine(3000, 8000, 4000, 1)
    spec = SpectrumSpec("spectrogram", 8000, 256, 64, 0, 4000, 64)
    levels = picture_levels(np.concatenate([first, second]), spec)
    rows = levels.argmax(axis=0)
    # 0 Hz is the bottom row 63, 4 kHz the top row 0: 1 kHz at a quarter of the height from below, 3 kHz from above
    assert np.abs(rows[4:28] - 47.5).max() <= 1
    assert np.abs(rows[36:60] - 15.5).max() <= 1


@pytest.mark.parametrize("kind", ["spectrogram", "spectrum"])
@pytest.mark.parametrize("imgsz", [32, 100, 300])
def test_picture_levels__band_is_cut_and_shape_holds(kind: Kind, imgsz: int) -> None:
    signal = sine(1500, 8000, 4000, 1) + sine(500, 8000, 4000, 1)
    spec = SpectrumSpec(kind, 8000, 256, 64, 1000, 2000, imgsz)
    levels = picture_levels(signal, spec)
    assert levels.shape == (imgsz, imgsz)
    line = levels.mean(axis=1)[::-1] if kind == "spectrogram" else levels[0]
    assert line.argmax() == pytest.approx(imgsz / 2, abs=0.04 * imgsz + 1)
    assert spec.bins == slice(32, 65)  # bins lie 31.25 Hz apart
    assert line[: imgsz // 8].max() < -40  # the tone at 500 Hz is outside


def test_picture_levels__shrinking_keeps_the_energy() -> None:
    signal = np.random.default_rng(3).standard_normal(16000)
    fine = picture_levels(signal, SpectrumSpec("spectrum", 16000, 512, 128, 0, 8000, 257))
    coarse = picture_levels(signal, SpectrumSpec("spectrum", 16000, 512, 128, 0, 8000, 32))
    assert np.mean(10 ** (coarse[0] / 10)) == pytest.approx(np.mean(10 ** (fine[0] / 10)), rel=1e-4)


@given(gain_db=st.floats(-40, 40))
@settings(max_examples=20, deadline=None)
def test_picture_levels__louder_sound_moves_every_level_alike(gain_db: float) -> None:
    signal = np.random.default_rng(4).standard_normal(2000)
    spec = SpectrumSpec("spectrogram", 8000, 256, 64, 0, 4000, 64)
    moved = picture_levels(signal * 10 ** (gain_db / 20), spec) - picture_levels(signal, spec)
    np.testing.assert_allclose(moved, gain_db, atol=1e-3)


def test_picture_levels__silence_is_finite() -> None:
    levels = picture_levels(np.zeros(2000), SpectrumSpec("spectrogram", 8000, 256, 64, 0, 4000, 64))
    np.testing.assert_allclose(levels, 10 * np.log10(FLOOR_POWER), rtol=1e-6)


def test_to_grey__ends_and_middle() -> None:
    levels = np.array([[-20.0, 0.0, -60.0, -100.0, -101.0, -40.0]], np.float32)
    # white at -20 dB, black at -100 dB: -60 dB is the middle, 127.5 rounded to even; -40 dB is 0.75 * 255 = 191.25
    assert to_grey(levels, -20, 80).tolist() == [[255, 255, 128, 0, 0, 191]]
