"""How a benchmark is run: the checked numbers that all its rows share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kd_yolo.bench.affinity import choose_cores, physical_cores
from kd_yolo.errors import ConfigError, nearest


@dataclass(frozen=True)
class Settings:
    """Settings of a benchmark that have a default.

    Attributes:
        rounds: Interleaved rounds.
        iterations: Timed calls per artifact and round.
        stream: Images of the continuous stream that gives frames per second.
        threads: CPU threads of every runtime; default the usable physical cores.
        affinity: Cores to bind every process to; default as many as threads, the idlest; False for none.
        device: ``cpu``, ``cuda`` or a CUDA number.
        targets: Processors to estimate a lower bound for, by name or YAML file.
        against: ``benchmark.json`` of an earlier run to report the change of every row against.
        category: Of the data set, for anomaly models.
    """

    rounds: int = 10
    iterations: int = 20
    stream: int = 200
    threads: int | None = None
    affinity: bool | Sequence[int] | None = None
    device: str = "cpu"
    targets: Sequence[str | Path] = ()
    against: str | Path | None = None
    category: str | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before a process starts.

    Attributes:
        batch: Images per call.
        rounds: Interleaved rounds.
        iterations: Timed calls per artifact and round.
        stream: Images of the stream.
        threads: CPU threads of every runtime.
        cores: Cores that every process is bound to, or None.
        device: ``cpu``, ``cuda`` or a CUDA number.
        data: Data set as given, or None.
        split: Its split.
        category: Its category, for anomaly models, or None.
    """

    batch: int
    rounds: int
    iterations: int
    stream: int
    threads: int
    cores: list[int] | None
    device: str
    data: str | None
    split: str
    category: str | None = None


def make_settings(given: Mapping[str, Any]) -> Settings:
    """Return settings from keyword arguments.

    Raises:
        ConfigError: An unknown one; the nearest is named.
    """
    known = [field.name for field in fields(Settings)]
    for key in given:
        if key not in known:
            raise ConfigError(f"benchmark: unknown key '{key}'{nearest(key, known)}")
    return Settings(**given)


def make_plan(settings: Settings, batch: int, data: str | Path | None, split: str) -> Plan:
    """Return what is decided before a process starts.

    Raises:
        ConfigError: A number below 1, or a core that this process may not use.
    """
    threads = len(physical_cores()) if settings.threads is None else settings.threads
    counts = {name: getattr(settings, name) for name in ("rounds", "iterations", "stream")}
    for name, value in {"batch": batch, **counts, "threads": threads}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value}: must be a whole number of at least 1")
    cores = choose_cores(threads, settings.affinity)
    shown = None if data is None else str(data)
    if settings.category is not None and data is None:
        raise ConfigError("category=: says which part of data= to judge on; give data= as well, or leave it out")
    return Plan(
        batch,
        threads=threads,
        cores=cores,
        device=str(settings.device),
        data=shown,
        split=split,
        category=settings.category,
        **counts,
    )
