"""Several processes: every one has the recipe, the same distillation and, after a step, the same gradients.

There is no GPU here: the processes talk through gloo on a CPU.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn
from ultralytics.cfg import get_cfg
from ultralytics.utils.torch_utils import TORCH_2_13

from kd_yolo.config import Recipe, read_recipe
from kd_yolo.distill.model import KDModel
from kd_yolo.distill.wrap import wrap_student
from kd_yolo.files import sha256
from kd_yolo.nn.lightnet import build_model

NAMES = {0: "scratch", 1: "dent"}

Gradients = dict[str, Tensor]


def wrapped_of(recipe: Path) -> KDModel:
    """Return the same wrapped model in every process: a student of LightNet-n under a wider teacher."""
    torch.manual_seed(0)
    student = build_model("lightnet-n", nc=2)
    student.args = get_cfg()
    content = read_recipe(recipe)
    assert content is not None
    model = wrap_student(student, content, NAMES, seed=3)
    model.train()
    return model


def batch_of(seed: int, images: int = 4, more: int = 0) -> dict[str, Tensor]:
    """Return images with two boxes each."""
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "img": torch.rand(images, 3, 64, 64, generator=generator),
        "batch_idx": torch.arange(images).repeat_interleave(2).float(),
        "cls": torch.randint(0, 2, (2 * images, 1), generator=generator).float(),
        "bboxes": torch.rand(2 * images, 4, generator=generator) * 0.3 + 0.3,
    }
    return {**batch, "unlabeled": torch.rand(more, 3, 64, 64, generator=generator)} if more else batch


def reversed_batch(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same images and boxes in the opposite order."""
    return {
        "img": batch["img"].flip(0),
        "batch_idx": len(batch["img"]) - 1 - batch["batch_idx"].flip(0),
        "cls": batch["cls"].flip(0),
        "bboxes": batch["bboxes"].flip(0),
    }


def joined(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return one batch of two."""
    whole = {name: torch.cat([first[name], second[name]]) for name in ("img", "cls", "bboxes")}
    return {**whole, "batch_idx": torch.cat([first["batch_idx"], second["batch_idx"] + len(first["img"])])}


def gradients(model: nn.Module, batch: Mapping[str, Tensor], world: int = 1) -> tuple[Gradients, dict[str, Tensor]]:
    """Do what the trainer's loop does in a step; with several processes it multiplies the loss by their number."""
    model.zero_grad(set_to_none=True)
    loss, items = model(dict(batch))
    (loss.sum() * world).backward()
    found = {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found, items


def process(rank: int, folder: str) -> None:
    """Be one of two processes."""
    place = Path(folder)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=(place / "store").as_uri(), rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    wrapped = wrapped_of(place / "recipe.yaml")
    buffers: Any = {"forward_sync_buffers" if TORCH_2_13 else "broadcast_buffers": False}
    model = nn.parallel.DistributedDataParallel(wrapped, find_unused_parameters=True, **buffers)  # as the stock trainer
    said: dict[str, Any] = {}
    half = batch_of(rank)
    said["halves"], said["items"] = gradients(model, half, world=2)
    with model.no_sync():
        said["alone"], _ = gradients(model, half)
    alike = reversed_batch(batch_of(7)) if rank else batch_of(7)
    said["alike"], _ = gradients(model, alike, world=2)
    said["unlabeled"], said["unlabeled items"] = gradients(model, batch_of(rank, more=2), world=2)
    wrapped.factor = 0.0  # distillation switched off: its parameters take no part in the step
    said["off"], _ = gradients(model, half, world=2)
    wrapped.factor, wrapped.balance, wrapped.balance_due = 1.0, 0.3, True
    said["balanced"], _ = gradients(model, half, world=2)
    said["factors"] = wrapped.balance_factors
    torch.save(said, place / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recipe whose method has adapters."""
    folder = tmp_path_factory.mktemp("ddp")
    torch.manual_seed(1)
    teacher = build_model("lightnet-s", nc=2)
    teacher.names = NAMES
    checkpoint = {"epoch": -1, "model": teacher.half(), "ema": None, "train_args": {"imgsz": 64}}
    torch.save(checkpoint, folder / "teacher.pt")
    content = Recipe(
        teacher=str(folder / "teacher.pt"), teacher_sha256=sha256(folder / "teacher.pt"), method="score-l2", trust=True
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content.model_dump()))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def said(recipe: Path) -> list[dict[str, Any]]:
    """Return what two processes say."""
    os.environ["OMP_NUM_THREADS"] = "1"
    spawn(process, args=(str(recipe.parent),), nprocs=2)  # type: ignore[no-untyped-call]
    return [torch.load(recipe.parent / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def single(recipe: Path) -> KDModel:
    return wrapped_of(recipe)


def assert_same(first: Gradients, second: Gradients, exact: bool = False) -> None:
    """Compare gradients; what BatchNorm makes zero is rounding noise, so the largest one gives the scale too."""
    assert first.keys() == second.keys()
    largest = max(float(value.abs().max()) for value in first.values())
    for name, value in first.items():
        if exact:
            assert torch.equal(value, second[name]), name
        else:
            torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("case", ["halves", "alike", "unlabeled", "off", "balanced"])
def test_ddp__gradients_are_bit_for_bit_the_same_in_every_process(said: list[dict[str, Any]], case: str) -> None:
    assert_same(said[0][case], said[1][case], exact=True)
    adapters = [value for name, value in said[0][case].items() if name.startswith("projector.")]
    if case == "off":
        assert not adapters  # they took no part, and the processes did not wait for them
    else:
        assert len(adapters) >= 3  # one for each level at least
        assert any(bool(value.any()) for value in adapters)


def test_ddp__without_synchronisation_they_differ(said: list[dict[str, Any]]) -> None:
    """The comparison above can fail: each process has its own half of the batch."""
    first, second = (one["alone"] for one in said)
    different = [name for name, value in first.items() if not torch.equal(value, second[name])]
    assert any(name.startswith("projector.") for name in different)
    assert any(name.startswith("student_model.") for name in different)


def test_ddp__every_process_has_a_distillation_loss(said: list[dict[str, Any]]) -> None:
    for one in said:
        assert float(one["items"]["kd_feat_loss"]) > 0
        assert float(one["unlabeled items"]["kd_feat_loss"]) > 0
    assert float(said[0]["items"]["kd_feat_loss"]) != float(said[1]["items"]["kd_feat_loss"])


def test_ddp__gradient_is_the_sum_over_the_halves(said: list[dict[str, Any]], single: KDModel) -> None:
    halves = [gradients(single, batch_of(rank))[0] for rank in range(2)]
    expected = {name: value + halves[1][name] for name, value in halves[0].items()}
    trained = {name: value for name, value in said[0]["halves"].items() if name in expected}
    assert_same(expected, trained)
    assert all(not value.any() for name, value in said[0]["halves"].items() if name not in expected)


def test_ddp__gradient_is_that_of_one_process_with_the_whole_batch(said: list[dict[str, Any]], single: KDModel) -> None:
    """Two halves of the same images, so that BatchNorm and the losses' normalisers are those of the whole batch."""
    whole, _ = gradients(single, joined(batch_of(7), reversed_batch(batch_of(7))))
    assert_same(whole, {name: said[0]["alike"][name] for name in whole})


def test_ddp__balance_factors_are_the_mean_over_the_processes(said: list[dict[str, Any]], single: KDModel) -> None:
    assert said[0]["factors"] == said[1]["factors"]
    own = []
    for rank in range(2):
        single.balance, single.balance_due, single.balance_factors = 0.3, True, {}
        gradients(single, batch_of(rank))
        own.append(single.balance_factors["kd_feat"])
    single.balance_factors = {}
    assert own[0] != own[1]
    assert said[0]["factors"]["kd_feat"] == pytest.approx(sum(own) / 2, rel=1e-3)
