"""Energy counters: NVIDIA's driver for GPUs, RAPL for CPUs; what nobody measures is said to be unknown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Meter:
    """One or several energy counters.

    Attributes:
        read: Returns the joules of each since some moment, or None without a counter.
        name: What they count, or why there is none.
        wraps_at: Joules at which each starts again from 0; empty where none does.
    """

    read: Callable[[], list[float]] | None
    name: str
    wraps_at: tuple[float, ...] = ()

    def start(self) -> list[float] | None:
        """Return the counters' state."""
        return None if self.read is None else self.read()

    def since(self, before: list[float] | None) -> float | None:
        """Return the joules since ``start``, or None."""
        if self.read is None or before is None:
            return None
        spent = [now - then for now, then in zip(self.read(), before, strict=True)]
        wraps = self.wraps_at or (0.0,) * len(spent)
        return sum(joules + (wrap if joules < 0 else 0.0) for joules, wrap in zip(spent, wraps, strict=True))


def open_meter(device: torch.device, rapl: Path = RAPL) -> Meter:
    """Return the energy counter of a device; without one, the reason."""
    return _nvml_meter(device) if device.type == "cuda" else _rapl_meter(rapl)


def _rapl_meter(root: Path) -> Meter:
    """Return the counter of all CPU packages: everything that runs on them, not this process alone."""
    zones = sorted(path for path in root.glob("*-rapl:*") if path.name.count(":") == 1) if root.is_dir() else []
    if not zones:
        return Meter(None, "this system has no RAPL counters")
    counters = [zone / "energy_uj" for zone in zones]

    def read() -> list[float]:
        return [int(counter.read_text()) / 1e6 for counter in counters]

    try:
        read()
        wraps = tuple(int((zone / "max_energy_range_uj").read_text()) / 1e6 for zone in zones)
    except (OSError, ValueError) as error:
        return Meter(None, f"RAPL counters cannot be read ({error}); root may")
    return Meter(read, "RAPL, all CPU packages", wraps)


def _nvml_meter(device: torch.device) -> Meter:
    try:
        import pynvml
    except ImportError:
        return Meter(None, "pynvml is not installed; run: pip install nvidia-ml-py")
    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")

        def read() -> list[float]:
            return [float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3]

        read()
    except pynvml.NVMLError as error:
        return Meter(None, f"the driver reports no energy ({error})")
    return Meter(read, "NVML, the whole GPU board")
