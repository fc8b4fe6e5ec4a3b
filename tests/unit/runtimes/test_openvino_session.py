"""OpenVINO: the precision that the file promises, the device that was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exported_factory import export_tiny, exported, photographs, reference

from kd_yolo.errors import BackendMissingError, ConfigError
from kd_yolo.runtimes import open_session, openvino_session

openvino = pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def folder() -> Path:
    return exported("openvino")


def test_open_session__float32_is_computed_in_float32(folder: Path) -> None:
    session: Any = open_session(folder, threads=1)
    assert session.inference_precision == "f32"
    assert session.compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert str(session.compiled.get_property("PERFORMANCE_HINT")).endswith("LATENCY")


def test_open_session__what_openvino_would_do_by_itself(folder: Path) -> None:
    """On a CPU with bfloat16 its default rounds: boxes move by a thousand times what float32 allows."""
    core = openvino.Core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bfloat16")
    pixels = photographs(1)
    alone = torch.from_numpy(core.compile_model(str(next(folder.glob("*.xml"))), "CPU")(pixels.numpy())[0])
    expected = reference(pixels)
    assert (alone - expected).abs().max() > 1e-2
    assert (open_session(folder)(pixels) - expected).abs().max() < 2e-4


class Core:
    """The capabilities of some CPU."""

    def __init__(self, *capabilities: str) -> None:
        self.capabilities = capabilities

    def get_property(self, device: str, key: str) -> list[str]:
        assert key == "OPTIMIZATION_CAPABILITIES"
        return list(self.capabilities)


@pytest.mark.parametrize(
    ("precision", "capabilities", "device", "machine", "hint"),
    [
        ("fp32", ["FP32", "BF16", "FP16"], "CPU", "aarch64", openvino.Type.f32),
        ("int8", ["FP32", "BF16", "FP16", "INT8"], "CPU", "aarch64", openvino.Type.f32),
        ("fp16", ["FP32", "BF16", "FP16"], "CPU", "aarch64", openvino.Type.f16),
        ("fp16", ["FP32", "BF16"], "CPU", "aarch64", openvino.Type.f32),
        # x86 with AVX512-FP16 has the kernels, and they are slower than float32
        ("fp16", ["FP32", "BF16", "FP16"], "CPU", "x86_64", openvino.Type.f32),
        ("fp16", ["FP32", "BF16", "FP16"], "CPU", "AMD64", openvino.Type.f32),
        ("fp16", ["FP32", "FP16"], "GPU", "x86_64", openvino.Type.f16),
    ],
)
def test_properties__never_less_than_promised(
    precision: str, capabilities: list[str], device: str, machine: str, hint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    found = openvino_session._properties(openvino, Core(*capabilities), device, precision, 2)
    assert found["INFERENCE_PRECISION_HINT"] == hint
    assert found.get("INFERENCE_NUM_THREADS") == (2 if device == "CPU" else None)


@pytest.mark.parametrize("device", ["intel:gpu", "intel:npu", "GPU", "intel:gpu.1"])
def test_open_session__device_that_is_not_there(device: str, folder: Path) -> None:
    if openvino.Core().available_devices != ["CPU"]:
        pytest.skip("there are more devices than the CPU")
    with pytest.raises(ConfigError, match=rf"device={device}: OpenVINO sees CPU here; use device=cpu"):
        open_session(folder, device=device)


def test_device__one_of_several() -> None:
    available = ["CPU", "GPU.0", "GPU.1"]
    assert openvino_session._device("intel:gpu", available, Path("x")) == "GPU"
    assert openvino_session._device("intel:gpu.1", available, Path("x")) == "GPU.1"
    with pytest.raises(ConfigError, match=r"OpenVINO sees CPU, GPU\.0, GPU\.1"):
        openvino_session._device("intel:gpu.2", available, Path("x"))


def test_open_session__silent_fallback_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = openvino.Core()

    class Elsewhere:
        """Compiles for the CPU whatever is asked for, as the AUTO and HETERO plugins may."""

        available_devices = ("CPU", "GPU")
        read_model = staticmethod(real.read_model)

        def get_property(self, device: str, key: str) -> list[str]:
            return ["FP32", "FP16"]

        def compile_model(self, model: Any, device: str, properties: dict[str, Any]) -> Any:
            return real.compile_model(model, "CPU")

    class Package:
        Core = Elsewhere
        Type = openvino.Type

    monkeypatch.setattr(openvino_session, "_openvino", lambda path: Package)
    with pytest.raises(BackendMissingError, match="OpenVINO GPU was asked for, but it chose CPU"):
        open_session(folder, device="intel:gpu")


def test_open_session__dynamic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export_tiny(tmp_path, "openvino", dynamic=True)
    pixels = photographs(3, (96, 64))
    session = open_session(folder, imgsz=[96, 64])
    assert session.fixed_batch is None
    torch.testing.assert_close(session(pixels), reference(pixels), atol=2e-4, rtol=0)
    # What an INT8 file needs on a CPU with AMX: one shape, and portions.
    monkeypatch.setattr(openvino_session, "_needs_static", lambda precision, name: True)
    session = open_session(folder, imgsz=[96, 64], batch=2)
    assert session.fixed_batch == 2
    torch.testing.assert_close(session(pixels), reference(pixels), atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("precision", "name", "flags", "static"),
    [
        ("int8", "CPU", "avx512f amx_int8", True),
        ("int8", "CPU", "avx512f avx512_vnni", False),
        ("fp32", "CPU", "amx_int8", False),
        ("fp16", "NPU", "", True),
    ],
)
def test_needs_static(precision: str, name: str, flags: str, static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_session, "_cpu_flags", lambda: flags)
    assert openvino_session._needs_static(precision, name) is static
