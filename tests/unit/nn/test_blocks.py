from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable

import pytest
import torch
from nn_factory import make_block, randomise_bn, relative
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad
from ultralytics.nn.modules import Conv, RepConv
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.errors import ModelError
from kd_yolo.nn import reparam
from kd_yolo.nn.blocks import FORMS, ConvBN, RepBlock

SHAPES = [(4, 4), (4, 6), (6, 3)]  # input and output channels: with and without an identity branch
Merge = Callable[[RepBlock], tuple[Tensor, Tensor]]


def merge_error(block: RepBlock, merge: Merge, size: tuple[int, int] = (9, 7)) -> float:
    """Return the relative error of a merge of a block against its training form: the one check of this file."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, block.c1, *size, dtype=torch.float64, generator=generator).to(block.conv.weight.dtype)
    kernel, bias = merge(block)
    dense = block.conv
    with torch.no_grad():
        expected = block(x)
        merged = block.act(conv2d(x, kernel, bias, dense.stride, dense.padding, dense.dilation, dense.groups))
    return relative(expected, merged)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", SHAPES)
def test_merged__equals_training_form_in_float64(form: str, stride: int, channels: tuple[int, int]) -> None:
    for seed, size in itertools.product(range(3), [(9, 7), (8, 8), (1, 1), (5, 2)]):
        block = make_block(*channels, stride, form=form, seed=seed)
        assert merge_error(block, RepBlock.merged, size) <= 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", SHAPES)
def test_merged__equals_training_form_in_float32(form: str, stride: int, channels: tuple[int, int]) -> None:
    block = make_block(*channels, stride, form=form, signs=False).float()
    kernel, bias = block.merged()
    assert kernel.dtype == bias.dtype == torch.float32
    assert merge_error(block, RepBlock.merged) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("groups", "dilation"), [(2, 1), (4, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_merged__groups_and_dilation(form: str, groups: int, dilation: int, stride: int) -> None:
    for c2 in (4, 8):
        assert merge_error(make_block(4, c2, stride, groups, dilation, form=form), RepBlock.merged) <= 1e-12


@pytest.mark.parametrize("branches", [1, 2, 4])
@pytest.mark.parametrize("identity", [True, False])
def test_merged__multi_branches(branches: int, identity: bool) -> None:
    block = make_block(4, 4, form="multi", branches=branches, identity=identity)
    kernels = [tuple(branch.conv.weight.shape[2:]) for branch in block.extra if isinstance(branch, ConvBN)]
    assert kernels == [(3, 3)] * (branches - 1) + [(1, 3), (3, 1)]
    assert (block.bn0 is not None) == identity
    assert merge_error(block, RepBlock.merged) <= 1e-12


def test_merged__tiny_variance() -> None:
    for form in FORMS:
        block = make_block(4, 4, form=form)
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_var is not None
                module.running_var.fill_(1e-12)
        assert merge_error(block, RepBlock.merged) <= 1e-12


def without_identity_bias(block: RepBlock) -> tuple[Tensor, Tensor]:
    """Wrong on purpose: forget the bias of the identity branch."""
    assert block.bn0 is not None
    kernel, bias = block.merged()
    return kernel, bias - reparam.fold_bn(reparam.identity_kernel(block.c1, block.g), None, block.bn0)[1]


def off_centre(block: RepBlock) -> tuple[Tensor, Tensor]:
    """Wrong on purpose: put the 1x1 kernel into a corner of the 3x3 one."""
    assert block.bn1 is not None
    kernel, bias = block.merged()
    pointwise = reparam.fold_bn(block.conv1.weight, None, block.bn1)[0]
    return kernel - pad(pointwise, [1, 1, 1, 1]) + pad(pointwise, [0, 2, 0, 2]), bias


@pytest.mark.parametrize("wrong", [without_identity_bias, off_centre])
def test_merge_error__catches_wrong_merges(wrong: Merge) -> None:
    block = make_block(4, 4, form="repvgg")
    assert merge_error(block, RepBlock.merged) <= 1e-12
    assert merge_error(block, wrong) > 1e-2


def test_merge_error__fresh_batch_norm_proves_nothing() -> None:
    # Statistics and shifts as initialised: the identity's bias is 0, so forgetting it goes unnoticed.
    torch.manual_seed(0)
    fresh = RepBlock(4, 4, form="repvgg").double().eval()
    assert merge_error(fresh, without_identity_bias) <= 1e-12
    randomise_bn(fresh)
    assert merge_error(fresh, without_identity_bias) > 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_to_conv__stock_class_same_function(form: str) -> None:
    for stride, act in ((1, True), (2, nn.ReLU()), (1, False)):
        block = make_block(4, 4, stride, act=act, form=form)
        conv = block.to_conv()
        x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
        assert type(conv) is Conv
        assert type(conv.bn) is nn.BatchNorm2d
        assert (conv.bn.eps, conv.bn.momentum) == (1e-3, 0.03)
        assert conv.act is block.act
        expected = block(x)
        assert relative(expected, conv(x)) <= 1e-12
        assert not conv.training
        assert block.to_conv().bn.running_mean.equal(conv.bn.running_mean)  # nothing was consumed


def test_to_conv__carries_statistics_that_fit_training() -> None:
    # Trained to convergence of its running statistics, the merged qarep block normalises as before in train mode too.
    torch.manual_seed(0)
    block = RepBlock(4, 6, form="qarep").double()
    x = torch.randn(16, 4, 12, 12, dtype=torch.float64)
    for bn in (block.bn, block.bn_out):
        assert bn is not None
        bn.momentum = None  # cumulative average: exactly the batch statistics after one pass
    nn.init.uniform_(block.bn.weight, 0.5, 2.0)
    block.train()(x)
    conv = block.eval().to_conv().train()
    expected = block(x)
    assert relative(expected, conv(x)) < 5e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", SHAPES)
@pytest.mark.parametrize("kernel", [1, 3])
def test_inherit__starts_as_the_trained_convolution(form: str, channels: tuple[int, int], kernel: int) -> None:
    torch.manual_seed(1)
    trained = Conv(*channels, kernel).double().eval()
    randomise_bn(trained, 3, signs=True)
    block = make_block(*channels, form=form)
    block.inherit(trained.conv.weight, trained.bn)
    x = torch.randn(2, channels[0], 9, 7, dtype=torch.float64)
    expected = trained(x)
    assert relative(expected, block(x)) <= 1e-12
    assert merge_error(block, RepBlock.merged) <= 1e-12


@pytest.mark.parametrize("scale", [0.05, 1.0])
@pytest.mark.parametrize(("form", "bound"), [("repvgg", 1e-12), ("multi", 1e-12), ("qarep", 1e-2)])
def test_inherit__train_mode(form: str, bound: float, scale: float) -> None:
    # qarep's outer BatchNorm normalises once more: equal as far as batch and running statistics agree, even where the
    # variance (0.0025 and 1 times 0.3) is near eps = 0.001. Their remaining difference here is 0.97^400 and the
    # unbiased variance's factor 504 / 503.
    torch.manual_seed(1)
    trained = Conv(4, 4, 3).double().train()
    trained.bn.eps, trained.bn.momentum = 1e-3, 0.03
    x = scale * torch.randn(8, 4, 9, 7, dtype=torch.float64)
    for _ in range(400):
        trained(x)
    block = RepBlock(4, 4, form=form).double().train()
    block.inherit(trained.conv.weight, trained.bn)
    assert relative(trained(x), block(x)) <= bound


def test_inherit__other_eps() -> None:
    torch.manual_seed(1)
    trained = Conv(4, 4, 3).double().eval()
    randomise_bn(trained)
    trained.bn.eps = 0.1
    for form in FORMS:
        block = make_block(4, 4, form=form)
        block.inherit(trained.conv.weight, trained.bn)
        x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
        assert relative(trained(x), block(x)) <= 1e-12
        assert {bn.eps for bn in (block.bn, block.bn_out) if bn is not None} == {0.1}


@pytest.mark.parametrize("form", FORMS)
def test_inherit__every_branch_gets_a_gradient_within_two_steps(form: str) -> None:
    torch.manual_seed(1)
    trained = Conv(4, 4, 3)
    block = RepBlock(4, 4, form=form).train()
    block.inherit(trained.conv.weight, trained.bn)
    optimizer = torch.optim.SGD(block.parameters(), 0.1)
    x, target = torch.randn(8, 4, 9, 7), torch.randn(8, 4, 9, 7)
    for _ in range(2):
        optimizer.zero_grad()
        (block(x) - target).square().mean().backward()
        optimizer.step()
    dead = [name for name, p in block.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # a BatchNorm before another one cannot shift the result, and its scale of one branch alone can still change
    assert [name for name in dead if not name.endswith(".bias")] == []


@pytest.mark.parametrize("form", FORMS)
def test_from_conv__keeps_shape_mode_gradient_and_activation(form: str) -> None:
    act = nn.ReLU()
    conv = Conv(4, 8, 3, 2, act=act).eval().requires_grad_(False).double()
    block = RepBlock.from_conv(conv, form)
    assert (block.c1, block.c2, block.conv.stride, block.act) == (4, 8, (2, 2), act)
    assert not block.training
    assert not any(p.requires_grad for p in block.parameters())
    assert all(p.dtype == torch.float64 for p in block.parameters())
    assert RepBlock.from_conv(Conv(4, 4, 3).train(), form).training


@pytest.mark.parametrize("form", FORMS)
def test_fuse_convs__one_convolution_idempotent_and_random_state_untouched(form: str) -> None:
    block = make_block(4, 4, form=form)
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    expected = block(x)
    state = torch.random.get_rng_state()
    block.fuse_convs()
    assert torch.equal(state, torch.random.get_rng_state())
    assert {name for name, _ in block.named_children()} == {"act", "conv"}
    assert not hasattr(block, "conv1")
    kernel = block.conv.weight.clone()
    block.fuse_convs()
    assert torch.equal(kernel, block.conv.weight)
    assert relative(expected, block(x)) <= 1e-12
    assert block.conv.weight.dtype == torch.float64
    assert not block.conv.weight.requires_grad
    assert relative(expected, block.to_conv()(x)) <= 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_block__deepcopy_pickle_half_and_channels_last(form: str) -> None:
    block = make_block(4, 4, form=form, signs=False)
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    expected = block(x)
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(block), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), expected)
        twin.fuse_convs()
        assert torch.allclose(twin(x), expected, rtol=1e-12, atol=1e-12)
        assert hasattr(block, "conv1")  # the copy owns its branches
    last = copy.deepcopy(block).to(memory_format=torch.channels_last)
    assert torch.allclose(last(x.contiguous(memory_format=torch.channels_last)), expected, rtol=1e-12, atol=1e-12)
    half = copy.deepcopy(block).half()
    kernel, bias = half.merged()
    assert kernel.dtype == bias.dtype == torch.float16
    # merged in float64 from half weights, rounded once
    reference = copy.deepcopy(half).double().merged()
    assert torch.equal(kernel, reference[0].half())
    assert torch.equal(bias, reference[1].half())


def test_block__batch_norms_are_ultralytics_own() -> None:
    for form in FORMS:
        norms = [m for m in RepBlock(4, 4, form=form).modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms
        assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.03)}


def test_block__is_repconv_and_never_conv() -> None:
    # stock fuse() picks RepConv by class and would mis-fuse a subclass of Conv without a word
    block = RepBlock(4, 4, form="multi")
    assert isinstance(block, RepConv)
    assert not any(isinstance(module, Conv) for module in block.modules())


def test_block__refuses_unknown_forms() -> None:
    with pytest.raises(ModelError, match="did you mean 'repvgg'"):
        RepBlock(4, 4, form="repvg")
    with pytest.raises(ModelError, match="branches=0"):
        RepBlock(4, 4, form="multi", branches=0)


@pytest.mark.parametrize("form", FORMS)
def test_block__stock_fuse_merges_it(form: str) -> None:
    rows = [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8, 3, 1]], [[-1], 1, "Detect", ["nc"]]]
    model = DetectionModel({"nc": 2, "reg_max": 1, "backbone": rows[:2], "head": rows[2:]}, verbose=False)
    block = RepBlock(8, 8, form=form)
    block.i, block.f, block.type = 1, -1, "RepBlock"
    model.model[1] = block
    randomise_bn(model.double().eval())
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    expected = model(x)[0]
    assert not model.is_fused()
    model.fuse(verbose=False)
    assert model.is_fused()
    assert not hasattr(block, "conv1")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert torch.allclose(model(x)[0], expected, rtol=1e-10, atol=1e-10)
    assert copy.deepcopy(model)(x)[0].equal(model(x)[0])
