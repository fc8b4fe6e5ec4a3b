from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomaly_factory import write_pixels
from anomaly_files import StandIn, checkpoint, photo, widgets
from ultralytics.utils import LOGGER

from kd_yolo.anomaly.checkpoint import load_anomaly
from kd_yolo.anomaly.dataset import AnomalyDataset
from kd_yolo.anomaly.evaluate import judge
from kd_yolo.anomaly.layouts import read_anomaly_data
from kd_yolo.errors import CheckpointError, ConfigError, DataError, KDYoloError
from kd_yolo.inspection.origin import Origin, is_anomaly_model, origin_of
from kd_yolo.inspection.predict import open_checked
from kd_yolo.inspection.validate import ValKeys, f1_thresholds, runner, val_anomaly


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model") / "best.pt")


@pytest.fixture(scope="module")
def bolts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return widgets(tmp_path_factory.mktemp("data") / "widgets")


@pytest.fixture(scope="module")
def with_val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a YAML file that names a labelled validation folder."""
    root = widgets(tmp_path_factory.mktemp("data") / "widgets", val=True)
    file = root / "widgets.yaml"
    file.write_text(f"path: {root / 'bolt'}\nval: val\n")
    return file


def place(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {"project": str(tmp_path / "runs"), "plots": False, "batch": 4, **more}


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_val_anomaly__what_the_model_itself_scores(weights: Path, bolts: Path, tmp_path: Path) -> None:
    report = val_anomaly(weights, bolts, **place(tmp_path, plots=True))
    model, _ = load_anomaly(weights)
    data = read_anomaly_data(bolts)

    @torch.inference_mode()
    def run(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = model(images)
        return maps, model.image_scores(maps)

    assert model.calibration is not None
    expected = judge(run, AnomalyDataset(data.test, 64), model.calibration)
    assert report.results_dict == pytest.approx(expected.metrics.results_dict, abs=1e-4)
    one = report.results["bolt"]
    assert (one.flagged_normal, one.flagged_anomalous) == expected.flagged
    assert one.threshold_image == model.calibration.threshold_image
    folder = tmp_path / "runs" / "val"
    assert report.save_dir == folder
    names = {path.name for path in folder.iterdir()}
    assert {"report.json", "categories.md", "overlays.png", "scores.png", "curves.png"} <= names
    said = json.loads((folder / "report.json").read_text())
    assert said["metrics/image_auroc"] == pytest.approx(report.metrics.image_auroc)
    assert said["categories"]["bolt"]["images"] == 6
    assert "| bolt | 3 | 3 |" in report.to_text()


def test_val_anomaly__category_all_of_a_run_folder(weights: Path, tmp_path: Path) -> None:
    data = widgets(tmp_path / "widgets", ("bolt", "nut"))
    for name in ("bolt", "nut"):
        (tmp_path / "run" / name / "weights").mkdir(parents=True)
        shutil.copy(weights, tmp_path / "run" / name / "weights" / "best.pt")
    report = val_anomaly(tmp_path / "run", data, category="all", **place(tmp_path))
    assert list(report.results) == ["bolt", "nut"]
    rows = [one.metrics.image_auroc for one in report.results.values()]
    assert report.results_dict["metrics/image_auroc"] == pytest.approx(sum(rows) / 2)
    assert "| mean |" in report.to_text()
    single = val_anomaly(tmp_path / "run", data, category="nut", **place(tmp_path))
    assert list(single.results) == ["nut"]
    assert single.metrics.image_auroc == pytest.approx(rows[1])
    for category in (None, "screw"):
        with pytest.raises(ConfigError, match="holds models of bolt, nut"):
            val_anomaly(tmp_path / "run", data, category=category, **place(tmp_path))
    shutil.rmtree(tmp_path / "run" / "nut")
    with pytest.raises(ConfigError, match=r"has no nut/weights/best\.pt"):
        val_anomaly(tmp_path / "run", data, category="all", **place(tmp_path))
    with pytest.raises(ConfigError, match="category=all"):
        val_anomaly(weights, data, category="all", **place(tmp_path))


def test_val_anomaly__only_normal_test_images(weights: Path, tmp_path: Path) -> None:
    data = widgets(tmp_path / "widgets")
    shutil.rmtree(data / "bolt" / "test" / "hole")
    shutil.rmtree(data / "bolt" / "ground_truth")
    report = val_anomaly(weights, data, **place(tmp_path))
    assert math.isnan(report.metrics.image_auroc)
    assert report.to_dict()["metrics/image_auroc"] is None
    assert report.results["bolt"].flagged_anomalous is None
    assert "anomalous images" not in report.to_text().splitlines()[-2]


# ---- which category --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["checkpoint", "result.json", "run.yaml"])
def test_origin_of__from_the_file_or_its_run_folder(how: str, tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "run" / "weights" / "best.pt", "nut" if how == "checkpoint" else None)
    if how == "result.json":
        (tmp_path / "run" / "result.json").write_text('{"category": "nut"}')
    elif how == "run.yaml":
        (tmp_path / "run" / "run.yaml").write_text("categories: [nut]\n")
    assert origin_of(file) == Origin("widgets", "nut")


def test_origin_of__unknown(weights: Path, tmp_path: Path) -> None:
    assert origin_of(weights) == Origin("widgets", None)
    assert origin_of(tmp_path / "model.onnx") == Origin()


def test_is_anomaly_model__files_exports_and_run_folders(weights: Path, tmp_path: Path) -> None:
    assert is_anomaly_model(weights)
    for folder in ("one/weights", "all/nut/weights"):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(weights, tmp_path / folder / "best.pt")
    assert is_anomaly_model(tmp_path / "one")
    assert is_anomaly_model(tmp_path / "all")
    (tmp_path / "other" / "weights").mkdir(parents=True)
    torch.save({"model": 1}, tmp_path / "other" / "weights" / "best.pt")
    for place in ("other", "other/weights/best.pt", "gone", "gone.onnx"):
        assert not is_anomaly_model(tmp_path / place)


def test_val_anomaly__the_folder_of_a_run(weights: Path, bolts: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "weights").mkdir(parents=True)
    shutil.copy(weights, tmp_path / "run" / "weights" / "best.pt")
    report = val_anomaly(tmp_path / "run", bolts, **place(tmp_path))
    assert report.results["bolt"].model == tmp_path / "run" / "weights" / "best.pt"


def test_val_anomaly__the_models_own_category_and_no_other(tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "best.pt", "nut", data=str(tmp_path / "widgets"))
    data = widgets(tmp_path / "widgets", ("bolt", "nut"))
    assert list(val_anomaly(file, data, **place(tmp_path)).results) == ["nut"]
    with pytest.raises(ConfigError, match="trained on the category 'nut', category=bolt is another"):
        val_anomaly(file, data, category="bolt", **place(tmp_path))


def test_val_anomaly__other_data_is_judged_with_a_warning(
    tmp_path: Path, bolts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(LOGGER, "warning", warned.append)
    val_anomaly(checkpoint(tmp_path / "best.pt", "screw", data="mvtec"), bolts, **place(tmp_path))
    assert len(warned) == 1
    assert "'screw' of mvtec" in warned[0]


# ---- thresholds of a validation set ----------------------------------------------------------------------------------


def test_f1_thresholds__the_best_of_all_on_the_val_images_only(with_val: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = read_anomaly_data(with_val)
    looked: list[Path] = []
    init = AnomalyDataset.__init__

    def spying(self: AnomalyDataset, samples: Any, *rest: Any, **more: Any) -> None:
        looked.extend(sample.image for sample in samples)
        init(self, samples, *rest, **more)

    monkeypatch.setattr(AnomalyDataset, "__init__", spying)
    session: Any = StandIn()
    found = f1_thresholds(session, data)
    assert looked == [sample.image for sample in data.val]
    dataset = AnomalyDataset(data.val, (64, 64))
    scores = judge(runner(session), dataset, session.thresholds).scores
    labels = dataset.labels().astype(bool)

    def f1(limit: float) -> float:
        above = scores > limit
        hits = int((above & labels).sum())
        return 2 * hits / max(int(above.sum()) + int(labels.sum()), 1)

    best = max(f1(limit) for limit in [-1.0, *scores.tolist()])
    assert f1(found.threshold_image) == pytest.approx(best)
    assert found.threshold_image not in scores.tolist()  # half way between two images, so that both keep a distance
    assert found.score_max >= found.threshold_image
    assert found.threshold_pixel == session.thresholds.threshold_pixel  # these val images have no masks


def test_val_anomaly__f1_thresholds_are_used_and_written(weights: Path, with_val: Path, tmp_path: Path) -> None:
    before, _ = load_anomaly(weights)
    out = tmp_path / "tuned.pt"
    report = val_anomaly(weights, with_val, threshold="f1", out=out, **place(tmp_path))
    plain = val_anomaly(weights, with_val, **place(tmp_path))
    one, own = report.results["bolt"], plain.results["bolt"]
    assert one.metrics.image_auroc == own.metrics.image_auroc
    assert one.threshold_image != own.threshold_image
    assert "best F1 on 6 validation images" in report.to_text()
    after, content = load_anomaly(out)
    assert after.calibration is not None
    assert before.calibration is not None
    assert after.calibration.threshold_image == np.float32(one.threshold_image)
    assert after.calibration.level_low == before.calibration.level_low
    assert "best F1" in content["extra"]["thresholds"]
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(after(images), before(images))
    assert open_checked(out).thresholds.threshold_image == one.threshold_image


# ---- faults, one line each -------------------------------------------------------------------------------------------


def test_val_anomaly__f1_without_labelled_val_images(weights: Path, bolts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"threshold=f1: .* has no labelled validation images") as caught:
        val_anomaly(weights, bolts, threshold="f1", **place(tmp_path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", ["good", "hole"])
def test_val_anomaly__f1_with_val_images_of_one_kind(kind: str, weights: Path, tmp_path: Path) -> None:
    root = widgets(tmp_path / "widgets")
    for index in range(3):
        write_pixels(root / "bolt" / "val" / kind / f"{index}.png", photo(9000 + index))
    file = tmp_path / "one.yaml"
    file.write_text(f"path: {root / 'bolt'}\nval: val\n")
    with pytest.raises(DataError) as caught:
        val_anomaly(weights, file, threshold="f1", **place(tmp_path))
    assert "\n" not in str(caught.value)
    assert "val" in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "kind", "text"),
    [
        ({"model": "gone.pt"}, CheckpointError, r"gone\.pt: no such file or folder"),
        ({"data": "gone"}, DataError, "gone"),
        ({"category": "nut"}, DataError, "category=nut"),
        ({"split": "val"}, DataError, "no labelled val images.*split=test has some"),
        ({"split": "val", "threshold": "f1"}, ConfigError, "split=val"),
        ({"split": "train"}, ConfigError, "split"),
        ({"out": "x.pt"}, ConfigError, r"out=x\.pt: needs threshold=f1"),
        ({"iou": 0.5}, ConfigError, "'iou' has no meaning"),
        ({"threshhold": "f1"}, ConfigError, "did you mean 'threshold'"),
    ],
)
def test_val_anomaly__refused(
    keys: dict[str, Any], kind: type[KDYoloError], text: str, weights: Path, bolts: Path, tmp_path: Path
) -> None:
    given = {"model": weights, "data": bolts, **place(tmp_path), **keys}
    with pytest.raises(kind, match=text) as caught:
        val_anomaly(given.pop("model"), given.pop("data"), **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_val_anomaly__uncalibrated(bolts: Path, tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "last.pt", calibrated=False)
    with pytest.raises(CheckpointError, match="is not calibrated"):
        val_anomaly(file, bolts, **place(tmp_path))


def test_val_keys__a_category_that_is_a_number() -> None:
    assert ValKeys(model="m", data="btad", category=1).category == "1"  # type: ignore[arg-type]
