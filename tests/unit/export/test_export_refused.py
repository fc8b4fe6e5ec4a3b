"""What never gets its name: one wrong weight, foreign metadata, files cut short, a full disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from export_factory import CORRUPT, exported, need, source
from kd_yolo.export import export, pipeline
from kd_yolo.export.stock import Made, Work

from kd_yolo.errors import ConfigError, ExportError, OutputError
from kd_yolo.files import sha256


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
        export(source(), format, quantize=quantize, out=out)
    assert caught.value.args[0].startswith(out.name)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_export__metadata_of_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, entry = exported("onnx"), pipeline._own_entry
    monkeypatch.setattr(pipeline, "_own_entry", lambda *words: entry(*words) | {"source_sha256": "another"})
    monkeypatch.setattr(pipeline, "_make", lambda work: Made(right.path, right.facts, right.path))
    with pytest.raises(ExportError, match=r"wrong\.onnx: not written, its metadata is wrong: own is"):
        export(source(), out=tmp_path / "wrong.onnx")
    monkeypatch.setattr(
        pipeline, "_make", lambda work: Made(work.folder / "gone.onnx", right.facts, work.folder / "gone.onnx")
    )
    with pytest.raises(ExportError, match=r"wrong\.onnx: not written, it does not describe itself"):
        export(source(), out=tmp_path / "wrong.onnx")
    assert not list(tmp_path.iterdir())


def test_export__truncated_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        export(source(), "openvino", out=tmp_path / "short_openvino_model")
    assert not list(tmp_path.iterdir())


def test_export__engine_with_one_corrupted_weight_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        export(source(), "engine", target="rtx3070ti", out=tmp_path / "line.engine")
    assert not list(tmp_path.iterdir())


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
def test_export__no_room_for_a_file(tmp_path: Path) -> None:
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
    words = [sys.executable, "-c", LIMITED, str(source()), str(out)]
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: float, message: str
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
        export(source(), "ncnn", out=tmp_path / "line_ncnn_model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["copytree", "copyfile"])
def test_export__full_disk_while_a_folder_is_published(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """``copytree`` reports the failure of one ``copyfile`` in a list of its own."""
    right = exported("openvino")
    before = sha256(right.path), right.parity_path.read_bytes()

    def full(*words: Any, **keys: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, call, full)
    with pytest.raises(OutputError, match=r"best_openvino_model: cannot be written \([^(]*No space left on device\)$"):
        export(source(), "openvino")
    assert (sha256(right.path), right.parity_path.read_bytes()) == before
    assert not [item for item in source().parent.iterdir() if item.name.startswith(".")]


def test_export__checkpoint_with_the_nms_free_head_only(tmp_path: Path) -> None:
    from kd_yolo.deploy import deploy

    need("ncnn")
    free = deploy(source(), out=tmp_path / "free.pt", nms=False).path
    with pytest.raises(ConfigError, match=r"free\.pt: keeps only its NMS-free head, which format=ncnn cannot hold"):
        export(free, "ncnn")
    with pytest.raises(ConfigError, match="has 84 anchors, and a dynamic NMS-free graph keeps 300"):
        export(free, "torchscript", dynamic=True)  # 8x8 + 4x4 + 2x2 places at 64 px
