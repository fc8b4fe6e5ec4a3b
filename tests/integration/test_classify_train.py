"""Training classifiers: stock without a method, a frozen teacher with one, plain checkpoints, exact resume, chains."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from ultralytics import YOLO
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.nn.tasks import ClassificationModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "classify"))
from class_factory import class_folder, save_classifier, tiny_classifier

from kd_yolo.classify import chain as chain_module
from kd_yolo.classify.checkpoints import load_classifier
from kd_yolo.classify.deploy import logits
from kd_yolo.classify.model import KDClassifier
from kd_yolo.classify.phases import ClassifyPhase, run_phase
from kd_yolo.classify.run import ClassifyReport, train_classify
from kd_yolo.classify.settings import split_classify_keys
from kd_yolo.classify.trainer import KDClassifyTrainer
from kd_yolo.config import read_recipe
from kd_yolo.errors import ConfigError, DistillationError, TeacherError
from kd_yolo.files import sha256
from kd_yolo.resources import load_yaml
from kd_yolo.tasks.run_folder import find_run, task_of

TINY = {"imgsz": 64, "batch": 8, "plots": False, "device": "cpu", "workers": 0, "verbose": False, "epochs": 2}
Build = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folder(tmp_path_factory.mktemp("classes") / "data")


@pytest.fixture(scope="module")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    keys = {**TINY, "data": str(data), "model": "yolo26n-cls.yaml", "epochs": 1}
    return run({**keys, "project": str(tmp_path_factory.mktemp("teacher")), "name": "run"}).best


@pytest.fixture
def keys(data: Path, tmp_path: Path) -> Build:
    def build(**given: Any) -> dict[str, Any]:
        base = {**TINY, "data": str(data), "model": "lightnet-n-cls", "project": str(tmp_path), "name": "run"}
        return {**base, **given}

    return build


def run(keys: dict[str, Any]) -> ClassifyReport:
    return train_classify(*split_classify_keys(keys))


def losses(run_dir: Path, phase: str = "student") -> list[dict[str, str]]:
    header, *rows = (line.split(",") for line in (run_dir / phase / "results.csv").read_text().splitlines())
    return [{key: cell for key, cell in zip(header, row, strict=True) if key != "time"} for row in rows]


# ---- one student ----------------------------------------


def test_train_classify__without_a_method_is_stock(keys: Build, tmp_path: Path) -> None:
    given = keys(model="yolo26n-cls.yaml", seed=3)
    mine = run(given)
    stock = {key: value for key, value in given.items() if key != "name"}
    trainer = ClassificationTrainer(overrides={**stock, "name": "stock", "mode": "train"})
    trainer.train()
    ours, theirs = (load_classifier(path)[0].state_dict() for path in (mine.best, trainer.best))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert losses(mine.run_dir) == losses(tmp_path, "stock")


def test_train_classify__zero_weight_repeats_the_plain_run(keys: Build, teacher: Path) -> None:
    plain = run(keys(name="plain"))
    zero = run(keys(name="zero", teacher=str(teacher), method="kd", allow_weak_teacher=True, **{"kd.weight": 0.0}))
    for mine, theirs in zip(losses(plain.run_dir), losses(zero.run_dir), strict=True):
        assert mine == {key: theirs[key] for key in mine}


@pytest.mark.parametrize("weighting", ["fixed", "frozen"])
def test_train_classify__teacher_is_frozen_hidden_and_gone(
    keys: Build, teacher: Path, monkeypatch: pytest.MonkeyPatch, weighting: str
) -> None:
    seen: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
    original = KDClassifyTrainer._setup_train

    def noting(self: KDClassifyTrainer) -> None:
        original(self)
        model = self.model
        assert isinstance(model, KDClassifier)
        frozen = model.teacher_model
        assert frozen is not None
        inside = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        assert not inside & {id(p) for p in frozen.parameters()}
        assert {id(p) for p in model.projector.parameters()} <= inside
        assert self.ema.ema.teacher_model is None
        seen.append(({key: value.clone() for key, value in frozen.state_dict().items()}, frozen.state_dict()))

    monkeypatch.setattr(KDClassifyTrainer, "_setup_train", noting)
    report = run(keys(teacher=str(teacher), allow_weak_teacher=True, **{"kd.weighting": weighting}))
    ((before, after),) = seen
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    row = losses(report.run_dir)[-1]
    for name in ("hflkd_feat", "hflkd_rel", "hflkd_irr"):
        assert float(row[f"train/{name}"]) > 0
        assert float(row[f"val/{name}"]) == 0
    for path in (report.best, report.run_dir / "student" / "weights" / "best.pt"):
        model, checkpoint = load_classifier(path)
        assert type(checkpoint["model"]) is ClassificationModel
        assert not [key for key in model.state_dict() if not key.startswith("model.")]
    assert sha256(report.best) == report.phases[-1].best_sha256
    assert report.phases[-1].teacher_sha256 == sha256(teacher)


def test_train_classify__deployed_exports_as_stock(keys: Build, teacher: Path) -> None:
    report = run(keys(teacher=str(teacher), method="dkd", allow_weak_teacher=True, epochs=1))
    for path in (report.best, Path(report.artifacts["deployed"])):
        made = YOLO(str(path)).export(format="onnx", imgsz=64, simplify=False, verbose=False)
        session = onnxruntime.InferenceSession(str(made), providers=["CPUExecutionProvider"])
        image = np.random.default_rng(0).random((1, 3, 64, 64), dtype=np.float32)
        (found,) = session.run(None, {session.get_inputs()[0].name: image})
        with torch.no_grad():
            expected = logits(load_classifier(path)[0], torch.from_numpy(image)).softmax(1).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4)
    result = YOLO(report.artifacts["deployed"])(np.zeros((50, 70, 3), dtype=np.uint8), verbose=False)[0]
    assert set(result.names.values()) == {"dots", "lines", "plain"}


def test_train_classify__report_and_run_file_survive(keys: Build, teacher: Path, tmp_path: Path) -> None:
    given = keys(teacher=str(teacher), method="kd", allow_weak_teacher=True, epochs=1, **{"kd.tau": 2.5})
    report = run(given)
    plan = load_yaml(tmp_path / "run" / "run.yaml")
    assert (plan["task"], plan["method"]["name"], plan["method"]["args"]["tau"]) == ("classify", "kd", 2.5)
    recipe = read_recipe(tmp_path / "run" / "recipe.yaml")
    assert recipe is not None
    assert recipe.args["tau"] == 2.5
    assert task_of(report.run_dir) == "classify"
    with pytest.raises(ConfigError, match=r"no run\.yaml"):
        find_run(str(teacher.parents[2]), {}, "classify")
    content = report.to_dict()
    assert content["phases"][-1]["top1"] == report.phases[-1].metrics["metrics/accuracy_top1"]
    again = run({**given, "name": "again"})
    assert losses(again.run_dir) == losses(report.run_dir)  # seeds are deterministic
    other = run({**given, "name": "other", "seed": 1})
    assert losses(other.run_dir) != losses(report.run_dir)


# ---- resume ----------------------------------------


class PowerCutError(Exception):
    """A power cut in the middle of training."""


@pytest.mark.parametrize(("method", "stop_epoch", "stop_batch"), [("none", 2, 0), ("hflkd", 1, 1)])
def test_train_classify__resumed_losses_equal_uninterrupted(
    keys: Build, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, stop_epoch: int,
    stop_batch: int,
) -> None:  # fmt: skip
    given = keys(method=method, epochs=3, nbs=20, batch=6, seed=4, close_mosaic=1)
    if method != "none":
        given |= {"teacher": str(teacher), "allow_weak_teacher": True, "kd.weighting": "regularised"}
    whole = run({**given, "name": "whole"})
    original = KDClassifyTrainer.preprocess_batch

    def cut(self: KDClassifyTrainer, data: dict[str, Any]) -> dict[str, Any]:
        result = original(self, data)
        if self.epoch == stop_epoch and self._batch_in_epoch == stop_batch + 1:
            raise PowerCutError
        return result

    monkeypatch.setattr(KDClassifyTrainer, "preprocess_batch", cut)
    with pytest.raises(PowerCutError):
        run(given)
    monkeypatch.setattr(KDClassifyTrainer, "preprocess_batch", original)
    again = run({"data": "resumed", "resume": True, "project": str(tmp_path)})
    assert again.run_dir == tmp_path / "run"
    assert losses(again.run_dir) == losses(whole.run_dir)
    ours, theirs = (load_classifier(one.best)[0].state_dict() for one in (again, whole))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_train_classify__stopped_before_its_result_was_recorded(keys: Build) -> None:
    """All epochs are done: nothing is trained again, and the last validation gives the same figures."""
    report = run(keys(epochs=1))
    trained = losses(report.run_dir)
    for path in (report.run_dir / "student" / "phase.json", report.run_dir / "report.json"):
        path.unlink()
    again = run({"data": "resumed", "resume": str(report.run_dir)})
    assert again.phases[-1].top1 == report.phases[-1].top1
    assert again.phases[-1].best_sha256 == sha256(again.run_dir / "student" / "weights" / "best.pt")
    assert losses(again.run_dir) == trained


def test_train_classify__resume_refuses_other_settings(keys: Build, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no unfinished run"):
        run({"data": "resumed", "resume": True, "project": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"epochs: a resumed run keeps its own settings"):
        run({"data": "resumed", "resume": str(tmp_path), "epochs": 5})
    run(keys(epochs=1))
    with pytest.raises(ConfigError, match="no unfinished run"):
        run({"data": "resumed", "resume": True, "project": str(tmp_path)})


# ---- chain ----------------------------------------


def test_train_classify__chain_teaches_stage_by_stage_and_goes_on_where_it_stopped(
    keys: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def stopping(run_dir: Path, name: str, *rest: Any) -> ClassifyPhase:
        if name == "stage3-lightnet-n-cls" and "stopped" not in ran:
            ran.append("stopped")
            raise KeyboardInterrupt
        ran.append(name)
        return run_phase(run_dir, name, *rest)

    monkeypatch.setattr(chain_module, "run_phase", stopping)
    given = keys(chain="yolo26n-cls.yaml,lightnet-s-cls,lightnet-n-cls", epochs=1, allow_weak_teacher=True)
    given.pop("model")
    with pytest.raises(KeyboardInterrupt):
        run(given)
    names = ["stage1-yolo26n-cls", "stage2-lightnet-s-cls", "direct", "stage3-lightnet-n-cls"]
    assert ran == [*names[:3], "stopped"]
    first, second = (sha256(tmp_path / "run" / name / "weights" / "best.pt") for name in names[:2])
    report = run({"data": "resumed", "resume": str(tmp_path / "run")})
    assert [phase.name for phase in report.phases] == names
    assert [phase.teacher_sha256 for phase in report.phases] == ["", first, first, second]
    assert [phase.best_sha256 for phase in report.phases[:2]] == [first, second]  # not trained again
    assert sha256(report.best) == report.phases[-1].best_sha256
    recipe = read_recipe(report.run_dir / "stage3-lightnet-n-cls.recipe.yaml")
    assert recipe is not None
    assert recipe.teacher_sha256 == second


def test_train_classify__a_ready_teacher_begins_the_chain(keys: Build, teacher: Path) -> None:
    given = keys(chain=[str(teacher), "lightnet-n-cls", "lightnet-n-cls"], epochs=1, allow_weak_teacher=True)
    given.pop("model")
    report = run({**given, "method": "kd"})
    assert [phase.name for phase in report.phases] == ["stage2-lightnet-n-cls", "direct", "stage3-lightnet-n-cls"]
    assert report.phases[0].teacher_sha256 == report.phases[1].teacher_sha256 == sha256(teacher)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({0: "plain", 1: "lines", 2: "dots"}, "the data's classes in another order"),
        ({0: "dots", 1: "lines", 2: "other"}, "2 of the data's 3 classes"),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_train_classify__chain_of_other_class_orders_is_refused(
    keys: Build, tmp_path: Path, names: dict[int, str], said: str, place: int
) -> None:
    stages = ["yolo26n-cls.yaml", "lightnet-s-cls", "lightnet-n-cls"]
    stages[place] = str(save_classifier(tiny_classifier(names=names), tmp_path / "other.pt"))
    given = keys(chain=",".join(stages))
    given.pop("model")
    with pytest.raises(TeacherError, match=said):
        run(given)
    assert not (tmp_path / "run").exists()


# ---- refusals ----------------------------------------


def chain_keys(keys: Build, chain: str) -> dict[str, Any]:
    return {key: value for key, value in keys(chain=chain).items() if key != "model"}


def test_train_classify__refuses_before_training(keys: Build, teacher: Path, tmp_path: Path) -> None:
    other = save_classifier(tiny_classifier(names={0: "plain", 1: "lines", 2: "dots"}), tmp_path / "other.pt")
    for given, kind, said in (
        (keys(teacher=str(other)), TeacherError, "in another order"),
        (keys(teacher=str(save_classifier(tiny_classifier(), tmp_path / "weak.pt"))), TeacherError, "commonest class"),
        (chain_keys(keys, f"{tmp_path / 'weak.pt'},yolo26n-cls.yaml,lightnet-n-cls"), TeacherError, "commonest class"),
        (keys(chain="lightnet-n-cls,lightnet-n-cls"), ConfigError, "at least one assistant"),
        (keys(chain="a,b,c", model="yolo26n-cls.yaml"), ConfigError, "say the same thing"),
        (keys(imgsz=65), ConfigError, "imgsz"),
        (keys(epochs=0), ConfigError, "epochs=0"),
        (keys(optimizer="ADAN", lr0="x"), ConfigError, "lr0"),
        (keys(split="test"), ConfigError, "chosen on val"),
    ):
        with pytest.raises(kind, match=said) as caught:
            run(given)
        assert "\n" not in str(caught.value), given
    assert not (tmp_path / "run").exists()


def test_train_classify__a_silent_teacher_stops_the_run(
    keys: Build, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that does not reach the student must not pass for distillation."""
    from kd_yolo.classify.methods import KD, ClassTerms

    def silent(self: KD, *_: Any) -> ClassTerms:
        return ClassTerms({"kd_kl": torch.tensor(1.0)})

    monkeypatch.setattr(KD, "forward", silent)
    with pytest.raises((DistillationError, RuntimeError)):
        run(keys(teacher=str(teacher), method="kd", allow_weak_teacher=True))
