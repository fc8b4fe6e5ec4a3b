from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_factory import randomise_bn, relative
from torch import nn
from torch.nn.functional import conv2d

from kd_yolo.errors import ReparamError
from kd_yolo.nn.reparam import bn_variance, fold_bn, identity_kernel, merge_branches, pad_to


def test_fold_bn__hand_values() -> None:
    # gamma / sqrt(var + eps) = 6 / sqrt(3.75 + 0.25) = 3; kernel 2 -> 6; bias (1 - 5) * 3 + 7 = -5
    bn = nn.BatchNorm2d(1, eps=0.25)
    for tensor, value in ((bn.running_mean, 5.0), (bn.running_var, 3.75), (bn.weight, 6.0), (bn.bias, 7.0)):
        assert tensor is not None
        tensor.data.fill_(value)
    kernel, bias = fold_bn(torch.full((1, 1, 1, 1), 2.0), torch.ones(1), bn)
    assert kernel.item() == 6.0
    assert bias.item() == -5.0
    assert fold_bn(torch.full((1, 1, 1, 1), 2.0), None, bn)[1].item() == -8.0
    assert kernel.dtype == bias.dtype == torch.float64


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([(1, 1), (3, 3), (1, 3), (3, 1)]), st.integers(0, 999))
def test_fold_bn__equals_convolution_then_bn(c1: int, c2: int, k: tuple[int, int], seed: int) -> None:
    torch.manual_seed(seed)
    conv, bn = nn.Conv2d(c1, c2, k, bias=bool(seed % 2)).double(), nn.BatchNorm2d(c2).double().eval()
    randomise_bn(bn, seed)
    x = torch.randn(2, c1, 6, 5, dtype=torch.float64)
    kernel, bias = fold_bn(conv.weight, conv.bias, bn)
    assert relative(bn(conv(x)), conv2d(x, kernel, bias)) < 1e-12


def test_fold_bn__without_affine_parameters() -> None:
    conv, bn = nn.Conv2d(2, 3, 1).double(), nn.BatchNorm2d(3, affine=False).double().eval()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    kernel, bias = fold_bn(conv.weight, conv.bias, bn)
    assert relative(bn(conv(x)), conv2d(x, kernel, bias)) < 1e-12


def test_fold_bn__refuses_what_is_not_linear_or_does_not_fit() -> None:
    kernel = torch.zeros(4, 4, 3, 3)
    with pytest.raises(ReparamError, match="without running statistics"):
        fold_bn(kernel, None, nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ReparamError, match="5 channels cannot follow 4"):
        fold_bn(kernel, None, nn.BatchNorm2d(5))


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (3, 3)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("size", [(7, 5), (8, 6)])
def test_pad_to__same_convolution(shape: tuple[int, int], stride: int, dilation: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    kernel = torch.randn(3, 2, *shape, dtype=torch.float64)
    x = torch.randn(1, 2, *size, dtype=torch.float64)
    own = (dilation * (shape[0] // 2), dilation * (shape[1] // 2))
    expected = conv2d(x, kernel, None, stride, own, dilation)
    assert relative(expected, conv2d(x, pad_to(kernel, 3), None, stride, dilation, dilation)) < 1e-12


def test_pad_to__refuses_kernels_without_a_centre() -> None:
    for shape, size in (((2, 2), 3), ((5, 5), 3), ((1, 1), 2)):
        with pytest.raises(ReparamError, match="no centred place"):
            pad_to(torch.zeros(1, 1, *shape), size)


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (6, 1), (6, 2), (6, 3), (6, 6)])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_identity_kernel__returns_its_input(channels: int, groups: int, size: int) -> None:
    x = torch.randn(2, channels, 7, 6, dtype=torch.float64)
    y = conv2d(x, identity_kernel(channels, groups, size), None, 1, size // 2, 1, groups)
    assert torch.equal(x, y)


def test_identity_kernel__refuses_impossible_shapes() -> None:
    with pytest.raises(ReparamError, match="5 channels in 2 groups"):
        identity_kernel(5, 2)
    with pytest.raises(ReparamError, match="size 2"):
        identity_kernel(4, 1, 2)


def test_merge_branches__adds_up_and_refuses_the_rest() -> None:
    branches = [(torch.ones(1, 1, 1, 1), torch.ones(1)), (torch.full((1, 1, 3, 3), 2.0), torch.full((1,), 4.0))]
    kernel, bias = merge_branches(branches)
    assert kernel.tolist() == [[[[2.0, 2.0, 2.0], [2.0, 3.0, 2.0], [2.0, 2.0, 2.0]]]]
    assert bias.tolist() == [5.0]
    with pytest.raises(ReparamError, match="no branch"):
        merge_branches([])
    with pytest.raises(ReparamError, match="different shapes"):
        merge_branches([*branches, (torch.ones(2, 1, 1, 1), torch.ones(2))])


def test_bn_variance__is_the_variance_of_the_output() -> None:
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(3, momentum=None).double()
    nn.init.uniform_(bn.weight, -2, 2)
    x = torch.randn(64, 3, 16, 16, dtype=torch.float64) * torch.tensor([0.01, 1.0, 5.0]).reshape(1, 3, 1, 1)
    bn.train()(x)  # momentum None: running statistics become the batch's, with the unbiased variance
    assert torch.allclose(bn_variance(bn), bn.eval()(x).var((0, 2, 3)), rtol=1e-9)
