from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from detector_factory import save_checkpoint, tiny_detector
from kd_yolo.export import export
from ultralytics import YOLO
from ultralytics.utils.torch_utils import get_flops

from kd_yolo.bench.complexity import onnx_complexity
from kd_yolo.bench.pool import WorkerProcess
from kd_yolo.bench.runners import Choice, Runner, SessionRunner, open_runner, parse_choice
from kd_yolo.bench.torch_runner import TorchRunner
from kd_yolo.bench.worker import memory_mb, serve
from kd_yolo.deploy import deploy
from kd_yolo.errors import BackendMissingError, CheckpointError, ConfigError, ModelError
from kd_yolo.images import textured_images


@pytest.fixture(scope="module")
def graph(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(export(tiny_checkpoint, out=tmp_path_factory.mktemp("graph") / "small.onnx").path)


def run(runner: Runner, images: list[Any]) -> list[torch.Tensor]:
    return runner.postprocess(runner.infer(runner.preprocess(images)), images)


@pytest.mark.parametrize("kind", ["torch", "onnx", "nms-free", "nms inside"])
def test_runner__detects_what_stock_predict_detects(
    tiny_checkpoint: Path, graph: Path, tmp_path: Path, kind: str
) -> None:
    path = {"torch": tiny_checkpoint, "onnx": graph}.get(kind)
    if kind == "nms-free":
        path = deploy(tiny_checkpoint, out=tmp_path / "free.pt", nms=False).path
    elif kind == "nms inside":
        path = export(tiny_checkpoint, out=tmp_path / "inside.onnx", nms=True).path
    assert path is not None
    runner = open_runner(Choice(path), 64, 1, "cpu")
    images = textured_images(3, (90, 120), seed=9)
    stock = YOLO(path, task="detect").predict(images, imgsz=64, rect=False, conf=0.25, device="cpu", verbose=False)
    assert sum(len(result.boxes) for result in stock) > 10
    for image, expected in zip(images, stock, strict=True):
        found = run(runner, [image])[0]
        np.testing.assert_allclose(found.numpy(), expected.boxes.data.numpy(), atol=1e-2)
    assert runner.head == {"nms-free": "nms-free", "nms inside": "nms inside"}.get(kind, "nms")


def test_runner__torch_facts(tiny_checkpoint: Path) -> None:
    runner = open_runner(Choice(tiny_checkpoint), None, 1, "cpu")
    assert isinstance(runner, TorchRunner)
    plain = tiny_detector(form=None)
    plain.fuse(verbose=False)
    assert (runner.runtime, runner.precision, runner.canvas) == ("torch eager", "fp32", (64, 64))
    assert runner.params == sum(parameter.numel() for parameter in plain.parameters())
    assert runner.gflops is not None
    assert runner.gflops == pytest.approx(get_flops(plain, 64))
    assert runner.peak_device_memory_mb() is None


def test_runner__onnx_facts_agree_with_torch(graph: Path, tiny_checkpoint: Path) -> None:
    runner, same = open_runner(Choice(graph), None, 1, "cpu"), open_runner(Choice(tiny_checkpoint), None, 1, "cpu")
    assert isinstance(runner, SessionRunner)
    assert runner.runtime == "onnxruntime CPUExecutionProvider"
    assert runner.canvas == (64, 64)
    assert runner.params == same.params
    assert runner.gflops == pytest.approx(same.gflops, rel=0.01)


def test_complexity__of_a_free_canvas(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = export(tiny_checkpoint, out=tmp_path / "free.onnx", dynamic=True).path
    small, large = onnx_complexity(path, (64, 64)), onnx_complexity(path, (128, 64))
    assert small[0] == large[0]
    assert large[1] == pytest.approx(2 * small[1])


def test_runner__half_precision_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = export(tiny_checkpoint, out=tmp_path / "half.onnx", half=True).path
    assert open_runner(Choice(path), 64, 1, "cpu").precision == "fp16"


def test_stages__stream_over_the_images(tiny_checkpoint: Path) -> None:
    runner = open_runner(Choice(tiny_checkpoint), 64, 2, "cpu")
    images = textured_images(3, (64, 64))
    pre, infer, post = runner.stages(images, 2)
    seen = []
    for _ in range(3):
        pixels = pre(None)
        seen += list(pixels)
        assert len(post(infer(pixels))) == 2
    assert torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(
    ("imgsz", "batch", "message"),
    [(96, 1, "its canvas is fixed at 64x64; use imgsz=64"), (64, 2, "its batch is fixed at 1; use batch=1")],
)
def test_runner__fixed_shapes(graph: Path, imgsz: int, batch: int, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"small\.onnx: {message}"):
        open_runner(Choice(graph), imgsz, batch, "cpu")


def test_open_runner__not_an_artifact(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.onnx").write_text("x")
    (tmp_path / "a.pt").write_text("x")
    with pytest.raises(ModelError, match=r"a\.txt: is not an exported model"):
        open_runner(Choice(tmp_path / "a.txt"), 64, 1, "cpu")
    with pytest.raises(ModelError, match=r"a\.onnx: truncated, or not an ONNX file"):
        open_runner(Choice(tmp_path / "a.onnx"), 64, 1, "cpu")
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        open_runner(Choice(tmp_path / "a.pt"), 64, 1, "cpu")
    with pytest.raises(ModelError, match=r"gone\.onnx: no such file"):
        open_runner(Choice(tmp_path / "gone.onnx"), 64, 1, "cpu")


@pytest.mark.parametrize(
    ("text", "runtime"),
    [("small.onnx", None), ("small.onnx@cpu", "cpu"), ("a@b.pt", None), ("a@b.pt@compile-fp16", "compile-fp16")],
)
def test_parse_choice__a_file_and_its_runtime(tmp_path: Path, text: str, runtime: str | None) -> None:
    for name in ("small.onnx", "a@b.pt"):
        (tmp_path / name).write_text("x")
    found = parse_choice(str(tmp_path / text))
    assert found.runtime == runtime
    assert found.path.is_file()
    assert str(found) == str(tmp_path / text)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("a.pt@complie", ConfigError, "unknown runtime 'complie' .*; did you mean 'compile'"),
        ("a.pt@", ConfigError, "unknown runtime ''"),
        ("a.onnx@eager", ConfigError, r"unknown runtime 'eager' \(known for it: cpu, cuda, tensorrt, openvino\)"),
        ("a.torchscript@cpu", ConfigError, "a file of its format runs in one way only"),
        ("gone.pt@compile", ModelError, r"gone\.pt: no such file or folder"),
        ("gone.pt", ModelError, r"gone\.pt: no such file or folder"),
    ],
)
def test_parse_choice__wrong(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    for name in ("a.pt", "a.onnx", "a.torchscript"):
        (tmp_path / name).write_text("x")
    with pytest.raises(error, match=message):
        parse_choice(str(tmp_path / text))


@pytest.mark.parametrize("runtime", ["cudagraph", "eager-fp16", "compile-fp16", "cudagraph-fp16"])
def test_open_runner__needs_a_gpu(tiny_checkpoint: Path, runtime: str) -> None:
    with pytest.raises(ConfigError, match=f"@{runtime}: needs a CUDA GPU"):
        open_runner(Choice(tiny_checkpoint, runtime), 64, 1, "cpu")


@pytest.mark.parametrize("runtime", ["cuda", "tensorrt"])
def test_open_runner__records_say_the_cpu_so_nothing_runs_on_a_gpu(graph: Path, runtime: str) -> None:
    with pytest.raises(ConfigError, match=f"@{runtime}: runs on a GPU; give device=0"):
        open_runner(Choice(graph, runtime), 64, 1, "cpu")
    with pytest.raises(ConfigError, match="@cpu: runs on the CPU; give device=cpu"):
        open_runner(Choice(graph, "cpu"), 64, 1, "0")


def test_runner__a_runtime_that_fell_back_is_an_error(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FallenBack:
        def __init__(self, *args: Any, **keys: Any) -> None:
            self.args = args

        def disable_fallback(self) -> None:
            pass

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["OpenVINOExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", FallenBack)
    with pytest.raises(BackendMissingError, match=r"OpenVINOExecutionProvider was asked for, .* fell back to CPUExec"):
        open_runner(Choice(graph, "openvino"), 64, 1, "cpu")


def test_torch_runner__compiled_is_the_same_network(tiny_checkpoint: Path) -> None:
    images = textured_images(2, (90, 120), seed=9)
    eager = open_runner(Choice(tiny_checkpoint), 64, 1, "cpu")
    compiled = open_runner(Choice(tiny_checkpoint, "compile"), 64, 1, "cpu")
    assert (eager.runtime, compiled.runtime) == ("torch eager", "torch compiled")
    for image in images:
        for found, expected in zip(run(compiled, [image]), run(eager, [image]), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-4)


def test_torch_runner__what_cannot_be_compiled_whole_is_an_error(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = open_runner(Choice(tiny_checkpoint, "compile"), 64, 1, "cpu")
    assert isinstance(runner, TorchRunner)

    def breaks(pixels: torch.Tensor) -> list[torch.Tensor]:
        torch._dynamo.graph_break()
        return [pixels * 2]

    monkeypatch.setattr(runner, "model", breaks)
    with pytest.raises(BackendMissingError, match=r"torch\.compile cannot compile it"):
        runner.infer(torch.zeros(1, 3, 64, 64))


def test_memory_mb__peak_is_not_the_parents() -> None:
    now, peak = memory_mb()
    assert 50 < now <= peak * 1.05


def ask(*requests: dict[str, Any]) -> list[dict[str, Any]]:
    answers = io.StringIO()
    serve(io.StringIO("".join(json.dumps(request) + "\n" for request in requests)), answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_serve__every_error_is_one_answer(tmp_path: Path) -> None:
    spec = {"imgsz": 64, "batch": 1, "device": "cpu", "threads": 1, "trust": False, "images": [], "synthetic": 2}
    spec |= {"runtime": None, "cores": None}
    found = ask({"do": "open", "artifact": str(tmp_path / "gone.pt"), **spec}, {"do": "warm"})
    assert found[0]["kind"] == "ModelError"
    assert "gone.pt: no such file" in found[0]["error"]
    assert "no attribute 'timer'" in found[1]["error"]


def test_worker__a_dead_process_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    worker = WorkerProcess(Choice(tmp_path / "a.pt"), 1)
    worker.process.kill()
    with pytest.raises(ModelError, match=r"a\.pt: its process ended with status -9 \(warm\)"):
        worker.ask("warm")
    worker.close()


def test_runner__foreign_checkpoint_needs_trust(tmp_path: Path) -> None:
    path = save_checkpoint(tiny_detector(), tmp_path / "odd.pt", train_metrics=Path.joinpath)
    with pytest.raises(CheckpointError, match=r"odd\.pt: .*trust=true"):
        open_runner(Choice(path), 64, 1, "cpu")
