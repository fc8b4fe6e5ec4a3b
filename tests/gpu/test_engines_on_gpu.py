"""Engines of TensorRT and of TensorRT for RTX, built for and run on the GPU of this machine."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from kd_yolo.errors import ModelError
from kd_yolo.images import textured_images, to_canvas
from kd_yolo.runtimes import open_session

sys.path.append(str(Path(__file__).resolve().parents[1] / "unit"))  # the factories that the unit tests use

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: torch.cuda.is_available() is False"),
]
CANVAS = (64, 64)
RUNTIMES = ["tensorrt", "tensorrt-rtx"]
# Of boxes (pixels) and of scores. float32 without TF32 differs by the order of its sums. float16 has eleven bits and
# runs through six layers. For int8 the reference is the quantized graph itself in ONNX Runtime: the same integers, so
# that only values on the border between two steps may round the other way.
TOLERANCES = {"fp32": (2e-2, 1e-3), "fp16": (1.5, 3e-2), "int8": (3.0, 8e-2)}


@pytest.fixture(scope="module")
def capability() -> str:
    """Return the compute capability of the first GPU, for example ``8.6``."""
    return ".".join(map(str, torch.cuda.get_device_capability(0)))


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """Return ONNX files of a small detector: (precision, batch) -> file; ``best.pt`` lies beside them."""
    from detector_factory import save_checkpoint, tiny_detector
    from kd_yolo.export import export
    from qdq_graphs import halve_graph, quantize_graph

    folder = tmp_path_factory.mktemp("gpu")
    checkpoint = save_checkpoint(tiny_detector(), folder / "best.pt")
    made: dict[tuple[str, int], Path] = {}
    for batch in (1, 4):
        for precision in ("fp32", "fp16", "int8"):
            made[precision, batch] = folder / f"{precision}-{batch}.onnx"
        export(checkpoint, "onnx", made["fp32", batch], batch=batch)
        halve_graph(made["fp32", batch], made["fp16", batch])
        quantize_graph(made["fp32", batch], made["int8", batch])
    return made


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest, capability: str) -> str:
    """Return a runtime that is installed and knows this GPU, or skip."""
    name = str(request.param)
    module = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}[name]
    pytest.importorskip(module, reason=f"{module} is not installed")
    if name == "tensorrt-rtx":
        from kd_yolo.export.tensorrt_engine import supported_capabilities

        if capability not in supported_capabilities():
            pytest.skip(f"TensorRT for RTX does not build for compute capability {capability}")
    return name


def build(
    graph: Path, out: Path, runtime: str, capability: str, batch: int, dynamic: bool = False
) -> tuple[Path, dict[str, Any]]:
    from kd_yolo.export.onnx_graph import graph_metadata
    from kd_yolo.export.tensorrt_engine import build_engine

    from kd_yolo.targets import load_target

    here = {"name": "here", "title": "The GPU of this machine", "compute_capability": capability}
    target = None if runtime == "tensorrt" else load_target("rtx3070ti").model_copy(update=here)
    return out, build_engine(graph, out, target, graph_metadata(graph), dynamic, batch, CANVAS)


def images(count: int) -> Tensor:
    return to_canvas(textured_images(count, CANVAS, seed=21), CANVAS)


def reference(graph: Path, pixels: Tensor) -> Tensor:
    """Run a graph in ONNX Runtime on the CPU, unoptimized, as its nodes say."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: pixels.numpy()})[0])


def assert_near(found: Tensor, wanted: Tensor, precision: str) -> None:
    box, score = TOLERANCES[precision]
    assert found.shape == wanted.shape
    assert bool(found.isfinite().all())
    assert float((found[:, :4] - wanted[:, :4]).abs().max()) <= box
    assert float((found[:, 4:] - wanted[:, 4:]).abs().max()) <= score


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_engine__is_the_model(
    precision: str, batch: int, runtime: str, capability: str, graphs: dict[tuple[str, int], Path], tmp_path: Path
) -> None:
    from kd_yolo.export.tensorrt_engine import inspect_engine

    path, facts = build(graphs[precision, batch], tmp_path / "best.engine", runtime, capability, batch)
    assert facts["compute_capability"] == capability
    assert set(facts["convolutions"]) == {precision}
    assert inspect_engine(path)["by"] == "runtime"
    session = open_session(path, device="0")
    pixels = images(batch)
    wanted = reference(graphs["int8" if precision == "int8" else "fp32", batch], pixels)
    found = session(pixels)
    assert found.device.type == "cpu"
    assert_near(found, wanted, precision)
    on_gpu = session(pixels.cuda())
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), found)
    memory = session.peak_device_memory_mb()
    assert memory is not None
    assert memory > 0


def test_engine__replayed_from_a_cuda_graph(
    runtime: str, capability: str, graphs: dict[tuple[str, int], Path], tmp_path: Path
) -> None:
    path, _ = build(graphs["fp16", 1], tmp_path / "best.engine", runtime, capability, 1)
    plain, replayed = open_session(path, device="0"), open_session(path, device="0", provider="cuda-graph")
    for one in torch.split(images(3), 1):
        assert torch.equal(plain(one), replayed(one))


def test_engine__of_another_gpu(
    runtime: str, capability: str, graphs: dict[tuple[str, int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = build(graphs["fp16", 1], tmp_path / "best.engine", runtime, capability, 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (3, 5))
    with pytest.raises(ModelError, match=rf"compute capability {capability}, but .* has 3\.5"):
        open_session(path, device="0")


def test_engine__damaged(runtime: str, capability: str, graphs: dict[tuple[str, int], Path], tmp_path: Path) -> None:
    path, _ = build(graphs["fp16", 1], tmp_path / "best.engine", runtime, capability, 1)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ModelError) as caught:
        open_session(path, device="0")
    assert "\n" not in str(caught.value)


def test_engine__latency_is_that_of_a_small_network_on_a_gpu(
    runtime: str, capability: str, graphs: dict[tuple[str, int], Path], tmp_path: Path
) -> None:
    path, _ = build(graphs["fp16", 1], tmp_path / "best.engine", runtime, capability, 1)
    session = open_session(path, device="0")
    pixels = images(1).cuda()
    for _ in range(50):
        session(pixels)
    session.sync()
    times = []
    for _ in range(100):
        started = time.perf_counter()
        session(pixels)
        session.sync()
        times.append(1e3 * (time.perf_counter() - started))
    assert 0 < float(np.median(times)) < 10  # ms; a fallback to the CPU or a compilation in every call would be above


def test_export__dynamic_engine_passes_its_gate(
    runtime: str, capability: str, graphs: dict[tuple[str, int], Path], tmp_path: Path
) -> None:
    from kd_yolo.export import export

    checkpoint = graphs["fp32", 1].with_name("best.pt")
    graph = tmp_path / "dynamic.onnx"
    export(checkpoint, "onnx", graph, dynamic=True, batch=3)
    path, facts = build(graph, tmp_path / "best.engine", runtime, capability, 3, dynamic=True)
    assert facts["profile"]["max"] == [3, 3, 128, 128]
    for canvas, count in (((64, 64), 1), ((64, 96), 3), ((128, 128), 5)):
        session = open_session(path, canvas, device="0")
        pixels = to_canvas(textured_images(count, canvas, seed=3), canvas)
        assert_near(session(pixels), reference(graph, pixels), "fp32")


def test_export__engine_of_this_gpu_through_the_front_door(
    capability: str, graphs: dict[tuple[str, int], Path], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt", reason="tensorrt is not installed")
    from kd_yolo.export import export

    report = export(graphs["fp32", 1].with_name("best.pt"), "engine", tmp_path / "best.engine", quantize=16)
    assert report.parity is not None
    assert report.parity.passed
    assert report.checked == "the artifact itself"
    assert report.facts["engine"]["compute_capability"] == capability


def test_onnx__cuda_provider(graphs: dict[tuple[str, int], Path]) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDAExecutionProvider: install onnxruntime-gpu")
    pixels = images(1)
    for precision in ("fp32", "fp16"):
        path = graphs[precision, 1]
        assert onnx.load(path).graph.node
        session = open_session(path, device="0")
        assert "CUDAExecutionProvider" in session.runtime
        # The provider multiplies float32 with TF32 unless told otherwise: ten bits, as float16 has.
        assert_near(session(pixels), reference(graphs["fp32", 1], pixels), "fp16")
