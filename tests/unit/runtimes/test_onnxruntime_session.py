"""ONNX Runtime: the provider that was asked for or none, and graphs that are no detector."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from exported_factory import export_tiny, exported, photographs, reference, with_metadata

from kd_yolo.errors import BackendMissingError, ConfigError, ModelError
from kd_yolo.runtimes import describe, onnxruntime_session, open_session


@pytest.fixture(scope="module")
def onnx_file() -> Path:
    return exported("onnx")


class FallenBack:
    """A session that answers on another provider than it was asked for, as ONNX Runtime's do after a failure."""

    def __init__(self, path: str, options: Any, providers: list[tuple[str, dict[str, Any]]]) -> None:
        self.asked = providers[0][0]

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]

    def disable_fallback(self) -> None:
        """Nothing to do: it has fallen back already."""


def test_open_session__silent_fallback_is_an_error(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    fake = types.SimpleNamespace(
        get_available_providers=lambda: ["OpenVINOExecutionProvider", "CPUExecutionProvider"],
        SessionOptions=onnxruntime.SessionOptions,
        InferenceSession=FallenBack,
    )
    monkeypatch.setattr(onnxruntime_session, "_onnxruntime", lambda path: fake)
    with pytest.raises(BackendMissingError, match=r"OpenVINOExecutionProvider was asked for, but .* fell back to CPU"):
        open_session(onnx_file, provider="openvino")


@pytest.mark.parametrize("provider", ["openvino", "OpenVINO"])
def test_open_session__provider_that_is_not_there(provider: str, onnx_file: Path) -> None:
    import onnxruntime

    if "OpenVINOExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("it is there")
    with pytest.raises(BackendMissingError, match=r"has no OpenVINOExecutionProvider \(it has .*CPUExecutionProvider"):
        open_session(onnx_file, provider=provider)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_open_session__provider_of_a_gpu_that_is_not_there(provider: str, onnx_file: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match="PyTorch sees 0 CUDA devices"):
        open_session(onnx_file, provider=provider)


def test_open_session__unknown_provider(onnx_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"provider=tensort: unknown; did you mean 'tensorrt'\? \(known: cpu, cuda"):
        open_session(onnx_file, provider="tensort")


def test_open_session__from_a_newer_version(onnx_file: Path, tmp_path: Path) -> None:
    path = with_metadata(onnx_file, tmp_path / "newer.onnx", kd_yolo={"version": "99.1.0"})
    for read in (describe, open_session):
        with pytest.raises(ModelError, match=r"newer\.onnx: was written by kd-yolo 99\.1\.0.*update kd-yolo"):
            read(path)


def test_open_session__no_detector(onnx_file: Path, tmp_path: Path) -> None:
    """Any ONNX file, then one that claims to be a detector and is none."""
    plain = tmp_path / "plain.onnx"
    node = onnx.helper.make_node("Flatten", ["a"], ["b"])
    image = onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, [1, 3, 64, 64])
    label = onnx.helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, [1, 12288])
    graph = onnx.helper.make_graph([node], "g", [image], [label])
    onnx.save(onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 13)]), plain)
    with pytest.raises(ModelError, match=r"plain\.onnx: says nothing about its stride, names"):
        open_session(plain)
    entries = {item.key: item.value for item in onnx.load(onnx_file).metadata_props}
    claims = with_metadata(plain, tmp_path / "claims.onnx", **entries)
    assert describe(claims) == describe(onnx_file)
    with pytest.raises(ModelError, match=r"claims\.onnx: is not a detector with one image input"):
        open_session(claims)


def test_open_session__metadata_of_another_export(onnx_file: Path, tmp_path: Path) -> None:
    path = with_metadata(onnx_file, tmp_path / "other.onnx", imgsz="[96, 96]")
    with pytest.raises(ModelError, match=r"other\.onnx: says height 96, but its graph takes 64"):
        open_session(path)


def test_open_session__threads(onnx_file: Path) -> None:
    session: Any = open_session(onnx_file, threads=3)
    assert session.session.get_session_options().intra_op_num_threads == 3
    session = open_session(onnx_file)
    assert session.session.get_session_options().intra_op_num_threads == torch.get_num_threads()


def test_open_session__fixed_batch_and_dynamic(tmp_path: Path) -> None:
    three = open_session(export_tiny(tmp_path / "three", "onnx", batch=3), batch=3)
    assert three.fixed_batch == 3
    free = open_session(export_tiny(tmp_path / "free", "onnx", dynamic=True), imgsz=[96, 64], batch=2)
    assert free.fixed_batch is None
    assert free.canvas == (96, 64)
    pixels = photographs(5)
    torch.testing.assert_close(three(pixels), reference(pixels), atol=2e-4, rtol=0)
    wide = photographs(2, (96, 64))
    torch.testing.assert_close(free(wide), reference(wide), atol=2e-4, rtol=0)


@pytest.mark.parametrize(("nms", "head"), [(False, "nms-free"), (True, "nms inside")])
def test_open_session__selected_rows(nms: bool, head: str, tmp_path: Path) -> None:
    session = open_session(export_tiny(tmp_path, "onnx", nms=nms))
    assert session.description.head == head
    pixels = photographs(3)
    rows = session(pixels)
    assert rows.shape[0] == 3
    assert rows.shape[2] == 6
    if not nms:
        torch.testing.assert_close(rows, reference(pixels, nms=False), atol=2e-4, rtol=0)


def test_infer__half_precision_input(onnx_file: Path) -> None:
    """A file with float16 inputs is given them, and still answers in float32."""
    session: Any = open_session(onnx_file)
    seen: list[Any] = []

    class Half:
        def run(self, _: None, feed: dict[str, Any]) -> list[Any]:
            seen.append(feed["images"].dtype)
            return [torch.zeros(1, 7, 84, dtype=torch.float16).numpy()]

    session.session, session.dtype = Half(), torch.float16
    assert session(photographs(1)).dtype == torch.float32
    assert [str(dtype) for dtype in seen] == ["float16"]
