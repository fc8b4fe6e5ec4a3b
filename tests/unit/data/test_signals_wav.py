from __future__ import annotations

import struct
import wave
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_yolo.data.signals_wav import read_wav, write_wav
from kd_yolo.errors import DataError


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WAVE" + b"".join(n + struct.pack("<I", len(b)) + b + b"\0" * (len(b) % 2) for n, b in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def form(code: int, channels: int, rate: int, bits: int, tail: bytes = b"") -> tuple[bytes, bytes]:
    step = channels * bits // 8
    return b"fmt ", struct.pack("<HHIIHH", code, channels, rate, rate * step, step, bits) + tail


def write_stdlib(file: Path, width: int, channels: int, frames: bytes) -> None:
    with wave.open(str(file), "wb") as stream:
        stream.setnchannels(channels)
        stream.setsampwidth(width)
        stream.setframerate(44100)
        stream.writeframes(frames)


@pytest.mark.parametrize(("width", "values", "expected"), [
    (1, [0, 128, 255], [-1.0, 0.0, 127 / 128]),
    (2, [-32768, 0, 16384], [-1.0, 0.0, 0.5]),
    (3, [-8388608, -1, 4194304], [-1.0, -1 / 8388608, 0.5]),
    (4, [-(2**31), 0, 2**30], [-1.0, 0.0, 0.5]),
])  # fmt: skip
def test_read_wav__integers_of_every_width(
    tmp_path: Path, width: int, values: list[int], expected: list[float]
) -> None:
    frames = b"".join(v.to_bytes(width, "little", signed=width > 1) for v in values)
    write_stdlib(tmp_path / "a.wav", width, 1, frames)
    found, rate = read_wav(tmp_path / "a.wav")
    assert rate == 44100
    np.testing.assert_array_equal(found, [expected])


def test_read_wav__channels_are_rows(tmp_path: Path) -> None:
    write_stdlib(tmp_path / "a.wav", 2, 2, struct.pack("<6h", 1, -1, 2, -2, 3, -3))
    found, _ = read_wav(tmp_path / "a.wav")
    np.testing.assert_array_equal(found * 32768, [[1, 2, 3], [-1, -2, -3]])


@pytest.mark.parametrize("bits", [32, 64])
def test_read_wav__floats_and_odd_chunks_in_between(tmp_path: Path, bits: int) -> None:
    data = np.array([0.25, -3.5, 0.0], f"<f{bits // 8}").tobytes()
    content = riff(form(3, 1, 16000, bits), (b"LIST", b"odd"), (b"fact", b"\0\0\0\0"), (b"data", data))
    (tmp_path / "a.wav").write_bytes(content)
    found, rate = read_wav(tmp_path / "a.wav")
    assert rate == 16000
    np.testing.assert_array_equal(found, [[0.25, -3.5, 0.0]])


def test_read_wav__extensible_takes_the_sub_format(tmp_path: Path) -> None:
    tail = struct.pack("<HHIH", 22, 16, 4, 1) + b"\x00\x00\x00\x00\x10\x00\x80\x00\x00\xaa\x00\x38\x9b\x71"
    content = riff(form(0xFFFE, 1, 48000, 16, tail), (b"data", struct.pack("<2h", 8192, -8192)))
    (tmp_path / "a.wav").write_bytes(content)
    np.testing.assert_array_equal(read_wav(tmp_path / "a.wav")[0], [[0.25, -0.25]])


def test_read_wav__agrees_with_scipy(tmp_path: Path) -> None:
    wavfile = pytest.importorskip("scipy.io.wavfile")
    rng = np.random.default_rng(0)
    for kind, scale in (("<i2", 2.0**15), ("<i4", 2.0**31), ("<f4", 1.0)):
        values = (rng.standard_normal((50, 3)) * 1000).astype(kind)
        wavfile.write(tmp_path / "a.wav", 22050, values)
        found, rate = read_wav(tmp_path / "a.wav")
        assert rate == 22050
        np.testing.assert_allclose(found * scale, values.T.astype(np.float64), rtol=1e-12)


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_write_wav__read_back_within_half_a_step(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    file = tmp_path_factory.mktemp("wav") / "a.wav"
    write_wav(file, np.array(values), 16000)
    found, rate = read_wav(file)
    assert rate == 16000
    np.testing.assert_allclose(found[0], np.clip(values, -1, 32767 / 32768), atol=0.5 / 32768 + 1e-12)
    with wave.open(str(file)) as stream:
        assert (stream.getnframes(), stream.getframerate(), stream.getsampwidth()) == (len(values), 16000, 2)


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is not a WAV file"),
    (b"RIFF\0\0\0\0AVI ", "is not a WAV file"),
    (riff(form(1, 1, 8000, 16)), "holds no 'fmt ' chunk followed by a 'data' chunk"),
    (riff((b"data", b"\0\0")), "holds no 'fmt ' chunk followed by a 'data' chunk"),
    (riff((b"fmt ", b"\1\0"), (b"data", b"\0\0")), "'fmt ' chunk is cut off"),
    (riff(form(2, 1, 8000, 4), (b"data", b"\0\0")), "encoding 2 with 4 bits is not read"),
    (riff(form(1, 0, 8000, 16), (b"data", b"\0\0")), "0 channels"),
    (riff(form(1, 1, 8000, 16), (b"data", b"")), "holds no samples"),
    (riff(form(1, 1, 8000, 16), (b"data", b"\0" * 100))[:-40], "is cut off"),
])  # fmt: skip
def test_read_wav__bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_wav(tmp_path / "a.wav")
    assert "a.wav" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_wav__missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_wav(tmp_path / "gone.wav")
