"""A comparison of classifiers from the command line: real runs in processes of their own, taken up, judged on test."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kd_yolo.cli import main
from kd_yolo.compare.statistics import compare_pairs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "classify"))
from class_factory import class_folder, save_classifier, tiny_classifier


@pytest.mark.slow
def test_compare__classifiers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = class_folder(tmp_path / "data")
    teacher = save_classifier(tiny_classifier(), tmp_path / "teacher.pt")
    words = [
        "compare", "task=classify", f"data={data}", "students=lightnet-n-cls", "methods=none,kd", f"teacher={teacher}",
        "allow_weak_teacher=true", "seeds=0,1", "epochs=1", "imgsz=64", "batch=8", "device=cpu", "workers=0",
        f"project={tmp_path}", "name=cmp",
    ]  # fmt: skip
    assert main([*words, "json=true"]) == 0
    report = json.loads(capsys.readouterr().out)
    plain, taught = report["rows"]
    assert (plain["method"], taught["method"]) == ("none", "kd")
    assert set(taught["values"]) == {"top1", "top5"}
    expected = compare_pairs(taught["values"]["top1"], plain["values"]["top1"], 0.95, 0.5, 0.0)
    assert taught["gain"]["mean"] == pytest.approx(expected.mean)
    runs = sorted((tmp_path / "cmp" / "runs").glob("*/result.json"))
    assert len(runs) == 4
    stamps = [run.stat().st_mtime_ns for run in runs]
    assert main([*words, "test=true", "test_methods=kd", "json=true"]) == 0  # nothing is trained again
    tested = json.loads(capsys.readouterr().out)["rows"][1]["test"]
    assert len(tested["top1"]) == 2
    assert [run.stat().st_mtime_ns for run in runs if "-none-" in run.parent.name] == [
        stamp for run, stamp in zip(runs, stamps, strict=True) if "-none-" in run.parent.name
    ]
    assert "top1" in (tmp_path / "cmp" / "compare.md").read_text(encoding="utf-8")
