"""Make the built-in recordings on first use: WAV files, then their pictures for ``task=classify``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from kd_yolo.data.layout import MARKER, built_aside
from kd_yolo.data.lock import locked
from kd_yolo.data.progress import Progress, silent, stderr_progress
from kd_yolo.data.signals_convert import convert_signals
from kd_yolo.data.signals_report import VERSION as CONVERTER_VERSION
from kd_yolo.data.signals_synth import CLASSES, RATE_HZ, knock, make_block
from kd_yolo.data.signals_wav import write_wav
from kd_yolo.errors import ConfigError
from kd_yolo.files import write_json

VERSION = 1
"""Raised whenever the same seed would give other sounds, so that cached copies are made anew."""

SIGNALS_BUILTIN = {"knock-synth": "knocks on iron blocks, sound and with an inner crack, made by formula"}
"""Name to title."""
MADE = {"parts": 100, "knocks": 4, "seed": 0}
"""Parts of each class and knocks on each of the built-in set."""
DRAWN_AS: dict[str, Any] = {
    "kind": "spectrogram", "window_s": 0.032, "hop_s": 0.008, "low_hz": 500.0, "high_hz": 8000.0,
    "dynamic_range_db": 70.0, "imgsz": 128, "split": "0.7/0.15/0.15",
}  # fmt: skip
"""How its pictures are drawn; each knock of a part is a file in the part's folder."""


def make_knock_synth(out: Path, parts: int = 100, knocks: int = 4, seed: int = 0, progress: Progress = silent) -> Path:
    """Write the recordings: ``out/CLASS/CLASS_000/knock_0.wav``, mono, 16 bit, 16 kHz, 0.5 s.

    Args:
        out: Folder to create (replaced when this package wrote it).
        parts: Parts of each class.
        knocks: Recordings of each part.
        seed: Seed of everything; each part depends on it, its class and its number alone.
        progress: Called with (recordings done, all recordings).

    Returns:
        ``out``.

    Raises:
        ConfigError: A count is out of range.
        OutputError: ``out`` cannot be written, or holds something else.
    """
    for name, value, least, most in (("parts", parts, 1, 10_000), ("knocks", knocks, 1, 100), ("seed", seed, 0, 2**31)):
        if not least <= value <= most:
            raise ConfigError(f"{name}={value}: must be {least} to {most}")
    jobs = [(label, part) for label in range(len(CLASSES)) for part in range(parts)]
    progress(0, len(jobs) * knocks)
    with built_aside(out) as folder:
        for done, (label, part) in enumerate(jobs, 1):
            rng = np.random.default_rng([seed, label, part])
            block = make_block(rng, cracked=CLASSES[label] == "crack")
            home = folder / CLASSES[label] / f"{CLASSES[label]}_{part:03d}"
            home.mkdir(parents=True)
            for number in range(knocks):
                write_wav(home / f"knock_{number}.wav", knock(rng, block), RATE_HZ)
            progress(done * knocks, len(jobs) * knocks)
        record = {"source": "kd-yolo knock-synth", "version": VERSION}
        write_json(folder / MARKER, {**record, "arguments": {"parts": parts, "knocks": knocks, "seed": seed}})
    return out.absolute()


def resolve_signals_builtin(name: str, root: Path) -> Path:
    """Return the folder of pictures of a built-in set; made under ``root`` on first use, progress on stderr.

    The recordings lie beside it in ``<root>/<name>-wav``.

    Args:
        name: A name of ``SIGNALS_BUILTIN``.
        root: Folder of converted data sets; see ``datasets.data_root``.

    Raises:
        ConfigError: No such name.
        OutputError: The folder cannot be written to, or holds something else.
    """
    if name not in SIGNALS_BUILTIN:
        raise ConfigError(f"{name}: not a built-in set of recordings; there is {', '.join(SIGNALS_BUILTIN)}")
    home, recordings = root / name, root / f"{name}-wav"
    mark = json.dumps({"made": MADE, "drawn": DRAWN_AS, "versions": [VERSION, CONVERTER_VERSION]}, sort_keys=True)
    if _mark(home) == mark:
        return home
    with locked(root / ".kd-yolo" / f"{name}.lock"):
        if _mark(home) != mark:  # another process may have finished while this one waited
            make_knock_synth(recordings, **MADE, progress=stderr_progress(f"{name}: making recordings in {recordings}"))
            show = stderr_progress(f"{name}: drawing pictures in {home}")
            convert_signals(recordings, home, progress=show, resolved_from=mark, **DRAWN_AS)
    return home


def _mark(home: Path) -> str | None:
    """Return what an earlier making recorded, or None when there is none."""
    try:
        record = json.loads((home / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record.get("resolved_from") if isinstance(record, dict) else None
