"""Golden numbers of TSKD's formulas: what the authors' released functions give on one deterministic input.

phi = 1 + n + 0.5 c + 0.3 y + 0.2 x, T = sin phi, S = 0.8 sin(phi + 0.4), N = 2, C = 8, H = 10, W = 12, image 120 x 100.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.testing import assert_close

from kd_yolo.distill.ops.attention import channel_attention, decoupled_loss, spatial_attention
from kd_yolo.distill.ops.crossing import match_statistics, soft_focal_bce
from kd_yolo.distill.ops.masks import decoupled_masks
from kd_yolo.distill.ops.relation import attended_map, draw_graph, pool_boxes, relation_loss
from kd_yolo.distill.ops.structure import structural_loss

N, C, H, W = 2, 8, 10, 12
CORNERS = torch.tensor([[15.0, 12, 58, 47], [50, 40, 119, 99], [5, 5, 30, 95]])
IMAGE = torch.tensor([0, 0, 1])
TAU = 0.5


def boxes() -> Tensor:
    """Return the three boxes as a batch holds them: centre x, centre y, width, height in 0..1, float32."""
    scale = torch.tensor([120.0, 100.0])
    return torch.cat([(CORNERS[:, :2] + CORNERS[:, 2:]) / 2 / scale, (CORNERS[:, 2:] - CORNERS[:, :2]) / scale], 1)


def phase() -> Tensor:
    n, c, y, x = torch.meshgrid(*(torch.arange(k, dtype=torch.float32) for k in (N, C, H, W)), indexing="ij")
    return 1 + n + 0.5 * c + 0.3 * y + 0.2 * x


TEACHER, STUDENT = phase().sin(), 0.8 * (phase() + 0.4).sin()


def graph(channels: int, nodes: int) -> dict[str, Tensor]:
    """Return test weights: element i, row-major, is 0.3 cos(i + d), d the dimensions of the layer's own tensor.

    The released unit has 2-D convolutions (4) from and to the map, 1-D ones (3) between nodes and states, biases (1).
    """
    dimensions = {"theta": 4, "phi": 4, "back": 4, "node": 3, "state": 3, "theta_bias": 1, "phi_bias": 1}
    weights = {}
    for name, value in draw_graph(channels, nodes).items():
        d = {**dimensions, "node_bias": 1}.get(name)
        filled = 0.3 * torch.cos(torch.arange(value.numel(), dtype=torch.float64) + d) if d else value
        weights[name] = filled.reshape(value.shape).float()
    return weights


def rounded(values: Tensor, expected: float | list[float]) -> None:
    """Compare with numbers given to six decimals."""
    assert_close(values.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1.5e-6)


def test_spatial_attention__golden() -> None:
    attention = spatial_attention(TEACHER, TAU)
    rounded(torch.stack([attention[0, 0, 0], attention[1, 9, 11]]), [1.120833, 1.003201])
    assert_close(attention.mean((1, 2)), torch.ones(N))


def test_channel_attention__golden() -> None:
    expected = [0.991615, 1.004319, 1.010030, 1.010550, 1.004166, 0.991504, 0.988506, 0.999309]
    attention = channel_attention(TEACHER, TAU)
    rounded(attention[0], expected)
    assert_close(attention.mean(1), torch.ones(N))


def test_decoupled_masks__golden() -> None:
    foreground, background = decoupled_masks(boxes(), IMAGE, N, (H, W))
    assert (foreground > 0).sum((1, 2)).tolist() == [68, 40]
    rounded(foreground.sum((1, 2)), [1.678571, 0.909091])
    assert_close(background.amax((1, 2)), torch.tensor([1 / 52, 1 / 80]))
    assert_close(background.sum((1, 2)), torch.ones(N))


def test_decoupled_loss__golden_and_the_published_total() -> None:
    masks = decoupled_masks(boxes(), IMAGE, N, (H, W))
    losses = torch.stack(decoupled_loss(STUDENT, TEACHER, *masks, TAU))
    rounded(losses, [0.878770, 0.640419])
    assert_close(5e-4 * losses.sum(), torch.tensor(7.59594e-4), rtol=1e-5, atol=0)


def test_structural_loss__golden_with_the_released_window_border_and_range() -> None:
    rounded(structural_loss(STUDENT, TEACHER, window=11, unit_range=False, zero_border=True), 0.214942)


def test_pool_boxes__golden() -> None:
    for maps, expected in (
        (TEACHER, [-0.349571, 0.063270, -0.141196]),
        (STUDENT, [-0.275526, 0.127931, -0.041869]),
    ):
        pooled = pool_boxes(attended_map(maps, TAU), boxes(), IMAGE)
        assert pooled.shape == (3, 6, 6)
        rounded(pooled.mean((1, 2)), expected)


def test_relation_loss__golden_between_boxes() -> None:
    mine, theirs = (pool_boxes(attended_map(x, TAU), boxes(), IMAGE).unsqueeze(0) for x in (STUDENT, TEACHER))
    weights = graph(3, 1)
    rounded(relation_loss(mine, theirs, weights, weights), 0.009379)


def test_relation_loss__golden_between_cells() -> None:
    weights = graph(8, 4)
    rounded(relation_loss(STUDENT, TEACHER, weights, weights), 0.112557)


def test_intended_total__golden() -> None:
    masks = decoupled_masks(boxes(), IMAGE, N, (H, W))
    mine, theirs = (pool_boxes(attended_map(x, TAU), boxes(), IMAGE).unsqueeze(0) for x in (STUDENT, TEACHER))
    terms = [
        *decoupled_loss(STUDENT, TEACHER, *masks, TAU),
        structural_loss(STUDENT, TEACHER, window=11, unit_range=False, zero_border=True),
        relation_loss(mine, theirs, graph(3, 1), graph(3, 1)),
        relation_loss(STUDENT, TEACHER, graph(8, 4), graph(8, 4)),
    ]
    assert_close(5e-4 * torch.stack(terms).sum(), torch.tensor(9.28033e-4), rtol=1e-5, atol=0)


def test_soft_focal_bce__golden() -> None:
    loss = soft_focal_bce(torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, -2.0, -0.5]))
    rounded(loss.sum(), 0.821235)


def test_match_statistics__golden() -> None:
    matched = match_statistics(STUDENT, TEACHER + 0.3)
    rounded(torch.stack([matched[0, 0, 0, 0], matched[1, 7, 9, 11]]), [1.529062, -0.790888])
