"""Built-in recordings ``knock-synth``: a hammer knocks on iron blocks, some with an inner crack; sound by formula.

A knock excites the block's free vibrations, each a decaying sine. The block is a free bar: bending in two planes after
Euler-Bernoulli with Timoshenko's correction, torsion and length modes (S. S. Rao, "Vibration of Continuous Systems",
Wiley 2007, ch. 8, 9 and 11). A crack

- lowers each mode in proportion to the strain energy of that mode at its place (P. Cawley, R. D. Adams, "The location
  of defects in structures from measurements of natural frequencies", J. Strain Analysis 14(2), 1979),
- splits it, because a one-sided crack breaks the symmetry of the section,
- damps it by friction, and
- opens and closes (breathes), which adds sums and differences of the modes and a buzz while the vibration is strong.

Size, stiffness, damping, hammer strength and tip, place of the knock, microphone and noise vary from part to part or
from knock to knock, and more than a small crack does, so that no single number tells the classes apart. It imitates
such recordings and replaces none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Signal = NDArray[np.float64]

CLASSES = ("crack", "normal")
RATE_HZ = 16000
LENGTH_S = 0.5

# The block: grey cast iron, nominal values.
LENGTH_M, WIDTH_M, HEIGHT_M = 0.30, 0.05, 0.034
WAVE_SPEED_M_S = 3900.0
"""Of length waves, sqrt(E / density)."""
SHEAR_SPEED_M_S = 2450.0
BENDING_ROOTS = (4.7300, 7.8532, 10.9956, 14.1372, 17.2788)
"""Solutions of cos(x) cosh(x) = 1: a bar with free ends."""

# Difficulty. Raise the first two for an easier set, the others for a harder one.
CRACK_DROP = (0.02, 0.08)
"""Relative fall of a mode with all its strain energy at the crack, smallest to largest crack (log-uniform)."""
CRACK_BUZZ = (0.04, 0.3)
"""Breathing non-linearity, same order."""
SIZE_SPREAD = 0.008
"""Standard deviation of each dimension between parts, relative."""
STIFFNESS_SPREAD = 0.008
"""Standard deviation of the wave speeds between parts, relative."""
DAMPING_SPREAD = 0.25
"""Standard deviation of the logarithm of a mode's damping between parts."""
SIGNAL_TO_NOISE_DB = (15.0, 35.0)
"""Level of a middling knock over the noise, dB, from knock to knock."""


@dataclass(frozen=True)
class Block:
    """A part: its modes.

    Attributes:
        hz: Frequencies, Hz, shape (modes,).
        decay: Decay rates, 1/s, shape (modes,).
        order: Bending, torsion or length number of each mode, from 1, shape (modes,).
        buzz: Strength of the breathing crack, 0 for a sound part.
    """

    hz: Signal
    decay: Signal
    order: Signal
    buzz: float


def bar_modes(length: float, width: float, height: float, speed: float, shear: float) -> tuple[Signal, Signal]:
    """Return the free vibrations of a bar with free ends: bending both ways, torsion and length modes.

    Args:
        length: Length, m.
        width: Width, m.
        height: Height, m.
        speed: Speed of length waves, sqrt(E / density), m/s.
        shear: Speed of shear waves, sqrt(G / density), m/s.

    Returns:
        Frequencies in Hz and the number of each mode in its family, both of shape (18,).
    """
    hz, order = [], []
    for side in (width, height):
        radius = side / np.sqrt(12)
        for number, root in enumerate(BENDING_ROOTS, 1):
            slender = root**2 * speed * radius / (2 * np.pi * length**2)
            thick = 1 + (root * radius / length) ** 2 * (1 + 3.1)  # rotary inertia and shear: E / (k G) about 3.1
            hz.append(slender / np.sqrt(thick))
            order.append(number)
    thin, wide = sorted((width, height))
    twist = shear * (2 * thin / wide) / np.sqrt(1 + (thin / wide) ** 2)
    for number in range(1, 5):
        hz += [number * twist / (2 * length), number * speed / (2 * length)]
        order += [number, number]
    return np.array(hz), np.array(order, float)


def make_block(rng: np.random.Generator, cracked: bool) -> Block:
    """Draw a part."""
    length, width, height = np.array([LENGTH_M, WIDTH_M, HEIGHT_M]) * (1 + SIZE_SPREAD * rng.standard_normal(3))
    stiff = 1 + STIFFNESS_SPREAD * rng.standard_normal()
    speed, shear = WAVE_SPEED_M_S * stiff, SHEAR_SPEED_M_S * stiff * (1 + 0.005 * rng.standard_normal())
    hz, order = bar_modes(length, width, height, speed, shear)
    hz = hz * (1 + 0.004 * rng.standard_normal(hz.size))  # casting: no block is a perfect bar
    loss = 0.0022 * np.exp(DAMPING_SPREAD * rng.standard_normal(hz.size) + 0.2 * rng.standard_normal())
    buzz = 0.0
    if cracked:
        share = rng.random()
        place = rng.uniform(0.15, 0.85)
        energy = np.sin(np.pi * order * place) ** 2 * rng.uniform(0.6, 1.0, hz.size)
        drop = _between(CRACK_DROP, share) * energy
        split = drop * rng.uniform(0.15, 0.5, hz.size)
        extra = 0.12 * drop * rng.uniform(0.4, 1.2, hz.size)  # friction in the crack
        seen = drop > 0.004  # a split narrower than the line is not one
        hz = np.concatenate([hz * (1 - drop), (hz * (1 - drop - split))[seen]])
        loss = np.concatenate([loss + extra, (loss + extra)[seen]])
        order = np.concatenate([order, order[seen]])
        buzz = _between(CRACK_BUZZ, share) * rng.uniform(0.5, 1.0)
    below = hz < 0.49 * RATE_HZ
    return Block(hz[below], (np.pi * hz * loss)[below], order[below], buzz)


def knock(rng: np.random.Generator, block: Block) -> Signal:
    """Return the sound of one knock.

    Args:
        rng: Source of all randomness.
        block: The part.

    Returns:
        Waveform of LENGTH_S at RATE_HZ, shape (samples,), within -1 to 1.
    """
    count = int(RATE_HZ * LENGTH_S)
    start = rng.uniform(0.02, 0.08)
    t = np.arange(count) / RATE_HZ - start
    on = (t >= 0).astype(float)
    t = np.maximum(t, 0)
    contact = rng.uniform(0.00008, 0.00022)  # s; the longer the hammer stays, the duller the knock
    place = rng.uniform(0.05, 0.95)
    gain = np.abs(np.cos(np.pi * block.order * place)) + 0.1
    gain = gain * _half_sine(block.hz * contact) * np.exp(0.3 * rng.standard_normal(block.hz.size))
    phase = rng.uniform(0, 2 * np.pi, block.hz.size)
    tones = (
        gain[:, None] * np.exp(-block.decay[:, None] * t) * np.sin(2 * np.pi * block.hz[:, None] * t + phase[:, None])
    )
    sound = tones.sum(axis=0) * on
    strength = np.exp(0.5 * rng.standard_normal())
    sound = sound / (np.abs(sound).max() + 1e-9)
    sound = strength * (sound + _breathing(rng, sound, block.buzz * strength)) + 0.15 * strength * _hammer(rng, t, on)
    level = 10 ** (-rng.uniform(*SIGNAL_TO_NOISE_DB) / 20) * 0.1
    sound = 0.25 * np.exp(0.2 * rng.standard_normal()) * (_room(rng, sound) + level * _noise(rng, count))
    return np.clip(sound, -1, 1)


def _between(limits: tuple[float, float], share: float) -> float:
    return float(limits[0] * (limits[1] / limits[0]) ** share)


def _half_sine(cycles: Signal) -> Signal:
    """Return the spectrum of a half-sine blow at frequency times contact time, 1 at 0."""
    gap = 1 - (2 * cycles) ** 2
    gap = np.where(np.abs(gap) < 1e-3, 1e-3, gap)
    return np.asarray(np.abs(np.cos(np.pi * cycles) / gap), np.float64)


def _breathing(rng: np.random.Generator, sound: Signal, strength: float) -> Signal:
    """Return what an opening and closing crack adds: sums and differences of the modes, and a buzz."""
    if strength == 0:
        return np.zeros_like(sound)
    open_ = np.maximum(sound, 0)
    clatter = rng.standard_normal(sound.size) * open_**2
    return strength * (open_**2 - np.mean(open_**2)) + 0.4 * strength * clatter


def _hammer(rng: np.random.Generator, t: Signal, on: Signal) -> Signal:
    """Return the dull click of the hammer itself."""
    return np.asarray(on * np.exp(-t / rng.uniform(0.001, 0.003)) * rng.standard_normal(t.size), np.float64)


def _room(rng: np.random.Generator, sound: Signal) -> Signal:
    """Add a few reflections."""
    heard = sound.copy()
    for delay in rng.integers(30, 400, 4):
        heard[delay:] += rng.uniform(-0.25, 0.25) * sound[:-delay]
    return heard


def _noise(rng: np.random.Generator, count: int) -> Signal:
    """Return factory noise of RMS 1: falling with frequency, mains hum, and now and then a tone of a machine."""
    spectrum = np.fft.rfft(rng.standard_normal(count))
    hz = np.fft.rfftfreq(count, 1 / RATE_HZ)
    noise = np.fft.irfft(spectrum / np.sqrt(1 + hz / 400), count)
    noise /= noise.std()
    t = np.arange(count) / RATE_HZ
    for multiple in (1, 2, 3):
        noise += rng.uniform(0, 0.5) * np.sin(2 * np.pi * 50 * multiple * t + rng.uniform(0, 6.28))
    if rng.random() < 0.4:
        noise += rng.uniform(0.2, 0.8) * np.sin(2 * np.pi * rng.uniform(300, 6000) * t + rng.uniform(0, 6.28))
    return noise / noise.std()
