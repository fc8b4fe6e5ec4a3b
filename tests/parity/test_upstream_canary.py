"""What kd-yolo leans on in Ultralytics: a failure means that upstream changed; mend the named module, not the test."""

from __future__ import annotations

import inspect
from importlib.metadata import version
from typing import Any

import pytest
import torch
from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg
from ultralytics.data.build import InfiniteDataLoader
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.modules import RepConv
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.tal import TaskAlignedAssigner
from ultralytics.utils.torch_utils import ModelEMA, strip_optimizer

from kd_yolo.config import stock_keys


def test_version__is_in_the_supported_range() -> None:
    numbers = tuple(int(part) for part in version("ultralytics").split(".")[:3])
    assert (8, 4, 190) <= numbers < (8, 5, 0)


@pytest.mark.parametrize(
    ("function", "needs"),
    [
        (BaseTrainer.setup_model, {"self"}),
        (BaseTrainer.resume_training, {"self", "ckpt"}),
        (BaseTrainer.preprocess_batch, {"self", "batch"}),
        (DistillationModel.loss, {"self", "batch", "preds"}),
        (RepConv.fuse_convs, {"self"}),
        (strip_optimizer, {"f", "s", "updates"}),
        (ModelEMA.__init__, {"self", "model"}),
        (TaskAlignedAssigner.forward, {"self", "pd_scores", "pd_bboxes", "anc_points", "gt_labels", "gt_bboxes"}),
    ],
)
def test_signatures__hold_what_is_used(function: object, needs: set[str]) -> None:
    assert needs <= set(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_trainer__wraps_after_attributes_and_before_optimizer() -> None:
    """tasks/detect.py wraps in set_model_attributes(): before the stock wrapping, DDP, optimizer and EMA."""
    source = inspect.getsource(BaseTrainer._setup_train)
    order = ["setup_model()", "set_model_attributes()", "isinstance(unwrap_model(self.model), DistillationModel)"]
    order += ["DistributedDataParallel(", "_build_train_pipeline()", "ModelEMA(", "resume_training("]
    places = [source.index(part) for part in order]
    assert places == sorted(places)


def test_trainer__steps_on_batches_since_the_last_step() -> None:
    """tasks/detect.py answers this comparison through its ``accumulate`` property on resume."""
    assert "if ni - last_opt_step >= self.accumulate:" in inspect.getsource(BaseTrainer._do_train)


def test_head__training_output_has_boxes_scores_feats() -> None:
    model = DetectionModel("yolo26n.yaml", nc=3, verbose=False).train()
    output = model(torch.zeros(2, 3, 64, 64))
    assert set(output) == {"one2many", "one2one"}
    assert {"boxes", "scores", "feats"} <= set(output["one2many"])
    assert output["one2many"]["scores"].shape == (2, 3, 84)
    assert output["one2many"]["boxes"].shape == (2, 4, 84)


def test_criterion__assigner_returns_the_foreground_fourth() -> None:
    """distill/model.py keeps output 3 of the assigner of the one-to-many loss."""
    model = DetectionModel("yolo26n.yaml", nc=3, verbose=False).train()
    model.args = get_cfg()
    model.criterion = model.init_criterion()
    seen = []
    model.criterion.one2many.assigner.register_forward_hook(lambda *a: seen.append(a[2][3]))
    batch = {"img": torch.zeros(2, 3, 64, 64), "batch_idx": torch.tensor([0.0, 1.0]), "cls": torch.zeros(2, 1)}
    model.loss({**batch, "bboxes": torch.full((2, 4), 0.5)})
    assert seen[0].shape == (2, 84)
    assert seen[0].dtype == torch.bool


def test_loader__keeps_an_iterator_whose_sampler_can_be_advanced() -> None:
    """tasks/exact_resume.py replays the sampler of a loader without workers."""
    loader: Any = InfiniteDataLoader(torch.arange(5), batch_size=2, shuffle=True, generator=torch.Generator())
    assert loader.iterator is None
    iterator = loader._get_iterator()
    drawn = sorted(index for _ in range(3) for index in next(iterator._sampler_iter))
    assert drawn == [0, 1, 2, 3, 4]


def test_stock_keys__read_without_import_equal_the_real_defaults() -> None:
    assert stock_keys() == DEFAULT_CFG_DICT
