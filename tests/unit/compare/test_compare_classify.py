"""Comparisons of classifiers: keys, runs laid out, figures by their names, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from kd_yolo.compare.classify import check_classify_teachers, class_fingerprint, plan_classify
from kd_yolo.compare.job import train_command
from kd_yolo.compare.outcome import result_of_run
from kd_yolo.compare.report import CompareReport, make_rows
from kd_yolo.compare.run import Progress
from kd_yolo.compare.settings import CompareKeys, split_compare_keys
from kd_yolo.compare.task import CLASSIFY, DETECT, task_of_figures
from kd_yolo.errors import ConfigError, DataError, ModelError, TeacherError
from kd_yolo.files import write_json, write_text

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "classify"))
from class_factory import NAMES, class_folder, save_classifier, tiny_classifier
from compare_factory import cell_and_result

from kd_yolo.classify.folder import read_class_folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folder(tmp_path_factory.mktemp("classes") / "data")


def keys_of(data: Path, tmp_path: Path, **given: Any) -> tuple[CompareKeys, dict[str, Any]]:
    base = {"task": "classify", "data": str(data), "students": "lightnet-n-cls", "project": str(tmp_path)}
    return split_compare_keys({**base, "imgsz": 64, "epochs": 2, "device": "cpu", **given})


def test_split_compare_keys__classification_has_its_own_metric_and_methods(data: Path, tmp_path: Path) -> None:
    keys, stock = keys_of(data, tmp_path, teacher="self")
    assert (keys.metric, keys.method_words, keys.kind) == ("top1", ["none", "hflkd"], CLASSIFY)
    assert "task" not in stock
    detector, _ = split_compare_keys({"data": "neu", "students": "lightnet-n", "teacher": "self"})
    assert (detector.task, detector.metric, detector.kind) == ("detect", "mAP50-95", DETECT)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"folds": 5}, "drop folds="),
        ({"metric": "mAP50"}, "has top1 and top5"),
        ({"unlabeled": "x"}, "unknown key 'unlabeled'"),
        ({"allow_weak_teacher": "yes"}, "allow_weak_teacher='yes'"),
        ({"task": "anomaly"}, "comparisons are made of detect and classify"),
        ({"task": "detect", "metric": "top1", "methods": "none"}, "has mAP50-95 and mAP50"),
        ({"teacher": "none"}, "needs a teacher"),
    ],
)
def test_split_compare_keys__refuses(data: Path, tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        keys_of(data, tmp_path, **{"teacher": "self", **given})


def test_plan_classify__every_student_method_and_seed_on_one_budget(data: Path, tmp_path: Path) -> None:
    teacher = save_classifier(tiny_classifier(), tmp_path / "t.pt")
    keys, stock = keys_of(data, tmp_path, teacher=str(teacher), methods="none,kd,hflkd", seeds="0,1")
    laid = plan_classify(keys, stock)
    assert [(cell.method, cell.seed) for cell in laid.cells] == [
        (method, seed) for method in ("none", "kd", "hflkd") for seed in (0, 1)
    ]
    assert len({cell.job.address for cell in laid.cells}) == 6
    assert (laid.imgsz, laid.epochs, laid.cells[0].job.images) == (64, 2, 24)
    plain, taught = laid.cells[0].job, laid.cells[-1].job
    assert plain.arguments["teacher"] == "none"
    assert taught.arguments["teacher"] == str(teacher)
    command = train_command(taught)
    assert {"task=classify", "method=hflkd", "seed=1"} <= set(command)
    write_text(taught.folder / "run.yaml", "x: 1\n")
    assert train_command(taught)[-2:] == ["task=classify", f"resume={taught.folder}"]


def test_plan_classify__own_teacher_is_one_run_a_seed(data: Path, tmp_path: Path) -> None:
    keys, stock = keys_of(data, tmp_path, teacher="self", methods="none,kd", seeds="0,1")
    laid = plan_classify(keys, stock)
    waves = laid.waves()
    assert [len(wave) for wave in waves] == [2, 2]  # the baseline is the teacher
    assert all(job.arguments["teacher"].endswith("best.pt") for job in waves[1])


def test_plan_classify__refuses_before_any_run(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="built-in: dkd, hflkd, kd, none"):
        plan_classify(*keys_of(data, tmp_path, teacher="self", methods="none,cwd"))
    with pytest.raises(ConfigError, match="did you mean 'lightnet-n-cls'"):
        plan_classify(*keys_of(data, tmp_path, teacher="self", students="lightnet-n"))
    with pytest.raises((ConfigError, ModelError), match=r"lr0"):
        plan_classify(*keys_of(data, tmp_path, teacher="self", lr0="x"))
    with pytest.raises(DataError, match="no such folder"):
        plan_classify(*keys_of(tmp_path / "gone", tmp_path, teacher="self"))


def test_check_classify_teachers__measures_and_refuses(data: Path, tmp_path: Path) -> None:
    teacher = save_classifier(tiny_classifier(), tmp_path / "t.pt")
    laid = plan_classify(*keys_of(data, tmp_path, teacher=str(teacher), allow_weak_teacher=True))
    (figures,) = check_classify_teachers(laid, tmp_path).values()
    assert set(figures) == {"top1", "top5"}
    assert figures["top5"] == 100.0  # of three classes
    with pytest.raises(TeacherError, match="commonest class"):
        check_classify_teachers(plan_classify(*keys_of(data, tmp_path, teacher=str(teacher))), tmp_path)
    other = save_classifier(tiny_classifier(names=dict(enumerate(reversed(NAMES.values())))), tmp_path / "o.pt")
    with pytest.raises(TeacherError, match="in another order"):
        check_classify_teachers(plan_classify(*keys_of(data, tmp_path, teacher=str(other))), tmp_path)


def test_class_fingerprint__changes_with_the_data_not_with_the_place(data: Path, tmp_path: Path) -> None:
    import shutil

    first = class_fingerprint(read_class_folder(data))
    shutil.copytree(data, tmp_path / "copy")
    assert class_fingerprint(read_class_folder(tmp_path / "copy")) == first
    image = next((tmp_path / "copy" / "val" / "dots").iterdir())
    image.rename(tmp_path / "copy" / "val" / "lines" / image.name)
    assert class_fingerprint(read_class_folder(tmp_path / "copy")) != first


def test_result_of_run__reads_the_figures_of_the_task(data: Path, tmp_path: Path) -> None:
    keys, stock = keys_of(data, tmp_path, teacher="self", methods="none")
    job = plan_classify(keys, stock).cells[0].job
    metrics = {"metrics/accuracy_top1": 0.75, "metrics/accuracy_top5": 1.0}
    write_json(job.folder / "report.json", {"phases": [{"metrics": metrics, "seconds": 3.0}]})
    write_json(job.folder / "run.yaml", {"stock": dict(job.arguments), "method": {"name": "none"}})
    job.checkpoint.parent.mkdir(parents=True)
    job.checkpoint.write_bytes(b"x")
    assert result_of_run(job)["metrics"] == {"top1": 0.75, "top5": 1.0}


def test_make_rows__in_top1(monkeypatch: pytest.MonkeyPatch) -> None:
    cells, results = [], {}
    for method, points in (("none", (70.0, 72.0, 71.0)), ("hflkd", (74.0, 75.5, 75.0))):
        for seed, value in enumerate(points):
            cell, result = cell_and_result(method, seed, value)
            record = {**result.record, "metrics": {"top1": value / 100, "top5": 1.0}}
            cells.append(cell)
            results[cell.job.name] = type(result)(**{**result.__dict__, "record": record})
    rows = make_rows(cells, results, "none", "top1", 0.95, 0.5, None)
    assert rows[1].gain is not None
    assert rows[1].gain.mean == pytest.approx(11.5 / 3)  # 4, 3.5, 4
    assert rows[1].values["top1"] == pytest.approx([74.0, 75.5, 75.0])
    setting = {"shown": {}, "baseline": "none", "metric": "top1", "confidence": 0.95, "min_gain": 0.5}
    table = CompareReport(setting, rows, [], [], []).to_markdown()
    assert "| top1 | top5 |" in table
    assert "mAP" not in table
    assert "top1 74.00" in Progress(1).line(results[cells[3].job.name], 1.0)
    assert task_of_figures(rows[0].values) is CLASSIFY
