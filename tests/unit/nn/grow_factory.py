"""Small networks with scales, and how far two of them are apart."""

from __future__ import annotations

import copy
from typing import Any

import torch
from nn_factory import randomise_bn
from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel, yaml_model_load

from kd_yolo.nn.lightnet import build_model
from kd_yolo.nn.merging import max_errors, random_images, raw_outputs

# Half of n's width, so that growing costs little: depth, width, largest number of channels before the width.
TINY = [0.5, 0.125, 1024]


def tiny_model(name: str, nc: int = 6, **scales: list[float]) -> DetectionModel:
    """Return a stock family's network at scale ``t``, half of n's width; ``scales`` are added to its YAML."""
    cfg: dict[str, Any] = yaml_model_load(name)
    depth = cfg["scales"]["n"][0]
    cfg |= {"scales": {"t": [depth, *TINY[1:]], **cfg["scales"], **scales}, "scale": "t"}
    torch.manual_seed(0)
    model = build_model(cfg, nc=nc)
    randomise_bn(model)
    return model.eval()


def mini_model() -> DetectionModel:
    """Return a network of few rows, for what does not depend on the rows."""
    backbone = [[-1, 1, "Conv", [64, 3, 2]], [-1, 1, "Conv", [128, 3, 2]], [-1, 2, "C3k2", [256, False, 0.25]]]
    backbone += [[-1, 1, "Conv", [256, 3, 2]], [-1, 1, "Conv", [256, 3, 2]], [-1, 1, "SPPF", [256, 5, 3, True]]]
    cfg = {"scales": {"t": TINY, "n": [0.5, 0.25, 1024]}, "scale": "t", "nc": 6, "end2end": True, "reg_max": 1}
    torch.manual_seed(0)
    model = build_model({**cfg, "backbone": backbone, "head": [[[3, 4, 5], 1, "Detect", ["nc"]]]})
    randomise_bn(model)
    model.names = {index: f"defect {index}" for index in range(6)}
    return model.eval()


def outputs(model: nn.Module, train: bool = False, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    network: Any = copy.deepcopy(model).to(dtype).train(train)
    with torch.no_grad():
        return raw_outputs(network, random_images(network, imgsz=64).to(dtype))


def difference(first: nn.Module, second: nn.Module, **keys: Any) -> float:
    return max_errors(outputs(first, **keys), outputs(second, **keys))[1]
