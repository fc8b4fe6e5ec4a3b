"""Exporting to OpenVINO and opening the result tell nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from export_factory import need, source

from kd_yolo.runtimes.telemetry import SWITCH, no_telemetry

WATCHED = """
import sys
from openvino_telemetry.utils.sender import TelemetrySender
sent = []
TelemetrySender.send = lambda self, backend, message, timeout=1.0: sent.append(message)
if sys.argv[1] == "export":
    from kd_yolo.export import export
    export(sys.argv[2], "openvino", out=sys.argv[3])
elif sys.argv[1] == "open":
    from pathlib import Path
    from kd_yolo.runtimes import open_session
    open_session(Path(sys.argv[3]))
else:
    import openvino
print("messages:", len(sent))
"""


def test_no_telemetry__export_and_open_send_nothing(tmp_path: Path) -> None:
    """The import alone, without the switch, does: so the watch works."""
    need("openvino")
    pytest.importorskip("openvino_telemetry")
    services = {"CI", SWITCH, "JENKINS_URL"}
    environment = {key: value for key, value in os.environ.items() if key not in services} | {"HOME": str(tmp_path)}
    counts = {}
    for what in ("import", "export", "open"):
        words = [sys.executable, "-c", WATCHED, what, str(source()), str(tmp_path / "x_openvino_model")]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        counts[what] = int(done.stdout.rsplit("messages:", 1)[1])
    assert counts["import"] > 0
    assert counts["export"] == counts["open"] == 0


@pytest.mark.parametrize("before", [None, "True"])
def test_no_telemetry__puts_the_environment_back(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    if before is not None:
        monkeypatch.setenv(SWITCH, before)
    seen = []

    def fail() -> None:
        with no_telemetry():
            seen.append(os.environ[SWITCH])
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert seen == [before or "kd-yolo"]
    assert os.environ.get(SWITCH) == before
