"""What ``kd-yolo targets`` shows."""

from __future__ import annotations

from typing import Any

from kd_yolo.targets import load_target, target_names


def targets_table() -> tuple[str, dict[str, Any]]:
    """Return the built-in targets as a table for people and as data."""
    targets = [load_target(name) for name in target_names()]
    names = " ".join(f"{name.upper():>7}" for name in targets[0].tflops.model_dump())
    head = f"{'target':<12} {'compute':>7} {names} {'GB/s':>6} {'launch us':>9} {'GB':>5}  title"
    lines = []
    for target in targets:
        peaks = " ".join(f"{value:7.4g}" for value in target.tflops.model_dump().values())
        memory = "-" if target.memory_gb is None else f"{target.memory_gb:g}"
        lines.append(
            f"{target.name:<12} {target.compute_capability or 'CPU':>7} {peaks} {target.bandwidth_gb_s:6g} "
            f"{target.launch_us:9g} {memory:>5}  {target.title}"
        )
    note = (
        "Peak arithmetic in 10^12 operations a second, dense. The YAML files say where every figure comes from; a "
        "file of your own works too:\nkd-yolo export format=engine target=my.yaml, kd-yolo benchmark targets=my.yaml"
    )
    return "\n".join([head, *lines, "", note]), {"targets": [target.model_dump() for target in targets]}
