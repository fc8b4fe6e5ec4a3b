"""The keys of ``kd-yolo data convert from=signals``: every parameter with its unit, checked before a file is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from kd_yolo.config import Strict, validate
from kd_yolo.errors import ConfigError
from kd_yolo.resources import load_yaml

WINDOW_S = {"spectrogram": 0.032, "spectrum": 0.128}
"""Default window, s: short enough to show a knock decay; long enough to tell resonances 8 Hz apart."""
OVERLAP = 4
"""The default hop is the window divided by this: windows whose squares add up evenly."""
SIGNALS_YAML = "signals.yaml"
WHERE = "data convert from=signals"

DRAWN = ("kind", "sampling_rate_hz", "window_s", "hop_s", "low_hz", "high_hz", "segment_s", "dynamic_range_db",
         "reference_db", "per_image", "imgsz")  # fmt: skip
"""The keys that decide how a recording is drawn; they are kept in signals.yaml and taken over with ``like``."""


TRAIN_DEFAULTS: dict[str, float | None] = {
    "fliplr": 0.0, "flipud": 0.0, "scale": 0.0, "auto_augment": None, "hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.2,
    "erasing": 0.2,
}  # fmt: skip
"""Stock training keys that suit these pictures: an axis is no direction, and a crop is another band."""


class SignalsKeys(Strict):
    """Keys of ``data convert from=signals``."""

    from_: Literal["signals"] = Field(default="signals", alias="from")
    src: str = Field(description="folder of class folders with WAV, CSV, NPY or MAT files; give src=FOLDER")
    out: str = Field(description="folder to write; give out=FOLDER")
    kind: Literal["spectrogram", "spectrum"] = "spectrogram"
    sampling_rate_hz: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    window_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    hop_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    low_hz: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    high_hz: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    segment_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    dynamic_range_db: float = Field(default=80.0, ge=6, le=200)
    reference_db: float | None = Field(default=None, ge=-300, le=300)
    per_image: bool = False
    imgsz: int = Field(default=224, ge=32, le=2048)
    orientation: Literal["rows", "columns"] | None = None
    variable: str | None = Field(default=None, min_length=1)
    channel: int | None = Field(default=None, ge=0)
    skip_columns: int = Field(default=0, ge=0)
    split: str = "auto"
    group: str | None = Field(default=None, min_length=1)
    signals_per_part: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    like: str | None = Field(default=None, min_length=1)


def read_keys(values: dict[str, Any]) -> SignalsKeys:
    """Check the keys, and take over those of an earlier conversion when ``like`` names its signals.yaml.

    Args:
        values: Keys as given; ``src`` and ``out`` as text.

    Raises:
        ConfigError: A key is unknown, missing, out of range, or contradicts another; one line.
    """
    keys = validate(SignalsKeys, values, WHERE)
    if keys.like is not None:
        keys = _like(keys, values)
    if keys.per_image and keys.reference_db is not None:
        raise ConfigError("per_image=true and reference_db exclude each other: give one scale for all, or one each")
    if keys.high_hz is not None and keys.high_hz <= keys.low_hz:
        raise ConfigError(f"low_hz={keys.low_hz:g} high_hz={keys.high_hz:g}: high_hz must be the larger")
    if keys.group is not None and keys.signals_per_part is not None:
        raise ConfigError("group= and signals_per_part= both say what belongs together; give one of them")
    window_s = keys.window_s or WINDOW_S[keys.kind]
    if keys.hop_s is not None and keys.hop_s > window_s:
        raise ConfigError(f"hop_s={keys.hop_s:g} is longer than window_s={window_s:g}: sound between would be lost")
    if keys.segment_s is not None and keys.segment_s < window_s:
        raise ConfigError(f"segment_s={keys.segment_s:g} is shorter than window_s={window_s:g}; lengthen it")
    return keys


def length_in(like: str) -> float | None:
    """Return the length of the recordings, s, that an earlier signals.yaml says, if it does."""
    file = Path(like).expanduser()
    length = load_yaml(file / SIGNALS_YAML if file.is_dir() else file).get("length_s")
    return float(length) if isinstance(length, (int, float)) else None


def train_defaults(data: Path) -> dict[str, float | None]:
    """Return the stock keys that training on a folder of pictures should use unless the user gives others.

    Args:
        data: Folder of the data set.

    Returns:
        ``TRAIN_DEFAULTS`` when the folder was written by ``data convert from=signals``, else nothing.
    """
    return dict(TRAIN_DEFAULTS) if (data / SIGNALS_YAML).is_file() else {}


def _like(keys: SignalsKeys, values: dict[str, Any]) -> SignalsKeys:
    """Return the keys with those of an earlier signals.yaml in place."""
    file = Path(str(keys.like)).expanduser()
    file = file / SIGNALS_YAML if file.is_dir() else file
    for name in ("split", "group", "signals_per_part"):
        if name in values and values[name] is not None:
            raise ConfigError(f"{name}= does not go with like=: recordings drawn like earlier ones are not split")
    taken = load_yaml(file).get("parameters")
    if not isinstance(taken, dict) or set(taken) != set(DRAWN):
        raise ConfigError(f"like={keys.like}: is not a {SIGNALS_YAML} written by data convert from=signals")
    for name in DRAWN:
        if name in values and values[name] != taken[name]:
            raise ConfigError(
                f"{name}={values[name]} contradicts like={keys.like}, which has {taken[name]}; leave it out"
            )
    return validate(SignalsKeys, {**values, **taken}, str(file))
