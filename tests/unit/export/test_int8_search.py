"""The search for float layers: as few as hold the bound, few validations, and no file that does not hold it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kd_yolo.export.int8 import Found, Int8Report, LayerError, Trial, search_float_layers

from kd_yolo.errors import ExportError


def search(layers: int, needed: int, max_drop: float = 0.5) -> Found:
    """Search where mAP is 0.4 with at least ``needed`` layers in float and 0.3 with fewer."""
    return search_float_layers(
        [f"layer{index}" for index in range(layers)],
        lambda floats: Path(str(len(floats))),
        lambda path: 0.4 if int(path.name) >= needed else 0.3,
        0.4,
        max_drop,
    )


def test_search_float_layers__nothing_needed_is_judged_once() -> None:
    found = search(40, 0)
    assert found.layers == ()
    assert found.path == Path("0")
    assert len(found.trials) == 1


@given(st.integers(2, 150), st.data())
def test_search_float_layers__smallest_set_of_the_worst(layers: int, data: st.DataObject) -> None:
    needed = data.draw(st.integers(0, layers // 2))
    found = search(layers, needed)
    assert found.layers == tuple(f"layer{index}" for index in range(needed))
    assert found.path == Path(str(needed))
    assert found.map50_95 == 0.4
    assert len(found.trials) <= 2 * math.log2(layers) + 2


def test_search_float_layers__half_of_the_layers_is_the_end() -> None:
    with pytest.raises(ExportError, match=r"loses 10\.00 points .* of 20 layers in float, and max_drop=0\.5") as caught:
        search(20, 11)
    assert "\n" not in str(caught.value)
    assert "quantize=16" in str(caught.value)


def test_search_float_layers__nan_holds_no_bound() -> None:
    with pytest.raises(ExportError):
        search_float_layers(["a", "b"], lambda floats: Path("x"), lambda path: math.nan, 0.4, 100.0)


def test_search_float_layers__the_bound_itself_holds() -> None:
    found = search_float_layers(["a", "b"], lambda floats: Path("x"), lambda path: 0.395, 0.4, 0.5)
    assert found.trials == [Trial(0, 0.395, pytest.approx(0.5))]


def test_report__is_plain_data_and_readable() -> None:
    report = Int8Report(
        format="onnx",
        calibration={"images": 9, "per_class": {"dent": 9}},
        layers_total=3,
        layers_int8=1,
        layers_float={"head": "output of the head", "stem": "sensitive"},
        sensitivity=[LayerError("stem", 0.5), LayerError("body", 0.01)],
        trials=[Trial(0, 0.2, 10.0), Trial(1, 0.299, 0.1)],
        map_float=0.3,
        map_int8=0.299,
        drop_points=0.1,
        max_drop=0.5,
        seconds=3.0,
    )
    content = report.to_dict()
    assert content["judge_calls"] == 2
    assert content["sensitivity"][0] == {"layer": "stem", "error": 0.5}
    text = report.to_markdown()
    assert "1 of 3 convolutions in int8; mAP50-95 0.2990, float 0.3000: +0.10 points lost (at most 0.5)" in text
    assert "Calibrated with 9 images (dent 9)." in text
    assert "| stem | 5.00e-01 |" in text
