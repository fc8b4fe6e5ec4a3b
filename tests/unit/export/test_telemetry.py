"""An export to OpenVINO tells nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from export_factory import need, source
from kd_yolo.export.telemetry import SWITCH, no_telemetry

WATCHED = """
import sys
from openvino_telemetry.utils.sender import TelemetrySender
sent = []
TelemetrySender.send = lambda self, backend, message, timeout=1.0: sent.append(message)
if sys.argv[1] == "export":
    from kd_yolo.export import export
    export(sys.argv[2], "openvino", out=sys.argv[3])
else:
    import openvino
print("messages:", len(sent))
"""


@pytest.mark.parametrize("what", ["import", "export"])
def test_no_telemetry__an_export_sends_nothing(tmp_path: Path, what: str) -> None:
    """The import alone, without the switch, does: so the watch works."""
    need("openvino")
    pytest.importorskip("openvino_telemetry")
    services = {"CI", SWITCH, "JENKINS_URL"}
    environment = {key: value for key, value in os.environ.items() if key not in services} | {"HOME": str(tmp_path)}
    words = [sys.executable, "-c", WATCHED, what, str(source()), str(tmp_path / "x_openvino_model")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    count = int(done.stdout.rsplit("messages:", 1)[1])
    assert (count > 0) == (what == "import")
    assert (tmp_path / "x_openvino_model").exists() == (what == "export")


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
