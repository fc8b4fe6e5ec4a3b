"""Keep Intel's usage telemetry quiet."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

SWITCH = "TF_BUILD"
"""``openvino_telemetry.utils.opt_in_checker`` declines for OpenVINO and NNCF, which ask it to be silent in automatic
builds (``disable_in_ci``), where CI is ``true`` or this is set. CI means something to other packages too; this is the
variable of one build service and means nothing to any that runs here."""


@contextlib.contextmanager
def no_telemetry() -> Iterator[None]:
    """Let OpenVINO and NNCF send nothing about their use: both do unless the user opted out.

    OpenVINO looks at the variable when it is imported and at the first conversion of a process, and keeps what it found
    until the process ends; a consent that the user wrote into Intel's file is left as it is.
    """
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = before or "kd-yolo"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before
