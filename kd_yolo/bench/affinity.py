"""Bind a process to cores, so that the scheduler cannot move it in the middle of a measurement."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import psutil

from kd_yolo.errors import ConfigError

SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def usable_cores() -> list[int]:
    """Return the logical cores that this process may use; numbers from 0 where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def physical_cores() -> list[int]:
    """Return one logical core of every physical core that this process may use."""
    found: dict[str, int] = {}
    for core in usable_cores():
        path = Path(SIBLINGS.format(core))
        found.setdefault(path.read_text().strip() if path.is_file() else str(core), core)
    return sorted(found.values())


def busy_percent(seconds: float = 0.2) -> dict[int, float]:
    """Return how busy every logical core of the machine is, watched for a moment."""
    return dict(enumerate(psutil.cpu_percent(interval=seconds, percpu=True)))


def choose_cores(threads: int, wanted: bool | Sequence[int] | None = None) -> list[int] | None:
    """Return the cores to bind to.

    Args:
        threads: CPU threads of the runtime.
        wanted: None or True for as many cores as threads, the idlest ones, and at a tie the last, because interrupts
            go to the first; False for no binding; or the cores themselves.

    Returns:
        Core numbers, or None to leave the process unbound.

    Raises:
        ConfigError: A core that this process may not use, or a system that cannot bind.
    """
    if wanted is False:
        return None
    usable = usable_cores()
    if wanted is None or wanted is True:
        if not hasattr(os, "sched_setaffinity"):
            return None
        separate, load = physical_cores(), busy_percent()
        ranked = sorted(usable, key=lambda core: (core not in separate, round(load.get(core, 0.0), -1), -core))
        return sorted(ranked[:threads])
    cores = sorted(set(wanted))
    missing = [core for core in cores if core not in usable]
    if missing or not cores:
        raise ConfigError(f"affinity={list(wanted)}: this process may use the cores {_ranges(usable)}")
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError("affinity: this system cannot bind a process to cores; leave the key out")
    return cores


def bind(cores: Sequence[int] | None) -> None:
    """Bind this process, and every thread it starts from now on, to cores; None leaves it as it is."""
    if cores is not None:
        os.sched_setaffinity(0, cores)


def _ranges(cores: Sequence[int]) -> str:
    """Return ``0-3, 8`` for 0, 1, 2, 3, 8."""
    parts: list[list[int]] = []
    for core in cores:
        if parts and core == parts[-1][-1] + 1:
            parts[-1].append(core)
        else:
            parts.append([core])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
