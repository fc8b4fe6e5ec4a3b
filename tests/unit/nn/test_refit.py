from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nn_factory import randomise_bn, relative
from torch import Tensor, nn
from torch.nn import functional
from ultralytics.nn.modules import Conv, DWConv

from kd_yolo.nn.blocks import RepBlock
from kd_yolo.nn.growing_channels import Channels, repeated
from kd_yolo.nn.narrowing_sites import Samples, Site, convolution
from kd_yolo.nn.refit import _solve, fit_dense, fit_depthwise, refit


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(a: Tensor, y: Tensor) -> Tensor:
    """Return weights and, last, the bias, (K + 1, O), of an ordinary least-squares fit with a column of ones."""
    solution: Tensor = torch.linalg.lstsq(torch.cat([a, torch.ones_like(a[:, :1])], 1), y).solution
    return solution


def example(
    kernel: int = 3, stride: int = 1, depthwise: bool = False, rep: bool = False
) -> tuple[Site, Tensor, Tensor]:
    """Return a site of 5 of 9 inputs and 4 of 7 outputs (5 of 9 depthwise), and what both networks read there."""
    torch.manual_seed(0)
    inputs, outputs = Channels(torch.tensor([0, 2, 3, 5, 8]), 9), Channels(torch.tensor([1, 2, 4, 6]), 7)
    if depthwise:
        source, target = (DWConv(width, width, kernel, stride) for width in (9, 5))
        outputs = inputs
    else:
        source = Conv(9, 7, kernel, stride)
        target = RepBlock(5, 4, stride) if rep else Conv(5, 4, kernel, stride)
    source, target = source.double().eval(), target.double().eval()
    randomise_bn(source)
    wide = drawn(6, 9, 8, 12) @ drawn(12, 12, seed=1)  # neighbours resemble each other, as in images
    wide = wide + wide.roll(1, 1)  # and so do channels
    return Site(target, source, inputs, outputs), wide, wide[:, inputs.source] + 0.1 * drawn(6, 5, 8, 12, seed=2)


def taken(site: Site, wide: Tensor, rows: int = 24_000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the positions and the outputs that are drawn of the source."""
    samples = Samples([site], len(wide), rows, seed)
    handle = site.end.register_forward_hook(samples.note)
    with torch.no_grad():
        for part in wide.chunk(2):
            site.source(part)
    handle.remove()
    return samples.take(site)


def before_activation(module: nn.Module, x: Tensor) -> Tensor:
    """Return what a convolution writes before its activation."""
    plain: Any = copy.deepcopy(module)
    plain.act = nn.Identity()
    with torch.no_grad():
        result: Tensor = plain(x)
    return result


def columns(x: Tensor, kernel: int, stride: int, channel: slice = slice(None)) -> Tensor:
    patches = functional.unfold(x[:, channel], kernel, padding=kernel // 2, stride=stride)
    return patches.transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize(("kernel", "stride", "rep"), [(1, 1, False), (3, 1, False), (3, 2, False), (3, 2, True)])
def test_refit__dense_equals_ordinary_least_squares(kernel: int, stride: int, rep: bool) -> None:
    site, wide, narrow = example(kernel, stride, rep=rep)
    positions, expected = taken(site, wide)
    refit(site, narrow, positions, expected, 0.0)
    a = columns(narrow, kernel, stride)
    y = before_activation(site.source, wide)[:, site.outputs.source].permute(0, 2, 3, 1).flatten(0, 2)
    best = oracle(a, y)
    result = before_activation(site.target, narrow).permute(0, 2, 3, 1).flatten(0, 2)
    assert relative(a @ best[:-1] + best[-1], result) < 1e-9
    assert (result - y).square().sum() < y.var(0, correction=0).sum() * len(y)


@pytest.mark.parametrize("stride", [1, 2])
def test_refit__depthwise_equals_ordinary_least_squares_of_each_channel(stride: int) -> None:
    site, wide, narrow = example(stride=stride, depthwise=True)
    positions, expected = taken(site, wide)
    refit(site, narrow, positions, expected, 0.0)
    y = before_activation(site.source, wide)[:, site.outputs.source].permute(0, 2, 3, 1).flatten(0, 2)
    result = before_activation(site.target, narrow).permute(0, 2, 3, 1).flatten(0, 2)
    for channel in range(5):
        a = columns(narrow, 3, stride, slice(channel, channel + 1))
        best = oracle(a, y[:, channel : channel + 1])
        assert relative((a @ best[:-1] + best[-1])[:, 0], result[:, channel]) < 1e-9


def test_refit__plain_convolution_with_bias() -> None:
    torch.manual_seed(0)
    source, target = nn.Conv2d(9, 3, 1).double(), nn.Conv2d(5, 3, 1).double()
    inputs = Channels(torch.tensor([0, 2, 3, 5, 8]), 9)
    wide = drawn(6, 9, 8, 8)
    narrow = wide[:, inputs.source]
    site = Site(target, source, inputs, repeated(3, 3))
    refit(site, narrow, *taken(site, wide), 0.0)
    a = narrow.permute(0, 2, 3, 1).flatten(0, 2)
    with torch.no_grad():
        best = oracle(a, source(wide).permute(0, 2, 3, 1).flatten(0, 2))
    assert relative(best[:-1].T, target.weight[:, :, 0, 0]) < 1e-9
    assert target.bias is not None
    assert relative(best[-1], target.bias) < 1e-9


@pytest.mark.parametrize("rep", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_refit__train_mode_agrees_with_eval_mode_on_the_images(rep: bool, stride: int) -> None:
    site, wide, narrow = example(stride=stride, rep=rep)
    target: Any = site.target
    refit(site, narrow, *taken(site, wide), 1e-2)
    z = functional.conv2d(narrow, target.conv.weight, None, stride, 1)
    assert relative(z.mean((0, 2, 3)), target.bn.running_mean) < 1e-12
    assert relative(z.var((0, 2, 3), correction=0), target.bn.running_var) < 1e-12
    evaluated = before_activation(target, narrow)
    assert relative(evaluated, before_activation(target.train(), narrow)) < (1e-2 if rep else 1e-9)


def test_refit__filters_keep_the_norm_of_the_sliced_ones() -> None:
    site, wide, narrow = example()
    source, target = (convolution(one).weight.detach() for one in (site.source, site.target))
    sliced = source[site.outputs.source][:, site.inputs.source]
    refit(site, narrow, *taken(site, wide), 1e-2)
    assert relative(sliced.flatten(1).norm(dim=1), target.flatten(1).norm(dim=1)) < 1e-12
    assert relative(sliced, target) > 0.05


def test_refit__an_exact_layer_is_left_alone() -> None:
    site, wide, _ = example()
    exact = Site(copy.deepcopy(site.source), site.source, repeated(9, 9), repeated(7, 7))
    before = {name: value.clone() for name, value in exact.target.state_dict().items()}
    refit(exact, wide, *taken(exact, wide), 1e-2)
    assert all(torch.equal(value, before[name]) for name, value in exact.target.state_dict().items())


def test_fit_dense__ridge_solves_its_normal_equations_and_pulls_to_the_given_weights() -> None:
    a, y, w0, b0 = drawn(50, 6), drawn(50, 4, seed=1), drawn(4, 6, seed=2), drawn(4, seed=3)
    centred, target = a - a.mean(0), y - y.mean(0)
    penalty = 0.1 * centred.square().sum(0).mean()
    fitted = fit_dense(iter(a.chunk(4)), y, w0, b0, 0.1)
    assert fitted is not None
    # the gradient of |Y - A W' - b|^2 + penalty |W - W0|^2 is 0
    gradient = (centred @ fitted[0].T - target).T @ centred + penalty * (fitted[0] - w0)
    assert gradient.abs().max() < 1e-10
    assert relative((y - a @ fitted[0].T).mean(0), fitted[1]) < 1e-10
    pulled = fit_dense(iter([a]), y, w0, b0, 1e9)
    assert pulled is not None
    assert relative(w0, pulled[0]) < 1e-6


def test_fit_dense__fewer_rows_than_unknowns_and_dead_inputs_keep_what_the_rows_do_not_say() -> None:
    a, y, w0, b0 = drawn(10, 30), drawn(10, 4, seed=1), drawn(4, 30, seed=2), drawn(4, seed=3)
    a[:, 7] = 0.0
    a[:, 8] = 5.0  # a dead channel behind a shift
    for ridge in (0.0, 1e-6):
        fitted = fit_dense(iter([a]), y, w0, b0, ridge)
        assert fitted is not None
        assert all(torch.isfinite(one).all() for one in fitted)
        assert relative(y, a @ fitted[0].T + fitted[1]) < 1e-3
        assert torch.allclose(fitted[0][:, 7:9], w0[:, 7:9], atol=1e-9)
    dead = fit_dense(iter([torch.zeros_like(a)]), y, w0, b0, 1e-3)
    assert dead is not None
    assert torch.equal(dead[0], w0)
    assert torch.allclose(dead[1], y.mean(0))


def test_fit_depthwise__a_dead_channel_keeps_its_kernel() -> None:
    a = drawn(40, 9, 3)
    a[:, :, 1] = 0.0
    y, w0, b0 = drawn(40, 3, seed=1), drawn(3, 9, seed=2), drawn(3, seed=3)
    fitted = fit_depthwise(iter(a.flatten(1).chunk(3)), y, w0, b0, 1e-3)
    assert fitted is not None
    assert torch.equal(fitted[0][1], w0[1])
    assert torch.allclose(fitted[1][1], y[:, 1].mean())
    assert relative(w0[[0, 2]], fitted[0][[0, 2]]) > 0.1


def test_refit__dead_filters_stay_finite() -> None:
    site, wide, narrow = example()
    with torch.no_grad():
        convolution(site.source).weight[site.outputs.source[1]] = 0.0
    refit(site, torch.zeros_like(narrow), *taken(site, wide), 1e-2)
    assert all(torch.isfinite(value).all() for value in site.target.state_dict().values())
    expected = before_activation(site.source, wide)[:, site.outputs.source].mean((0, 2, 3))
    assert torch.allclose(before_activation(site.target, torch.zeros_like(narrow)).mean((0, 2, 3)), expected)


def test_refit__shuffled_channels_are_worse_than_the_slice() -> None:
    site, wide, narrow = example()
    expected = before_activation(site.source, wide)[:, site.outputs.source]
    errors = []
    for order in ([0, 1, 2, 3], [1, 2, 3, 0]):
        positions, values = taken(site, wide)
        refit(site, narrow, positions, values[:, order], 1e-2)
        errors.append(float((before_activation(site.target, narrow) - expected).square().mean() / expected.var()))
    assert errors[1] > 4 * errors[0]
    assert errors[1] > 0.5


def test_samples__keeps_the_same_rows_whatever_the_chunks() -> None:
    site, wide, _ = example(stride=2)
    positions, values = taken(site, wide, rows=50)
    everything = before_activation(site.source, wide)[:, site.outputs.source].permute(0, 2, 3, 1).flatten(0, 2)
    assert len(positions) == len(set(positions.tolist())) == 50
    assert torch.allclose(values, everything[positions], rtol=0, atol=1e-12)
    assert torch.equal(positions, taken(site, wide, rows=50)[0])
    assert not torch.equal(positions, taken(site, wide, rows=50, seed=1)[0])


def test_solve__singular_matrix_gives_the_solution_of_least_norm() -> None:
    a = drawn(3, 6)
    b = drawn(6, 2, seed=1)
    gram = a.T @ a
    expected = torch.linalg.pinv(gram) @ (gram @ b)
    assert relative(expected, _solve(gram, gram @ b, torch.zeros((), dtype=torch.float64))) < 1e-9
