"""Any number of images through a graph that takes so many at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_yolo.errors import ConfigError, ModelError
from kd_yolo.runtimes import Description, Session


class Sums(Session):
    """Answers with the sum of every image, always from the same memory, as a runtime may."""

    def __init__(self, batch: int, dynamic: bool = False, head: str = "nms") -> None:
        self.runtime = "test"
        self.canvas = (32, 64)
        names = {0: "a", 1: "b"}
        self.description = Description("onnx", names, 32, 3, self.canvas, batch, dynamic, "fp32", head)
        self.calls: list[int] = []
        self.memory = torch.zeros(64, 6, 9)

    def infer(self, pixels: Tensor) -> Tensor:
        self.calls.append(len(pixels))
        output = self.memory[: len(pixels)]
        output.copy_(pixels.sum((1, 2, 3))[:, None, None].expand_as(output))
        return output


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 13), batch=st.integers(1, 6))
def test_call__any_number_through_a_fixed_batch(count: int, batch: int) -> None:
    pixels = torch.rand(count, 3, 32, 64, generator=torch.Generator().manual_seed(count))
    session = Sums(batch)
    output = session(pixels)
    assert output.shape == (count, 6, 9)
    torch.testing.assert_close(output[:, 0, 0], pixels.sum((1, 2, 3)))
    assert session.calls == [batch] * -(-count // batch)


def test_call__dynamic_takes_all_at_once() -> None:
    session = Sums(1, dynamic=True)
    assert session.fixed_batch is None
    assert len(session(torch.rand(5, 3, 96, 32))) == 5
    assert session.calls == [5]


def test_call__other_canvas_or_channels() -> None:
    with pytest.raises(ConfigError, match="canvas is 32x64, not 64x64"):
        Sums(1)(torch.rand(1, 3, 64, 64))
    for dynamic in (False, True):
        with pytest.raises(ConfigError, match="images of 3 channels, not 1"):
            Sums(1, dynamic)(torch.rand(1, 1, 32, 64))


def test_call__output_of_another_model() -> None:
    session = Sums(1)
    session.description.names[2] = "c"
    with pytest.raises(ModelError, match=r"output is \(1, 6, 9\), that of a detector of 3 classes .* is \(B, 7, A\)"):
        session(torch.rand(1, 3, 32, 64))
    with pytest.raises(ModelError, match=r"\(head 'nms-free'\) is \(B, n, 6\)"):
        Sums(1, head="nms-free")(torch.rand(1, 3, 32, 64))
