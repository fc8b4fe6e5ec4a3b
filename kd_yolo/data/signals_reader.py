"""Read a whole set of recordings at one sampling rate and one length, cut them, and measure their pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_yolo.data.progress import Progress
from kd_yolo.data.signals import DRAWN, OVERLAP, WINDOW_S, SignalsKeys
from kd_yolo.data.signals_read import ReadSpec, read_signals
from kd_yolo.data.signals_spectra import SpectrumSpec, picture_levels
from kd_yolo.data.signals_split import Source
from kd_yolo.errors import ConfigError, DataError

MIN_WINDOW = 16
"""Shortest window, samples."""


@dataclass(frozen=True)
class Picture:
    """One picture to be: where its samples lie, its file name without suffix, and the peak of its levels, dB."""

    source: Source
    row: int
    start: int
    length: int
    name: str
    peak_db: float
    digest: str
    part: str


class SetReader:
    """Reads files one after another and holds them to one sampling rate and one length."""

    def __init__(self, keys: SignalsKeys, total: int, progress: Progress) -> None:
        self.keys, self.total, self.progress, self.done = keys, total, progress, 0
        self.how = ReadSpec(keys.orientation, keys.variable, keys.channel, keys.skip_columns)
        self.rate_hz, self.rate_from = keys.sampling_rate_hz, "sampling_rate_hz"
        self.first: tuple[Path, int] | None = None
        self.dropped_s = 0.0
        progress(0, total)

    def examine(self, source: Source) -> list[Picture]:
        """Read a file, check it and measure its pictures."""
        values, rate_hz = read_signals(source.file, self.how)
        spec = self._fits(source.file, values.shape[1], rate_hz)
        whole = values.shape[1]
        length = min(whole, round(self.keys.segment_s * spec.rate_hz)) if self.keys.segment_s else whole
        self.dropped_s += len(values) * (whole % length) / spec.rate_hz
        pictures = []
        for row, signal in enumerate(values):
            digest = hashlib.sha256(signal.tobytes()).hexdigest()
            for number, start in enumerate(range(0, whole - length + 1, length)):
                name = source.stem.replace("/", "_") + (f"_r{row:04d}" if len(values) > 1 else "")
                name += f"_s{number:04d}" if self.keys.segment_s else ""
                peak = float(picture_levels(signal[start : start + length], spec).max())
                block = f"#{row // self.keys.signals_per_part}" if self.keys.signals_per_part else ""
                pictures.append(Picture(source, row, start, length, name, peak, digest, source.stem + block))
        self._step()
        return pictures

    def levels(self, pictures: Sequence[Picture]) -> Iterator[tuple[Picture, NDArray[np.float32]]]:
        """Read the one file of these pictures again and give their levels, dB."""
        values, _ = read_signals(pictures[0].source.file, self.how)
        for picture in pictures:
            yield picture, picture_levels(values[picture.row, picture.start :][: picture.length], self.spec)
        self._step()

    @property
    def spec(self) -> SpectrumSpec:
        """Return what is drawn, in samples."""
        if self.rate_hz is None:
            raise ConfigError("sampling_rate_hz: no file stated it; give it in Hz")
        keys = self.keys
        window = round((keys.window_s or WINDOW_S[keys.kind]) * self.rate_hz)
        hop = max(1, round(keys.hop_s * self.rate_hz) if keys.hop_s else window // OVERLAP)
        return SpectrumSpec(keys.kind, self.rate_hz, window, hop, keys.low_hz, self._high_hz(), keys.imgsz)

    @property
    def length_s(self) -> float | None:
        """Return the length of every recording, where it decides how the time axis runs."""
        if self.first is None or self.keys.kind != "spectrogram":
            return None
        return self.first[1] / self.spec.rate_hz

    def parameters(self, reference_db: float | None) -> dict[str, Any]:
        """Return the parameters as they were used, none left open."""
        spec = self.spec
        used = {**self.keys.model_dump(), "sampling_rate_hz": spec.rate_hz, "window_s": spec.window / spec.rate_hz}
        used.update(hop_s=spec.hop / spec.rate_hz, high_hz=spec.high_hz, reference_db=reference_db)
        return {name: used[name] for name in DRAWN}

    def _high_hz(self) -> float:
        return self.keys.high_hz or float(self.rate_hz or 0) / 2

    def _step(self) -> None:
        self.done += 1
        self.progress(self.done, self.total)

    def _fits(self, file: Path, samples: int, rate_hz: float | None) -> SpectrumSpec:
        """Check a file's sampling rate and length against what was given and the files before it."""
        if rate_hz is not None and self.rate_hz is None:
            self.rate_hz, self.rate_from = rate_hz, str(file)
        if rate_hz is None and self.keys.sampling_rate_hz is None:
            raise DataError(f"{file}: states no sampling rate; give it in Hz, for example sampling_rate_hz=40000")
        if rate_hz is not None and rate_hz != self.rate_hz:
            raise DataError(
                f"{file}: sampled at {rate_hz:g} Hz, but {self.rate_from} says {self.rate_hz:g} Hz; resample it or "
                "take it out: one set needs one rate"
            )
        spec = self.spec
        self._check_spec(spec)
        self._check_length(file, samples, spec)
        return spec

    def _check_spec(self, spec: SpectrumSpec) -> None:
        if spec.window < MIN_WINDOW:
            raise ConfigError(
                f"window_s={spec.window / spec.rate_hz:g} is {spec.window} samples at {spec.rate_hz:g} Hz; "
                f"need {MIN_WINDOW} or more"
            )
        if spec.high_hz > spec.rate_hz / 2:
            raise ConfigError(
                f"high_hz={spec.high_hz:g}: above half the sampling rate, {spec.rate_hz / 2:g} Hz; lower it"
            )
        if len(range(*spec.bins.indices(spec.window // 2 + 1))) < 2:
            raise ConfigError(
                f"low_hz={spec.low_hz:g} high_hz={spec.high_hz:g}: fewer than 2 frequencies, which lie "
                f"{spec.rate_hz / spec.window:g} Hz apart; widen the band or lengthen window_s"
            )

    def _check_length(self, file: Path, samples: int, spec: SpectrumSpec) -> None:
        length_s, window_s = samples / spec.rate_hz, spec.window / spec.rate_hz
        if samples < spec.window:
            raise DataError(f"{file}: {length_s:g} s is too short for one window of {window_s:g} s; shorten window_s")
        if self.keys.segment_s is not None:
            if length_s + 0.5 / spec.rate_hz < self.keys.segment_s:
                raise DataError(
                    f"{file}: {length_s:g} s is shorter than segment_s={self.keys.segment_s:g}; shorten segment_s, or "
                    "take the file out"
                )
            return
        if self.first is None:
            self.first = (file, samples)
        if self.keys.kind == "spectrogram" and abs(samples - self.first[1]) > spec.hop:
            remedy = "cut it to that length" if self.keys.like else "cut all to one length with segment_s=SECONDS"
            raise DataError(
                f"{file}: {length_s:g} s long, but {self.first[0]} is {self.first[1] / spec.rate_hz:g} s: their time "
                f"axes would differ; {remedy}"
            )
