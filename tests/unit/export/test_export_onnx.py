from __future__ import annotations

import ast
import errno
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kd_yolo.export.gate as gate
import kd_yolo.export.onnx_file as onnx_file
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from detector_factory import save_checkpoint, tiny_dataset, tiny_detector
from kd_yolo.export import export
from kd_yolo.export.onnx_graph import sort_nodes
from ultralytics import YOLO

from kd_yolo import __version__
from kd_yolo.checkpoints import load_model
from kd_yolo.deploy import deploy
from kd_yolo.errors import BackendMissingError, CheckpointError, ConfigError, DataError, ExportError, OutputError
from kd_yolo.files import sha256
from kd_yolo.images import textured_images, to_canvas
from kd_yolo.inference import raw_outputs, split_raw, use_head
from kd_yolo.runtimes import open_session

# {blocks, stock} x {static, dynamic} x {batch 1, 3} x {64, 96x64}, every value with every other at least once
GRID: list[tuple[str | None, bool, int, Any]] = [
    ("repvgg", False, 1, 64),
    ("qarep", True, 3, 64),
    ("qarep", False, 3, [96, 64]),
    (None, True, 1, [96, 64]),
    (None, False, 3, 64),
]


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return export(tiny_checkpoint, out=tmp_path_factory.mktemp("onnx") / "small.onnx")


@pytest.mark.parametrize(("form", "dynamic", "batch", "imgsz"), GRID)
def test_export__raw_outputs_equal_the_unfused_model(
    tmp_path: Path, form: str | None, dynamic: bool, batch: int, imgsz: Any
) -> None:
    source = save_checkpoint(tiny_detector(form), tmp_path / "best.pt")
    report = export(source, imgsz=imgsz, batch=batch, dynamic=dynamic)
    height, width = (imgsz, imgsz) if isinstance(imgsz, int) else imgsz
    assert report.path == tmp_path / "best.onnx"
    assert report.canvas == (height, width)
    assert report.parity.passed
    assert len(report.parity.canvases) == (2 if dynamic else 1)

    model, _ = load_model(source)
    use_head(model, nms=True)
    cases = [(batch, (height, width))] + ([(batch + 1, (height + 32, width))] if dynamic else [])
    for count, canvas in cases:
        run = open_session(report.path, canvas, count).infer
        pixels = to_canvas(textured_images(count, seed=11), canvas)
        apart = raw_outputs(model, pixels).difference(split_raw(run(pixels).transpose(1, 2), xyxy=False))
        assert apart.box < 5e-5 * max(canvas)
        assert apart.score < 1e-5
    graph = onnx.load(report.path)
    onnx.checker.check_model(graph, full_check=True)
    assert report.facts["opset"] == graph.opset_import[0].version
    shape = [dim.dim_param or dim.dim_value for dim in graph.graph.input[0].type.tensor_type.shape.dim]
    assert shape == (["batch", 3, "height", "width"] if dynamic else [batch, 3, height, width])


def test_export__metadata_round_trips(exported: Any, tiny_checkpoint: Path) -> None:
    session = onnxruntime.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])
    meta = session.get_modelmeta().custom_metadata_map
    assert ast.literal_eval(meta["names"]) == {0: "scratch", 1: "dent", 2: "stain"}
    assert meta["stride"] == "32"
    assert ast.literal_eval(meta["imgsz"]) == [64, 64]
    own = json.loads(meta["kd_yolo"])
    assert own == {
        "version": __version__,
        "source_sha256": sha256(tiny_checkpoint),
        "recipe_sha256": None,
        "precision": "fp32",
        "head": "nms",
        "created": exported.created,
    }


def test_export__parity_file_holds_everything(exported: Any) -> None:
    content = json.loads(exported.parity_path.read_text())
    assert exported.parity_path.name == "small.onnx.parity.json"
    assert content == json.loads(json.dumps(exported.to_dict()))
    assert content["sha256"] == sha256(exported.path)
    assert content["parity"]["images"] >= 32
    assert content["parity"]["passed"] is True
    assert set(content["versions"]) >= {"onnx", "onnxruntime", "torch", "ultralytics", "kd_yolo"}
    for text in (exported.to_text(), exported.to_markdown()):
        assert "small.onnx" in text
        assert "32 synthetic images" in text


def test_export__is_the_merged_graph(exported: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = deploy(tiny_checkpoint, out=tmp_path / "deployed.pt")
    assert exported.facts["convolutions"] == report.convolutions
    again = export(report.path, out=tmp_path / "again.onnx")
    assert again.facts == exported.facts
    pixels = to_canvas(textured_images(1), (64, 64))
    assert torch.equal(open_session(again.path).infer(pixels), open_session(exported.path).infer(pixels))


@pytest.mark.parametrize("kind", ["outside", "inside", "free", "free from deployed"])
def test_export__detections_of_stock_predict_are_the_same(tiny_checkpoint: Path, tmp_path: Path, kind: str) -> None:
    source, keys = tiny_checkpoint, {"inside": {"nms": True}, "free": {"nms_free": True}}.get(kind, {})
    if kind == "free from deployed":
        source = deploy(tiny_checkpoint, out=tmp_path / "free.pt", nms=False).path
    report = export(source, out=tmp_path / "small.onnx", **keys)
    assert report.head == ("nms-free" if kind.startswith("free") else "nms")
    images = textured_images(4, (64, 64), seed=5)
    ask: dict[str, Any] = {"imgsz": 64, "rect": False, "device": "cpu", "verbose": False, "conf": 0.25}
    expected = YOLO(tiny_checkpoint).predict(images, nms=False if kind.startswith("free") else None, **ask)
    found = [YOLO(report.path, task="detect").predict(image, **ask)[0] for image in images]
    assert sum(len(result.boxes) for result in expected) > 20
    for one, other in zip(expected, found, strict=True):
        assert one.names == other.names
        np.testing.assert_allclose(one.boxes.data.numpy(), other.boxes.data.numpy(), atol=5e-3)


def test_export__half(tiny_checkpoint: Path, exported: Any, tmp_path: Path) -> None:
    report = export(tiny_checkpoint, out=tmp_path / "half.onnx", half=True)
    assert report.precision == report.parity.precision == "fp16"
    assert report.size_mb < 0.6 * exported.size_mb
    assert report.parity.box_error > exported.parity.box_error
    onnx.checker.check_model(onnx.load(report.path), full_check=True)


def test_export__real_images(tiny_checkpoint: Path, tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "set")
    report = export(tiny_checkpoint, out=tmp_path / "small.onnx", data=str(data))
    assert (report.parity.real_images, report.parity.images) == (4, 32)
    assert str(data) in report.parity.image_source


def change_one_weight(path: Path) -> None:
    """Add 0.1 to one element of one kernel."""
    graph = onnx.load(path)
    kernel = next(item for item in graph.graph.initializer if len(item.dims) == 4)
    values = onnx.numpy_helper.to_array(kernel).copy()
    values.flat[0] += np.asarray(0.1, values.dtype)
    kernel.CopyFrom(onnx.numpy_helper.from_array(values, kernel.name))
    onnx.save(graph, path)


@pytest.mark.parametrize("by", ["weights", "outputs"])
@pytest.mark.parametrize("keys", [{}, {"nms_free": True}, {"nms": True}, {"dynamic": True}], ids=str)
def test_export__one_corrupted_weight_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], by: str
) -> None:
    """By the comparison of weights, and by that of outputs without it."""
    right = onnx_file.run_stock_exporter
    if by == "outputs":
        monkeypatch.setattr(gate, "_prove_weights", lambda *_: None)

    def corrupt(*args: Any, **keys: Any) -> Path:
        path: Path = right(*args, **keys)
        change_one_weight(path)
        return path

    monkeypatch.setattr(onnx_file, "run_stock_exporter", corrupt)
    reason = {"weights": r"model\.0\.conv: a weight differs by 0\.1", "outputs": r".*differ by \d"}[by]
    with pytest.raises(ExportError, match=rf"small\.onnx: not written, the graph is not the model: {reason}") as caught:
        export(tiny_checkpoint, out=tmp_path / "small.onnx", **keys)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_export__failure_keeps_the_old_file(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "small.onnx"
    out.write_bytes(b"old")

    def fail(*args: Any, **keys: Any) -> str:
        raise RuntimeError("the exporter broke\nwith a long story")

    monkeypatch.setattr(YOLO, "export", fail)
    with pytest.raises(ExportError, match=r"^export failed: the exporter broke$"):
        export(tiny_checkpoint, out=out)
    assert [item.name for item in tmp_path.iterdir()] == ["small.onnx"]
    assert out.read_bytes() == b"old"


def test_export__full_disk(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[[Path, bytes], int] = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        if self.suffix == ".onnx":
            raise OSError(errno.ENOSPC, "No space left on device")
        return right(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match=r"small\.onnx: cannot be written \(No space left"):
        export(tiny_checkpoint, out=tmp_path / "small.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"imgsz": 0}, "imgsz=0: must be positive and a multiple of the stride 32, for example 32"),
        ({"imgsz": -64}, "imgsz=-64"),
        ({"imgsz": 100}, "imgsz=100: .*for example 128"),
        ({"imgsz": [64, 50]}, r"imgsz=\[64, 50\]"),
        ({"batch": 0}, "batch=0"),
        ({"batch": True}, "batch=True"),
        ({"opset": 3}, "opset=3: must be between 11 and"),
        ({"opset": 999}, "opset=999"),
        ({"out": "small.pt"}, r"out=small\.pt: an onnx file ends in \.onnx"),
        ({"nms": True, "nms_free": True}, "choose one"),
        ({"half": True, "quantize": 8}, "half=true is quantize=16, but quantize=8 was given"),
        ({"simplfy": False}, "unknown key 'simplfy'; did you mean 'simplify'"),
    ],
)
def test_export__bad_arguments(tiny_checkpoint: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export(tiny_checkpoint, **keys)
    assert not list(tiny_checkpoint.parent.glob("*.onnx"))


def test_export__heads_that_are_not_there(tiny_checkpoint: Path, tmp_path: Path) -> None:
    plain = save_checkpoint(tiny_detector(both_heads=False), tmp_path / "plain.pt")
    with pytest.raises(ConfigError, match=r"plain\.pt: has no NMS-free"):
        export(plain, nms_free=True)
    free = deploy(tiny_checkpoint, out=tmp_path / "free.pt", nms=False).path
    with pytest.raises(ConfigError, match=r"free\.pt: keeps only its NMS-free head"):
        export(free, nms=True)


def test_export__missing_inputs(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.pt"):
        export(tmp_path / "gone.pt")
    with pytest.raises(DataError, match=r"gone\.yaml"):
        export(tiny_checkpoint, data=str(tmp_path / "gone.yaml"))


def test_export__missing_package_is_named(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxslim" else right(name, *rest)
    )
    with pytest.raises(BackendMissingError, match=r"needs onnxslim; run: pip install 'kd-yolo\[onnx\]'"):
        export(tiny_checkpoint)


def test_export__says_nothing_on_stdout(
    tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export(tiny_checkpoint, out=tmp_path / "small.onnx", nms_free=True)
    assert capfd.readouterr().out == ""


def test_sort_nodes__orders_and_finds_cycles() -> None:
    make = onnx.helper.make_node
    value = onnx.helper.make_tensor_value_info
    ends = [value("x", 1, [1])], [value("c", 1, [1])]
    late = [make("Neg", ["b"], ["c"]), make("Neg", ["a"], ["b"]), make("Neg", ["x"], ["a"])]
    graph = onnx.helper.make_graph(late, "late", *ends)
    sort_nodes(graph)
    assert [node.output[0] for node in graph.node] == ["a", "b", "c"]
    before = graph.SerializeToString()
    sort_nodes(graph)
    assert graph.SerializeToString() == before

    ring = onnx.helper.make_graph([make("Neg", ["c"], ["b"]), make("Neg", ["b"], ["c"])], "ring", *ends)
    with pytest.raises(ExportError, match="cycle"):
        sort_nodes(ring)


def test_sort_nodes__looks_into_subgraphs() -> None:
    make = onnx.helper.make_node
    out = [onnx.helper.make_tensor_value_info("y", 1, [1])]
    branch = onnx.helper.make_graph([make("Identity", ["a"], ["y"])], "branch", [], out)
    nodes = [make("If", ["flag"], ["c"], then_branch=branch, else_branch=branch), make("Neg", ["x"], ["a"])]
    graph = onnx.helper.make_graph(nodes, "g", [], out)
    sort_nodes(graph)
    assert [node.op_type for node in graph.node] == ["Neg", "If"]
