from __future__ import annotations

import importlib
import struct
import wave
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from signals_factory import tone, write_tone

from kd_yolo.data.signals_read import ReadSpec, read_signals
from kd_yolo.errors import BackendMissingError, DataError

PLAIN = ReadSpec()
TABLE = np.array([tone(1000, seed, 0.02) for seed in range(3)])


def write_csv(file: Path, table: np.ndarray, delimiter: str = ",", head: str = "", decimal: str = ".") -> Path:
    lines = [delimiter.join(f"{value:.9g}" for value in row).replace(".", decimal) for row in table]
    file.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize(("delimiter", "decimal"), [(",", "."), (";", "."), (";", ","), ("\t", "."), (" ", ".")])
@pytest.mark.parametrize("head", ["", "sensor A, sensor B\n", "Scope model 3;;\nSample interval;1e-4;s\n\n"])
def test_read_signals__csv_of_every_dialect(tmp_path: Path, delimiter: str, decimal: str, head: str) -> None:
    file = write_csv(tmp_path / "a.csv", TABLE.T, delimiter, head, decimal)
    values, rate = read_signals(file, ReadSpec(orientation="columns"))
    assert rate is None
    np.testing.assert_allclose(values, TABLE, rtol=1e-8)


def test_read_signals__csv_rows_and_a_single_line(tmp_path: Path) -> None:
    values, _ = read_signals(write_csv(tmp_path / "a.csv", TABLE), ReadSpec(orientation="rows"))
    np.testing.assert_allclose(values, TABLE, rtol=1e-8)
    for table in (TABLE[:1], TABLE[:1].T):  # one signal: no question which way it runs
        values, _ = read_signals(write_csv(tmp_path / "b.csv", table), PLAIN)
        np.testing.assert_allclose(values, TABLE[:1], rtol=1e-8)


def test_read_signals__csv_needs_its_orientation(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", TABLE)
    with pytest.raises(DataError, match=r"a\.csv: a table of 3 rows and 160 columns; say with orientation=rows"):
        read_signals(file, PLAIN)


def test_read_signals__time_column_is_refused_and_left_out_on_request(tmp_path: Path) -> None:
    time_s = np.round(np.arange(160) / 8000, 4)  # as printed with few decimals: steps of 0.0001 and 0.0002
    file = write_csv(tmp_path / "a.csv", np.column_stack([time_s, TABLE.T]))
    with pytest.raises(DataError, match="skip_columns=1"):
        read_signals(file, ReadSpec(orientation="columns"))
    values, _ = read_signals(file, ReadSpec(orientation="columns", skip_columns=1))
    np.testing.assert_allclose(values, TABLE, rtol=1e-8)
    with pytest.raises(DataError, match="skip_columns=4 leaves nothing"):
        read_signals(file, ReadSpec(orientation="columns", skip_columns=4))


@pytest.mark.parametrize(("text", "message"), [
    ("", "holds no line of numbers"),
    ("name\nother\n", "holds no line of numbers"),
    ("1,2,3\n4,5\n", "not a table of numbers"),
    ("1,2,3\n4,x,6\n", "not a table of numbers"),
    ("1,x,3,5\n4,5,6,7\n", "line 1 holds 'x' among numbers"),
    ("1,2,3\n4,nan,6\n", "signal 2 of 2 has 1 values that are NaN or infinite, the first at sample 1"),
    ("1,2,3\n4,5,inf\n", "NaN or infinite"),
    ("1,2,3\n5,5,5\n", "signal 2 of 2 is constant"),
])  # fmt: skip
def test_read_signals__bad_csv(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_signals(tmp_path / "a.csv", ReadSpec(orientation="rows"))
    assert "a.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_signals__csv_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DataError, match="cannot be read as text"):
        read_signals(tmp_path / "a.csv", PLAIN)


@pytest.mark.parametrize("kind", ["<f4", "<f8", "<i2"])
def test_read_signals__npy_is_one_signal_a_row(tmp_path: Path, kind: str) -> None:
    table = (TABLE * 1000).astype(kind)
    np.save(tmp_path / "a.npy", table)
    np.testing.assert_array_equal(read_signals(tmp_path / "a.npy", PLAIN)[0], table)
    np.save(tmp_path / "b.npy", table.T)
    np.testing.assert_array_equal(read_signals(tmp_path / "b.npy", ReadSpec(orientation="columns"))[0], table)
    np.save(tmp_path / "c.npy", table[0])
    np.testing.assert_array_equal(read_signals(tmp_path / "c.npy", PLAIN)[0], table[:1])


@pytest.mark.parametrize(("values", "message"), [
    (np.zeros((2, 3, 4)), "has 3 dimensions"),
    (np.zeros((0, 5)), "is empty"),
    (np.float64(3), "is empty"),
    (np.fft.rfft(TABLE), "complex numbers"),
    (np.array(["a", "b"]), "no plain array of numbers"),
    (np.array([{"a": 1}], object), "cannot be read as an NPY array"),
])  # fmt: skip
def test_read_signals__bad_npy(tmp_path: Path, values: Any, message: str) -> None:
    np.save(tmp_path / "a.npy", values, allow_pickle=True)
    with pytest.raises(DataError, match=message) as caught:
        read_signals(tmp_path / "a.npy", PLAIN)
    assert "a.npy" in str(caught.value)


def test_read_signals__npy_cut_off(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", TABLE)
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-100])
    with pytest.raises(DataError, match="cannot be read as an NPY array"):
        read_signals(tmp_path / "a.npy", PLAIN)


def test_read_signals__mat_variable(tmp_path: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    scipy_io.savemat(tmp_path / "a.mat", {"data": TABLE, "fs": 8000.0, "note": "tile 4"})
    values, rate = read_signals(tmp_path / "a.mat", ReadSpec(orientation="rows"))  # fs is a single number
    assert rate is None
    np.testing.assert_array_equal(values, TABLE)
    scipy_io.savemat(tmp_path / "b.mat", {"data": TABLE.T, "spare": TABLE})
    with pytest.raises(DataError, match="holds data, spare; say which variable"):
        read_signals(tmp_path / "b.mat", ReadSpec(orientation="rows"))
    values, _ = read_signals(tmp_path / "b.mat", ReadSpec(orientation="columns", variable="data"))
    np.testing.assert_array_equal(values, TABLE)
    with pytest.raises(DataError, match="holds no variable 'dat', but data, spare; did you mean 'data'"):
        read_signals(tmp_path / "b.mat", ReadSpec(variable="dat"))
    with pytest.raises(DataError, match="say with orientation=rows"):
        read_signals(tmp_path / "a.mat", PLAIN)


def test_read_signals__bad_mat(tmp_path: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    (tmp_path / "a.mat").write_bytes(b"no matlab file at all" * 20)
    with pytest.raises(DataError, match=r"a\.mat: cannot be read as a MAT file"):
        read_signals(tmp_path / "a.mat", PLAIN)
    scipy_io.savemat(tmp_path / "b.mat", {"data": np.fft.rfft(TABLE)})
    with pytest.raises(DataError, match="complex numbers"):
        read_signals(tmp_path / "b.mat", ReadSpec(orientation="rows"))
    scipy_io.savemat(tmp_path / "c.mat", {"data": {"inner": TABLE}})
    with pytest.raises(DataError, match="no array of numbers"):
        read_signals(tmp_path / "c.mat", PLAIN)
    with pytest.raises(DataError, match="no plain array of numbers"):
        read_signals(tmp_path / "c.mat", ReadSpec(variable="data"))
    header = b"MATLAB 7.3 MAT-file".ljust(124) + struct.pack("<HH", 0x0200, 0x4D49)
    (tmp_path / "d.mat").write_bytes(header + b"\x89HDF\r\n\x1a\n" + b"\0" * 400)
    with pytest.raises(DataError, match=r"MATLAB 7\.3"):
        read_signals(tmp_path / "d.mat", PLAIN)


def test_read_signals__mat_without_scipy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str, package: str | None = None) -> ModuleType:
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(BackendMissingError, match=r"pip install 'kd-yolo\[anomaly\]'"):
        read_signals(tmp_path / "a.mat", PLAIN)


def test_read_signals__wav_channel(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as stream:
        stream.setnchannels(2)
        stream.setsampwidth(2)
        stream.setframerate(8000)
        stream.writeframes(struct.pack("<6h", 1, -1, 2, -2, 3, -3))
    with pytest.raises(DataError, match="has 2 channels; say which one with channel=0 to 1"):
        read_signals(tmp_path / "a.wav", PLAIN)
    with pytest.raises(DataError, match="channel=2 is not there"):
        read_signals(tmp_path / "a.wav", ReadSpec(channel=2))
    values, rate = read_signals(tmp_path / "a.wav", ReadSpec(channel=1))
    assert rate == 8000
    np.testing.assert_array_equal(values * 32768, [[-1, -2, -3]])


def test_read_signals__silent_wav_is_refused(tmp_path: Path) -> None:
    write_tone(tmp_path / "a.wav", 1000, 0)
    content = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(content[:44] + b"\0" * (len(content) - 44))
    with pytest.raises(DataError, match="its signal is constant"):
        read_signals(tmp_path / "a.wav", PLAIN)
