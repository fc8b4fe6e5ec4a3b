"""Tiny recordings in class folders."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kd_yolo.data.signals_wav import write_wav

RATE_HZ = 8000


def tone(hz: float, seed: int, length_s: float = 0.25, amplitude: float = 0.5) -> NDArray[np.float64]:
    """Return a tone in weak noise that no other seed gives."""
    t = np.arange(round(RATE_HZ * length_s)) / RATE_HZ
    rng = np.random.default_rng(seed)
    return np.asarray(amplitude * np.sin(2 * np.pi * hz * t) + 0.01 * rng.standard_normal(t.size), np.float64)


def write_tone(file: Path, hz: float, seed: int, length_s: float = 0.25, amplitude: float = 0.5) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_wav(file, tone(hz, seed, length_s, amplitude), RATE_HZ)
    return file


def two_classes(root: Path, files: int = 10, length_s: float = 0.25) -> Path:
    """Write normal/n0.wav ... (1 kHz) and crack/c0.wav ... (2 kHz)."""
    for index in range(files):
        write_tone(root / "normal" / f"n{index}.wav", 1000, index, length_s)
        write_tone(root / "crack" / f"c{index}.wav", 2000, 1000 + index, length_s)
    return root


def pictures(out: Path) -> dict[str, NDArray[np.uint8]]:
    """Return every picture by SPLIT/CLASS/NAME."""
    return {
        path.relative_to(out).with_suffix("").as_posix(): np.asarray(cv2.imread(str(path), 0), np.uint8)
        for path in sorted(out.rglob("*.png"))
    }
