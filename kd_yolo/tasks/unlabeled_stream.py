"""The order in which a run sees images without labels, and how they are loaded.

They have a loader of their own, so that no mosaic mixes them with labelled images, and random streams of their own, so
that the labelled images of a run are drawn and augmented as they are without it. What an epoch draws depends only on
the seed, the epoch and the process: a resumed run sees what the stopped one would have seen (with ``workers=0``; data
loader workers keep their random streams from epoch to epoch).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import DataLoader, Sampler
from ultralytics.data.build import seed_worker
from ultralytics.data.dataset import YOLODataset

Streams = tuple[Any, Any, Tensor]


class UnlabeledImages(YOLODataset):
    """Images with empty labels and the training set's augmentation; mosaics are made among themselves."""

    def __init__(self, files: Sequence[Path], **arguments: Any) -> None:
        """Take the images.

        Args:
            files: Readable images.
            **arguments: As for ``YOLODataset``, without ``img_path``.
        """
        self._files = [str(file) for file in files]
        super().__init__(img_path=self._files, fraction=1.0, classes=None, **arguments)

    def get_img_files(self, img_path: str | list[str]) -> list[str]:
        """Return the given images; there is nothing to search for."""
        return list(self._files)

    def get_labels(self) -> list[dict[str, Any]]:
        """Return an empty label for every image; no label file is looked for and no cache file written."""
        empty: dict[str, Any] = {"segments": [], "keypoints": None, "normalized": True, "bbox_format": "xywh"}
        boxes = {"cls": np.zeros((0, 1), np.float32), "bboxes": np.zeros((0, 4), np.float32)}
        return [{"im_file": file, **boxes, **empty} for file in self._files]

    def forget_loaded(self) -> None:
        """Empty the buffer that mosaics draw from, so that an epoch does not depend on the one before."""
        if self.cache == "ram":
            return
        for index in self.buffer:
            self.ims[index] = self.im_hw0[index] = self.im_hw[index] = None
        self.buffer.clear()


class EpochShare(Sampler[int]):
    """The images that one process draws in one epoch: the next stretch of an endless series of shuffled passes.

    Every image of the folder is drawn once before any is drawn again, over epochs and over processes together.

    Attributes:
        epoch: Set before an epoch is drawn.
    """

    def __init__(self, size: int, draws: int, seed: int, rank: int = 0, world: int = 1) -> None:
        """Describe the share.

        Args:
            size: Images in the folder.
            draws: Images that this process draws in an epoch.
            seed: Seed of the passes.
            rank: Number of this process.
            world: Number of processes.
        """
        self.size, self.draws, self.seed, self.rank, self.world = size, draws, seed, rank, world
        self.epoch = 0

    def __len__(self) -> int:
        return self.draws

    def __iter__(self) -> Iterator[int]:
        start, current, order = self.epoch * self.draws * self.world, -1, []
        for step in range(self.draws):
            lap, place = divmod(start + step * self.world + self.rank, self.size)
            if lap != current:
                generator = torch.Generator().manual_seed(_mixed(self.seed, lap))
                current, order = lap, torch.randperm(self.size, generator=generator).tolist()
            yield order[place]


class UnlabeledStream:
    """Batches of unlabeled images, one for each training batch.

    Attributes:
        dataset: The images.
        ratio: Unlabeled images per labelled image.
        fingerprint: Digest of the list of images, to notice a folder that changed.
    """

    def __init__(
        self,
        dataset: UnlabeledImages,
        ratio: float,
        batch: int,
        steps: int,
        workers: int = 0,
        seed: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Prepare the loader; nothing is drawn yet.

        Args:
            dataset: The images.
            ratio: Unlabeled images per labelled image.
            batch: Labelled images in a whole batch of this process.
            steps: Training batches in an epoch.
            workers: Loader processes.
            seed: Seed of order and augmentation.
            pin_memory: Whether batches go to a GPU.
        """
        self.dataset, self.ratio = dataset, ratio
        self.fingerprint = hashlib.sha256("\n".join(dataset.im_files).encode()).hexdigest()
        shared = dist.is_available() and dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
        self._count = self.share_of(batch)
        self._seed = _mixed(seed, rank, 1)
        self._sampler = EpochShare(len(dataset), steps * self._count, seed, rank, world)
        self._workers, self._pin_memory = workers, pin_memory
        self._loader = self._make_loader()
        self.begin_epoch(0)

    def share_of(self, images: int) -> int:
        """Return how many unlabeled images join a batch of labelled ones; at least one."""
        return max(round(self.ratio * images), 1)

    def begin_epoch(self, epoch: int) -> None:
        """Start an epoch, counted from 0, from its own seed."""
        self._sampler.epoch = epoch
        self._batches: Iterator[Tensor] | None = None
        self.dataset.forget_loaded()
        seed = _mixed(self._seed, epoch)
        self._loader.generator.manual_seed(seed)
        with random_streams():
            _seed_streams(seed)
            self._streams = current_streams()

    def join(self, images: Tensor) -> Tensor:
        """Return the next unlabeled images for a batch of labelled ones.

        Args:
            images: Labelled images as the model gets them, (B, 3, H, W) in 0..1.

        Returns:
            (U, 3, H, W) in 0..1, on the same device and canvas.
        """
        with random_streams(self._streams):
            if self._batches is None:
                self._batches = iter(self._loader)
            drawn = next(self._batches)
            self._streams = current_streams()
        drawn = drawn[: self.share_of(len(images))]
        drawn = drawn.to(images.device, non_blocking=images.device.type == "cuda").to(images.dtype) / 255
        if drawn.shape[2:] != images.shape[2:]:  # multi_scale resized the labelled ones
            drawn = F.interpolate(drawn, size=images.shape[2:], mode="bilinear", align_corners=False)
        return drawn

    def close_mosaic(self, arguments: Any) -> None:
        """Go on without mosaic and its kin, as the training set does in its last epochs."""
        self.dataset.close_mosaic(hyp=copy(arguments))
        self.close()
        self._loader = self._make_loader()  # worker processes hold copies of the data set

    def close(self) -> None:
        """Stop the loader's worker processes."""
        self._batches = None
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()

    def _make_loader(self) -> DataLoader[Any]:
        generator = torch.Generator()
        generator.manual_seed(_mixed(self._seed, self._sampler.epoch))
        return DataLoader(
            self.dataset,
            batch_size=self._count,
            sampler=self._sampler,
            num_workers=self._workers,
            collate_fn=_stack,
            pin_memory=self._pin_memory,
            worker_init_fn=seed_worker,
            generator=generator,
            persistent_workers=self._workers > 0,
        )


@contextmanager
def random_streams(streams: Streams | None = None) -> Iterator[None]:
    """Use other random streams of Python, NumPy and PyTorch (CPU), and put the present ones back afterwards.

    Args:
        streams: From ``current_streams``; None goes on from the present ones.
    """
    own = current_streams()
    try:
        _use(streams or own)
        yield
    finally:
        _use(own)


def current_streams() -> Streams:
    """Return where the random streams of Python, NumPy and PyTorch (CPU) stand."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _stack(samples: Sequence[dict[str, Any]]) -> Tensor:
    return torch.stack([sample["img"] for sample in samples])


def _mixed(*numbers: int) -> int:
    """Return one seed below 2**32 for a tuple of numbers; neighbours give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _seed_streams(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too


def _use(streams: Streams) -> None:
    random.setstate(streams[0])
    np.random.set_state(streams[1])
    torch.set_rng_state(streams[2])
