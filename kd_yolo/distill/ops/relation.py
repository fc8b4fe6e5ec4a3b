"""Graph reasoning over a feature map and over the boxes in it, as losses.

The unit is GloRe: Chen et al., "Graph-Based Global Reasoning Networks", CVPR 2019, arXiv:1811.12814, section 3, here
with the projections averaged over the Q positions. Distilling what it makes of both maps: Ni et al., "Dual Relation
Knowledge Distillation for Object Detection", IJCAI 2023, arXiv:2302.05637. The self-attended one-channel map and the
pooled boxes follow the released code of TSKD (Wen et al., Computers in Industry 166, 2025, 104252).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_yolo.distill.ops.attention import channel_attention, spatial_attention
from kd_yolo.distill.ops.masks import grid_boxes

BN_EPS = 1e-4


def draw_graph(channels: int, nodes: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Draw the weights of a unit: m nodes of s = 2 m states, with PyTorch's bounds for convolutions.

    Args:
        channels: C of the maps it reasons over.
        nodes: m.
        generator: Random stream on the CPU; None uses the global one.

    Returns:
        ``theta`` (s, C) and ``phi`` (m, C), what a position says and which nodes it belongs to, with biases; ``node``
        (m, m), the graph's edges, with bias; ``state`` (s, s); ``back`` (C, s); ``gamma``, ``beta`` (C,) of the
        normalisation.
    """
    states = 2 * nodes

    def uniform(fan_in: int, *shape: int) -> Tensor:
        bound = fan_in**-0.5
        return torch.rand(*shape, generator=generator) * (2 * bound) - bound

    return {
        "theta": uniform(channels, states, channels),
        "theta_bias": uniform(channels, states),
        "phi": uniform(channels, nodes, channels),
        "phi_bias": uniform(channels, nodes),
        "node": uniform(nodes, nodes, nodes),
        "node_bias": uniform(nodes, nodes),
        "state": uniform(states, states, states),
        "back": uniform(states, channels, states),
        "gamma": torch.ones(channels),
        "beta": torch.zeros(channels),
    }


def graph_unit(channels: int, nodes: int, trainable: bool, gamma: float = 1.0) -> nn.Module:
    """Return a module that only holds a unit's weights, as parameters or as buffers; see ``graph_weights``.

    A frozen unit must not be made of parameters without gradient: Ultralytics' trainer switches those on again.
    """
    holder = nn.Module()
    for name, value in draw_graph(channels, nodes).items():
        value = value * gamma if name == "gamma" else value
        if trainable:
            holder.register_parameter(name, nn.Parameter(value))
        else:
            holder.register_buffer(name, value)
    return holder


def graph_weights(unit: nn.Module) -> dict[str, Tensor]:
    """Return the weights that ``graph_unit`` stored, by name."""
    return {**dict(unit.named_parameters()), **dict(unit.named_buffers())}


def graph_reason(feature: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Return X + BN(W_e V'' P), (B, C, H, W), of the unit with these weights.

        U = W_theta X + b    P = W_phi X + b    V = U P^T / Q    V' = V + V W_a^T + b_a    V'' = W_g ReLU(V')

    U (B, s, Q) and V'' P (B, s, Q) are never built: W_theta (X P^T) / Q and (W_e V'') P are the same numbers for less
    than half of the work. BN uses the statistics of this batch and keeps none; over a single value it gives 0.

    Args:
        feature: X, (B, C, H, W), Q = H W.
        weights: See ``draw_graph``.
    """
    x = feature.flatten(2)
    nodes = weights["phi"] @ x + weights["phi_bias"][:, None]
    gathered = x @ nodes.transpose(1, 2) / x.shape[2]
    state = weights["theta"] @ gathered + weights["theta_bias"][:, None] * nodes.mean(2).unsqueeze(1)
    state = state + state @ weights["node"].T + weights["node_bias"]
    y = weights["back"] @ (weights["state"] @ state.relu()) @ nodes
    if y.shape[0] * y.shape[2] > 1:
        y = F.batch_norm(y, None, None, weights["gamma"], weights["beta"], training=True, eps=BN_EPS)
    else:
        y = (y - y) + weights["beta"][:, None]
    return (x + y).reshape(feature.shape)


def relation_loss(student: Tensor, teacher: Tensor, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Tensor:
    """Return the mean squared difference of what two units make of two maps (B, C, H, W), a scalar."""
    return F.mse_loss(graph_reason(student, mine), graph_reason(teacher, theirs))


def attended_map(feature: Tensor, tau: float, scaled: bool = False) -> Tensor:
    """Return E = mean over channels of F A^s A^c, each by F's own attention, (B, H, W)."""
    weighted = (feature * channel_attention(feature, tau, scaled)[:, :, None, None]).mean(1)
    return weighted * spatial_attention(feature, tau, scaled)


def pool_boxes(values: Tensor, boxes: Tensor, image: Tensor, bins: int = 6, samples: int = 2) -> Tensor:
    """Return RoIAlign (He et al., ICCV 2017) of a one-channel map, (N, bins, bins), in the legacy convention.

    The same numbers as ``torchvision.ops.roi_align(..., aligned=False)``. Bilinear sampling is separable, so each box
    is a product with two small matrices: deterministic on a GPU, where torchvision's is not and, asked to be, compiles
    a kernel during training.

    Args:
        values: (B, H, W).
        boxes: Centre x, centre y, width, height in 0..1 of the canvas, (N, 4); pooled from X1, Y1 to X2 + 1, Y2 + 1
            of ``grid_boxes``.
        image: Image of each box, (N,) integers.
        bins: Bins a side.
        samples: Samples a side of each bin.
    """
    count, height, width = values.shape
    x1, y1, x2, y2 = grid_boxes(boxes, (height, width)).unbind(1)
    rows, columns = (
        _bin_weights(start, end + 1, n, bins, samples) for start, end, n in ((y1, y2, height), (x1, x2, width))
    )
    chosen = F.one_hot(image, count).to(values) @ values.flatten(1)
    return rows @ chosen.reshape(-1, height, width) @ columns.transpose(1, 2)


def _bin_weights(start: Tensor, end: Tensor, cells: int, bins: int, samples: int) -> Tensor:
    """Return how much each cell counts in each bin along one side, (N, bins, cells)."""
    step = (end - start).clamp_min(1.0) / (bins * samples)
    offsets = torch.arange(bins * samples, device=start.device, dtype=start.dtype) + 0.5
    at = start[:, None] + offsets * step[:, None]
    inside = (at >= -1) & (at <= cells)
    grid = torch.arange(cells, device=start.device, dtype=start.dtype)
    weight = (1 - (at.clamp(0, cells - 1).unsqueeze(2) - grid).abs()).clamp_min(0) * inside.unsqueeze(2)
    return weight.unflatten(1, (bins, samples)).mean(2)
