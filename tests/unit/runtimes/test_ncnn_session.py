"""ncnn: one image at a time, in full precision when the file is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exported_factory import copied, export_tiny, exported, photographs, reference

from kd_yolo.errors import ConfigError, ModelError
from kd_yolo.runtimes import ncnn_session, open_session

pytest.importorskip("ncnn")
pytest.importorskip("pnnx")


@pytest.fixture(scope="module")
def folder() -> Path:
    return exported("ncnn")


def test_open_session__full_precision_and_threads(folder: Path) -> None:
    session: Any = open_session(folder, threads=1)
    assert session.net.opt.num_threads == 1
    assert [getattr(session.net.opt, name) for name in ncnn_session.ROUNDING] == [False] * 4
    assert session.net.opt.use_vulkan_compute is False


def test_open_session__half_precision_file(tmp_path: Path) -> None:
    """Its weights were rounded: near the checkpoint, but not as near as a float32 file."""
    session: Any = open_session(export_tiny(tmp_path, "ncnn", quantize=16))
    assert session.description.precision == "fp16"
    pixels = photographs(2)
    difference = (session(pixels) - reference(pixels)).abs().max()
    assert 2e-4 < difference < 0.5
    assert session.net.opt.use_fp16_storage is True


def test_open_session__other_device(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"device=vulkan:0: .* runs on the CPU here; use device=cpu"):
        open_session(folder, device="vulkan:0")


def test_open_session__two_outputs(folder: Path, tmp_path: Path) -> None:
    """A branch whose output nobody reads is an output of the network."""
    path = copied(folder, tmp_path)
    file = next(path.glob("*.param"))
    magic, counts, first, *rest = file.read_text().splitlines()
    layers, blobs = map(int, counts.split())
    spare = "Input spare 0 1 spare"
    file.write_text("\n".join([magic, f"{layers + 1} {blobs + 1}", first, spare, *rest, ""]))
    with pytest.raises(ModelError, match=r"is not a detector with one image input and one output \(inputs"):
        open_session(path)


def test_infer__failed_extraction_is_an_error(folder: Path) -> None:
    session: Any = open_session(folder)
    session.exit = "nowhere"
    with pytest.raises(ModelError, match="stopped with status -1"):
        session(torch.zeros(1, 3, 64, 64))
