"""Images without labels: who sees them, what they change, and that a run with them is repeatable."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from ultralytics.cfg import get_cfg

from kd_yolo.config import Recipe, read_recipe, split_train_keys
from kd_yolo.distill.model import KDModel
from kd_yolo.distill.probe import BatchProbe
from kd_yolo.distill.pseudo import PseudoLabels
from kd_yolo.distill.teacher import load_teacher
from kd_yolo.distill.wrap import wrap_student
from kd_yolo.errors import TeacherError
from kd_yolo.files import sha256
from kd_yolo.nn.lightnet import build_model
from kd_yolo.tasks.detect import KDTrainer
from kd_yolo.training import train

GREEN = (20, 200, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 13 green pictures, some nested; the training images are all grey."""
    root = tmp_path_factory.mktemp("unlabeled")
    rng = np.random.default_rng(0)
    for number in range(13):
        place = root / "line 2" / "cam" if number % 3 == 0 else root
        place.mkdir(parents=True, exist_ok=True)
        picture = np.full((64, 80, 3), GREEN, np.uint8)
        x, y = rng.integers(8, 40, 2)
        picture[y : y + 16, x : x + 16] = (10, 90 + 5 * number, 10)
        cv2.imwrite(str(place / f"{number}.png"), picture)
    return root


@pytest.fixture
def recipe_of(tiny_teacher: Path, tmp_path: Path, folder: Path) -> Callable[..., Path]:
    def write(method: str = "score-l2", **given: Any) -> Path:
        keys = {"teacher": str(tiny_teacher), "teacher_sha256": sha256(tiny_teacher), "method": method}
        recipe = Recipe(**{**keys, "schedule": {"warmup": 0.0}, "unlabeled": str(folder), **given})
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe.model_dump()))
        return path

    return write


@pytest.fixture
def wrapped(recipe_of: Callable[..., Path], tiny_teacher: Path, tiny_layout: str) -> KDModel:
    torch.manual_seed(0)
    student = build_model(tiny_layout, nc=6)
    student.args = get_cfg()
    recipe = read_recipe(recipe_of())
    assert recipe is not None
    model = wrap_student(student, recipe, load_teacher(tiny_teacher)[0].names)
    model.train()
    return model


def batch_of(images: int = 2, more: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch = {
        "img": torch.rand(images, 3, 64, 64, generator=generator),
        "batch_idx": torch.arange(images, dtype=torch.float32),
        "cls": torch.zeros(images, 1),
        "bboxes": torch.full((images, 4), 0.5),
    }
    return {**batch, "unlabeled": torch.rand(more, 3, 64, 64, generator=generator)} if more else batch


def freeze_statistics(model: KDModel) -> None:
    """Put BatchNorm into eval mode, so that images do not change each other's outputs."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()


def gradient(model: KDModel, loss: Tensor) -> Tensor:
    used = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, used, retain_graph=True, allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def test_loss__ratio_to_the_labelled_loss_does_not_depend_on_how_many_are_added(wrapped: KDModel) -> None:
    """Copies of the labelled images teach nothing new: loss and gradient must be those without them."""
    freeze_statistics(wrapped)
    batch = batch_of()
    alone, items = wrapped.loss(batch)
    for copies in (1, 4):
        joined, joined_items = wrapped.loss({**batch, "unlabeled": batch["img"].repeat(copies, 1, 1, 1)})
        assert joined.tolist() == pytest.approx(alone.tolist(), rel=1e-4)
        assert float(joined_items["kd_feat_loss"]) == pytest.approx(float(items["kd_feat_loss"]), rel=1e-4)
        for part in (slice(0, 3), slice(3, None)):  # labels, distillation
            torch.testing.assert_close(
                gradient(wrapped, joined[part].sum()), gradient(wrapped, alone[part].sum()), rtol=1e-3, atol=1e-4
            )


def test_loss__labelled_part_is_blind_to_unlabeled_images(wrapped: KDModel) -> None:
    freeze_statistics(wrapped)
    batch = batch_of(more=3)
    other = {**batch, "unlabeled": torch.zeros(3, 3, 64, 64)}
    first, second = wrapped.loss(batch)[0], wrapped.loss(other)[0]
    assert torch.allclose(first[:3], second[:3])
    assert not torch.allclose(first[3:], second[3:])


@pytest.fixture
def seen(wrapped: KDModel, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what the method gets, filled at each call."""
    noted: dict[str, Any] = {}
    original = type(wrapped.projector).forward

    def look(self: Any, student: Any, teacher: Any, batch: Any) -> Any:
        noted.update(batch, scores=student.scores, theirs=teacher.neck[0])
        return original(self, student, teacher, batch)

    monkeypatch.setattr(type(wrapped.projector), "forward", look)
    return noted


def test_loss__student_runs_once_and_the_assigner_sees_labelled_images_only(
    wrapped: KDModel, seen: dict[str, Any]
) -> None:
    sizes: dict[str, list[int]] = {"student": [], "assigner": []}
    wrapped.student_model.model[0].register_forward_hook(lambda _, x, y: sizes["student"].append(len(y)))
    wrapped.student_model.criterion = wrapped.student_model.init_criterion()
    assigner = wrapped.student_model.criterion.one2many.assigner
    assigner.register_forward_hook(lambda _, x, y: sizes["assigner"].append(len(y[3])))
    wrapped.loss(batch_of(images=2, more=3))
    assert sizes == {"student": [5], "assigner": [2]}
    anchors = seen["scores"].shape[-1]
    assert seen["fg_mask"].shape == (5, anchors)
    assert seen["target_scores"].shape[:2] == (5, anchors)
    assert seen["fg_mask"][:2].any()
    assert not seen["fg_mask"][2:].any()
    assert len(seen["img"]) == len(seen["theirs"]) == 5


def test_loss__pseudo_labels_add_a_weighted_detection_loss(wrapped: KDModel) -> None:
    """The value is what the student's own criterion says of the teacher's boxes, times the weight."""
    freeze_statistics(wrapped)
    batch = batch_of(more=3)
    plain = wrapped.loss(batch)[0]
    values: dict[float, float] = {}
    for weight in (0.25, 0.5):
        wrapped.label_with_teacher(PseudoLabels(0.002, weight))  # a teacher of one epoch is sure of nothing
        loss, items = wrapped.loss(batch)
        assert list(items)[-2:] == ["kd_feat_loss", "pseudo_loss"] == list(wrapped.term_names)
        assert loss[:-1].tolist() == pytest.approx(plain.tolist(), rel=1e-4)  # it adds and changes nothing
        assert float(loss[-1].detach()) == pytest.approx(2 * float(items["pseudo_loss"]))
        values[weight] = float(items["pseudo_loss"])
    assert values[0.25] > 0
    assert values[0.5] == pytest.approx(2 * values[0.25], rel=1e-4)
    assert gradient(wrapped, loss[-1]).any()


def test_loss__pseudo_labels_are_targets_for_the_method(wrapped: KDModel, seen: dict[str, Any]) -> None:
    wrapped.label_with_teacher(PseudoLabels(0.002, 0.5))
    wrapped.loss(batch_of(images=2, more=3))
    labelled = set(seen["batch_idx"].long().tolist())
    assert labelled & {2, 3, 4}
    assert set(torch.nonzero(seen["fg_mask"].any(1)).flatten().tolist()) == labelled


def test_loss__validation_has_the_same_terms(wrapped: KDModel) -> None:
    wrapped.label_with_teacher(PseudoLabels(0.5, 0.5))
    trained = list(wrapped.loss(batch_of(more=2))[1])
    wrapped.eval()
    items = wrapped.loss(batch_of())[1]
    assert list(items) == trained
    assert float(items["pseudo_loss"]) == 0.0


def test_label_with_teacher__needs_boxes(wrapped: KDModel) -> None:
    assert wrapped.teacher_model is not None
    wrapped.teacher_model.provides = frozenset({"neck", "scores"})
    with pytest.raises(TeacherError, match=r"'pseudo=true' reads the teacher's boxes"):
        wrapped.label_with_teacher(PseudoLabels(0.5, 0.5))


def test_uses_unlabeled__not_while_switched_off_nor_in_the_measuring_step(wrapped: KDModel) -> None:
    assert wrapped.uses_unlabeled
    for factor, measuring in ((0.0, False), (1.0, True)):
        wrapped.factor, wrapped.balance_due = factor, measuring
        assert not wrapped.uses_unlabeled
    wrapped.balance_due = False
    assert not copy.deepcopy(wrapped).uses_unlabeled  # a copy has no teacher


def test_batch_probe__counts_unlabeled_images(wrapped: KDModel) -> None:
    sizes: list[int] = []
    wrapped.student_model.model[0].register_forward_hook(lambda _, x, y: sizes.append(len(y)))
    probe = BatchProbe(wrapped, boxes_per_image=2, unlabeled_ratio=1.5)
    probe(torch.rand(2, 3, 64, 64))
    BatchProbe(wrapped, boxes_per_image=2)(torch.rand(2, 3, 64, 64))
    assert sizes == [5, 2]
    wrapped.label_with_teacher(PseudoLabels(0.5, 0.5))
    twin = copy.deepcopy(probe)
    assert twin.unlabeled_ratio == 1.5
    assert len(twin(torch.rand(2, 3, 64, 64))) == 5  # three stock terms, distillation, pseudo labels
    assert twin.model.pseudo == wrapped.pseudo


def tiny_trainer(data: Path, recipe: Path, folder: Path, **given: Any) -> KDTrainer:
    keys = {"model": "yolo26n.yaml", "pretrained": False, "data": str(data), "imgsz": 64, "batch": 8, "epochs": 2}
    keys |= {"plots": False, "device": "cpu", "project": str(folder), "name": "kd", "exist_ok": True, "close_mosaic": 0}
    keys |= {"hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0}
    return KDTrainer(overrides={**keys, "distill_model": str(recipe), **given})


def recorded(trainer: KDTrainer, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    seen: list[dict[str, Tensor]] = []
    original = KDTrainer.preprocess_batch

    def keep(self: KDTrainer, batch: dict[str, Any]) -> dict[str, Any]:
        result = original(self, batch)
        seen.append({key: result[key].clone() for key in ("img", "unlabeled") if key in result})
        return result

    monkeypatch.setattr(KDTrainer, "preprocess_batch", keep)
    trainer.train()
    monkeypatch.undo()
    return seen


def greenness(images: Tensor) -> float:
    """Return the share of pixels whose green is far above red."""
    return float((images[:, 1] - images[:, 0] > 0.1).float().mean())


def test_trainer__labelled_images_are_drawn_as_without_and_never_mixed(
    recipe_of: Callable[..., Path], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny_trainer(tiny_data, recipe_of(unlabeled_ratio=0.5), tmp_path / "with", close_mosaic=1)
    seen = recorded(trainer, monkeypatch)
    without = tiny_trainer(tiny_data, recipe_of(unlabeled=None), tmp_path / "without", close_mosaic=1)
    plain = recorded(without, monkeypatch)
    assert [torch.equal(a["img"], b["img"]) for a, b in zip(seen, plain, strict=True)] == [True] * 6
    assert all("unlabeled" not in batch for batch in plain)
    # off_last=mosaic: distillation, and with it every use of unlabeled images, ends with mosaic
    assert [len(batch.get("unlabeled", ())) for batch in seen] == [4, 4, 4, 0, 0, 0]
    assert all(greenness(batch["img"]) == 0.0 for batch in seen)
    assert min(greenness(image[None]) for batch in seen[:3] for image in batch["unlabeled"]) > 0.0


def test_trainer__pseudo_labels_are_logged(recipe_of: Callable[..., Path], tiny_data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(pseudo=True, pseudo_conf=0.002, unlabeled_ratio=0.25)
    trainer = tiny_trainer(tiny_data, recipe, tmp_path, epochs=1)
    trainer.train()
    header, row = (line.split(",") for line in (tmp_path / "kd" / "results.csv").read_text().splitlines())
    values = dict(zip(header, row, strict=True))
    assert float(values["train/pseudo_loss"]) > 0
    assert float(values["train/kd_feat_loss"]) > 0
    assert float(values["val/pseudo_loss"]) == 0


def losses(run_dir: Path) -> list[list[str]]:
    rows = [line.split(",") for line in (run_dir / "student" / "results.csv").read_text().splitlines()]
    return [[cell for i, cell in enumerate(row) if i != 1] for row in rows]  # column 1 is wall time


def test_train__resumed_losses_equal_uninterrupted(
    train_keys: Callable[..., dict[str, Any]],
    tiny_teacher: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = train_keys(
        teacher=str(tiny_teacher), method="score-l2", unlabeled=str(folder), pseudo=True, pseudo_conf=0.002
    )
    keys |= {"epochs": 4, "close_mosaic": 1, "allow_weak_teacher": True, "seed": 5}
    whole = train(*split_train_keys({**keys, "name": "whole"})).run_dir
    original = KDTrainer.preprocess_batch

    def cut(self: KDTrainer, data: dict[str, Any]) -> dict[str, Any]:
        result = original(self, data)
        if self.epoch == 2 and self._batch_in_epoch == 2:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(KDTrainer, "preprocess_batch", cut)
    with pytest.raises(KeyboardInterrupt):
        train(*split_train_keys({**keys, "name": "cut"}))
    monkeypatch.undo()
    resumed = train(*split_train_keys({"data": "resumed", "resume": str(tmp_path / "cut")})).run_dir
    assert losses(resumed) == losses(whole)
