"""The trainer of ``task=anomaly``: Ultralytics' training loop around a model that learns from normal images only.

What differs from a detector: the teacher is inside the model and needed at inference, its answers do not change (no
augmentation), so they are computed once; a held-out tenth of the normals chooses the checkpoint and calibrates it; and
checkpoints are plain data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from ultralytics.data.build import build_dataloader
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import DEFAULT_CFG, LOGGER
from ultralytics.utils.torch_utils import unwrap_model

from kd_yolo.anomaly.checkpoint import load_anomaly, save_anomaly
from kd_yolo.anomaly.dataset import CACHE_SHARE, AnomalyDataset, collate
from kd_yolo.anomaly.layouts import AnomalySample
from kd_yolo.anomaly.model import AnomalyModel
from kd_yolo.errors import DistillationError
from kd_yolo.tasks.distilling import truncate_csv
from kd_yolo.tasks.exact_resume import (
    load_state,
    prune_states,
    replay_sampler,
    restore_gradients_and_random,
    restore_state,
    save_state,
)

MEAN_STRIDE = 32


@dataclass(frozen=True)
class Views:
    """How training images are varied from epoch to epoch.

    Attributes:
        flips: Mirror each image with probability one half in each direction.
        brightness: Largest relative change of brightness, 0..1.
    """

    flips: bool = False
    brightness: float = 0.0

    @property
    def any(self) -> bool:
        """Whether images change at all."""
        return self.flips or self.brightness > 0

    def vary(self, images: Tensor) -> Tensor:
        """Return varied images (B, 3, H, W) in [0, 1]; random numbers come from torch's global stream."""
        for axis in (-1, -2) if self.flips else ():
            chosen = (torch.rand(len(images)) < 0.5).to(images.device)
            images = torch.where(chosen[:, None, None, None], images.flip(axis), images)
        if self.brightness > 0:
            gains = 1 + self.brightness * (2 * torch.rand(len(images), 1, 1, 1) - 1)
            images = (images * gains.to(images.device)).clamp(0, 1)
        return images


class TrainingStep(nn.Module):
    """What the training loop calls: a batch in, the loss and its named terms out.

    Args:
        net: The model.
    """

    def __init__(self, net: AnomalyModel) -> None:
        super().__init__()
        self.net = net
        self.criterion = None  # the loop asks for it
        self.stride = torch.tensor([MEAN_STRIDE])
        self.names = dict(net.names)

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss (scalar) and the detached terms by name."""
        total, items = self.net.loss(batch["img"], batch.get("targets"))
        return total, dict(zip(self.net.loss_names, items, strict=True))


class HeldOutLoss:
    """The validator: the loss on held-out normals; its negative is the fitness.

    Args:
        loader: Held-out normals; each batch goes through ``prepare``.
        prepare: The trainer's ``preprocess_batch``.
    """

    def __init__(self, loader: DataLoader[Any], prepare: Any, args: Any) -> None:
        self.dataloader, self._prepare, self.args = loader, prepare, args
        self.metrics = self
        self.keys = ["metrics/held_out_loss"]

    def __call__(self, trainer: AnomalyTrainer) -> dict[str, float]:
        """Return the mean loss over the held-out images."""
        model = trainer.ema.ema.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in self.dataloader:
                loss, _ = model(self._prepare(batch, held_out=True))
                total, count = total + float(loss) * len(batch["img"]), count + len(batch["img"])
        value = total / max(count, 1)
        return {"metrics/held_out_loss": value, "fitness": -value}


class AnomalyTrainer(BaseTrainer):
    """Train one anomaly model on one category.

    Args:
        net: The model, untrained.
        train: Normal images.
        held_out: Normal images that choose the checkpoint and calibrate it.
        views: How training images are varied; without it the teacher's answers are computed once.
        overrides: Stock training arguments; ``resume`` is true to go on from ``weights/last.pt``.
        category: What the images are of; the checkpoint keeps it.
    """

    def __init__(
        self,
        net: AnomalyModel,
        train: list[AnomalySample],
        held_out: list[AnomalySample],
        views: Views,
        overrides: dict[str, Any],
        category: str | None = None,
    ) -> None:
        self.category = category
        self._net, self._samples = net, {"train": train, "val": held_out}
        self._views = views
        self._targets: dict[str, dict[str, Tensor]] = {}
        self._resume_state: dict[str, Any] | None = None
        self.steps_since_update = 0  # read by exact_resume
        self.last: Path
        self.best: Path
        self._resuming = bool(overrides.pop("resume", False))
        nbs = overrides.get("batch", 16)  # one step a batch, and the weight decay that was asked for
        super().__init__(DEFAULT_CFG, {**overrides, "nbs": nbs, "task": "anomaly", "mode": "train", "close_mosaic": 0})

    def check_resume(self, overrides: dict[str, Any]) -> None:
        """Resume from the run's own folder, never from what a checkpoint says."""
        self.resume = self._resuming
        self.args.resume = self._resuming  # keeps results.csv

    def get_dataset(self) -> dict[str, Any]:
        """Return the two lists of images under Ultralytics' names."""
        return {"train": "train", "val": "val", "names": dict(self._net.names), "nc": 2, "channels": 3}

    def setup_model(self) -> dict[str, Any] | None:
        """Wrap the model; on resume say from which epoch."""
        self.model: Any = TrainingStep(self._net)
        if not self.resume:
            return None
        _, content = load_anomaly(self.last)
        return dict(content["extra"])

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        """Return a loader; training images are shuffled by the run's seed."""
        dataset = AnomalyDataset(self._samples[dataset_path], self.args.imgsz)
        dataset.collate_fn = collate  # type: ignore[attr-defined]
        size = min(batch_size, len(dataset))
        loader = build_dataloader(dataset, size, self.args.workers, shuffle=mode == "train", rank=rank, drop_last=False)
        self._prepare_targets(dataset_path, dataset)
        return loader

    def get_validator(self) -> HeldOutLoss:
        """Return what is called after every epoch."""
        return HeldOutLoss(self.test_loader, self.preprocess_batch, self.args)

    def preprocess_batch(self, batch: dict[str, Any], held_out: bool = False) -> dict[str, Any]:
        """Bring images to the device as floats in [0, 1], with the teacher's answers where they are known."""
        prepared = {"img": batch["img"].to(self.device, non_blocking=True).float() / 255}
        known = self._targets.get("val" if held_out else "train")
        if known:
            prepared["targets"] = {name: rows[batch["index"]].to(self.device) for name, rows in known.items()}
        elif not held_out:
            prepared["img"] = self._views.vary(prepared["img"])
        return prepared

    def progress_string(self) -> str:
        """Return the header of the progress line."""
        return ("\n" + "%11s" * (4 + len(self.loss_names))) % ("Epoch", "GPU_mem", *self.loss_names, "Images", "Size")

    def run_callbacks(self, event: str) -> None:
        """Do our own part of an event before the callbacks."""
        if event == "on_train_epoch_start" and self._resume_state is not None and self.epoch == self.start_epoch:
            replay_sampler(self)
            restore_gradients_and_random(self, self._resume_state)
        elif event == "on_train_epoch_end":
            for name, value in (self.tloss or {}).items():
                if not bool(torch.isfinite(torch.as_tensor(value)).all()):
                    raise DistillationError(
                        f"the loss '{name}' became {float(value)} in epoch {self.epoch + 1}; lower lr0, then start anew"
                    )
        super().run_callbacks(event)

    def _do_train(self) -> None:
        """Train; of a run that was stopped after its last epoch only the end is made up for."""
        state = load_state(self.wdir, int(load_anomaly(self.last)[1]["extra"]["epoch"])) if self.resume else None
        if state is None or not state["finished"]:
            super()._do_train()
            return
        self.test_loader = self.get_dataloader("val", 2 * self.args.batch, mode="val")
        self.final_eval()
        if self.args.plots:
            self.plot_metrics()

    def save_model(self) -> bool:
        """Write ``last.pt``, ``best.pt`` and the exact-resume state, each aside and then renamed."""
        extra = {"epoch": self.epoch, "best_fitness": self.best_fitness, "train_metrics": dict(self.metrics)}
        extra |= {"category": self.category} if self.category else {}
        save_state(self)
        net = unwrap_model(self.ema.ema).net
        if self.best_fitness == self.fitness:
            save_anomaly(self.best, net, vars(self.args), extra)
        save_anomaly(self.last, net, vars(self.args), extra)
        prune_states(self.wdir, self.epoch)
        return True

    def resume_training(self, ckpt: dict[str, Any] | None) -> None:
        """Go on after the last finished epoch, exactly."""
        if ckpt is None:
            return
        self.start_epoch = int(ckpt["epoch"]) + 1
        self.best_fitness = ckpt.get("best_fitness")
        self._resume_state = load_state(self.wdir, self.start_epoch - 1)
        if self._resume_state is None:
            raise DistillationError(f"{self.wdir}: the state to go on from is gone; delete the run folder, start anew")
        restore_state(self, self._resume_state)
        truncate_csv(self.csv, self.start_epoch)

    def final_eval(self) -> None:
        """Calibrate the best checkpoint on the held-out normals and remove what only a resume needs."""
        net, content = load_anomaly(self.best)
        calibration = net.to(self.device).calibrate(self._batches(self.test_loader))
        LOGGER.info(
            f"calibrated on {len(self.test_loader.dataset)} held-out normal images: image threshold "
            f"{calibration.threshold_image:.4f}, pixel threshold {calibration.threshold_pixel:.4f}"
        )
        save_anomaly(self.best, net, vars(self.args), {**content["extra"], "epoch": -1})
        for path in self.wdir.glob("resume-*.pt"):
            path.unlink(missing_ok=True)

    def _prepare_targets(self, which: str, dataset: AnomalyDataset) -> None:
        """Fit the teacher's statistics and keep its answers, which are the same in every epoch."""
        loader = DataLoader(dataset, batch_size=self.batch_size, collate_fn=collate)
        net = self._net.to(self.device)
        if which == "train":
            net.fit_targets(self._batches(loader))
        if which == "train" and self._views.any:
            return
        one = net.targets(next(self._batches(loader))[:1])
        needed = 2 * len(dataset) * sum(rows.element_size() * rows.nelement() for rows in one.values())
        if needed > CACHE_SHARE * psutil.virtual_memory().available:
            LOGGER.warning(
                f"the teacher's answers would take {needed / 2e9:.1f} GB, so they are computed in every epoch"
            )
            return
        parts = [net.targets(images) for images in self._batches(loader)]
        self._targets[which] = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}

    def _batches(self, loader: Any) -> Iterator[Tensor]:
        for batch in loader:
            yield batch["img"].to(self.device).float() / 255
