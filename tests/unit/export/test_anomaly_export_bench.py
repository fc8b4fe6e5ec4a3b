from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from anomaly_export_factory import exported, labelled_folder, source
from detector_factory import tiny_dataset

from kd_yolo.anomaly.dataset import AnomalyDataset, collate
from kd_yolo.anomaly.layouts import read_anomaly_data
from kd_yolo.anomaly.metrics import AnomalyMetrics
from kd_yolo.bench import benchmark
from kd_yolo.bench.runners import open_runner, parse_choice
from kd_yolo.errors import ConfigError, DataError
from kd_yolo.runtimes.anomaly_session import open_anomaly

QUICK: dict[str, Any] = {"rounds": 1, "iterations": 2, "threads": 1, "stream": 4}


def test_benchmark__anomaly_models_are_judged_by_auroc(tmp_path: Path) -> None:
    root = labelled_folder(tmp_path / "widget")
    report = benchmark([source(), exported("onnx").path], data=str(root), out=tmp_path / "out", **QUICK)
    first, second = report.rows
    assert (first.runtime, second.runtime) == ("torch cpu", "onnxruntime CPUExecutionProvider")
    assert (first.head, first.map50) == ("map", None)
    session, data = open_anomaly(source()), read_anomaly_data(root)
    dataset = AnomalyDataset(data.test, 64)
    maps = session.maps(collate(dataset[index] for index in range(6))["img"].float() / 255)
    wanted = AnomalyMetrics.compute(session.scores(maps), dataset.labels(), maps[:, 0], dataset.masks())
    assert first.image_auroc == pytest.approx(wanted.image_auroc)
    assert first.pixel_auroc == pytest.approx(wanted.pixel_auroc)
    assert second.image_auroc == pytest.approx(wanted.image_auroc)
    assert second.pixel_auroc == pytest.approx(wanted.pixel_auroc, abs=1e-4)
    assert first.params == pytest.approx(second.params, rel=0.02)  # the graph's count has the blur and merged scales
    assert first.gflops == pytest.approx(second.gflops, rel=0.01)
    assert report.images == f"6 of {root}"
    text = report.to_markdown()
    assert "image AUROC | pixel AUROC" in text
    assert "mAP" not in text


def test_benchmark__both_tasks_in_one_table_without_data(tiny_checkpoint: Path) -> None:
    report = benchmark([tiny_checkpoint, exported("onnx").path], imgsz=64, **QUICK)
    assert [row.head for row in report.rows] == ["nms", "map"]
    assert "AUROC" not in report.to_markdown()


def test_benchmark__one_data_set_cannot_judge_both(tiny_checkpoint: Path, tmp_path: Path) -> None:
    data = str(tiny_dataset(tmp_path / "set"))
    with pytest.raises(ConfigError, match="data=: judges detectors or anomaly models, not both"):
        benchmark([tiny_checkpoint, exported("onnx").path], data=data, **QUICK)
    with pytest.raises(ConfigError, match="category=: is for anomaly models"):
        benchmark([tiny_checkpoint], data=data, category="screw", **QUICK)
    with pytest.raises(ConfigError, match="category=: says which part of data="):
        benchmark([source()], category="screw", **QUICK)
    with pytest.raises(DataError, match="category=screw"):
        benchmark([source()], data=str(labelled_folder(tmp_path / "widget")), category="screw", **QUICK)


def test_open_runner__an_anomaly_checkpoint_runs_eager_alone() -> None:
    with pytest.raises(ConfigError, match="runs in PyTorch @eager alone"):
        open_runner(parse_choice(f"{source()}@compile"), None, 1, "cpu")
    assert open_runner(parse_choice(f"{source()}@eager"), 96, 1, "cpu").canvas == (96, 96)
