"""Run a training script as Ultralytics' multi-GPU launcher would, on CPUs: ``python gloo_shim.py SCRIPT [ARGUMENTS]``.

Ultralytics' trainer takes several processes on GPUs only. What it needs in their place is exactly what is replaced
here: the process group (gloo for NCCL), the device of ``DistributedDataParallel``, an average that gloo may lack, and
the last evaluation, which opens a CUDA device. The trainer, its loaders and the wrapped model are the real ones. Each
process writes what it saw to ``$KD_YOLO_SEEN/RANK.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from ultralytics.utils.torch_utils import unwrap_model

from kd_yolo.distill.model import KDModel
from kd_yolo.tasks.detect import KDTrainer

SEEN: dict[str, Any] = {"labelled": [], "unlabeled": [], "kd": [], "local": []}
STOCK = nn.parallel.DistributedDataParallel


class OnCPU(STOCK):
    """``DistributedDataParallel`` without the device that Ultralytics names."""

    def __init__(self, module: nn.Module, device_ids: Any = None, **arguments: Any) -> None:
        SEEN["ddp"] = sorted(arguments)
        super().__init__(module, **arguments)


class GlooTrainer(KDTrainer):
    """The methods that take the places of ``KDTrainer``'s."""

    def _setup_ddp(self) -> None:
        dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=self.world_size)

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Note which images came."""
        names = [Path(file).name for file in batch["im_file"]]
        batch = ORIGINAL(self, batch)
        SEEN["labelled"] += names
        SEEN["unlabeled"] += [digest(image) for image in batch.get("unlabeled", ())]
        return batch

    def final_eval(self) -> None:
        """Note the result instead of evaluating it."""
        model = unwrap_model(self.model)
        assert isinstance(model, KDModel)
        assert self.recipe is not None
        SEEN["recipe"] = self.recipe.model_dump()
        SEEN["world_size"] = self.world_size
        SEEN["batch"] = self.train_loader.batch_size
        SEEN["student"] = digest(*model.student_model.parameters())
        SEEN["method"] = digest(*model.projector.parameters())
        SEEN["trainer"] = type(self).__name__
        SEEN["kd"] = {name: float(self.tloss[name]) for name in model.term_names}
        Path(os.environ["KD_YOLO_SEEN"], f"{os.environ['RANK']}.json").write_text(json.dumps(SEEN))


ORIGINAL = KDTrainer.preprocess_batch


def digest(*values: torch.Tensor) -> str:
    """Return a hash of the values, bit for bit."""
    return hashlib.sha256(b"".join(value.detach().contiguous().numpy().tobytes() for value in values)).hexdigest()


def average(tensor: torch.Tensor, dst: int = 0, op: Any = None) -> None:
    """Reduce to the mean by a sum, whatever the backend knows."""
    REDUCE(tensor, dst=dst)
    tensor /= dist.get_world_size()


REDUCE = dist.reduce


def main() -> None:
    """Replace what a CPU lacks and run the script."""
    vars(nn.parallel)["DistributedDataParallel"] = OnCPU
    vars(dist)["reduce"] = average
    for name in ("_setup_ddp", "preprocess_batch", "final_eval"):
        setattr(KDTrainer, name, vars(GlooTrainer)[name])
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
