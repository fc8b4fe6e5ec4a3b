"""The keys of a comparison: what is refused, and with which words."""

from __future__ import annotations

from typing import Any

import pytest

from kd_yolo.compare.settings import CompareKeys, split_compare_keys, words
from kd_yolo.config import parse_pairs
from kd_yolo.errors import ConfigError

BASE = {"data": "neu", "students": "lightnet-n", "methods": "none,score-l2", "teacher": "t.pt"}


def test_split_compare_keys__own_options_and_stock_apart() -> None:
    keys, stock = split_compare_keys({**BASE, "epochs": 3, "mosaic": 0.0, "reparam": "none", "balance": 0.3})
    assert stock == {"epochs": 3, "mosaic": 0.0}
    assert keys.options == {"reparam": "none", "balance": 0.3}
    assert keys.seed_list == [0, 1, 2]


def test_split_compare_keys__as_the_command_line_reads_them() -> None:
    line = "data=neu students=lightnet-n,a.pt methods=cwd+bckd,none,my.yaml teacher=self seeds=[2,0] device=0,1 name=7"
    keys, _ = split_compare_keys(parse_pairs(line.split()))
    assert keys.student_words == ["lightnet-n", "a.pt"]
    assert keys.method_words == ["none", "cwd+bckd", "my.yaml"]
    assert keys.seed_list == [0, 2]
    assert keys.home.name == "7"


def test_split_compare_keys__baseline_is_added_and_first() -> None:
    keys, _ = split_compare_keys({**BASE, "methods": "cwd,score-l2"})
    assert keys.method_words == ["none", "cwd", "score-l2"]
    keys, _ = split_compare_keys({**BASE, "methods": "cwd,none", "baseline": "score-l2"})
    assert keys.method_words == ["score-l2", "cwd", "none"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"epoch": 3}, "did you mean 'epochs'"),
        ({"student": "a"}, "did you mean 'students'"),
        ({"kd.tau": 2}, "YAML file of that method"),
        ({"seed": 1}, "seeds=0,1,2"),
        ({"model": "lightnet-n"}, "students=A,B"),
        ({"resume": True}, "the same command goes on"),
        ({"distill_model": "x"}, "not used here"),
        ({"time": 1.0}, "budgets unequal"),
        ({"seeds": "0,one"}, "whole numbers"),
        ({"seeds": "-1"}, "whole numbers"),
        ({"seeds": "1,1"}, "given twice"),
        ({"split": "test"}, "judged once"),
        ({"test_methods": "winner"}, "without test=true"),
        ({"teacher": "none"}, "needs a teacher"),
        ({"control": "equal_total"}, "teacher=self"),
        ({"control": "equal_total", "teacher": "self", "baseline": "score-l2"}, "baseline must be none"),
        ({"folds": 1}, "folds=1"),
        ({"confidence": 0.2}, "confidence=0.2"),
        ({"engine": "slurm"}, "engine='slurm'"),
        ({"name": "a/b"}, "plain folder name"),
        ({"balance": 99.0}, "balance=99.0"),
        ({"students": ""}, "at least one model"),
        ({"metric": "F1"}, "metric='F1'"),
    ],
)
def test_split_compare_keys__refused_in_one_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        split_compare_keys({**BASE, **given})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["data", "students"])
def test_split_compare_keys__needed_keys(key: str) -> None:
    with pytest.raises(ConfigError, match=f"missing key '{key}'"):
        split_compare_keys({name: value for name, value in BASE.items() if name != key})


def test_compare_keys__unknown_option_in_python() -> None:
    with pytest.raises(ValueError, match="no option"):
        CompareKeys(data="neu", students="a", options={"epochs": 3})


def test_words__every_form() -> None:
    assert words("a, b,") == ["a", "b"]
    assert words(3) == ["3"]
    assert words([0, "x"]) == ["0", "x"]
    assert words(None) == []
