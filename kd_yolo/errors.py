"""The one error tree: every message names the key or file and says what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KDYoloError(Exception):
    """Base of every error a user can cause; the command line prints it as one line and exits with status 2."""

    exit_status = 2


class ConfigError(KDYoloError):
    """A key or value on the command line, in a YAML file or in a Python call is not acceptable."""


class DataError(KDYoloError):
    """A data set, label or image is missing, malformed or inconsistent."""


class ModelError(KDYoloError):
    """A model name or model file cannot be built or loaded."""


class CheckpointError(ModelError):
    """A checkpoint file is missing, truncated, foreign or not trusted."""


class TeacherError(KDYoloError):
    """A teacher does not fit the data, the student or the method."""


class ReparamError(KDYoloError):
    """Merged branches do not compute what the training form computes."""


class ExportError(KDYoloError):
    """An export failed or did not pass its parity gate."""


class BackendMissingError(KDYoloError):
    """An optional package is needed; the message names the extra that installs it."""


class OutputError(KDYoloError):
    """A result cannot be written where it was asked for."""


class DistillationError(KDYoloError):
    """Distillation failed one of its own checks (no loss, no gradient, a non-finite value)."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint such as ``; did you mean 'epochs'?`` or an empty string when nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
