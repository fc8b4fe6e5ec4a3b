"""Every format through the one door: same outputs, same errors."""

from __future__ import annotations

import builtins
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_factory import copied, exported, photographs, reference

from kd_yolo.errors import BackendMissingError, ConfigError, ModelError
from kd_yolo.runtimes import artifact_format, describe, open_session
from kd_yolo.runtimes.opening import is_foreign

PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino", "torchscript": "torch", "ncnn": "ncnn"}
RUNTIMES = {
    "onnx": "onnxruntime CPUExecutionProvider",
    "openvino": "openvino CPU",
    "torchscript": "torchscript cpu",
    "ncnn": "ncnn CPU",
}
FORMATS = list(RUNTIMES)
WEIGHTS = {"onnx": "", "torchscript": "", "openvino": "*.bin", "ncnn": "*.bin"}
GRAPHS = {"onnx": "", "torchscript": "", "openvino": "*.xml", "ncnn": "*.param"}


def part(path: Path, pattern: str) -> Path:
    return next(path.glob(pattern)) if pattern else path


@pytest.mark.parametrize("format", FORMATS)
def test_open_session__says_what_the_checkpoint_says(format: str) -> None:
    path = exported(format)
    assert artifact_format(path) == format
    session = open_session(path, threads=1)
    assert session.runtime == RUNTIMES[format]
    assert session.canvas == session.description.canvas == (64, 64)
    assert session.description == describe(path)
    assert session.description.names == {0: "scratch", 1: "dent", 2: "stain"}
    pixels = photographs(5)
    ours, theirs = session(pixels), reference(pixels)
    assert (theirs[0] - theirs[1]).abs().max() > 1e-2, "images that say the same would hide a mix-up"
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(session.infer(pixels[:1]), theirs[:1], atol=2e-4, rtol=0)
    session.sync()
    assert session.peak_device_memory_mb() is None


@pytest.mark.parametrize("format", ["openvino", "ncnn"])
def test_open_session__by_the_file_in_the_folder(format: str) -> None:
    path = exported(format)
    graph = part(path, GRAPHS[format])
    assert artifact_format(graph) == format
    assert describe(graph) == describe(path)
    pixels = photographs(2)
    torch.testing.assert_close(open_session(graph)(pixels), open_session(path)(pixels))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"imgsz": 96}, "canvas is fixed at 64x64; use imgsz=64"),
        ({"imgsz": [64, 96]}, "canvas is fixed at 64x64"),
        ({"imgsz": 63}, "multiple of the stride"),
        ({"batch": 2}, "batch is fixed at 1; use batch=1"),
        ({"device": "0"}, "device=0: "),
        ({"device": "abacus"}, "device=abacus: "),
        ({"provider": "abacus"}, "provider=abacus: "),
    ],
)
def test_open_session__cannot_have_that(format: str, keys: dict[str, Any], message: str) -> None:
    path = exported(format)
    if "device" in keys and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match=message) as caught:
        open_session(path, **keys)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("what", ["weights", "graph"])
def test_open_session__truncated(format: str, share: float, what: str, tmp_path: Path) -> None:
    path = copied(exported(format), tmp_path)
    file = part(path, (WEIGHTS if what == "weights" else GRAPHS)[format])
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelError) as caught:
        open_session(path)
    assert str(caught.value).startswith(f"{path}")
    assert "\n" not in str(caught.value)
    assert ("is empty" in str(caught.value)) == (share == 0)


@pytest.mark.parametrize("format", FORMATS)
def test_open_session__garbage(format: str, tmp_path: Path) -> None:
    path = copied(exported(format), tmp_path)
    part(path, GRAPHS[format]).write_bytes(os.urandom(5000))
    with pytest.raises(ModelError) as caught:
        open_session(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["openvino", "ncnn"])
@pytest.mark.parametrize("pattern", ["*.bin", "metadata.yaml"])
def test_open_session__a_part_is_missing(format: str, pattern: str, tmp_path: Path) -> None:
    path = copied(exported(format), tmp_path)
    part(path, pattern).unlink()
    with pytest.raises(ModelError, match=r"its file \S+ is missing; copy the whole folder"):
        open_session(path)


@pytest.mark.parametrize("format", ["openvino", "ncnn"])
def test_open_session__metadata_of_another_model(format: str, tmp_path: Path) -> None:
    """Four classes named, three computed: found at the latest by the first answer."""
    path = copied(exported(format), tmp_path)
    file = path / "metadata.yaml"
    file.write_text(file.read_text().replace("  2: stain\n", "  2: stain\n  3: hole\n"))
    session = open_session(path)
    with pytest.raises(ModelError, match=r"detector of 4 classes .* belongs to another model"):
        session(photographs(1))


@pytest.mark.parametrize("format", ["onnx", "openvino", "ncnn"])
def test_open_session__package_is_missing(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = exported(format), builtins.__import__

    def without(name: str, *arguments: Any, **keys: Any) -> Any:
        if name.split(".")[0] == PACKAGES[format]:
            raise ImportError(name)
        return real(name, *arguments, **keys)

    monkeypatch.setattr(builtins, "__import__", without)
    assert describe(path).format == format, "what a file says can be read without its runtime"
    with pytest.raises(BackendMissingError, match=rf"pip install 'kd-yolo\[{format}\]'"):
        open_session(path)


def test_artifact_format__nothing_that_an_export_writes(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        artifact_format(tmp_path / "gone.onnx")
    with pytest.raises(ModelError, match="folder without an exported model"):
        artifact_format(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"notes\.txt: is not an exported model \(known: \.onnx"):
        artifact_format(tmp_path / "notes.txt")


def test_artifact_format__suffix_in_capitals(tmp_path: Path) -> None:
    path = tmp_path / "BEST.ONNX"
    shutil.copy(exported("onnx"), path)
    assert artifact_format(path) == "onnx"
    assert open_session(path).canvas == (64, 64)


@pytest.mark.parametrize(
    ("name", "foreign"),
    [
        ("a.onnx", False),
        ("a_qnn.onnx", True),
        ("a.engine", False),
        ("a_openvino_model", False),
        ("a_ncnn_model", False),
        ("a_saved_model", True),
        ("a.mnn", True),
        ("a.tflite", True),
        ("a.pt", False),
        ("lightnet-n", False),
        ("a_openvino_model.xml", False),
    ],
)
def test_is_foreign__what_only_ultralytics_opens(name: str, foreign: bool) -> None:
    assert is_foreign(Path("some.mnn") / name) is foreign
