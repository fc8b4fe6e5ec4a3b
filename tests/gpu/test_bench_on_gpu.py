"""The benchmark on the GPU of this machine: every way PyTorch runs a checkpoint there, and the energy counter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "unit"))  # the factories that the unit tests use

from detector_factory import save_checkpoint, tiny_detector

from kd_yolo.bench import benchmark
from kd_yolo.bench.energy import open_meter
from kd_yolo.bench.runners import Choice, open_runner
from kd_yolo.images import textured_images

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: torch.cuda.is_available() is False"),
]
# Of raw outputs: box coordinates in pixels at a canvas of 64, and scores.
TOLERANCES = {"fp32": 0.1, "fp16": 1.5}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tiny_detector(), tmp_path_factory.mktemp("gpu") / "best.pt")


@pytest.mark.parametrize("runtime", ["eager", "compile", "cudagraph", "eager-fp16", "compile-fp16", "cudagraph-fp16"])
@pytest.mark.parametrize("batch", [1, 4])
def test_torch__computes_what_the_cpu_computes(checkpoint: Path, runtime: str, batch: int) -> None:
    images = textured_images(2 * batch, (90, 120), seed=9)
    reference = open_runner(Choice(checkpoint), 64, batch, "cpu")
    runner = open_runner(Choice(checkpoint, runtime), 64, batch, "0")
    assert runner.precision == ("fp16" if runtime.endswith("fp16") else "fp32")
    for part in (images[:batch], images[batch:]):  # a graph that replays its recording's images would fail the second
        found = runner.infer(runner.preprocess(part))
        runner.sync()
        expected = reference.infer(reference.preprocess(part))
        torch.testing.assert_close(found.cpu(), expected, atol=TOLERANCES[runner.precision], rtol=0.05)
    assert runner.peak_device_memory_mb()


def test_meter__counts_joules() -> None:
    device = torch.device("cuda", 0)
    meter = open_meter(device)
    if meter.read is None:
        pytest.skip(meter.name)
    before = meter.start()
    left = torch.randn(4096, 4096, device=device)
    for _ in range(200):
        left = torch.nn.functional.normalize(left @ left)
    torch.cuda.synchronize()
    spent = meter.since(before)
    assert spent is not None
    assert 0 < spent < 1e6


def test_benchmark__on_the_gpu(checkpoint: Path) -> None:
    quick: dict[str, Any] = {"rounds": 2, "iterations": 5, "stream": 20, "device": "0"}
    report = benchmark([checkpoint, f"{checkpoint}@cudagraph-fp16"], imgsz=64, **quick)
    assert report.environment["gpu"] == torch.cuda.get_device_name(0)
    assert [row.runtime for row in report.rows] == ["torch eager", "torch CUDA graph"]
    assert all(row.peak_device_memory_mb for row in report.rows)
