"""One-to-all matching of HFLKD: the attention, the grid and the normalisation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kd_yolo.distill.methods.hflkd import Side, one_to_all_loss
from kd_yolo.distill.ops.features import standardise
from kd_yolo.distill.ops.matching import attend, grid_average, head_count, limited_size, weighted_position_l2


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matching_matrix(query: Tensor, key: Tensor, heads: int, scale: float = 1.0) -> Tensor:
    """Read M, (B, h, N, N), out of ``attend`` by asking for the mixture of unit vectors."""
    batch, _, positions = query.shape
    unit = torch.eye(positions, dtype=query.dtype).repeat(batch, heads, 1)  # (B, h N, N): one eye a head
    return attend(query, key, unit, heads, scale).reshape(batch, heads, positions, positions).transpose(2, 3)


@pytest.mark.parametrize(("channels", "heads"), [(1, 1), (7, 7), (13, 1), (16, 8), (36, 6), (64, 8), (100, 5)])
def test_head_count__largest_divisor_not_above_8(channels: int, heads: int) -> None:
    assert head_count(channels) == heads


@pytest.mark.parametrize("size", [(28, 28), (7, 5), (20, 33), (20, 20), (1, 1)])
@pytest.mark.parametrize("grid", [20, 3])
def test_grid_average__equals_adaptive_average_pooling(size: tuple[int, int], grid: int) -> None:
    values = draw(2, 3, *size)
    out = limited_size(size, grid)
    torch.testing.assert_close(grid_average(values, out), F.adaptive_avg_pool2d(values, out))


def test_grid_average__a_map_that_fits_is_not_copied() -> None:
    values = draw(1, 2, 7, 7)
    assert grid_average(values, limited_size((7, 7), 20)) is values


def test_grid_average__enlarges_as_adaptive_pooling_does() -> None:
    values = draw(2, 3, 1, 2)
    torch.testing.assert_close(grid_average(values, (3, 3)), F.adaptive_avg_pool2d(values, (3, 3)))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attend__rows_of_the_matching_matrix_sum_to_1_and_follow_the_definition(heads: int) -> None:
    query, key = draw(2, 8, 6), draw(2, 8, 6, seed=1)
    matrix = matching_matrix(query, key, heads, scale=1.7)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, heads, 6, dtype=torch.float64))
    d = 8 // heads
    a, b = query.reshape(2, heads, d, 6), key.reshape(2, heads, d, 6)
    logits = 1.7 * torch.einsum("bhdi,bhdj->bhij", a, b) / d**0.5
    torch.testing.assert_close(matrix, logits.softmax(-1))
    value = draw(2, 8, 6, seed=2)
    mixed = torch.einsum("bhij,bhdj->bhdi", logits.softmax(-1), value.reshape(2, heads, d, 6)).reshape(2, 8, 6)
    torch.testing.assert_close(attend(query, key, value, heads, 1.7), mixed)


@pytest.mark.filterwarnings("ignore:Flash attention kernel not used", "ignore:All fused kernels require")
def test_attend__uses_the_fused_kernel_which_never_holds_the_matching_matrix() -> None:
    query, key = draw(2, 16, 50).float().requires_grad_(), draw(2, 16, 50, seed=1).float().requires_grad_()
    a, b = (x.reshape(2, 8, 2, 50).transpose(2, 3) for x in (query, key))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torch.autograd.backward(attend(query, key, key, 8).sum())
        with pytest.raises(RuntimeError, match="No available kernel"):  # what a transposed view would get
            F.scaled_dot_product_attention(a, b, b)


def test_attend__of_one_position_is_the_value() -> None:
    student = draw(3, 8, 1)
    torch.testing.assert_close(attend(draw(3, 8, 1, seed=1), student, student, 8), student)


def test_attend__permuting_the_teacher_permutes_columns_when_the_student_asks() -> None:
    student, teacher, order = draw(2, 8, 5), draw(2, 8, 5, seed=1), torch.tensor([3, 0, 4, 1, 2])
    matrix = matching_matrix(student, teacher, 2)
    torch.testing.assert_close(matching_matrix(student, teacher[..., order], 2), matrix[..., order])


def test_attend__permuting_the_teacher_permutes_rows_when_the_teacher_asks() -> None:
    student, teacher, order = draw(2, 8, 5), draw(2, 8, 5, seed=1), torch.tensor([3, 0, 4, 1, 2])
    matrix = matching_matrix(teacher, student, 2)
    torch.testing.assert_close(matching_matrix(teacher[..., order], student, 2), matrix[:, :, order])


def test_one_to_all_loss__permuted_student_positions_change_nothing_when_the_teacher_asks() -> None:
    # Each teacher position looks among all of the student's: where the student put the answer does not matter.
    student, teacher, weight, order = draw(2, 8, 5), draw(2, 8, 5, seed=1), draw(2, 5).abs(), [3, 0, 4, 1, 2]
    loss = one_to_all_loss(student, teacher, weight, "teacher", 2.0)
    torch.testing.assert_close(one_to_all_loss(student[..., order], teacher, weight, "teacher", 2.0), loss)
    other = one_to_all_loss(student[..., order], teacher, weight, "student", 2.0)
    assert abs(float(other - one_to_all_loss(student, teacher, weight, "student", 2.0))) > 1e-3


@pytest.mark.parametrize("query", ["teacher", "student"])
def test_one_to_all_loss__vanishes_at_equality_with_sharp_similarity(query: Side) -> None:
    # 64 channels a head: <e_i, e_i> is about 64 +- 11 and <e_i, e_j> about 0 +- 8, so each position finds itself.
    maps = standardise(draw(2, 512, 2, 3)).flatten(2)
    weight = torch.ones(2, 6, dtype=torch.float64)
    blurred, sharp = (float(one_to_all_loss(maps, maps, weight, query, scale)) for scale in (0.1, 100.0))
    assert sharp < 1e-6
    assert blurred > 0.3


def test_one_to_all_loss__standardising_only_one_side_is_unreachable() -> None:
    # The released code compares a map that cannot be negative with a whitened one. The best a mixture of non-negative
    # vectors can do is 0 wherever the target is negative: E[min(e, 0)^2] = 1/2 for a symmetric target of variance 1.
    teacher = standardise(draw(4, 64, 10, 10)).flatten(2)
    weight = torch.ones(4, 100, dtype=torch.float64)
    unreachable = float(weighted_position_l2(teacher.clamp_min(0), teacher, weight))
    assert 0.45 < unreachable < 0.55
    random_student = draw(4, 64, 100, seed=1).abs()
    assert float(one_to_all_loss(random_student, teacher, weight, "student", 8.0)) > 0.45


def test_weighted_position_l2__golden_and_without_weight() -> None:
    student, teacher = torch.tensor([[[1.0, 2.0], [0.0, 4.0]]]), torch.zeros(1, 2, 2)
    # position 0: 1 + 0 = 1, position 1: 4 + 16 = 20; two channels: (1 * 3 + 20 * 1) / (2 * 4) and (1 + 20) / (2 * 2)
    assert float(weighted_position_l2(student, teacher, torch.tensor([[3.0, 1.0]]))) == pytest.approx(23 / 8)
    assert float(weighted_position_l2(student, teacher, torch.zeros(1, 2))) == pytest.approx(21 / 4)
