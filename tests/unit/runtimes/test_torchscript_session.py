"""TorchScript: threads, NMS inside, no advice from PyTorch on the screen."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from exported_factory import export_tiny, exported, photographs, reference

from kd_yolo.runtimes import open_session


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_open_session__quiet_and_with_the_threads_asked_for() -> None:
    path = exported("torchscript")
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session = open_session(path, threads=2)
    assert torch.get_num_threads() == 2
    pixels = photographs(1)
    output = session(pixels)
    assert not output.requires_grad
    torch.testing.assert_close(output, reference(pixels), atol=2e-4, rtol=0)


def test_open_session__nms_inside(tmp_path: Path) -> None:
    session = open_session(export_tiny(tmp_path, "torchscript", nms=True))
    assert session.description.head == "nms inside"
    assert session(photographs(3)).shape == (3, 300, 6)
