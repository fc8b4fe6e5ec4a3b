from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_yolo.bench.against import changes, check_same, load_old, shift
from kd_yolo.errors import ConfigError


class Row:
    """What ``changes`` needs of a row."""

    def __init__(self, artifact: str, scale: float = 1.0, **keys: Any) -> None:
        self.artifact = artifact
        self.runtime = keys.get("runtime", "torch eager")
        self.precision = keys.get("precision", "fp32")
        self.map50, self.map50_95 = keys.get("map50"), keys.get("map50_95")
        self.rounds_ms = {"whole": [10 * scale, 10.1 * scale, 9.9 * scale], "inference": [8 * scale, 8.1 * scale]}


def save_old(path: Path, *rows: Row, **keys: Any) -> Path:
    content = {
        "rows": [{**vars(row), "size_mb": 1.0} for row in rows],
        "canvas": [224, 224],
        "batch": 1,
        "threads": 2,
        "device": "cpu",
        "data": "neu.yaml",
        "split": "val",
        "environment": {"cpu": "A CPU", "gpu": None},
        "created": "2025-01-01",
    }
    path.write_text(json.dumps(content | keys))
    return path


NOW: dict[str, Any] = {"canvas": (224, 224), "batch": 1, "threads": 2, "cpu": "A CPU", "gpu": None}


def test_shift__golden() -> None:
    # medians 10 and 5: half; rounds of the first are 0.2 apart at a median of 10, those of the second 0.4 at 5: 8 % / 2
    found = shift([10.0, 10.1, 9.9], [5.0, 5.2, 4.8])
    assert (found.before_ms, found.now_ms, found.change, found.verdict) == (10.0, 5.0, -0.5, "faster")
    assert found.band == pytest.approx(0.04)
    # the most extreme medians that rounds can give: 4.8 / 10.1 and 5.2 / 9.9
    assert 4.8 / 10.1 - 1 <= found.low < found.change < found.high <= 5.2 / 9.9 - 1


def test_shift__slower_is_the_mirror() -> None:
    assert shift([5.0, 5.1, 4.9], [10.0, 10.1, 9.9]).verdict == "slower"


def test_shift__a_change_inside_the_noise() -> None:
    # 3 % faster, but rounds of either run differ by 20 %
    noisy = [10.0, 11.0, 9.0, 10.2, 9.8]
    assert shift(noisy, [0.97 * value for value in noisy]).verdict == "within noise"


def test_shift__a_clear_interval_is_not_enough_when_a_run_wavered() -> None:
    # Eight of nine rounds agree to a hair, so the interval leaves 0 out; but one round took twice as long.
    before = [10.0] * 8 + [20.0]
    found = shift(before, [9.7] * 9)
    assert found.high < 0
    assert found.verdict == "within noise"


def test_shift__noise_alone_is_rarely_a_verdict() -> None:
    rng = np.random.default_rng(0)
    verdicts = [
        shift(list(rng.normal(10, 0.5, 10)), list(rng.normal(10, 0.5, 10))).verdict != "within noise"
        for _ in range(200)
    ]
    assert sum(verdicts) <= 4


rounds = st.lists(st.floats(1.0, 100.0), min_size=2, max_size=12)


@given(rounds, st.floats(0.1, 10.0))
def test_shift__does_not_depend_on_the_unit(before: list[float], unit: float) -> None:
    now = [1.5 * value for value in reversed(before)]
    first, second = shift(before, now), shift([unit * v for v in before], [unit * v for v in now])
    assert first.change == pytest.approx(second.change)
    assert (first.low, first.high) == pytest.approx((second.low, second.high))
    assert first.low <= first.change + 1e-9
    assert first.change <= first.high + 1e-9


@given(rounds)
def test_shift__nothing_changed(same: list[float]) -> None:
    found = shift(same, same)
    assert found.change == 0
    assert found.verdict == "within noise"


def test_changes__rows_find_their_partner(tmp_path: Path) -> None:
    old = load_old(
        save_old(
            tmp_path / "benchmark.json",
            Row("runs/one/best.pt", map50=0.70, map50_95=0.40),
            Row("runs/one/best.pt", 2.0, runtime="torch compiled"),
            Row("a/twin.onnx"),
            Row("b/twin.onnx"),
        )
    )
    now = [
        Row("runs/two/best.pt", 0.5, map50=0.72, map50_95=0.39),
        Row("runs/two/best.pt", runtime="torch compiled"),
        Row("b/twin.onnx", 3.0),
        Row("c/twin.onnx"),
        Row("runs/two/best.pt", precision="fp16"),
    ]
    found = changes(old, now, "neu.yaml", "val")
    shifts = [None if change.whole is None else round(change.whole.change, 6) for change in found]
    # the compiled row was twice as slow; of twins in two folders only the same path is a partner; fp16 is another row
    assert shifts == [-0.5, -0.5, 2.0, None, None]
    assert found[0].map50 == pytest.approx(2.0)
    assert found[0].map50_95 == pytest.approx(-1.0)
    assert found[1].map50 is None


@pytest.mark.parametrize(("data", "split"), [("other.yaml", "val"), ("neu.yaml", "test"), (None, "val")])
def test_changes__accuracy_only_on_the_same_images(tmp_path: Path, data: str | None, split: str) -> None:
    old = load_old(save_old(tmp_path / "benchmark.json", Row("best.pt", map50=0.7, map50_95=0.4)))
    found = changes(old, [Row("best.pt", map50=0.7, map50_95=0.4)], data, split)[0]
    assert found.whole is not None
    assert (found.map50, found.map50_95) == (None, None)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("canvas", (640, 640), "canvas 224x224, this is 640x640"),
        ("batch", 8, "batch 1, this is 8"),
        ("threads", 1, "threads 2, this is 1"),
        ("cpu", "Another CPU", "cpu A CPU, this is Another CPU"),
        ("gpu", "A GPU", "gpu None, this is A GPU"),
    ],
)
def test_check_same__other_conditions(tmp_path: Path, key: str, value: Any, message: str) -> None:
    path = save_old(tmp_path / "benchmark.json", Row("best.pt"))
    old = load_old(path)
    check_same(old, path, NOW)
    with pytest.raises(ConfigError, match=rf"benchmark\.json: was measured at {message}; .* do not compare"):
        check_same(old, path, NOW | {key: value})


def test_check_same__the_gpu_counts_only_where_it_ran(tmp_path: Path) -> None:
    environment = {"cpu": "A CPU", "gpu": "A GPU"}
    path = save_old(tmp_path / "benchmark.json", Row("best.pt"), environment=environment)
    check_same(load_old(path), path, NOW)
    path = save_old(tmp_path / "benchmark.json", Row("best.pt"), environment=environment, device="0")
    check_same(load_old(path), path, NOW | {"gpu": "A GPU"})


@pytest.mark.parametrize("text", ["", "not JSON", "[]", '{"rows": []}', '{"rows": [{"artifact": "a.pt"}]}'])
def test_load_old__not_a_benchmark(tmp_path: Path, text: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"against=.*old\.json: is not a benchmark\.json"):
        load_old(path)


def test_load_old__missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"against=.*gone\.json: cannot be read"):
        load_old(tmp_path / "gone.json")
