"""The tensor functions of TSKD, FGD and CrossKD against slow, literal twins and against torchvision."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import generalized_box_iou_loss, roi_align

from kd_yolo.distill.ops.attention import channel_attention, decoupled_loss, spatial_attention
from kd_yolo.distill.ops.crossing import generalized_overlap_loss, match_statistics, soft_focal_bce, soft_positives
from kd_yolo.distill.ops.masks import decoupled_masks, grid_boxes, ground_truth
from kd_yolo.distill.ops.relation import draw_graph, graph_reason, pool_boxes
from kd_yolo.distill.ops.structure import structural_loss, window_matrix

SEEDS = range(5)


def stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_boxes(count: int, images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return boxes that may stick out of the canvas, and their images."""
    values = torch.rand(count, 4, generator=stream(seed))
    return values * torch.tensor([1, 1, 0.6, 0.6]), torch.randint(images, (count,), generator=stream(seed + 1))


def masks_by_loops(boxes: Tensor, image: Tensor, images: int, size: tuple[int, int], inclusive: bool = True) -> Tensor:
    height, width = size
    foreground = torch.zeros(images, height, width)
    for (x, y, w, h), i in zip(boxes.tolist(), image.tolist(), strict=True):
        x1, x2 = math.floor((x - w / 2) * width), math.ceil((x + w / 2) * width)
        y1, y2 = math.floor((y - h / 2) * height), math.ceil((y + h / 2) * height)
        share, end = 1 / ((y2 - y1 + 1) * (x2 - x1 + 1)), 1 if inclusive else 0
        for row in range(max(y1, 0), min(y2 + end, height)):
            for column in range(max(x1, 0), min(x2 + end, width)):
                foreground[i, row, column] = max(foreground[i, row, column].item(), share)
    return foreground


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [(7, 5), (1, 1), (12, 20)])
def test_decoupled_masks__against_loops(seed: int, size: tuple[int, int]) -> None:
    boxes, image = random_boxes(6, 3, seed)
    foreground, background = decoupled_masks(boxes, image, 3, size)
    assert_close(foreground, masks_by_loops(boxes, image, 3, size))
    outside = foreground == 0
    assert_close(background.sum((1, 2)), outside.any(-1).any(-1).float())
    assert float((background * foreground).abs().max()) == 0


def test_decoupled_masks__a_twin_with_open_ends_is_caught() -> None:
    boxes, image = random_boxes(6, 3, 0)
    foreground, _ = decoupled_masks(boxes, image, 3, (12, 20))
    assert not torch.allclose(foreground, masks_by_loops(boxes, image, 3, (12, 20), inclusive=False))


@pytest.mark.parametrize("cells", [10, 12, 28, 80])
def test_grid_boxes__box_on_cell_edges_does_not_grow_by_rounding(cells: int) -> None:
    edges = torch.combinations(torch.arange(cells + 1))
    corners = edges.float() / cells
    first, last = corners.unbind(1)
    boxes = torch.stack([(first + last) / 2, (first + last) / 2, last - first, last - first], 1)
    assert_close(grid_boxes(boxes, (cells, cells))[:, ::2], edges.float(), rtol=0, atol=0)


def test_ground_truth__missing_or_other_type() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    assert [len(x) for x in ground_truth({}, like)] == [0, 0]
    boxes, image = ground_truth({"bboxes": torch.rand(2, 4), "batch_idx": torch.tensor([[0.0], [3.0]])}, like)
    assert boxes.dtype == torch.float64
    assert image.tolist() == [0, 3]


@pytest.mark.parametrize("scaled", [False, True])
def test_attention__mean_one_and_sharper_at_a_lower_temperature(scaled: bool) -> None:
    feature = torch.randn(2, 6, 5, 4, generator=stream(0))
    for attention, dims in ((spatial_attention, (1, 2)), (channel_attention, (1,))):
        blunt, sharp = attention(feature, 1.0, scaled), attention(feature, 0.1, scaled)
        assert_close(blunt.mean(dims), torch.ones(2))
        assert bool((sharp.amax(dims) > blunt.amax(dims)).all())


def test_attention__scaled_ignores_the_size_of_the_features() -> None:
    feature = torch.randn(2, 6, 5, 4, generator=stream(0))
    for attention in (spatial_attention, channel_attention):
        assert_close(attention(30 * feature, 0.5, True), attention(feature, 0.5, True))
        assert not torch.allclose(attention(30 * feature, 0.5), attention(feature, 0.5))
        assert bool(torch.isfinite(attention(0 * feature, 0.5, True)).all())


def test_decoupled_loss__literal_sum_and_a_twin_with_the_students_attention() -> None:
    student, teacher = (torch.randn(2, 6, 5, 4, generator=stream(s)) for s in (0, 1))
    boxes, image = random_boxes(4, 2, 2)
    masks = decoupled_masks(boxes, image, 2, (5, 4))

    def literal(attended: Tensor) -> Tensor:
        weight = spatial_attention(attended, 0.5)[:, None] * channel_attention(attended, 0.5)[:, :, None, None]
        return torch.stack([(mask[:, None] * weight * (student - teacher) ** 2).sum() / 2 for mask in masks])

    losses = torch.stack(decoupled_loss(student, teacher, *masks, 0.5))
    assert_close(losses, literal(teacher))
    assert not torch.allclose(losses, literal(student), rtol=1e-3)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [(7, 9), (1, 1), (2, 30)])
def test_pool_boxes__equals_torchvision(seed: int, size: tuple[int, int]) -> None:
    values = torch.randn(3, *size, generator=stream(seed))
    boxes, image = random_boxes(8, 3, seed)
    cells = grid_boxes(boxes, size)
    rois = torch.cat([image[:, None].float(), cells[:, :2], cells[:, 2:] + 1], 1)
    expected = roi_align(values[:, None], rois, 6, 1.0, 2, aligned=False).squeeze(1)
    assert_close(pool_boxes(values, boxes, image), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, roi_align(values[:, None], rois, 6, 1.0, 2, aligned=True).squeeze(1))


def literal_graph(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """GloRe as its paper writes it, U and V'' P built in full."""
    flat = x.flatten(2)
    u = w["theta"] @ flat + w["theta_bias"][:, None]
    p = w["phi"] @ flat + w["phi_bias"][:, None]
    v = u @ p.transpose(1, 2) / flat.shape[2]
    v = w["state"] @ (v + v @ w["node"].T + w["node_bias"]).relu()
    y = w["back"] @ (v @ p)
    mean, variance = y.mean((0, 2), keepdim=True), y.var((0, 2), unbiased=False, keepdim=True)
    return (flat + (y - mean) / (variance + 1e-4).sqrt()).reshape(x.shape)


@pytest.mark.parametrize("seed", SEEDS)
def test_graph_reason__equals_the_literal_unit(seed: int) -> None:
    x = torch.randn(2, 6, 5, 4, generator=stream(seed), dtype=torch.float64)
    weights = {name: value.double() for name, value in draw_graph(6, 3, stream(seed)).items()}
    assert_close(graph_reason(x, weights), literal_graph(x, weights))
    assert not torch.allclose(graph_reason(x, weights), x)


def test_graph_reason__single_value_and_zero_gamma_are_the_identity() -> None:
    weights = draw_graph(6, 3, stream(0))
    one = torch.randn(1, 6, 1, 1, generator=stream(1))
    assert_close(graph_reason(one, weights), one)
    more = torch.randn(2, 6, 3, 3, generator=stream(1))
    assert_close(graph_reason(more, {**weights, "gamma": torch.zeros(6)}), more)


def test_draw_graph__pytorchs_bounds_and_its_own_stream() -> None:
    before = torch.get_rng_state()
    weights, again = (draw_graph(64, 16, stream(0)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    for name, fan_in in (("theta", 64), ("phi", 64), ("node", 16), ("state", 32), ("back", 32)):
        layer = torch.nn.Linear(fan_in, 1000)
        bound = float(layer.weight.detach().abs().max())
        assert 0.8 * bound < float(weights[name].abs().max()) <= 1.01 * bound


@pytest.mark.parametrize("zero_border", [True, False])
@pytest.mark.parametrize(("height", "width", "window"), [(9, 13, 7), (3, 4, 11), (1, 1, 7)])
def test_structural_loss__equals_depthwise_convolution(height: int, width: int, window: int, zero_border: bool) -> None:
    student, teacher = (torch.rand(2, 3, height, width, generator=stream(s), dtype=torch.float64) for s in (0, 1))
    line = torch.exp(-((torch.arange(window, dtype=torch.float64) - window // 2) ** 2) / (2 * 1.5**2))
    kernel = (line[:, None] * line / line.sum() ** 2).expand(3, 1, window, window)

    def blur(x: Tensor) -> Tensor:
        total = F.conv2d(x, kernel, padding=window // 2, groups=3)
        return total if zero_border else total / F.conv2d(torch.ones_like(x), kernel, padding=window // 2, groups=3)

    mx, my = blur(student), blur(teacher)
    sx, sy, sxy = blur(student**2) - mx**2, blur(teacher**2) - my**2, blur(student * teacher) - mx * my
    ssim = (2 * mx * my + 1e-4) * (2 * sxy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (sx + sy + 9e-4))
    loss = structural_loss(student, teacher, window, unit_range=False, zero_border=zero_border)
    assert_close(loss, (1 - ssim.mean()) / 2)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (20, 20)])
def test_structural_loss__bounded_zero_at_equality_and_free_of_scale(size: tuple[int, int]) -> None:
    student, teacher = (10 * torch.randn(2, 4, *size, generator=stream(s)) + 5 for s in (0, 1))
    loss = structural_loss(student, teacher)
    assert 0 < loss.item() < 1
    assert abs(structural_loss(teacher, teacher).item()) < 1e-6
    assert_close(structural_loss(100 * student, 100 * teacher), loss, rtol=1e-4, atol=1e-6)
    flat = torch.full_like(teacher, 3.0)
    assert bool(torch.isfinite(structural_loss(student, flat)))


@pytest.mark.parametrize("size", [1, 3, 20])
def test_window_matrix__rows_sum_to_one_inside_the_map(size: int) -> None:
    like = torch.zeros(1, dtype=torch.float64)
    assert_close(window_matrix(size, 7, like).sum(1), torch.ones(size, dtype=torch.float64))
    padded = window_matrix(size, 7, like, zero_border=True).sum(1)
    assert bool((padded <= 1 + 1e-12).all())
    assert padded[0] < 1


@pytest.mark.parametrize("seed", SEEDS)
def test_match_statistics__has_the_teachers_and_lets_the_gradient_through_its_own(seed: int) -> None:
    student = torch.randn(3, 4, 5, 2, generator=stream(seed), dtype=torch.float64, requires_grad=True)
    teacher = 3 * torch.randn(3, 4, 5, 2, generator=stream(seed + 9), dtype=torch.float64) + 1
    matched = match_statistics(student, teacher)
    for mine, theirs in zip(torch.std_mean(matched, (0, 2, 3)), torch.std_mean(teacher, (0, 2, 3)), strict=True):
        assert_close(mine, theirs, rtol=1e-5, atol=1e-8)
    grad = torch.autograd.grad(matched.square().sum(), student)[0]
    assert (
        float(grad.abs().max()) < 1e-4
    )  # sum of squares is fixed by mean and deviation: only a detached twin moves it
    assert torch.autograd.gradcheck(lambda x: match_statistics(x, teacher), (student,))


def test_match_statistics__constant_channels_and_single_values() -> None:
    single = torch.randn(1, 4, 1, 1, requires_grad=True)
    assert torch.equal(match_statistics(single, torch.zeros(1, 4, 1, 1)), single)
    flat = torch.ones(2, 4, 3, 3, requires_grad=True)
    matched = match_statistics(flat, torch.randn(2, 4, 3, 3))
    torch.autograd.backward(matched.square().sum())
    assert bool(torch.isfinite(matched).all())
    assert flat.grad is not None
    assert bool(torch.isfinite(flat.grad).all())


def test_soft_focal_bce__zero_at_agreement_and_for_masked_classes() -> None:
    logits = torch.linspace(-20, 20, 41)
    assert float(soft_focal_bce(logits, logits).abs().max()) == 0
    masked = torch.tensor([-1e4])
    assert float(soft_focal_bce(masked, masked)) == 0
    assert bool((soft_focal_bce(logits, logits.flip(0))[logits != 0] > 0).all())


@pytest.mark.parametrize("seed", SEEDS)
def test_generalized_overlap_loss__equals_torchvision_and_is_bounded_for_any_corners(seed: int) -> None:
    first, second = (torch.rand(2, 40, 4, generator=stream(seed + s)) * 100 for s in (0, 50))
    valid = [torch.cat([torch.minimum(b[..., :2], b[..., 2:]), torch.maximum(b[..., :2], b[..., 2:]) + 1], -1) for b in
             (first, second)]  # fmt: skip
    assert_close(generalized_overlap_loss(*valid), generalized_box_iou_loss(*valid), rtol=1e-5, atol=1e-5)
    inverted = generalized_overlap_loss(first, valid[1])
    assert float(inverted.min()) >= -1e-5
    assert float(inverted.max()) <= 2 + 1e-5


def test_soft_positives__targets_then_foreground_then_confidence_and_never_below_one() -> None:
    confidence = torch.full((2, 10), 0.3)
    scores, mask = torch.zeros(2, 10, 3), torch.zeros(2, 10, dtype=torch.bool)
    assert soft_positives({}, confidence).item() == pytest.approx(6.0)
    assert soft_positives({"target_scores": scores, "fg_mask": mask}, confidence).item() == pytest.approx(6.0)
    mask[0, :4] = True
    assert soft_positives({"target_scores": scores, "fg_mask": mask}, confidence).item() == 4.0
    scores[0, :3] = 0.5
    assert soft_positives({"target_scores": scores, "fg_mask": mask}, confidence).item() == 4.5
    assert soft_positives({}, confidence / 100).item() == 1.0
