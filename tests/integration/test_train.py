"""Training with a teacher, end to end on tiny data."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ultralytics.nn.tasks import DetectionModel, load_checkpoint

from kd_yolo.config import Recipe, read_recipe, split_train_keys
from kd_yolo.distill.model import BALANCE_TRIES, KDModel
from kd_yolo.distill.probe import BatchProbe
from kd_yolo.distill.teacher import load_teacher
from kd_yolo.distill.wrap import wrap_student
from kd_yolo.errors import DistillationError, TeacherError
from kd_yolo.files import sha256
from kd_yolo.nn.blocks import RepBlock
from kd_yolo.nn.lightnet import build_model
from kd_yolo.tasks.detect import KDTrainer
from kd_yolo.training import train


def state_hash(model: DetectionModel) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


def columns(results: Path) -> list[str]:
    return results.read_text().splitlines()[0].split(",")


def column(results: Path, name: str) -> list[float]:
    index = columns(results).index(name)
    return [float(row.split(",")[index]) for row in results.read_text().splitlines()[1:]]


@pytest.fixture
def recipe_of(tiny_teacher: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(method: str = "kd-lightnet", **given: Any) -> Path:
        recipe = Recipe(teacher=str(tiny_teacher), teacher_sha256=sha256(tiny_teacher), method=method, **given)
        path = tmp_path / f"{method}.yaml"
        path.write_text(yaml.safe_dump(recipe.model_dump()))
        return path

    return write


def tiny_trainer(data: Path, recipe: Path, folder: Path, **given: Any) -> KDTrainer:
    keys = {"model": "yolo26n.yaml", "pretrained": False, "data": str(data), "imgsz": 64, "batch": 8, "epochs": 1}
    keys |= {"plots": False, "device": "cpu", "project": str(folder), "name": "kd", "exist_ok": True, "close_mosaic": 0}
    return KDTrainer(overrides={**keys, "distill_model": str(recipe), **given})


@pytest.mark.parametrize("method", ["kd-lightnet", "score-l2"])
def test_train__self_distillation_end_to_end(
    method: str, train_keys: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    report = train(*split_train_keys(train_keys(model="lightnet-n", method=method, allow_weak_teacher=True)))
    assert [phase.name for phase in report.phases] == ["teacher", "student"]
    terms = {"kd-lightnet": ["kd_cls_loss", "kd_box_loss"], "score-l2": ["kd_feat_loss"]}[method]
    results = report.run_dir / "results.csv"
    # kd_cls is below the log's five decimals here: a teacher of two epochs is sure of nothing
    assert max(column(results, f"train/{terms[-1]}")) > 0
    for term in terms:
        assert min(column(results, f"train/{term}")) >= 0
        assert column(results, f"val/{term}") == [0.0, 0.0]
    assert "train/kd_cls_loss" not in columns(report.run_dir / "teacher" / "results.csv")
    model, _ = load_checkpoint(report.best)
    assert type(model).__name__ == "DetectionModel"  # the student alone, without wrapper or teacher
    assert any(isinstance(module, RepBlock) for module in model.modules())
    recipe = read_recipe(report.run_dir / "recipe.yaml")
    assert recipe is not None
    assert recipe.method == method
    deployed = json.loads(Path(report.artifacts["deployed"]).with_suffix(".json").read_text())
    assert deployed["recipe"]["method"] == method


def test_train__student_starts_afresh_not_from_the_teacher(
    train_keys: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Prepared self-distillation: same structure and start; with lr0 near 0 both stay where they began."""
    keys = train_keys(allow_weak_teacher=True, epochs=1, optimizer="SGD", lr0=1e-9, momentum=0.0, warmup_epochs=0)
    report = train(*split_train_keys(keys))
    teacher = load_checkpoint(report.run_dir / "teacher" / "weights" / "best.pt")[0].state_dict()
    student = load_checkpoint(report.best)[0].state_dict()
    weights = [name for name in teacher if name.endswith("conv.weight")]
    assert all(torch.allclose(teacher[name], student[name], atol=1e-3) for name in weights)


def test_train__generations_stop_when_validation_does_not_improve(
    train_keys: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    report = train(*split_train_keys(train_keys(allow_weak_teacher=True, epochs=1, generations=3)))
    names = [phase.name for phase in report.phases]
    assert names[0] == "teacher"
    assert names[-1] == "student"  # 0 mAP after one epoch: the second generation is no improvement, the first is kept
    assert "student-2" in names
    assert "student-3" not in names


def test_train__surgery_student(train_keys: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    report = train(*split_train_keys(train_keys(model="yolo26n.yaml", reparam="qarep", teacher="none", epochs=1)))
    model, _ = load_checkpoint(report.best)
    assert sum(isinstance(module, RepBlock) for module in model.modules()) == 45
    merged, _ = load_checkpoint(report.artifacts["deployed"])
    assert not any(isinstance(module, RepBlock) for module in merged.modules())


def test_trainer__teacher_is_untouched_and_in_no_checkpoint(
    recipe_of: Callable[..., Path], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes: list[str] = []
    saved: list[set[str]] = []
    original = KDTrainer.save_model

    def look(self: KDTrainer) -> bool:
        assert self.model.teacher_model is not None
        assert not self.model.teacher_model.training
        assert not any(p.requires_grad for p in self.model.teacher_model.parameters())
        hashes.append(state_hash(self.model.teacher_model))
        owned = {id(p) for p in self.model.teacher_model.parameters()}
        assert not owned & {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        done = original(self)
        saved.append(set(load_checkpoint(self.last)[1]["ema"].state_dict()))
        return done

    monkeypatch.setattr(KDTrainer, "save_model", look)
    trainer = tiny_trainer(tiny_data, recipe_of("score-l2"), tmp_path, epochs=2)
    trainer.train()
    assert len(hashes) == 2
    assert len(set(hashes)) == 1
    assert not any("teacher" in name for name in saved[-1])
    assert any(name.startswith("projector.") for name in saved[-1])  # adapters resume with the run ...
    best = load_checkpoint(trainer.best)[0].state_dict()
    assert not any("projector" in name for name in best)  # ... and are not in what ships


def test_trainer__worker_replay_rebuilds_the_same_recipe(
    recipe_of: Callable[..., Path], tiny_data: Path, tmp_path: Path
) -> None:
    """What a multi-GPU worker does: build the trainer again from ``vars(args)``."""
    first = tiny_trainer(tiny_data, recipe_of(args={"tau": 2.0}), tmp_path)
    second = KDTrainer(overrides=vars(copy.copy(first.args)))
    assert first.recipe == second.recipe
    assert second.recipe is not None
    assert second.recipe.args == {"tau": 2.0}


def test_trainer__teacher_changed_since_the_run_began(
    recipe_of: Callable[..., Path], tiny_data: Path, tmp_path: Path
) -> None:
    recipe = recipe_of()
    content = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**content, "teacher_sha256": "0" * 64}))
    with pytest.raises(TeacherError, match="changed since"):
        tiny_trainer(tiny_data, recipe, tmp_path).train()


def test_trainer__non_finite_distillation_stops_with_the_terms_name(
    recipe_of: Callable[..., Path], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = KDModel.distill_terms
    calls = {"n": 0}

    def poisoned(self: KDModel, preds: Any, batch: Any, teacher: Any) -> dict[str, torch.Tensor]:
        terms = original(self, preds, batch, teacher)
        calls["n"] += 1
        return {k: v * float("nan") if calls["n"] == 2 and k == "kd_box" else v for k, v in terms.items()}

    monkeypatch.setattr(KDModel, "distill_terms", poisoned)
    with pytest.raises(DistillationError, match="kd_box"):
        tiny_trainer(tiny_data, recipe_of(schedule={"warmup": 0.0}), tmp_path).train()


def test_trainer__balance_sets_the_gradient_ratio_once(
    recipe_of: Callable[..., Path], tiny_data: Path, tmp_path: Path
) -> None:
    trainer = tiny_trainer(tiny_data, recipe_of(balance=0.3, schedule={"warmup": 0.0}), tmp_path, epochs=2)
    trainer.train()
    factors = trainer.model.balance_factors
    assert set(factors) == {"kd_cls", "kd_box"}
    assert all(value > 0 for value in factors.values())


# ---- the wrapped model on its own ----


@pytest.fixture
def wrapped(recipe_of: Callable[..., Path], tiny_teacher: Path, tiny_layout: str) -> KDModel:
    from ultralytics.cfg import get_cfg

    torch.manual_seed(0)
    student = build_model(tiny_layout, nc=6)
    student.args = get_cfg()
    names = load_teacher(tiny_teacher)[0].names
    recipe = read_recipe(recipe_of("kd-lightnet"))
    assert recipe is not None
    model = wrap_student(student, recipe, names)
    model.train()
    return model


def batch_of(images: int = 2, imgsz: int = 64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "img": torch.rand(images, 3, imgsz, imgsz, generator=generator),
        "batch_idx": torch.arange(images, dtype=torch.float32),
        "cls": torch.zeros(images, 1),
        "bboxes": torch.full((images, 4), 0.5),
    }


def test_first_step__teacher_without_signal_is_refused(wrapped: KDModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(self: KDModel, preds: Any, batch: Any, teacher: Any) -> dict[str, torch.Tensor]:
        return {"kd_cls": preds["one2many"]["scores"].sum() * 0, "kd_box": preds["one2many"]["boxes"].sum() * 0}

    monkeypatch.setattr(KDModel, "distill_terms", silent)
    with pytest.raises(DistillationError, match="zero in the first step"):
        wrapped.loss(batch_of())


def test_first_step__loss_without_gradient_is_refused(wrapped: KDModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def detached(self: KDModel, preds: Any, batch: Any, teacher: Any) -> dict[str, torch.Tensor]:
        nothing = preds["one2many"]["scores"].sum() * 0
        return {"kd_cls": 1.0 + nothing, "kd_box": 1.0 + nothing}

    monkeypatch.setattr(KDModel, "distill_terms", detached)
    with pytest.raises(DistillationError, match="no gradient"):
        wrapped.loss(batch_of())


def test_loss__terms_are_multiplied_by_the_batch_size_once(wrapped: KDModel) -> None:
    loss, items = wrapped.loss(batch_of(images=2))
    assert loss[3:].detach().tolist() == pytest.approx([2 * float(items[name]) for name in wrapped.term_names])


def test_loss__foreground_of_the_assigner_reaches_the_method(wrapped: KDModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, torch.Tensor] = {}
    original = type(wrapped.projector).forward

    def look(self: Any, student: Any, teacher: Any, batch: Any) -> Any:
        seen.update({"fg": batch["fg_mask"], "scores": student.scores})
        return original(self, student, teacher, batch)

    monkeypatch.setattr(type(wrapped.projector), "forward", look)
    wrapped.loss(batch_of())
    assert seen["fg"].shape == (2, seen["scores"].shape[-1])
    assert 0 < int(seen["fg"].sum()) <= 20  # ten anchors a box at most


def test_balance__waits_for_a_batch_it_can_measure(wrapped: KDModel, monkeypatch: pytest.MonkeyPatch) -> None:
    original = KDModel.distill_terms

    def silent(self: KDModel, preds: Any, batch: Any, teacher: Any) -> dict[str, torch.Tensor]:
        terms = original(self, preds, batch, teacher)
        return {**terms, "kd_box": terms["kd_box"] * 0} if silenced else terms

    silenced = True
    monkeypatch.setattr(KDModel, "distill_terms", silent)
    wrapped.balance, wrapped.balance_due = 0.3, True
    wrapped.loss(batch_of())
    assert wrapped.balance_due
    assert not wrapped.balance_factors
    silenced = False
    wrapped.loss(batch_of())
    assert set(wrapped.balance_factors) == {"kd_cls", "kd_box"}
    silenced, wrapped.balance_due, wrapped.balance_factors = True, True, {}
    for _ in range(BALANCE_TRIES - 2):  # one was used up above
        wrapped.loss(batch_of())
    with pytest.raises(DistillationError, match=r"'kd_box' has no gradient.*kd.weight"):
        wrapped.loss(batch_of())


def test_copies__leave_the_teacher_out(wrapped: KDModel) -> None:
    twin = copy.deepcopy(wrapped)
    assert twin.teacher_model is None
    assert wrapped.teacher_model is not None
    assert not any("teacher" in name for name, _ in wrapped.named_parameters())


def test_batch_probe__runs_the_teacher(wrapped: KDModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoBatch measures the probe; a probe without the teacher would overfill the memory."""
    ran: list[int] = []
    assert wrapped.teacher_model is not None
    wrapped.teacher_model.get_submodule("model.model.0").register_forward_hook(lambda *_: ran.append(1))
    probe = copy.deepcopy(BatchProbe(wrapped, boxes_per_image=4))
    assert probe.names == wrapped.names
    probe(torch.rand(2, 3, 64, 64)).sum().backward()
    assert ran
    assert any(p.grad is not None for p in probe.model.student_model.parameters())
