from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from detector_factory import save_checkpoint, tiny_detector
from fake_tensorrt import MARK, Config, Profile, fake_tensorrt, pretend_gpu
from kd_yolo.export import export
from kd_yolo.export.onnx_graph import graph_metadata
from kd_yolo.export.tensorrt_engine import (
    _set_profile,
    build_engine,
    check_target,
    inspect_engine,
    supported_capabilities,
)
from kd_yolo.export.tensorrt_plan import is_readable
from onnx import helper
from qdq_graphs import halve_graph, quantize_graph
from ultralytics import YOLO

from kd_yolo.errors import BackendMissingError, ConfigError, ExportError, ModelError
from kd_yolo.runtimes import describe
from kd_yolo.runtimes.tensorrt_header import read_header
from kd_yolo.targets import load_target

CANVAS = (64, 64)
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return ONNX files of a tiny student: as the exporter writes them, in float16, quantized, dynamic, NMS-free."""
    folder = tmp_path_factory.mktemp("graphs")
    checkpoint = save_checkpoint(tiny_detector(), folder / "best.pt")
    made = {name: folder / f"{name}.onnx" for name in ("fp32", "fp16", "int8", "dynamic", "free", "nms")}
    export(checkpoint, "onnx", made["fp32"])
    halve_graph(made["fp32"], made["fp16"])
    quantize_graph(made["fp32"], made["int8"])
    # Stock blocks, which the stock exporter takes as they are; its nms=False means the NMS-free head.
    stock = save_checkpoint(tiny_detector(None), folder / "stock.pt")
    kinds: dict[str, dict[str, Any]] = {"dynamic": {"dynamic": True, "batch": 3}, "free": {"nms": False}}
    for name, keys in kinds.items():
        written = YOLO(stock, task="detect").export(format="onnx", imgsz=64, device="cpu", verbose=False, **keys)
        Path(written).rename(made[name])
    model = onnx.load(made["fp32"])
    model.graph.node.append(helper.make_node("NonMaxSuppression", ["boxes", "scores"], ["chosen"]))
    onnx.save(model, made["nms"])
    return made


@pytest.fixture
def rtx() -> Any:
    """Return the installed TensorRT for RTX, or skip."""
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install 'kd-yolo[rtx]'")


@pytest.fixture
def readable_rtx(rtx: Any) -> Any:
    """Return it if its engines can be read without a GPU, or skip."""
    if not is_readable(rtx.__version__):
        pytest.skip(f"engines of TensorRT for RTX {rtx.__version__} cannot be read without a GPU")
    return rtx


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)


def build(graph: Path, out: Path, target: str | None = "rtx3070ti", **given: Any) -> dict[str, Any]:
    arguments = {"metadata": graph_metadata(graph), "dynamic": False, "batch": 1, "canvas": CANVAS} | given
    facts: dict[str, Any] = build_engine(graph, out, None if target is None else load_target(target), **arguments)
    return facts


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_build_engine__for_the_rtx_3070_ti_without_a_gpu(
    precision: str, graphs: dict[str, Path], tmp_path: Path, readable_rtx: Any
) -> None:
    facts = build(graphs[precision], tmp_path / "best.engine")
    found = inspect_engine(tmp_path / "best.engine")
    pixels = {"images": {"shape": [1, 3, 64, 64], "dtype": "float32"}}
    anchors = {"output0": {"shape": [1, 7, 84], "dtype": "float32"}}  # 4 + 3 classes; 8^2 + 4^2 + 2^2 anchors
    for said in (facts, found):
        assert said["runtime"] == "tensorrt-rtx"
        assert said["tensorrt"] == readable_rtx.__version__
        assert said["compute_capability"] == "8.6"
        assert said["inputs"] == pixels
        assert said["outputs"] == anchors
    assert (found["precision"], found["by"]) == (precision, "file")
    convolutions = [node for node in onnx.load(graphs["fp32"]).graph.node if node.op_type == "Conv"]
    assert facts["convolutions"] == {precision: len(convolutions)}
    # One, two or four bytes for each weight: what the GPU will multiply really has that type.
    parameters = _weights(graphs["fp32"])
    size = {"fp32": 4, "fp16": 2, "int8": 1}[precision]
    heaviest = {"fp32": "float32", "fp16": "float16", "int8": "int8"}[precision]
    assert 0.9 * parameters * size <= found["weight_bytes"][heaviest] <= 1.3 * parameters * size
    assert facts["tf32"] == (precision != "fp32")
    assert 0 < facts["build_s"] < 30


@pytest.mark.parametrize(("target", "capability"), [("t4", "7.5"), ("rtx4070", "8.9"), ("rtx5070", "12.0")])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_build_engine__for_other_gpus(
    target: str, capability: str, precision: str, graphs: dict[str, Path], tmp_path: Path, readable_rtx: Any
) -> None:
    build(graphs[precision], tmp_path / "best.engine", target)
    found = inspect_engine(tmp_path / "best.engine")
    assert (found["compute_capability"], found["precision"]) == (capability, precision)


@pytest.mark.parametrize("target", ["orin-nano", "h200"])
def test_check_target__names_the_capabilities_that_work(target: str, rtx: Any) -> None:
    gpu = load_target(target)
    with pytest.raises(ConfigError, match=rf"target={target}: .*{gpu.compute_capability}, and .*8\.6, 8\.9, 12\.0"):
        check_target(gpu)


def test_build_engine__refuses_a_target_before_it_builds(graphs: dict[str, Path], tmp_path: Path, rtx: Any) -> None:
    cpu = load_target("rtx3070ti").model_copy(update={"name": "desk", "title": "A desk", "compute_capability": None})
    with pytest.raises(ConfigError, match=r"target=desk: A desk is no GPU.*format=openvino") as caught:
        build_engine(graphs["fp32"], tmp_path / "a.engine", cpu, {}, False, 1, CANVAS)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_supported_capabilities__are_sorted_as_numbers(rtx: Any) -> None:
    found = supported_capabilities()
    assert found == sorted(found, key=float)
    assert {"7.5", "8.6", "8.9", "12.0"} <= set(found)


def test_build_engine__dynamic_profile_reaches_from_one_stride_to_twice_the_canvas(
    graphs: dict[str, Path], tmp_path: Path, readable_rtx: Any
) -> None:
    facts = build(graphs["dynamic"], tmp_path / "best.engine", dynamic=True, batch=3, canvas=(64, 96))
    assert facts["profile"] == {"min": [1, 3, 32, 32], "opt": [3, 3, 64, 96], "max": [3, 3, 128, 192]}
    found = inspect_engine(tmp_path / "best.engine")
    assert found["inputs"]["images"]["shape"] == [-1, 3, -1, -1]
    assert found["outputs"]["output0"]["shape"] == [-1, 7, -1]


def test_build_engine__nms_free_head(graphs: dict[str, Path], tmp_path: Path, readable_rtx: Any) -> None:
    facts = build(graphs["free"], tmp_path / "best.engine")
    assert facts["outputs"]["output0"]["shape"] == [1, 84, 6]
    assert describe(tmp_path / "best.engine").head == "nms-free"


def test_build_engine__dynamic_nms_free_head_needs_as_many_anchors_as_rows() -> None:
    # 300 rows want a square canvas of s^2 (1/64 + 1/256 + 1/1024) >= 300, s >= 121 -> 128.
    shapes = (SimpleNamespace(name="images", shape=(-1, 3, -1, -1)), SimpleNamespace(shape=(-1, 300, 6)))
    network = SimpleNamespace(get_input=lambda _: shapes[0], get_output=lambda _: shapes[1])
    builder = SimpleNamespace(create_optimization_profile=Profile)
    assert _set_profile(builder, Config(), network, (4, 640, 320), 32) == {
        "min": [1, 3, 128, 128],
        "opt": [4, 3, 640, 320],
        "max": [4, 3, 1280, 640],
    }


def test_build_engine__rtx_takes_no_nms_inside(graphs: dict[str, Path], tmp_path: Path, rtx: Any) -> None:
    with pytest.raises(ConfigError, match=r"nms=true: TensorRT for RTX takes no NMS"):
        build(graphs["nms"], tmp_path / "best.engine")


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty", "missing"])
def test_build_engine__corrupted_onnx(damage: str, graphs: dict[str, Path], tmp_path: Path, rtx: Any) -> None:
    whole = graphs["fp32"].read_bytes()
    broken = tmp_path / "broken.onnx"
    if damage != "missing":
        broken.write_bytes({"garbage": b"\xff" * 4096, "truncated": whole[: len(whole) // 2], "empty": b""}[damage])
    with pytest.raises(ExportError, match=r"^broken\.onnx: ") as caught:
        build_engine(broken, tmp_path / "a.engine", load_target("rtx3070ti"), {"stride": 32}, False, 1, CANVAS)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a.engine").exists()


def test_build_engine__a_graph_that_tensorrt_refuses(graphs: dict[str, Path], tmp_path: Path, rtx: Any) -> None:
    model = onnx.load(graphs["fp32"])
    next(node for node in model.graph.node if node.op_type == "Conv").op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(ExportError, match=r"odd\.onnx: TensorRT does not take this graph \(.*NoSuchOperator") as caught:
        build(tmp_path / "odd.onnx", tmp_path / "a.engine")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [{"batch": 2}, {"canvas": (64, 96)}, {"dynamic": True}])
def test_build_engine__graph_of_another_shape(
    given: dict[str, Any], graphs: dict[str, Path], tmp_path: Path, rtx: Any
) -> None:
    with pytest.raises(ExportError, match=r"the graph takes \(1, 3, 64, 64\)"):
        build(graphs["fp32"], tmp_path / "a.engine", **given)


def test_build_engine__graph_of_another_precision_than_it_says(
    graphs: dict[str, Path], tmp_path: Path, rtx: Any
) -> None:
    with pytest.raises(ExportError, match="was to be fp16, but its graph computes in fp32"):
        build(graphs["fp32"], tmp_path / "a.engine", metadata=graph_metadata(graphs["fp16"]))


def test_build_engine__without_the_package(
    graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendMissingError, match=r"needs tensorrt_rtx; run: pip install 'kd-yolo\[rtx\]'"):
        build(graphs["fp32"], tmp_path / "a.engine")


def test_build_engine__header_is_ultralytics(graphs: dict[str, Path], tmp_path: Path, rtx: Any) -> None:
    from ultralytics.nn.backends.base import BaseBackend

    engine = tmp_path / "best.engine"
    build(graphs["fp16"], engine)
    offset, metadata = BaseBackend.engine_header(engine)
    assert (offset, metadata["stride"], metadata["task"]) == (read_header(engine)[0], 32, "detect")
    assert BaseBackend.read_metadata(engine)["imgsz"] == [64, 64]
    own = metadata["kd_yolo"]
    assert {key: own[key] for key in ("runtime", "compute_capability", "tensorrt", "precision")} == {
        "runtime": "tensorrt-rtx",
        "compute_capability": "8.6",
        "tensorrt": rtx.__version__,
        "precision": "fp16",
    }
    said, source = describe(engine), describe(graphs["fp16"])
    assert said.format == "rtx"
    for key in ("names", "stride", "channels", "canvas", "batch", "dynamic", "precision", "head"):
        assert getattr(said, key) == getattr(source, key)
    assert said.own["source_sha256"] == source.own["source_sha256"]


def test_build_engine__without_a_gpu_says_both_ways(
    graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"no CUDA GPU.*machine that has the GPU.*target=rtx3070ti") as caught:
        build(graphs["fp32"], tmp_path / "a.engine", None)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("gpu")
def test_build_engine__without_tensorrt(
    graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendMissingError, match=r"needs tensorrt; run: pip install 'kd-yolo\[tensorrt\]'"):
        build(graphs["fp32"], tmp_path / "a.engine", None)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("8.6.1"))
    with pytest.raises(BackendMissingError, match=r"needs TensorRT 10 or newer, this is 8\.6\.1"):
        build(graphs["fp32"], tmp_path / "a.engine", None)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("version", ["10.13.3.9", "11.4.1.2"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_build_engine__precision_comes_from_the_graph_and_never_from_flags(
    version: str, precision: str, graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = fake_tensorrt(version)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    facts = build(graphs[precision], tmp_path / "best.engine", None)
    ((network, config),) = fake.built
    assert network.flags == (1 << 1 if version.startswith("10.") else 0)  # strongly typed
    assert config.set == []
    assert config.cleared == ([fake.BuilderFlag.TF32] if precision == "fp32" else [])
    assert {key: facts[key] for key in ("runtime", "tensorrt", "compute_capability")} == {
        "runtime": "tensorrt",
        "tensorrt": version,
        "compute_capability": "8.6",
    }
    said = describe(tmp_path / "best.engine")
    assert (said.format, said.precision) == ("engine", precision)
    assert read_header(tmp_path / "best.engine")[1]["kd_yolo"]["runtime"] == "tensorrt"


@pytest.mark.usefixtures("gpu")
def test_build_engine__what_was_written_is_read_back(
    graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = fake_tensorrt("10.13.3.9")
    honest = fake.Builder.build_serialized_network
    other = MARK + graphs["free"].read_bytes()  # of another graph
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(fake.Builder, "build_serialized_network", lambda *given: (honest(*given), other)[1])
    with pytest.raises(ModelError, match="says outputs"):
        build(graphs["fp32"], tmp_path / "best.engine", None)


def _weights(graph: Path) -> int:
    model = onnx.load(graph)
    read = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    return sum(int(np.prod(item.dims)) for item in model.graph.initializer if item.name in read)
