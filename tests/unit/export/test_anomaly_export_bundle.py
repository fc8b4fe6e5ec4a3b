from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from anomaly_export_factory import anomaly_model, exported, labelled_folder, save_model, source, write
from kd_yolo.export import export
from kd_yolo.export.anomaly_bundle import write_anomaly_bundle

from kd_yolo.anomaly.dataset import load_image, stretched
from kd_yolo.errors import ModelError
from kd_yolo.images import read_image
from kd_yolo.runtimes.anomaly_session import open_anomaly

sys.path.insert(0, str(Path(write_anomaly_bundle.__code__.co_filename).parent / "bundle_files"))
import anomaly_detect

STANDARD = {"numpy", "cv2", "onnxruntime"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled_folder(tmp_path_factory.mktemp("photos")) / "test"


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", str(folder / "detect.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_bundle__scores_are_the_checkpoints(photos: Path, tmp_path: Path) -> None:
    folder = exported("bundle").path
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "detect.py",
        "metadata.json",
        "model.onnx",
        "requirements.txt",
    ]
    done = run(folder, "--source", str(photos), "--json", "--save", str(tmp_path / "seen"), "--threads", "1")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    session = open_anomaly(source())
    pixels = np.stack([load_image(Path(row["image"]), (64, 64)) for row in rows])
    wanted = session.scores(session.maps(torch.from_numpy(pixels).float() / 255))
    assert len(rows) == 6
    for row, score in zip(rows, wanted, strict=True):
        assert row["score"] == pytest.approx(float(score), abs=1e-3)  # an image may differ by one grey level
        assert row["threshold"] == session.thresholds.threshold_image
        assert row["is_anomaly"] == (row["score"] > row["threshold"])
        assert row["normalised"] == pytest.approx(session.thresholds.normalised(row["score"]))
        picture = tmp_path / "seen" / Path(row["image"]).relative_to(photos)
        assert read_image(picture).shape == (70, 90, 3)


def test_bundle__a_line_an_image_and_another_threshold(photos: Path) -> None:
    image = next((photos / "hole").iterdir())
    low = run(exported("bundle").path, "--source", str(image), "--threshold", "-1000")
    assert f"{image}: anomaly (score " in low.stdout
    high = run(exported("bundle").path, "--source", str(image), "--threshold", "1000")
    assert f"{image}: normal (score " in high.stdout
    assert "threshold 1000" in high.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source", "absent"], "--source absent: no such file or folder"),
        (["--source", __file__], "cannot be read as an image"),
        (["--source", str(Path(__file__).parent)], "no images in it that can be read"),
        ([], "the following arguments are required: --source"),
        (["--source", "x", "--threads", "-1"], "--threads must be 0 or more"),
        (["--source", "x", "--threshold", "nan"], "--threshold a number"),
        (["--source", "x", "--provider", "npu"], "invalid choice"),
    ],
)
def test_bundle__bad_input_is_one_line(words: list[str], message: str) -> None:
    done = run(exported("bundle").path, *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_bundle__a_damaged_model_is_refused(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported("bundle").path, folder)
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-1])
    done = run(folder, "--source", str(photos))
    assert done.returncode == 2
    assert "damaged, or not the model of metadata.json" in done.stderr
    (folder / "metadata.json").write_text("{}")
    assert "metadata.json: damaged" in run(folder, "--source", str(photos)).stderr


def test_bundle__topk_score(photos: Path, tmp_path: Path) -> None:
    path = save_model(tmp_path / "topk.pt", anomaly_model(score="topk", top_fraction=0.01))
    found = anomaly_detect.Detector(export(path, "bundle", batch=2).path, threads=1)
    session = open_anomaly(path)
    image = next((photos / "hole").iterdir())
    pixels = torch.from_numpy(load_image(image, (64, 64))[None]).float() / 255
    finding = found.detect(read_image(image))
    assert finding.score == pytest.approx(float(session.scores(session.maps(pixels))[0]), abs=1e-3)
    assert finding.map.shape == finding.mask.shape == (70, 90)


def test_stretch__is_that_of_training() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        height, width = (int(side) for side in rng.integers(10, 500, 2))
        canvas = (32 * int(rng.integers(1, 6)), 32 * int(rng.integers(1, 6)))
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        difference = np.abs(anomaly_detect.stretch(image, canvas).astype(int) - stretched(image, canvas))
        assert difference.max() <= 1


def test_detect_script__needs_nothing_of_ours() -> None:
    tree = ast.parse(Path(anomaly_detect.__file__).read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {name.split(".")[0] for name in modules}
    assert roots - set(sys.stdlib_module_names) == STANDARD


def test_write_anomaly_bundle__a_detector_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    graph = export(tiny_checkpoint, out=tmp_path / "detector.onnx").path
    with pytest.raises(ModelError, match="an anomaly model is needed"):
        write_anomaly_bundle(graph, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_read_images__unreadable_files_of_a_folder_are_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.png", np.zeros((20, 20, 3), np.uint8))
    (tmp_path / "b.png").write_bytes(b"no image")
    found = [path.name for path, _ in anomaly_detect.read_images(str(tmp_path))]
    assert found == ["a.png"]
    assert "warning" in capsys.readouterr().err
