from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from anomaly_export_factory import anomaly_model, exported, save_model, source, textures
from kd_yolo.export import export

from kd_yolo.anomaly.checkpoint import load_anomaly
from kd_yolo.errors import CheckpointError, ConfigError, ModelError
from kd_yolo.runtimes import open_session
from kd_yolo.runtimes.anomaly_session import is_anomaly_file, open_anomaly


@pytest.fixture(scope="module")
def detector(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(export(tiny_checkpoint, out=tmp_path_factory.mktemp("detector") / "detector.onnx").path)


def test_open_anomaly__a_checkpoint_gives_the_maps_of_its_model() -> None:
    session = open_anomaly(source())
    model, _ = load_anomaly(source())
    pixels = textures(3, (64, 96), seed=4)
    np.testing.assert_allclose(session.maps(pixels), model(pixels).detach().numpy(), rtol=0, atol=1e-5)
    assert (session.canvas, session.runtime, session.description.format) == ((64, 64), "torch cpu", "pt")
    assert session.maps(pixels.numpy()).dtype == np.float32


def test_scores__as_the_file_says(tmp_path: Path) -> None:
    path = save_model(tmp_path / "topk.pt", anomaly_model(score="topk", top_fraction=0.01))
    report = export(path)
    session = open_anomaly(report.path)
    maps = np.zeros((2, 1, 64, 64), np.float32)
    maps[1, 0, 0, :41] = np.arange(41)  # 1% of 4096 pixels is 40.96, so 41 values: 0 to 40, whose mean is 20
    assert session.scores(maps).tolist() == [0.0, 20.0]
    assert open_anomaly(source()).scores(maps).tolist() == [0.0, 40.0]


def test_open_anomaly__files_of_another_task(tiny_checkpoint: Path, detector: Path) -> None:
    with pytest.raises(CheckpointError, match="is no anomaly checkpoint"):
        open_anomaly(tiny_checkpoint)
    with pytest.raises(ModelError, match="task 'detect'; an anomaly model is needed"):
        open_anomaly(detector)
    with pytest.raises(ModelError, match="task 'anomaly'; a detector is needed"):
        open_session(exported("onnx").path)


def test_is_anomaly_file__never_raises(tiny_checkpoint: Path, detector: Path, tmp_path: Path) -> None:
    assert is_anomaly_file(source())
    assert is_anomaly_file(exported("onnx").path)
    (tmp_path / "half.onnx").write_bytes(b"no graph")
    (tmp_path / "notes.txt").write_text("x")
    others = [tiny_checkpoint, detector, tmp_path, *tmp_path.iterdir(), tmp_path / "absent.onnx", Path("mvtec")]
    for other in others:
        assert not is_anomaly_file(other)


def test_open_anomaly__not_calibrated(tmp_path: Path) -> None:
    model = anomaly_model()
    model.calibration = None
    with pytest.raises(CheckpointError, match="not calibrated"):
        open_anomaly(save_model(tmp_path / "early.pt", model))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, "carries no thresholds"),
        ({"threshold_image": float("nan")}, "its thresholds are damaged"),
        ({"score": "median"}, "its thresholds are damaged"),
        ({"threshold_pixel": "high"}, "its thresholds are damaged"),
        ({"top_fraction": 0}, "its thresholds are damaged"),
    ],
)
def test_open_anomaly__thresholds_are_checked(entry: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    graph = onnx.load(exported("onnx").path)
    for item in graph.metadata_props:
        if item.key == "kd_yolo":
            own = json.loads(item.value)
            own["anomaly"] = None if entry is None else own["anomaly"] | entry
            item.value = json.dumps(own)
    onnx.save(graph, tmp_path / "changed.onnx")
    with pytest.raises(ModelError, match=message):
        open_anomaly(tmp_path / "changed.onnx")


def test_open_anomaly__a_fixed_canvas_stays() -> None:
    path = exported("onnx").path
    with pytest.raises(ConfigError, match="its canvas is fixed at 64x64"):
        open_anomaly(path, 96)
    with pytest.raises(ConfigError, match="canvas is 64x64, not 96x64"):
        open_anomaly(path).maps(textures(1, (96, 64)))
    with pytest.raises(ConfigError, match="multiple of the stride 32"):
        open_anomaly(source(), 70)
    with pytest.raises(ConfigError, match="takes images of 3 channels, not 1"):
        open_anomaly(source()).maps(textures(1)[:, :1])
