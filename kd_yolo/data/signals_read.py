"""Read recordings: WAV, CSV, NPY and MATLAB files, each as rows of numbers, checked."""

from __future__ import annotations

import importlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kd_yolo.data.signals_wav import read_wav
from kd_yolo.errors import BackendMissingError, DataError, nearest

SIGNAL_SUFFIXES = frozenset({".wav", ".csv", ".npy", ".mat"})
Orientation = Literal["rows", "columns"]

_NUMBER = r"\s*[-+]?(\d+[.,]?\d*|[.,]\d+)(e[-+]?\d+)?\s*|\s*[-+]?(nan|inf|infinity)\s*"


@dataclass(frozen=True)
class ReadSpec:
    """How to read.

    Attributes:
        orientation: Whether a table's signals are its rows or its columns; needed for CSV and MAT tables.
        variable: Name of the array in a MAT file; needed when it holds several.
        channel: Channel of a WAV file with several, 0 is the first.
        skip_columns: Columns left out at the start of a CSV table, such as a time column.
    """

    orientation: Orientation | None = None
    variable: str | None = None
    channel: int | None = None
    skip_columns: int = 0


def read_signals(file: Path, spec: ReadSpec) -> tuple[NDArray[np.float64], float | None]:
    """Read every signal of a file.

    Args:
        file: A file whose suffix is one of ``SIGNAL_SUFFIXES``.
        spec: How to read.

    Returns:
        Values of shape (signals, samples), and the sampling rate in Hz where the file states it (WAV), else None.

    Raises:
        DataError: Unreadable, of the wrong shape or type, not finite, or constant; one line with the remedy.
        BackendMissingError: A MAT file without SciPy.
    """
    rate = None
    if file.suffix.lower() == ".wav":
        channels, rate = read_wav(file)
        values = _one_channel(file, channels, spec.channel)
    elif file.suffix.lower() == ".csv":
        values = _table(file, _read_csv(file, spec.skip_columns), spec.orientation, needed=True)
        _refuse_time(file, values)
    elif file.suffix.lower() == ".npy":
        values = _table(file, _cut(file, _numbers(file, _read_npy(file)), spec), spec.orientation, needed=False)
        _refuse_time(file, values)
    else:
        numbers = _cut(file, _numbers(file, _read_mat(file, spec.variable)), spec)
        values = _table(file, numbers, spec.orientation, needed=True)
        _refuse_time(file, values)
    _check_values(file, values)
    return values, rate


def _one_channel(file: Path, channels: NDArray[np.float64], wanted: int | None) -> NDArray[np.float64]:
    if wanted is None and len(channels) > 1:
        raise DataError(f"{file}: has {len(channels)} channels; say which one with channel=0 to {len(channels) - 1}")
    if wanted is not None and wanted >= len(channels):
        raise DataError(f"{file}: channel={wanted} is not there; it has {len(channels)}, counted from 0")
    return channels[wanted or 0][None]


def _read_csv(file: Path, skip_columns: int) -> NDArray[np.float64]:
    """Read comma, semicolon, tab or space separated numbers; leading lines of text are passed over."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as text ({error}); save it again as CSV in UTF-8") from error
    start = next((i for i, line in enumerate(lines) if _delimiter(line) is not None), None)
    for number, line in enumerate(lines[:start], 1):
        bad = [cell for cell in re.split(r"[;\t,]", line) if not re.fullmatch(_NUMBER, cell, re.IGNORECASE)]
        if 0 < len(bad) < len(re.split(r"[;\t,]", line)) / 2:  # no heading: a damaged row must not be lost as one
            raise DataError(f"{file}: line {number} holds '{bad[0].strip()[:20]}' among numbers; correct the file")
    if start is None:
        raise DataError(f"{file}: holds no line of numbers; export it again as CSV, or take it out of the folder")
    delimiter = _delimiter(lines[start])
    text = "\n".join(lines[start:])
    if delimiter == ";":
        text = text.replace(",", ".")  # decimal comma
    try:
        values = np.loadtxt(io.StringIO(text), delimiter=delimiter or None, ndmin=2, comments=None)
    except ValueError as error:
        reason = str(error).split(";")[0].rstrip(".")
        raise DataError(f"{file}: not a table of numbers after line {start} ({reason}); correct the file") from error
    if skip_columns >= values.shape[1]:
        raise DataError(f"{file}: skip_columns={skip_columns} leaves nothing of {values.shape[1]} columns; lower it")
    return np.asarray(values[:, skip_columns:], np.float64)


def _delimiter(line: str) -> str | None:
    """Return the delimiter of a line of numbers (an empty text for blanks), or None when it holds anything else."""
    delimiter = next((mark for mark in (";", "\t", ",") if mark in line), "")
    cells = line.split(delimiter) if delimiter else line.split()
    return delimiter if cells and all(re.fullmatch(_NUMBER, cell, re.IGNORECASE) for cell in cells) else None


def _read_npy(file: Path) -> Any:
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{file}: cannot be read as an NPY array ({_first_line(error)}); save it again with numpy.save"
        ) from error


def _read_mat(file: Path, variable: str | None) -> Any:
    try:
        scipy_io = importlib.import_module("scipy.io")
    except ImportError as error:
        raise BackendMissingError(f"{file}: MAT files need SciPy; run: pip install 'kd-yolo[anomaly]'") from error
    try:
        content = scipy_io.loadmat(file)
    except NotImplementedError as error:
        raise DataError(f"{file}: is a MATLAB 7.3 (HDF5) file; save it with save(..., '-v7')") from error
    except (OSError, ValueError, TypeError, KeyError, scipy_io.matlab.MatReadError) as error:
        raise DataError(f"{file}: cannot be read as a MAT file ({_first_line(error)}); save it again") from error
    arrays = {name: value for name, value in content.items() if not name.startswith("__")}
    if variable is not None:
        if variable not in arrays:
            known = ", ".join(sorted(arrays)) or "nothing"
            raise DataError(f"{file}: holds no variable '{variable}', but {known}{nearest(variable, arrays)}")
        return arrays[variable]
    tables = [name for name, value in arrays.items() if getattr(value, "size", 0) > 1 and value.dtype.kind in "iufc"]
    if len(tables) != 1:
        found = ", ".join(sorted(tables)) or "no array of numbers"
        raise DataError(f"{file}: holds {found}; say which variable holds the signals with variable=NAME")
    return arrays[tables[0]]


def _numbers(file: Path, values: Any) -> NDArray[np.float64]:
    kind = getattr(getattr(values, "dtype", None), "kind", "O")
    if kind == "c":
        raise DataError(f"{file}: holds complex numbers; save the real waveform, not its transform")
    if kind not in "iufb" or not isinstance(values, np.ndarray):
        raise DataError(f"{file}: holds no plain array of numbers; save the signals as one numeric array")
    return values.astype(np.float64)


def _cut(file: Path, values: NDArray[np.float64], spec: ReadSpec) -> NDArray[np.float64]:
    """Return a table without its first ``skip_columns`` columns, as of a CSV file."""
    if not spec.skip_columns:
        return values
    if values.ndim != 2 or spec.skip_columns >= values.shape[1]:
        raise DataError(f"{file}: skip_columns={spec.skip_columns} leaves nothing of {values.shape}; lower it")
    return values[:, spec.skip_columns :]


def _table(
    file: Path, values: NDArray[np.float64], orientation: Orientation | None, *, needed: bool
) -> NDArray[np.float64]:
    """Return one signal a row."""
    if values.size == 0 or values.ndim == 0:
        raise DataError(f"{file}: is empty (shape {values.shape}); take it out of the folder")
    if values.ndim > 2:
        raise DataError(
            f"{file}: has {values.ndim} dimensions {values.shape}; give a table, one signal a row or column"
        )
    if values.ndim == 1:
        return values[None]
    if 1 in values.shape and orientation is None:
        return values.reshape(1, -1)
    if orientation is None and needed:
        raise DataError(
            f"{file}: a table of {values.shape[0]} rows and {values.shape[1]} columns; say with orientation=rows or "
            "orientation=columns which of them are the signals"
        )
    return np.ascontiguousarray(values.T) if orientation == "columns" else values


def _refuse_time(file: Path, values: NDArray[np.float64]) -> None:
    """Refuse a first column that is a time axis: it would pass for a signal unnoticed."""
    if len(values) > 1 and values.shape[1] >= 16:
        first = values[0]
        off = np.abs(first - np.linspace(first[0], first[-1], first.size)).max()
        if first[-1] > first[0] and np.all(np.diff(first) >= 0) and off < 1e-2 * (first[-1] - first[0]):
            raise DataError(
                f"{file}: its first column or row rises in equal steps like a time axis; leave it out with "
                "skip_columns=1, or delete that row"
            )


def _check_values(file: Path, values: NDArray[np.float64]) -> None:
    for number, signal in enumerate(values):
        where = f"signal {number + 1} of {len(values)}" if len(values) > 1 else "its signal"
        bad = np.flatnonzero(~np.isfinite(signal))
        if bad.size:
            raise DataError(
                f"{file}: {where} has {bad.size} values that are NaN or infinite, the first at sample {bad[0]}; "
                "repair the recording or take it out of the folder"
            )
        if signal.size > 1 and np.ptp(signal) == 0:
            raise DataError(f"{file}: {where} is constant (nothing was recorded); take it out of the folder")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
