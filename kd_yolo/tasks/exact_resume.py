"""Everything a stopped run needs to go on exactly: what Ultralytics' checkpoint leaves out.

A stock ``last.pt`` holds the EMA weights in half precision and resumes from those. Here a state file beside it holds
the live weights, the optimizer, the random streams, leftover gradients and the position of the accumulation counter,
all in full precision, so that on one machine a resumed run repeats the uninterrupted run's losses digit for digit (CPU,
or any device whose operations are deterministic, with ``workers=0``; data loader workers have random streams of their
own). Unlabeled images need nothing saved: what an epoch draws of them follows from the seed and the epoch.

The state file is named after its epoch and written before ``last.pt`` is renamed into place: whatever moment the power
fails, ``last.pt`` and the state of the same epoch both exist.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ultralytics.utils import LOGGER, RANK
from ultralytics.utils.torch_utils import unwrap_model

from kd_yolo.files import written_aside

if TYPE_CHECKING:
    from kd_yolo.tasks.distilling import DistillingTrainer


def state_path(weights_folder: Path, epoch: int) -> Path:
    """Return the name of the state file written after ``epoch`` (counted from 0)."""
    return weights_folder / f"resume-{epoch}.pt"


def save_state(trainer: DistillingTrainer) -> None:
    """Write the state file of the epoch just finished."""
    model = unwrap_model(trainer.model)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    dataset = trainer.train_loader.dataset
    state = {
        "epoch": trainer.epoch,
        "finished": bool(trainer.stop),
        "model": model.state_dict(),
        "ema": trainer.ema.ema.state_dict(),
        "ema_updates": trainer.ema.updates,
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "gradients": gradients,
        "steps_since_update": trainer.steps_since_update,
        "balance_factors": dict(getattr(model, "balance_factors", {})),
        "random": _random_state(),
        "mosaic_buffer": list(getattr(dataset, "buffer", [])),
        "unlabeled": _unlabeled_fingerprint(trainer),
    }
    with written_aside(state_path(trainer.wdir, trainer.epoch)) as aside:
        torch.save(state, aside)


def prune_states(weights_folder: Path, keep_epoch: int) -> None:
    """Remove state files of other epochs; called once ``last.pt`` of ``keep_epoch`` is in place."""
    keep = state_path(weights_folder, keep_epoch)
    for path in weights_folder.glob("resume-*.pt"):
        if path != keep:
            path.unlink(missing_ok=True)


def load_state(weights_folder: Path, epoch: int) -> dict[str, Any] | None:
    """Read the state of an epoch without unpickling code, or return None when there is none."""
    path = state_path(weights_folder, epoch)
    if not path.is_file():
        return None
    # numpy's generator state is stored as plain lists, so the restricted loader is enough
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def restore_state(trainer: DistillingTrainer, state: dict[str, Any]) -> None:
    """Put a trainer that was set up for resume exactly where the stopped one was."""
    model = unwrap_model(trainer.model)
    model.load_state_dict(state["model"])
    trainer.ema.ema.load_state_dict(state["ema"])
    trainer.ema.updates = state["ema_updates"]
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.scaler.load_state_dict(state["scaler"])
    if hasattr(model, "balance_factors"):
        model.balance_factors = dict(state["balance_factors"])
    dataset = trainer.train_loader.dataset
    for index in state["mosaic_buffer"]:
        if dataset.ims[index] is None:
            dataset.load_image(index)  # refills the mosaic buffer in its old order; draws no random number
    if _unlabeled_fingerprint(trainer) not in {None, state.get("unlabeled")}:
        LOGGER.warning("unlabeled images were added or removed since the run stopped: it does not go on exactly")
    LOGGER.info(f"Resuming exactly: live weights, optimizer, random streams of epoch {state['epoch'] + 1}")


def restore_gradients_and_random(trainer: DistillingTrainer, state: dict[str, Any]) -> None:
    """Restore what the set-up of a run touches itself; called right before the first resumed epoch."""
    model = unwrap_model(trainer.model)
    for name, parameter in model.named_parameters():
        gradient = state["gradients"].get(name)
        parameter.grad = None if gradient is None else gradient.to(parameter)
    if RANK > 0:  # these are the first process's streams; the others would augment as it does
        return
    streams = state["random"]
    version, internal, gauss = streams["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = streams["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(streams["torch"])
    if torch.cuda.is_available() and streams["cuda"]:
        torch.cuda.set_rng_state_all(streams["cuda"])


def replay_sampler(trainer: DistillingTrainer) -> None:
    """Advance the training loader's sampler to where the stopped run had it.

    The order of images comes from a generator inside the loader whose state between epochs depends on details of
    PyTorch's samplers. Drawing the indices of all finished epochs again, without loading an image, is exact whatever
    these details are. Loaders with worker processes are left alone: their prefetching cannot be repeated.
    """
    loader = trainer.train_loader
    if loader.num_workers or trainer.world_size > 1:
        return
    closing = trainer.epochs - trainer.args.close_mosaic if trainer.args.close_mosaic else None
    loader.iterator = loader._get_iterator()
    for epoch in range(trainer.start_epoch):
        if epoch > 0 and epoch == closing:
            loader.iterator = loader._get_iterator()  # the loop resets the loader when mosaic closes
        for _ in range(len(loader)):
            next(loader.iterator._sampler_iter)
    if closing is not None and trainer.start_epoch > max(closing, 0):
        # The loop is about to close mosaic and reset the loader, which the stopped run did epochs ago.
        loader.reset = lambda: loader.__dict__.pop("reset")


def _unlabeled_fingerprint(trainer: DistillingTrainer) -> str | None:
    """Return what identifies a detection run's images without labels, or None; no other trainer has any."""
    stream = getattr(trainer, "unlabeled", None)
    return stream.fingerprint if stream is not None else None


def _random_state() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [state["state"]["key"].tolist(), state["state"]["pos"], state["has_gauss"], state["gauss"]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
