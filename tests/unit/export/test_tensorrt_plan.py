from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from detector_factory import save_checkpoint, tiny_detector
from kd_yolo.export import export
from kd_yolo.export.onnx_graph import graph_metadata
from kd_yolo.export.tensorrt_engine import build_engine
from kd_yolo.export.tensorrt_plan import inspect_engine, is_readable

from kd_yolo.errors import ModelError
from kd_yolo.runtimes.tensorrt_header import read_header
from kd_yolo.targets import load_target


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a float32 engine for the RTX 3070 Ti, or skip where its kind cannot be read without a GPU."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install 'kd-yolo[rtx]'")
    if not is_readable(rtx.__version__):
        pytest.skip(f"engines of TensorRT for RTX {rtx.__version__} cannot be read without a GPU")
    folder = tmp_path_factory.mktemp("built")
    graph, engine = folder / "best.onnx", folder / "best.engine"
    export(save_checkpoint(tiny_detector(None), folder / "best.pt"), "onnx", graph)
    build_engine(graph, engine, load_target("rtx3070ti"), graph_metadata(graph), False, 1, (64, 64))
    return engine


@pytest.mark.parametrize(
    ("version", "known"), [("1.7.1.116", True), ("1.7.0", True), ("1.8.0.2", False), ("2.7", False)]
)
def test_is_readable(version: str, known: bool) -> None:
    assert is_readable(version) is known


def _change(metadata: dict[str, Any], plan: bytes, kind: str) -> tuple[dict[str, Any], bytes]:
    own = metadata["kd_yolo"]
    if kind == "capability":
        return metadata | {"kd_yolo": own | {"compute_capability": "8.9"}}, plan
    if kind == "precision":
        return metadata | {"kd_yolo": own | {"precision": "int8"}}, plan
    if kind == "shape":
        return metadata | {"kd_yolo": own | {"inputs": {"images": {"shape": [1, 3, 96, 96], "dtype": "float32"}}}}, plan
    if kind == "name":
        return metadata | {"kd_yolo": own | {"inputs": {"pixels": own["inputs"]["images"]}}}, plan
    if kind == "truncated":
        return metadata, plan[:-1000]
    if kind == "version":
        return metadata, plan[:24] + b"\x09" + plan[25:]
    if kind == "stock":
        return {key: value for key, value in metadata.items() if key != "kd_yolo"}, plan
    return metadata, b"garbage" * 100


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("capability", r"says compute_capability 8\.9, the engine in it 8\.6"),
        ("precision", "says precision int8, the engine in it fp32"),
        ("shape", r"says inputs .*96.*, the engine in it .*64"),
        ("name", "has no input or output pixels"),
        ("truncated", r"has \d+ bytes of \d+; it is truncated"),
        ("version", r"is of TensorRT for RTX 9\.7"),
        ("stock", "kd-yolo did not export it"),
        ("garbage", "holds no engine of TensorRT for RTX"),
    ],
)
def test_inspect_engine__refuses_what_is_not_what_it_says(kind: str, message: str, built: Path, tmp_path: Path) -> None:
    assert inspect_engine(built)["precision"] == "fp32"
    offset, metadata = read_header(built)
    metadata, plan = _change(metadata, built.read_bytes()[offset:], kind)
    engine = tmp_path / "best.engine"
    header = json.dumps(metadata).encode()
    engine.write_bytes(len(header).to_bytes(4, "little") + header + plan)
    with pytest.raises(ModelError, match=message) as caught:
        inspect_engine(engine)
    assert "\n" not in str(caught.value)
