from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kd_yolo.anomaly.spec import AnomalySpec, load_spec, preset_names
from kd_yolo.errors import ConfigError


def test_presets__are_the_four_and_valid() -> None:
    assert preset_names() == ["hkt", "hkt-hybrid", "hkt-plus", "same-layer"]
    specs = {name: load_spec(name) for name in preset_names()}
    assert (specs["hkt"].cross, specs["hkt"].same, specs["hkt"].plus) == (1, 0, False)
    assert specs["hkt-plus"] == specs["hkt"].model_copy(update={"plus": True})
    assert specs["hkt-hybrid"] == specs["hkt"].model_copy(update={"same": 1.0})
    assert (specs["same-layer"].cross, specs["same-layer"].same, specs["same-layer"].cbam) == (0, 1, "none")


@pytest.mark.parametrize(
    ("changes", "levels", "targets", "teacher"),
    [
        ({}, [4, 8, 16], [16, 16, 16], [16]),
        ({"plus": True}, [4, 8, 16, 32], [16, 16, 16, 32], [16, 32]),
        ({"plus": True, "plus_targets": "top"}, [4, 8, 16, 32], [32] * 4, [32]),
        ({"same": 1.0}, [4, 8, 16], [16, 16, 16], [4, 8, 16]),
        ({"same": 1.0, "plus": True, "taps": [8, 16]}, [8, 16, 32], [16, 16, 32], [8, 16, 32]),
        ({"same": 1.0, "cross": 0.0}, [4, 8, 16], [16, 16, 16], [4, 8, 16]),
    ],
)
def test_spec__levels_and_their_targets(
    changes: dict[str, Any], levels: list[int], targets: list[int], teacher: list[int]
) -> None:
    spec = AnomalySpec(**changes)
    assert spec.levels == levels
    assert [spec.target_stride(stride) for stride in levels] == targets
    assert spec.teacher_strides == teacher


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, ("cross",)),
        ({"cross": 0.0, "same": 1.0}, ("same",)),
        ({"same": 1.0}, ("cross",)),
        ({"same": 1.0, "maps": "both"}, ("cross", "same")),
        ({"same": 1.0, "maps": "same"}, ("same",)),
    ],
)
def test_spec__which_distances_make_the_map(changes: dict[str, Any], kinds: tuple[str, ...]) -> None:
    assert AnomalySpec(**changes).map_kinds == kinds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector": "teacher-anchored"}, "collapses"),
        ({"projector": "teacher"}, "teacher-frozen"),
        ({"cross": 0.0}, "nothing would be learned"),
        ({"maps": "same"}, "same=0"),
        ({"maps": "both"}, "same=0"),
        ({"taps": [4, 5]}, "strides are 2, 4, 8, 16, 32"),
        ({"taps": [8, 4]}, "smallest first"),
        ({"taps": [4, 4, 8]}, "smallest first"),
        ({"taps": []}, "taps"),
        ({"taps": [4, 8, 16, 32], "plus": True}, "after the last tap"),
        ({"hard_quantile": 1.0}, "hard_quantile"),
        ({"cross": float("nan")}, "cross"),
        ({"imgsz": 100}, "imgsz"),
        ({"cbm": "none"}, "did you mean 'cbam'"),
    ],
)
def test_load_spec__refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_spec("hkt", changes)
    assert "\n" not in str(caught.value)


def test_load_spec__a_file_of_the_user(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("same: 0.5\ntaps: [8, 16]\n", encoding="utf-8")
    spec = load_spec(file, {"fuse": "product"})
    assert (spec.same, spec.taps, spec.fuse, spec.student) == (0.5, [8, 16], "product", "yolo26n-cls")
    file.write_text("sam: 0.5\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"mine\.yaml: unknown key 'sam'; did you mean 'same'"):
        load_spec(file)


def test_load_spec__unknown_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'hkt-plus'"):
        load_spec("hkt-pluss")
