from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from detector_factory import tiny_detector
from engine_files import VERSION, changed, write
from fake_tensorrt import MARK, fake_tensorrt, pretend_gpu

import kd_yolo.runtimes.tensorrt_session as tensorrt_session
from kd_yolo.errors import BackendMissingError, ConfigError, ModelError
from kd_yolo.images import textured_images, to_canvas
from kd_yolo.runtimes import open_session

# -- opening, with a pretended GPU


def test_open_session__without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="an engine runs on an NVIDIA GPU alone, and PyTorch sees none") as caught:
        open_session(write(tmp_path / "best.engine", changed()), device="0")
    assert "\n" not in str(caught.value)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a pretended TensorRT on a pretended GPU of compute capability 8.6 whose memory is the CPU's."""
    pretend_gpu(monkeypatch)
    module = fake_tensorrt(VERSION)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("given", "keys", "kind", "message"),
    [
        ({}, {"device": "cpu"}, ConfigError, "device=cpu: an engine runs on an NVIDIA GPU alone; use device=0"),
        ({}, {"device": "3"}, ConfigError, "PyTorch sees 1 CUDA devices"),
        ({}, {"device": "0", "imgsz": 96}, ConfigError, "its canvas is fixed at 64x64"),
        ({}, {"device": "0", "batch": 2}, ConfigError, "its batch is fixed at 1"),
        ({}, {"device": "0", "provider": "cuda"}, ConfigError, "an engine is its own provider"),
        ({"compute_capability": "8.9"}, {"device": "0"}, ModelError, r"capability 8\.9, but Pretended GPU has 8\.6"),
        (
            {"tensorrt": "11.4.1.2"},
            {"device": "0"},
            ModelError,
            r"with tensorrt 11\.4\.1\.2, but 10\.13\.3\.9 is",
        ),
        ({}, {"device": "0"}, ModelError, "cannot load this engine .Serialization assertion failed. magic tag"),
    ],
)
def test_open_session__refuses(
    given: dict[str, Any], keys: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message) as caught:
        open_session(write(tmp_path / "best.engine", changed(given)), **keys)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("runtime", "extra"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "rtx")])
def test_open_session__missing_package(
    runtime: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    path = write(tmp_path / "best.engine", changed({"runtime": runtime}))
    with pytest.raises(BackendMissingError, match=rf"pip install 'kd-yolo\[{extra}\]'"):
        open_session(path, device="0")


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("imgsz", "fits"), [(32, True), ([64, 192], True), ([64, 224], False), ([160, 64], False)])
def test_open_session__canvas_of_a_dynamic_engine(imgsz: Any, fits: bool, tmp_path: Path) -> None:
    profile = {"min": [1, 3, 32, 32], "opt": [4, 3, 64, 96], "max": [4, 3, 128, 192]}
    path = write(tmp_path / "best.engine", changed({"profile": profile}, args={"dynamic": True}, batch=4))
    # What fits is opened, and fails only there, at what is no engine.
    kind, message = (ModelError, "cannot load") if fits else (ConfigError, "a canvas from 32x32 to 128x192, not")
    with pytest.raises(kind, match=message):
        open_session(path, imgsz, device="0")


# -- running: the pretended engine is an ONNX graph that reads and writes at the addresses it was given


@pytest.fixture(scope="module")
def network() -> Any:
    return tiny_detector(None, both_heads=False)


@pytest.fixture(scope="module")
def plans(network: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("plans")
    head = network.model[-1]
    head.export, head.format, head.dynamic = True, "onnx", False
    made = {}
    for name, batch in (("one", 1), ("three", 3)):
        path = folder / f"{name}.onnx"
        head.shape = None
        torch.onnx.export(network, (torch.zeros(batch, 3, 64, 64),), str(path), opset_version=18, dynamo=False)
        made[name] = MARK + onnx.load(path).SerializeToString()
    return made


@pytest.fixture
def opened(fake: Any, plans: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(tensorrt_session, "_cuda_device", lambda path, device: torch.device("cpu"))

    def open_one(plan: str = "one", provider: str | None = None, **keys: Any) -> Any:
        path = write(tmp_path / "best.engine", changed(batch=3 if plan == "three" else 1, **keys), plans[plan])
        return open_session(path, device="0", provider=provider)

    return open_one


def images(count: int) -> torch.Tensor:
    return to_canvas(textured_images(count, (64, 64), seed=2), (64, 64))


@pytest.mark.parametrize(("plan", "count"), [("one", 1), ("one", 3), ("three", 3), ("three", 4)])
def test_session__computes_what_the_network_computes(
    plan: str, count: int, opened: Callable[..., Any], network: Any
) -> None:
    session = opened(plan)
    pixels = images(count)
    with torch.inference_mode():
        expected = network(pixels)
    assert torch.allclose(session(pixels), expected, atol=1e-4, rtol=1e-4)
    assert session.runtime == f"tensorrt {VERSION}"


def test_session__results_outlive_the_next_call(opened: Callable[..., Any]) -> None:
    session = opened()
    one, other = torch.split(images(2), 1)
    first = session.infer(one)
    kept = first.clone()
    second = session.infer(other)
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
    assert session.context.runs == 2
    assert (
        len({tensor.data_ptr() for tensor in session.buffers.values()} & set(session.context.addresses.values())) == 2
    )


def test_session__another_shape_than_the_engine_has(opened: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="does not take an input of 1x3x96x96; it was built for 1x3x64x64"):
        opened().infer(torch.zeros(1, 3, 96, 96))


def test_session__metadata_of_another_engine(opened: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match="says height 96, but its graph takes 64"):
        opened(imgsz=[96, 96])


def test_session__a_run_that_fails(opened: Callable[..., Any]) -> None:
    session = opened()
    session.context.execute_async_v3 = lambda stream: False
    with pytest.raises(ModelError, match="the engine could not be run"):
        session.infer(images(1))


def test_session__records_a_cuda_graph_once_per_shape(
    opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opened(provider="cuda-graph")
    replays: list[int] = []

    class Graph:
        def replay(self) -> None:
            replays.append(session.context.execute_async_v3(7))

    class Recording:
        def __init__(self, graph: Any, stream: Any) -> None:
            assert stream is session.stream

        def __enter__(self) -> None:
            return

        def __exit__(self, *given: object) -> None:
            return

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    pixels = images(1)
    assert torch.equal(session.infer(pixels), session.infer(pixels))
    assert (len(replays), session.context.runs) == (2, 4)  # one run before and one while it records
    assert session.runtime.endswith("cuda-graph")


def test_session__peak_memory_is_what_the_engine_took(
    opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opened()  # 3 MB were free
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (500_000, 8_000_000))
    assert session.peak_device_memory_mb() == pytest.approx(2.5)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (5_000_000, 8_000_000))
    assert session.peak_device_memory_mb() == 0
