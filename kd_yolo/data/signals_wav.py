"""Read and write WAV files (RIFF): PCM of 8, 16, 24 or 32 bits and IEEE floats of 32 or 64 bits, any channels.

Written here because ``wave`` of the standard library reads no floats (and no WAVE_FORMAT_EXTENSIBLE before Python
3.12), and SciPy is an extra. Layout after "Multiple channel audio data and WAVE files" (Microsoft, 2007).
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kd_yolo.errors import DataError

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE


def read_wav(file: Path) -> tuple[NDArray[np.float64], float]:
    """Read a WAV file.

    Args:
        file: The file.

    Returns:
        Values of shape (channels, samples), integers scaled so that full scale is 1, floats as they are; and the
        sampling rate, Hz.

    Raises:
        DataError: Not a WAV file, cut off, or of an encoding that is not read; one line.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); take it out of the folder") from error
    if len(content) < 12 or content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise DataError(
            f"{file}: is not a WAV file (no RIFF/WAVE header); take it out of the folder or export it again"
        )
    form: tuple[int, int, int, int] | None = None
    place = 12
    while place + 8 <= len(content):
        name, size = content[place : place + 4], struct.unpack_from("<I", content, place + 4)[0]
        body = memoryview(content)[place + 8 : place + 8 + size]
        if name == b"fmt ":
            form = _form(file, body)
        elif name == b"data":
            if form is None:
                break
            if len(body) < size:
                raise DataError(f"{file}: is cut off ({len(body)} of {size} bytes of sound); record or copy it again")
            return _samples(file, body, form), float(form[2])
        place += 8 + size + size % 2
    raise DataError(f"{file}: holds no 'fmt ' chunk followed by a 'data' chunk; record or copy it again")


def write_wav(file: Path, values: NDArray[np.float64], rate_hz: int) -> None:
    """Write one channel as 16-bit PCM.

    Args:
        file: The file.
        values: Shape (samples,); full scale is 1, anything beyond is cut.
        rate_hz: Sampling rate, Hz.
    """
    data = np.round(np.clip(values, -1, 32767 / 32768) * 32768).astype("<i2").tobytes()
    form = struct.pack("<HHIIHH", _PCM, 1, rate_hz, 2 * rate_hz, 2, 16)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    file.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)


def _form(file: Path, body: memoryview) -> tuple[int, int, int, int]:
    """Return (encoding, channels, rate in Hz, bits) of a format chunk."""
    if len(body) < 16:
        raise DataError(f"{file}: its 'fmt ' chunk is cut off; record or copy it again")
    code, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", body)
    if code == _EXTENSIBLE and len(body) >= 26:
        code = struct.unpack_from("<H", body, 24)[0]
    if (code, bits) not in {(_PCM, 8), (_PCM, 16), (_PCM, 24), (_PCM, 32), (_FLOAT, 32), (_FLOAT, 64)}:
        raise DataError(f"{file}: encoding {code} with {bits} bits is not read; save it as PCM of 16 or 24 bits")
    if channels < 1 or rate < 1:
        raise DataError(f"{file}: says {channels} channels at {rate} Hz; record or export it again")
    return code, channels, rate, bits


def _samples(file: Path, body: memoryview, form: tuple[int, int, int, int]) -> NDArray[np.float64]:
    code, channels, _, bits = form
    count = len(body) // (bits // 8 * channels) * channels
    raw = np.frombuffer(body, np.uint8, count * (bits // 8))
    if raw.size == 0:
        raise DataError(f"{file}: holds no samples; take it out of the folder")
    if code == _FLOAT:
        values = raw.view(f"<f{bits // 8}").astype(np.float64)
    elif bits == 8:
        values = (raw.astype(np.float64) - 128) / 128
    elif bits == 24:  # placed in the upper three bytes of 32 bits, which keeps the sign
        wide = np.zeros((count, 4), np.uint8)
        wide[:, 1:] = raw.reshape(-1, 3)
        values = wide.view("<i4").ravel() / 2.0**31
    else:
        values = raw.view(f"<i{bits // 8}") / 2.0 ** (bits - 1)
    return np.ascontiguousarray(values.reshape(-1, channels).T)
