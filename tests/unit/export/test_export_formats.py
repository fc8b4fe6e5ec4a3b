"""Every format end to end on a tiny detector: proven, described, named, and refused with one wrong weight."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from detector_factory import save_checkpoint, tiny_dataset, tiny_detector
from export_factory import CORRUPT
from kd_yolo.export import FORMATS, export, pipeline
from kd_yolo.export.report import ExportReport
from kd_yolo.export.stock import Made, Work
from ultralytics import YOLO

from kd_yolo.checkpoints import load_model
from kd_yolo.errors import ConfigError, ExportError, OutputError
from kd_yolo.files import sha256, size_mb
from kd_yolo.images import textured_images, to_canvas
from kd_yolo.inference import raw_outputs, split_raw, use_head
from kd_yolo.runtimes import describe, open_session

NAMES = {
    ("onnx", None): "best.onnx",
    ("onnx", 16): "best_fp16.onnx",
    ("openvino", None): "best_openvino_model",
    ("openvino", 16): "best_fp16_openvino_model",
    ("torchscript", None): "best.torchscript",
    ("ncnn", None): "best_ncnn_model",
    ("ncnn", 16): "best_fp16_ncnn_model",
    ("bundle", None): "best_bundle",
}
PACKAGES = {"openvino": ("openvino",), "ncnn": ("ncnn", "pnnx")}


def need(format: str) -> None:
    for package in PACKAGES.get(format, ()):
        pytest.importorskip(package)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tiny_detector(), tmp_path_factory.mktemp("formats") / "best.pt")


@pytest.fixture(scope="module")
def exported(source: Path) -> Any:
    """Return a function that exports once and remembers."""
    known: dict[tuple[str, int | None], ExportReport] = {}

    def run(format: str, quantize: int | None = None) -> ExportReport:
        need(format)
        if (format, quantize) not in known:
            known[format, quantize] = export(source, format, quantize=quantize)
        return known[format, quantize]

    return run


@pytest.mark.parametrize(("format", "quantize"), NAMES)
def test_export__every_format_is_proven(exported: Any, source: Path, format: str, quantize: int | None) -> None:
    report = exported(format, quantize)
    precision = {None: "fp32", 16: "fp16"}[quantize]
    assert report.path == source.with_name(NAMES[format, quantize])
    assert report.path.is_dir() == (format in {"openvino", "ncnn", "bundle"})
    assert report.passed is True
    assert report.parity.images >= 32
    assert report.parity.reference_detections > 100
    assert report.size_mb == size_mb(report.path)
    assert format != "onnx" or report.runtime == "onnxruntime CPUExecutionProvider"
    content = json.loads(report.parity_path.read_text())
    assert report.parity_path.name == f"{report.path.name}.parity.json"
    assert content == json.loads(json.dumps(report.to_dict()))
    assert (content["passed"], content["sha256"]) == (True, sha256(report.path))
    for text in (report.to_text(), report.to_markdown()):
        assert precision in text
        assert report.checked in text
    made = next(report.path.glob("*.onnx")) if format == "bundle" else report.path
    found = describe(made)
    assert (found.canvas, found.batch, found.dynamic) == ((64, 64), 1, False)
    assert (found.precision, found.head, found.stride) == (precision, "nms", 32)
    assert found.names == {0: "scratch", 1: "dent", 2: "stain"}
    assert found.own["source_sha256"] == sha256(source)
    assert found.own["created"] == content["created"]


@pytest.mark.parametrize("format", ["openvino", "torchscript", "ncnn"])
def test_export__raw_outputs_equal_the_unfused_model(exported: Any, source: Path, format: str) -> None:
    run = open_session(exported(format).path)
    model, _ = load_model(source)
    use_head(model, nms=True)
    pixels = to_canvas(textured_images(1, seed=11), (64, 64))
    apart = raw_outputs(model, pixels).difference(split_raw(run.infer(pixels).transpose(1, 2), xyxy=False))
    assert apart.box < 5e-5 * 64
    assert apart.score < 2e-5


@pytest.mark.parametrize(
    ("format", "keys"),
    [
        ("openvino", {"imgsz": [64, 96], "batch": 2, "dynamic": True}),
        ("openvino", {"nms": True}),
        ("torchscript", {"imgsz": [96, 64], "batch": 2, "nms_free": True}),
        ("torchscript", {"dynamic": True, "batch": 2, "nms": True}),
        ("ncnn", {"imgsz": [64, 96]}),
    ],
    ids=str,
)
def test_export__shapes_and_heads(source: Path, tmp_path: Path, format: str, keys: dict[str, Any]) -> None:
    need(format)
    suffix = {"openvino": "_openvino_model", "ncnn": "_ncnn_model"}.get(format, f".{format}")
    report = export(source, format, out=tmp_path / f"line{suffix}", **keys)
    found = describe(report.path)
    canvas = tuple(keys.get("imgsz", (64, 64)))
    assert (found.canvas, found.batch, found.dynamic) == (canvas, keys.get("batch", 1), "dynamic" in keys)
    assert found.head == ("nms inside" if "nms" in keys else "nms-free" if "nms_free" in keys else "nms")
    assert report.passed


@pytest.mark.parametrize(
    ("format", "quantize", "amount"),
    [
        ("onnx", 16, 1.0),
        ("openvino", None, 0.1),
        ("openvino", 16, 1.0),
        ("torchscript", None, 0.1),
        ("ncnn", None, 0.1),
        ("ncnn", 16, 1.0),
        ("bundle", None, 0.1),
    ],
)
def test_export__one_corrupted_weight_is_refused(
    exported: Any,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    format: str,
    quantize: int | None,
    amount: float,
) -> None:
    right = exported(format, quantize)
    entry = pipeline._own_entry
    # The artifact that passed is made anew from a copy of itself, so that the wrong weight is the only difference.
    monkeypatch.setattr(pipeline, "_own_entry", lambda *words: entry(*words) | {"created": right.created})

    def corrupt(work: Work) -> Made:
        made = work.folder / right.path.name
        (shutil.copytree if right.path.is_dir() else shutil.copy)(right.path, made)
        proven = next(made.glob("*.onnx")) if format == "bundle" else made
        CORRUPT["onnx" if format == "bundle" else format](proven, amount)
        return Made(made, right.facts, proven)

    out = tmp_path / right.path.name
    monkeypatch.setattr(pipeline, "_make", corrupt)
    with pytest.raises(ExportError, match=r"not written, the graph is not the model: .*\(bound \d") as caught:
        export(source, format, quantize=quantize, out=out)
    assert caught.value.args[0].startswith(out.name)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_export__metadata_of_another_model_is_refused(
    exported: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = exported("onnx")
    monkeypatch.setattr(pipeline, "_make", lambda work: Made(right.path, right.facts, right.path))
    with pytest.raises(ExportError, match=r"wrong\.onnx: not written, its metadata is wrong: own is"):
        export(source, out=tmp_path / "wrong.onnx")  # says another time of making
    monkeypatch.setattr(
        pipeline, "_make", lambda work: Made(work.folder / "gone.onnx", right.facts, work.folder / "gone.onnx")
    )
    with pytest.raises(ExportError, match=r"wrong\.onnx: not written, it does not describe itself"):
        export(source, out=tmp_path / "wrong.onnx")
    assert not list(tmp_path.iterdir())


def test_export__truncated_weights_are_refused(
    exported: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up may leave a weight file short without any error."""
    right = exported("openvino")
    entry = pipeline._own_entry
    monkeypatch.setattr(pipeline, "_own_entry", lambda *words: entry(*words) | {"created": right.created})

    def short(work: Work) -> Made:
        made = work.folder / right.path.name
        shutil.copytree(right.path, made)
        weights = next(made.glob("*.bin"))
        weights.write_bytes(weights.read_bytes()[:-1000])
        return Made(made, right.facts, made)

    monkeypatch.setattr(pipeline, "_make", short)
    with pytest.raises(ExportError, match=r"not written, it cannot be opened again \("):
        export(source, "openvino", out=tmp_path / "short_openvino_model")
    assert not list(tmp_path.iterdir())


def test_export__passed_through_and_not_proven(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: dict[str, Any] = {}

    def stock(self: YOLO, **keys: Any) -> str:
        asked.update(keys)
        assert not any("kd_yolo" in type(module).__module__ for module in self.model.modules())  # deployed first
        made = Path(str(self.ckpt_path)).with_suffix(".mnn")
        made.write_bytes(b"made")
        return str(made)

    monkeypatch.setattr(YOLO, "export", stock)
    report = export(source, "mnn", out=tmp_path / "line.mnn", quantize=16, imgsz=[64, 96])
    assert (asked["format"], asked["quantize"], asked["imgsz"], asked["simplify"]) == ("mnn", 16, [64, 96], True)
    assert report.path.read_bytes() == b"made"
    assert (report.passed, report.parity, report.runtime) == (None, None, None)
    assert "not checked: no runtime here for mnn" in report.to_text()
    assert "line.mnn: not checked: no runtime here for mnn" in caplog.text
    content = json.loads((tmp_path / "line.mnn.parity.json").read_text())
    assert content["passed"] is None
    assert content["parity"] == {"passed": None, "reason": "not checked: no runtime here for mnn"}


def test_export__engine_for_a_gpu_that_is_not_here(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    report = export(source, "engine", target="rtx3070ti", quantize=16, out=tmp_path / "line.engine")
    assert report.target == "rtx3070ti"
    assert report.runtime == "onnxruntime CPUExecutionProvider"
    assert report.checked == (
        "the ONNX graph it was built from; the engine itself runs only on a GPU of compute capability 8.6"
    )
    found = describe(report.path)
    assert (found.format, found.precision, found.canvas) == ("rtx", "fp16", (64, 64))
    assert found.own["compute_capability"] == "8.6"
    assert found.own["source_sha256"] == sha256(source)
    assert "tensorrt-rtx" in report.to_text()


def test_export__engine_with_one_corrupted_weight_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is changed before the engine is built from it."""
    pytest.importorskip("tensorrt_rtx")
    import kd_yolo.export.engine_file as engine_file

    right = engine_file.make_onnx

    def corrupt(work: Work) -> Made:
        made = right(work)
        CORRUPT["onnx"](made.path, 0.1)
        return made

    monkeypatch.setattr(engine_file, "make_onnx", corrupt)
    with pytest.raises(ExportError, match=r"line\.engine: not written, the graph is not the model: .*\(bound \d"):
        export(source, "engine", target="rtx3070ti", out=tmp_path / "line.engine")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_export__int8_end_to_end(tmp_path: Path, format: str) -> None:
    need(format)
    if format == "openvino":
        pytest.importorskip("nncf")
    data = tiny_dataset(tmp_path / "set", images=8)
    source = save_checkpoint(tiny_detector(), tmp_path / "best.pt")
    report = export(source, format, quantize=8, data=str(data), max_drop=100, calibration_images=8)
    assert report.path.name == {"onnx": "best_int8.onnx", "openvino": "best_int8_openvino_model"}[format]
    assert (report.passed, report.precision, report.parity.precision) == (True, "int8", "int8")
    assert describe(report.path).precision == "int8"
    assert report.int8.calibration["images"] == 8
    content = json.loads(report.parity_path.read_text())
    assert content["int8"]["layers_int8"] > 0
    assert content["int8"]["judge_calls"] == len(content["int8"]["trials"]) > 0


LIMITED = """
import resource, signal, sys
from kd_yolo.errors import KDYoloError
from kd_yolo.export import export
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for format, limit in (("onnx", 300_000), ("onnx", 440_000), ("torchscript", 450_000)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        export(sys.argv[1], format, out=f"{sys.argv[2]}/line.{format}", dynamic=True, batch=2)
    except KDYoloError as error:
        print(f"{type(error).__name__}: {error}")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX")
def test_export__no_room_for_a_file(source: Path, tmp_path: Path) -> None:
    """No file may grow beyond a limit, as on a full disk: one line, the old artifact stays, nothing else is left.

    The limits let through nothing; the deployed checkpoint (0.43 MB) but not the graph (0.45 MB); and the same of the
    archive (0.47 MB), which PyTorch itself would end the process over.
    """
    out, temporary = tmp_path / "out", tmp_path / "tmp"
    for folder in (out, temporary):
        folder.mkdir()
    for format in ("onnx", "torchscript"):
        (out / f"line.{format}").write_bytes(b"old")
    environment = os.environ | {"TMPDIR": str(temporary)}
    words = [sys.executable, "-c", LIMITED, str(source), str(out)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3, (done.stdout, done.stderr)
    assert all(line.startswith("ExportError: export failed: ") for line in lines), lines
    assert sorted(item.name for item in out.iterdir()) == ["line.onnx", "line.torchscript"]
    assert {item.read_bytes() for item in out.iterdir()} == {b"old"}
    assert not list(temporary.glob("kd-yolo-*"))


@pytest.mark.parametrize(
    ("kept", "message"), [(0, "pnnx ended with status 0 without"), (0.5, "cannot be opened again")]
)
def test_export__pnnx_that_ran_out_of_room(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: float, message: str
) -> None:
    """Pnnx says nothing when its files are cut short."""
    need("ncnn")
    right = subprocess.run

    def short(words: Any, **keys: Any) -> Any:
        done = right(words, **keys)
        weights = next(Path(keys["cwd"]).rglob("*.ncnn.bin"))
        weights.write_bytes(weights.read_bytes()[: int(weights.stat().st_size * kept)])
        return done

    monkeypatch.setattr(subprocess, "run", short)
    with pytest.raises(ExportError, match=message):
        export(source, "ncnn", out=tmp_path / "line_ncnn_model")
    assert not list(tmp_path.iterdir())


def test_export__full_disk_while_a_folder_is_published(
    exported: Any, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = exported("openvino")
    before = sha256(right.path), right.parity_path.read_bytes()

    def full(*words: Any, **keys: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(OutputError, match=r"best_openvino_model: cannot be written \(No space left on device\)"):
        export(source, "openvino")
    assert (sha256(right.path), right.parity_path.read_bytes()) == before
    assert not [item for item in source.parent.iterdir() if item.name.startswith(".")]


def test_export__checkpoint_with_the_nms_free_head_only(source: Path, tmp_path: Path) -> None:
    from kd_yolo.deploy import deploy

    need("ncnn")
    free = deploy(source, out=tmp_path / "free.pt", nms=False).path
    with pytest.raises(ConfigError, match=r"free\.pt: keeps only its NMS-free head, which format=ncnn cannot hold"):
        export(free, "ncnn")
    with pytest.raises(ConfigError, match="has 84 anchors, and a dynamic NMS-free graph keeps 300"):
        export(free, "torchscript", dynamic=True)  # 8x8 + 4x4 + 2x2 places at 64 px


def test_formats__listed() -> None:
    assert FORMATS == ("onnx", "openvino", "engine", "torchscript", "ncnn", "bundle")
    assert set(pipeline.MAKERS) == set(FORMATS)


def test_report__fields_are_documented() -> None:
    text = str(ExportReport.__doc__)
    assert [item.name for item in dataclasses.fields(ExportReport) if f" {item.name}: " not in text] == []
