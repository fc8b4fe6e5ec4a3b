from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from detector_factory import save_checkpoint, tiny_dataset, tiny_detector
from kd_yolo.export import export
from ultralytics import YOLO

from kd_yolo.bench import BenchReport, benchmark
from kd_yolo.bench.measure import share_complexity
from kd_yolo.errors import ConfigError, DataError, ModelError, OutputError

SOURCES = (("abc", "nms"), ("abc", "nms-free"), ("def", "nms"), (None, "nms"))
QUICK: dict[str, Any] = {"rounds": 2, "iterations": 3, "threads": 1, "stream": 8}


@pytest.fixture(scope="module")
def judged(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[BenchReport, Path, Path]:
    folder = tmp_path_factory.mktemp("bench")
    data = tiny_dataset(folder / "set")
    graph = export(tiny_checkpoint, out=folder / "small.onnx").path
    models = [str(tiny_checkpoint), str(graph)]
    report = benchmark(models, data=str(data), out=folder / "out", targets=["rtx3070ti", "t4"], **QUICK)
    return report, folder / "out", data


def test_benchmark__rows_are_complete(judged: tuple[BenchReport, Path, Path], tiny_checkpoint: Path) -> None:
    report, _, data = judged
    first, second = report.rows
    assert (first.runtime, second.runtime) == ("torch eager", "onnxruntime CPUExecutionProvider")
    assert first.params == second.params
    assert first.gflops == pytest.approx(second.gflops, rel=0.01)
    for row in report.rows:
        assert row.samples == 6
        assert row.warmup_calls >= 10
        whole = row.latency_ms["whole"]
        assert 0 < whole.fastest <= whole.p50 <= whole.p90 <= whole.p99 <= whole.slowest
        parts = sum(row.latency_ms[stage].mean for stage in ("preprocess", "inference", "postprocess"))
        assert whole.mean == pytest.approx(parts)
        assert row.stream_images == 8
        assert 0.1 < row.fps * whole.p50 / 1000 < 10  # the same pipeline, on end
        assert {name: len(medians) for name, medians in row.rounds_ms.items()} == dict.fromkeys(row.latency_ms, 2)
        assert row.energy_note
        assert row.peak_memory_mb > row.model_memory_mb > 0
    assert first.size_mb == pytest.approx(tiny_checkpoint.stat().st_size / 1e6)
    assert report.images == f"4 of {data}"


def test_benchmark__records_its_conditions(judged: tuple[BenchReport, Path, Path]) -> None:
    report, _, _ = judged
    assert (report.canvas, report.batch, report.device, report.threads) == ((64, 64), 1, "cpu", 1)
    assert report.environment["threads"] == 1
    assert report.affinity is None or (len(report.affinity) == 1 and report.environment["affinity"] == report.affinity)
    assert report.environment["cpu"]
    assert set(report.environment["versions"]) >= {"torch", "ultralytics", "onnxruntime", "opencv", "kd_yolo"}


def test_benchmark__accuracy_is_the_stock_validators(
    judged: tuple[BenchReport, Path, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    report, _, data = judged
    keys: dict[str, Any] = {
        "data": str(data),
        "imgsz": 64,
        "rect": False,
        "plots": False,
        "verbose": False,
        "workers": 0,
    }
    stock = YOLO(tiny_checkpoint).val(**keys, device="cpu", project=str(tmp_path), name="stock").box
    for row in report.rows:
        assert row.map50 == pytest.approx(float(stock.map50), abs=1e-3)
        assert row.map50_95 == pytest.approx(float(stock.map), abs=1e-3)


def test_benchmark__writes_and_prints(
    judged: tuple[BenchReport, Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    report, out, _ = judged
    assert sorted(path.name for path in out.iterdir()) == [f"benchmark.{kind}" for kind in ("csv", "json", "md", "png")]
    assert json.loads((out / "benchmark.json").read_text()) == json.loads(json.dumps(report.to_dict()))


def test_benchmark__estimates_of_the_one_network_that_both_files_hold(judged: tuple[BenchReport, Path, Path]) -> None:
    report, out, _ = judged
    found = {(one.target, one.precision): one for one in report.estimates}
    assert len(found) == len(report.estimates) == 2 * 3
    for (target, _), one in found.items():
        assert one.artifact == report.rows[0].artifact
        assert one.flops / 1e9 == pytest.approx(report.rows[0].gflops, rel=0.01)
        assert one.bound_ms >= one.launch_ms > 0
        assert one.measured_ms is None, f"nobody measured on a {target}"
    assert found["rtx3070ti", "fp16"].bound_ms < found["t4", "fp16"].bound_ms
    assert "Estimates, not measurements" in (out / "benchmark.md").read_text()


def test_benchmark__against_an_earlier_one(judged: tuple[BenchReport, Path, Path], tmp_path: Path) -> None:
    first, out, _ = judged
    graph = first.rows[1].artifact
    report = benchmark([graph], against=out / "benchmark.json", **QUICK)
    change = report.changes[0]
    assert change.whole is not None
    assert change.whole.now_ms / change.whole.before_ms == pytest.approx(1 + change.whole.change)
    assert change.map50_95 is None
    assert "| change |" in report.to_markdown()
    for keys, message in (({"threads": 2}, "at threads 1, this is 2"), ({"batch": 3}, "at batch 1, this is 3")):
        with pytest.raises(ConfigError, match=rf"benchmark\.json: was measured {message}"):
            benchmark([graph], against=out / "benchmark.json", **{**QUICK, **keys})


def test_share_complexity__from_a_file_of_the_same_checkpoint_and_head() -> None:
    known: dict[str, Any] = {"source": "abc", "head": "nms", "params": 7, "gflops": 0.5}
    hidden: list[dict[str, Any]] = [
        {"source": source, "head": head, "params": None, "gflops": None} for source, head in SOURCES
    ]
    share_complexity([known, *hidden])
    assert [facts["params"] for facts in hidden] == [7, None, None, None]
    assert hidden[0]["gflops"] == 0.5


def test_benchmark__progress_goes_to_stderr_only(tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = benchmark([tiny_checkpoint], imgsz=64, batch=2, **QUICK)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "round 2 of 2" in shown.err
    assert report.images == "32 synthetic"
    row = report.rows[0]
    assert row.map50 is None
    assert row.stream_images == 8


def test_benchmark__errors_of_the_process_arrive_with_their_class(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone\.onnx: no such file"):
        benchmark([tmp_path / "gone.onnx"], imgsz=64, **QUICK)
    with pytest.raises(ConfigError, match="imgsz=50: must be positive and a multiple"):
        benchmark([tiny_checkpoint], imgsz=50, **QUICK)


def test_benchmark__other_canvases_do_not_compare(tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = save_checkpoint(tiny_detector(), tmp_path / "other.pt", train_args={"imgsz": 96})
    with pytest.raises(ConfigError, match=r"other\.pt: its canvas is 96x96, .* is 64x64.*give imgsz="):
        benchmark([tiny_checkpoint, other], **QUICK)


def test_benchmark__other_classes_are_not_judged(tiny_checkpoint: Path, tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "set", names=("scratch", "stain", "dent"))
    with pytest.raises(DataError, match=r"best\.pt: its 3 classes \(scratch, dent, stain\) are not the"):
        benchmark([tiny_checkpoint], data=str(data), **QUICK)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"models": []}, "give at least one"),
        ({"batch": 0}, "batch=0: must be a whole number"),
        ({"rounds": 0}, "rounds=0"),
        ({"iterations": True}, "iterations=True"),
        ({"threads": -1}, "threads=-1"),
        ({"stream": 0}, "stream=0"),
        ({"itertions": 3}, "benchmark: unknown key 'itertions'; did you mean 'iterations'"),
        ({"affinity": [4096]}, r"affinity=\[4096\]: this process may use the cores"),
        ({"targets": ["rtx3070"]}, "did you mean 'rtx3070ti'"),
        ({"against": "gone.json"}, "against=gone.json: cannot be read"),
    ],
)
def test_benchmark__bad_arguments(tiny_checkpoint: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        benchmark(**{"models": [tiny_checkpoint], **keys})


def test_benchmark__bad_places(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="file"):
        benchmark([tiny_checkpoint], out=tmp_path / "file" / "below")
    with pytest.raises(DataError, match=r"gone\.yaml"):
        benchmark([tiny_checkpoint], data=str(tmp_path / "gone.yaml"))
