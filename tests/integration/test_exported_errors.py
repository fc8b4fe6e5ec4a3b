"""Exported files that are damaged, or asked for what they cannot do: one line each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ultralytics import YOLO

from kd_yolo import KDYOLO
from kd_yolo.checkpoints import load_model, serialize
from kd_yolo.cli import main
from kd_yolo.errors import BackendMissingError, CheckpointError, ConfigError, DataError, ModelError
from kd_yolo.inference import deployed_form

QUIET: dict[str, Any] = {"device": "cpu", "verbose": False}

Export = Callable[..., Path]


@pytest.fixture(scope="module")
def exported(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Return a function that exports to ONNX with Ultralytics alone, with either head, each once; or skip."""
    pytest.importorskip("onnxruntime")
    made: dict[bool, Path] = {}

    def export(format: str, free: bool = False) -> Path:
        if free not in made:
            source = tmp_path_factory.mktemp("exported") / "best.pt"
            model, content = load_model(tiny_teacher)
            source.write_bytes(serialize(deployed_form(model, not free)[0], content, {}))
            made[free] = Path(YOLO(source).export(format=format, imgsz=64, nms=False if free else None))
        return made[free]

    return export


@pytest.fixture(scope="module")
def images(tiny_data: Path) -> list[str]:
    return [str(path) for path in sorted((tiny_data.parent / "images" / "val").iterdir())]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"imgsz": 96}, r"best\.onnx: its canvas is fixed at 64x64; use imgsz=64"),
        ({"imgsz": 50}, "multiple of the stride 32"),
        ({"device": "7"}, "device=7: PyTorch sees"),
        ({"device": [0, 1]}, "runs on one device"),
        ({"rect": True}, "rect=true: .* fixed canvas; export it with dynamic=true"),
        ({"nms": False}, r"nms=False: .* has the head 'nms' for good"),
        ({"dnn": True}, r"dnn=True: only a \.pt checkpoint"),
        ({"augment": True}, r"augment=True: only a \.pt checkpoint"),
    ],
)
def test_predict_and_val__what_the_file_cannot_do(
    keys: dict[str, Any], message: str, exported: Export, images: list[str], tiny_data: Path
) -> None:
    model = KDYOLO(exported("onnx"))
    calls: list[Callable[[], Any]] = [
        lambda: model.predict(images, **{**QUIET, **keys}),
        lambda: model.val(data=tiny_data, **{**QUIET, **keys}),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_nms_free__cannot_be_given_nms(exported: Export, images: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"nms=True: .* has the head 'nms-free' for good"):
        KDYOLO(exported("onnx", free=True)).predict(images, nms=True, **QUIET)


def test_val__data_of_other_classes(exported: Export, tiny_teacher: Path, tiny_data: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(tiny_data.read_text())
    content["names"] = dict(enumerate(reversed(content["names"].values())))
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(content))
    for path in (exported("onnx"), tiny_teacher):
        with pytest.raises(DataError, match=rf"{path.name}: its 6 classes .* are not the 6 of "):
            KDYOLO(path).val(data=other, **QUIET)
    with pytest.raises(ConfigError, match="knows no data set; give data="):
        KDYOLO(exported("onnx")).val(**QUIET)


@pytest.mark.parametrize("call", ["train", "deploy", "export", "fuse", "info", "save", "reset_weights"])
def test_exported__is_no_checkpoint(call: str, exported: Export) -> None:
    model = KDYOLO(exported("onnx"))
    with pytest.raises(ModelError, match=r"is an exported file, .* give the \.pt checkpoint"):
        getattr(model, call)(**({"data": "steel-synth"} if call == "train" else {}))


def test_kdyolo__files_that_are_none(exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("gone.onnx", "gone_openvino_model", "gone_ncnn_model", "gone.engine", "gone.mnn"):
        with pytest.raises(CheckpointError, match=f"{name}: no such file or folder"):
            KDYOLO(name)
    Path("empty.onnx").touch()
    with pytest.raises(ModelError, match=r"empty\.onnx is empty"):
        KDYOLO("empty.onnx")
    Path("notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"notes\.txt: is not an exported model"):
        KDYOLO("notes.txt")
    cut = Path("cut.onnx")
    cut.write_bytes(exported("onnx").read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"cut\.onnx: truncated"):
        KDYOLO(cut)
    Path("lightnet-n").mkdir()  # a run's folder, not the model
    assert KDYOLO("lightnet-n").task == "detect"


def test_predict__missing_package(exported: Export, images: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = KDYOLO(exported("onnx"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendMissingError, match=r"pip install 'kd-yolo\[onnx\]'"):
        model.predict(images, **QUIET)


def test_cli__one_line(exported: Export, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(exported("onnx").read_bytes()[:5000])
    assert main(["predict", f"model={path}", f"source={tmp_path}"]) == 2
    printed = capsys.readouterr()
    assert [line for line in printed.err.splitlines() if "cut.onnx" in line]
    assert "Traceback" not in printed.err
