"""From a waveform to the grey picture of its spectrum or spectrogram: Hann windows, levels in dB, a fixed scale.

The short-time Fourier transform after J. B. Allen, L. R. Rabiner, "A unified approach to short-time Fourier analysis
and synthesis", Proc. IEEE 65(11), 1977; the averaged spectrum after P. D. Welch, "The use of fast Fourier transform
for the estimation of power spectra", IEEE Trans. Audio Electroacoust. 15(2), 1967; windows and their amplitude
correction after F. J. Harris, "On the use of windows for harmonic analysis with the discrete Fourier transform",
Proc. IEEE 66(1), 1978.

Levels are dB re amplitude 1: a sine of amplitude A shows as 20 log10(A) in its bin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

Kind = Literal["spectrogram", "spectrum"]

FLOOR_POWER = 1e-20
"""Power under which everything counts as silence: -200 dB."""


@dataclass(frozen=True)
class SpectrumSpec:
    """What is drawn.

    Attributes:
        kind: ``spectrogram``: time to the right, frequency upwards. ``spectrum``: frequency to the right, every row
            the same, averaged over all windows.
        rate_hz: Sampling rate, Hz.
        window: Length of a window, samples.
        hop: From one window to the next, samples.
        low_hz: Lowest frequency shown, Hz.
        high_hz: Highest frequency shown, Hz.
        imgsz: Side of the square picture, px.
    """

    kind: Kind
    rate_hz: float
    window: int
    hop: int
    low_hz: float
    high_hz: float
    imgsz: int

    @property
    def bins(self) -> slice:
        """Return the frequency bins that lie within low_hz to high_hz, both included."""
        step = self.rate_hz / self.window
        first = int(np.ceil(self.low_hz / step - 1e-9))
        last = int(np.floor(self.high_hz / step + 1e-9))
        return slice(first, min(last, self.window // 2) + 1)


def stft_power(signal: NDArray[np.float64], window: int, hop: int) -> NDArray[np.float64]:
    """Return the power of every frequency in every window.

    The mean is taken off first. Half a window of zeros is added on both sides, so that an impact at the first sample
    counts in full: a Hann window is zero at its ends.

    Args:
        signal: Waveform, shape (samples,).
        window: Length of the (periodic) Hann window, samples.
        hop: From one window to the next, samples.

    Returns:
        Squared amplitudes, shape (windows, window // 2 + 1), one-sided: a sine of amplitude A gives A**2 in its bin.
    """
    padded = np.pad(signal - signal.mean(), window // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    amplitude = np.abs(np.fft.rfft(frames * hann, axis=1)) / hann.sum()
    amplitude[:, 1 : (window + 1) // 2] *= 2  # the other half of the spectrum; bin 0 and rate / 2 have none
    return np.asarray(amplitude**2, np.float64)


def picture_levels(signal: NDArray[np.float64], spec: SpectrumSpec) -> NDArray[np.float32]:
    """Return the levels of a picture.

    Where the picture is coarser than the transform, powers are averaged, so that no energy is lost; where it is
    finer, levels are interpolated.

    Args:
        signal: Waveform, shape (samples,).
        spec: What is drawn.

    Returns:
        Levels in dB re amplitude 1, shape (imgsz, imgsz).
    """
    power = stft_power(signal, spec.window, spec.hop)[:, spec.bins]
    n = spec.imgsz
    if spec.kind == "spectrum":
        level = _resized(power.mean(axis=0, keepdims=True), n, 1)
        return np.repeat(level, n, axis=0)
    return _resized(power.T[::-1], n, n)


def to_grey(levels: NDArray[np.float32], reference_db: float, dynamic_range_db: float) -> NDArray[np.uint8]:
    """Map levels to grey: ``reference_db`` and above to 255, ``dynamic_range_db`` below it and less to 0."""
    share = (levels - (reference_db - dynamic_range_db)) / dynamic_range_db
    return np.asarray(np.round(np.clip(share, 0, 1) * 255), np.uint8)


def _resized(power: NDArray[np.float64], width: int, height: int) -> NDArray[np.float32]:
    """Return levels in dB of shape (height, width)."""
    fewer = (min(width, power.shape[1]), min(height, power.shape[0]))
    small = cv2.resize(np.ascontiguousarray(power), fewer, interpolation=cv2.INTER_AREA)
    level = (10 * np.log10(np.maximum(small, FLOOR_POWER))).astype(np.float32)
    return np.asarray(cv2.resize(level, (width, height), interpolation=cv2.INTER_LINEAR), np.float32)
