"""Which device a key means."""

from __future__ import annotations

import torch

from kd_yolo.errors import ConfigError


def parse_device(device: str) -> torch.device:
    """Return a device.

    Args:
        device: ``cpu``, ``cuda`` or a CUDA number.

    Raises:
        ConfigError: It is unknown, or not there.
    """
    name = str(device).strip().lower()
    if name == "cpu":
        return torch.device("cpu")
    number = name.removeprefix("cuda").removeprefix(":") or "0"
    if not number.isdigit():
        raise ConfigError(f"device={device}: unknown; use cpu, or a CUDA number such as 0")
    if not torch.cuda.is_available() or int(number) >= torch.cuda.device_count():
        raise ConfigError(f"device={device}: PyTorch sees {torch.cuda.device_count()} CUDA devices; use device=cpu")
    return torch.device("cuda", int(number))
