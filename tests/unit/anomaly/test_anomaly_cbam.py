from __future__ import annotations

import pytest
import torch
from anomaly_models import stir_norms
from torch import Tensor, nn

from kd_yolo.anomaly.cbam import CBAM, add_to_blocks
from kd_yolo.anomaly.foreign import model_yaml
from kd_yolo.anomaly.student import Student


def reference(block: CBAM, x: Tensor) -> Tensor:
    """The equations with plain sums and loops over the channel gate, written from the paper's equations 2 and 3."""
    assert block.reduce.bias is not None
    assert block.expand.bias is not None
    first, second = block.reduce.bias, block.expand.bias
    average, largest = x.flatten(2).mean(2), x.flatten(2).max(2).values

    def mlp(pooled: Tensor) -> Tensor:
        hidden = (pooled @ block.reduce.weight.flatten(1).T + first).clamp_min(0)
        return hidden @ block.expand.weight.flatten(1).T + second

    x = x * 2 * torch.sigmoid(mlp(average) + mlp(largest))[:, :, None, None]
    summary = torch.stack((x.max(1).values, x.mean(1)), 1)
    logits = nn.functional.conv2d(summary, block.spatial.weight, padding=3)
    return x * 2 * torch.sigmoid(block.bn(logits))


def test_cbam__starts_as_the_identity() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 24, 9, 7)
    for training in (True, False):
        assert torch.equal(CBAM(24).train(training)(x), x)


def test_cbam__equations() -> None:
    torch.manual_seed(0)
    block = CBAM(32).eval()
    nn.init.normal_(block.expand.weight)
    stir_norms(block)
    x = torch.randn(2, 32, 8, 6)
    torch.testing.assert_close(block(x), reference(block, x))
    assert (block(x) - x).abs().max() > 0.1  # else the comparison proves nothing


@pytest.mark.parametrize(("channels", "hidden"), [(16, 4), (64, 4), (128, 8), (256, 16)])
def test_cbam__hidden_width(channels: int, hidden: int) -> None:
    assert CBAM(channels).reduce.out_channels == hidden


def test_cbam__every_part_can_learn() -> None:
    torch.manual_seed(0)
    block = CBAM(16)
    optimizer = torch.optim.SGD(block.parameters(), 0.1)
    for _ in range(2):  # the layers behind the zero ones get a gradient from the second step on
        optimizer.zero_grad()
        (block(torch.randn(4, 16, 8, 8)) - 1).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in block.parameters())


@pytest.mark.parametrize(("cbam", "plus", "count"), [("none", True, 0), ("stage", False, 3), ("stage", True, 4)])
def test_student__where_attention_stands(cbam: str, plus: bool, count: int) -> None:
    student = Student(model_yaml("yolo26n-cls"), [4, 8, 16], cbam, plus)
    assert sum(isinstance(module, CBAM) for module in student.modules()) == count
    assert sum(isinstance(module, CBAM) for module in student.gates) == count
    assert list(student.channels) == [4, 8, 16, 32][: 3 + plus]


def test_student__attention_in_every_block() -> None:
    student = Student(model_yaml("yolo26n-cls"), [4, 8, 16], "block", False)
    plain = Student(model_yaml("yolo26n-cls"), [4, 8, 16], "none", False)
    assert sum(isinstance(module, CBAM) for module in student.modules()) == add_to_blocks(plain) > 2
    assert not any(isinstance(gate, CBAM) for gate in student.gates)
    x = torch.rand(1, 3, 64, 64)
    assert {stride: value.shape for stride, value in student.eval()(x).items()} == {
        stride: value.shape for stride, value in plain.eval()(x).items()
    }


def test_student__gated_map_feeds_the_next_stage() -> None:
    torch.manual_seed(0)
    student = Student(model_yaml("yolo26n-cls"), [4, 8], "stage", False).eval()
    x = torch.rand(1, 3, 64, 64)
    before = student(x)
    gate = student.gates[0]
    assert isinstance(gate, CBAM)
    nn.init.constant_(gate.bn.bias, 3.0)
    after = student(x)
    assert not torch.allclose(before[4], after[4])
    assert not torch.allclose(before[8], after[8])
