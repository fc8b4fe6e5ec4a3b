from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import cv2
import pytest

from kd_yolo.bench.against import Change, shift
from kd_yolo.bench.layers import Layer
from kd_yolo.bench.report import BenchReport, BenchRow
from kd_yolo.bench.roofline import PRECISIONS, estimate
from kd_yolo.bench.timing import round_medians, summarize_stages
from kd_yolo.bench.writing import save
from kd_yolo.errors import OutputError
from kd_yolo.targets import load_target


def row(name: str, scale: float, **keys: Any) -> BenchRow:
    calls = [[1.0 * scale, 10.0 * scale, 0.5 * scale], [1.0 * scale, 12.0 * scale, 0.5 * scale]]
    fields: dict[str, Any] = {
        "artifact": name,
        "runtime": "torch eager",
        "precision": "fp32",
        "head": "nms",
        "latency_ms": summarize_stages(calls),
        "rounds_ms": round_medians([calls]),
        "fps": 80.0 / scale,
        "stream_images": 200,
        "samples": 2,
        "warmup_calls": 20,
        "warmup_stable": True,
        "round_spread": 0.04,
        "size_mb": 9.6,
        "params": 2_400_000,
        "gflops": 0.83,
        "peak_memory_mb": 512.0,
        "model_memory_mb": 40.0,
        "peak_device_memory_mb": None,
        "energy_mj_per_image": None,
        "energy_note": "no counter",
    }
    return BenchRow(**fields | keys)


def report(*rows: BenchRow, data: str | None = None, **keys: Any) -> BenchReport:
    versions = {"kd_yolo": "0.1.0", "torch": "2.9", "onnxruntime": "1.23"}
    environment = {"cpu": "A CPU", "gpu": None, "cores_usable": 2, "versions": versions}
    return BenchReport(
        rows=list(rows),
        canvas=(224, 224),
        batch=1,
        device="cpu",
        threads=2,
        affinity=[0, 1],
        rounds=3,
        iterations=4,
        images="32 synthetic",
        data=data,
        split="val",
        confidence=0.25,
        iou=0.7,
        environment=environment,
        load_average=0.5,
        created="2025-01-01T00:00:00+00:00",
        **keys,
    )


def test_markdown__one_table_with_its_conditions() -> None:
    text = report(row("runs/a.pt", 1), row("runs/b.onnx", 2, warmup_stable=False)).to_markdown()
    lines = text.splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == lines[3].count("|")
    assert "mAP" not in text
    # whole: 11.5 and 13.5 ms; p50 in the middle, p90 at 11.5 + 0.9 * 2, p99 at 11.5 + 0.99 * 2
    assert "12.5/13.3/13.5" in lines[2]
    assert "a.pt (fp32)" in lines[2]
    assert "runs/" not in lines[2]
    for part in ("batch of 1 at 224x224", "nothing left out", "A CPU, 2 threads, bound to 2 cores", "32 synthetic"):
        assert part in text
    assert "onnxruntime 1.23" in text
    assert "mJ: energy an image of the stream (no counter)." in text
    assert "Still drifting after the warm-up: runs/b.onnx" in text


def test_markdown__accuracy_when_there_is_some() -> None:
    judged = row("a.pt", 1, map50=0.7712, map50_95=0.4009)
    text = report(judged, row("b.onnx", 1), data="neu.yaml").to_markdown()
    assert "| 0.771 | 0.401 |" in text
    assert "| - | - |" in text
    assert "mAP on the val split of neu.yaml" in text


def test_markdown__what_a_format_hides_is_a_dash() -> None:
    lines = report(row("a.engine", 1, params=None, gflops=None, energy_mj_per_image=12.34)).to_markdown().splitlines()
    assert "| 9.6 | - | - |" in lines[2]
    assert lines[2].endswith("| 512 | 12.3 |")


def test_markdown__estimates_are_called_estimates() -> None:
    target, layers = load_target("rtx3070ti"), [Layer("conv", "Conv", 217_000_000, 1000, 1000)]
    found = [estimate(layers, target, precision, "runs/a.onnx") for precision in PRECISIONS]
    measured = type(found[1])(**{**vars(found[1]), "measured_ms": 1.5, "measured_by": "tensorrt"})
    one = report(row("runs/a.onnx", 1), estimates=[found[0], measured, found[2]])
    text = one.to_markdown()
    # 217e6 operations at 21.7e12 a second are 10 us, and a launch of 0.5 us
    line = next(line for line in text.splitlines() if "RTX 3070 Ti" in line)
    assert "| a.onnx |" in line
    assert "| 0.011 |" in line  # 0.0105
    assert "fp16 1.50 (tensorrt)" in line
    assert "estimate, lower bound in ms" in text
    assert "Estimates, not measurements" in text
    content = json.loads(json.dumps(one.to_dict()))["estimates"]
    assert {entry["kind"] for entry in content} == {"estimate"}
    assert content[0]["layers"][0]["operators"] == "Conv"


def test_markdown__changes() -> None:
    whole = shift([10.0, 10.1, 9.9], [5.0, 5.1, 4.9])
    changed = Change("runs/a.pt", "torch eager", whole, whole, 0.1, -0.25)
    text = report(
        row("runs/a.pt", 1),
        against="old/benchmark.json",
        changes=[changed, Change("b.pt", "torch eager", None, None, None, None)],
    ).to_markdown()
    assert "| a.pt | torch eager | 10.00 -> 5.00 | -50.0% [" in text
    assert "| faster |" in text
    assert "| -0.25 |" in text
    assert "| b.pt | torch eager | - | - | - | new |" in text
    assert "old/benchmark.json" in text


def test_csv__one_column_a_number() -> None:
    found = list(csv.DictReader(io.StringIO(report(row("a.pt", 1), row("b|c.onnx", 2)).to_csv())))
    assert [line["artifact"] for line in found] == ["a.pt", "b|c.onnx"]
    assert float(found[0]["inference_ms_p50"]) == 11
    assert float(found[1]["whole_ms_slowest"]) == 27
    assert found[0]["threads"] == "2"
    assert None not in found[0]


def test_dict__is_json() -> None:
    content = json.loads(json.dumps(report(row("a.pt", 1)).to_dict()))
    assert content["rows"][0]["latency_ms"]["whole"]["p50"] == 12.5
    assert content["canvas"] == [224, 224]


def test_save__all_files_and_a_plot_only_with_accuracy(tmp_path: Path) -> None:
    plain = save(report(row("a.pt", 1)), tmp_path / "plain")
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == [
        "benchmark.csv",
        "benchmark.json",
        "benchmark.md",
    ]
    judged = save(
        report(row("a.pt", 1, map50=0.7, map50_95=0.4), row("b.onnx", 2, map50=0.6, map50_95=0.3)), tmp_path / "j"
    )
    assert [Path(name).name for name in judged.files] == [
        "benchmark.json",
        "benchmark.csv",
        "benchmark.md",
        "benchmark.png",
    ]
    image = cv2.imread(str(tmp_path / "j" / "benchmark.png"))
    assert image is not None
    assert image.std() > 10
    assert json.loads((tmp_path / "plain" / "benchmark.json").read_text())["files"] == plain.files
    assert (tmp_path / "j" / "benchmark.md").read_text() == judged.to_markdown() + "\n"


def test_save__unwritable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="file"):
        save(report(row("a.pt", 1)), tmp_path / "file" / "below")
