from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kd_yolo.bench import affinity
from kd_yolo.bench.affinity import choose_cores, physical_cores, usable_cores
from kd_yolo.bench.energy import Meter, open_meter
from kd_yolo.errors import ConfigError

needs_binding = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot bind processes")


def test_cores__are_those_of_this_process() -> None:
    assert usable_cores()
    assert set(physical_cores()) <= set(usable_cores())


@needs_binding
def test_choose_cores__the_idlest_physical_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affinity, "usable_cores", lambda: [0, 1, 2, 3, 4, 5])
    monkeypatch.setattr(affinity, "physical_cores", lambda: [0, 1, 2])  # 3, 4, 5 share their units
    monkeypatch.setattr(affinity, "busy_percent", lambda: {0: 1.0, 1: 99.0, 2: 3.0})
    assert choose_cores(1) == [2]  # 0 and 2 are idle alike, and interrupts go to 0
    assert choose_cores(2) == [0, 2]
    assert choose_cores(3, True) == [0, 1, 2]
    assert choose_cores(4) == [0, 1, 2, 5]
    assert choose_cores(64) == [0, 1, 2, 3, 4, 5]


@needs_binding
def test_choose_cores__as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affinity, "usable_cores", lambda: [0, 1, 2, 3, 8])
    assert choose_cores(1, False) is None
    assert choose_cores(2, [8, 1, 8]) == [1, 8]
    for wanted in ([4], [0, 9], []):
        with pytest.raises(ConfigError, match=r"affinity=\[.*\]: this process may use the cores 0-3, 8"):
            choose_cores(1, wanted)


@needs_binding
def test_bind__holds_for_threads_started_later() -> None:
    core = usable_cores()[-1]
    code = (
        "import os, threading; from kd_yolo.bench.affinity import bind; "
        f"bind([{core}]); found = []; "
        "one = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0))); one.start(); one.join(); "
        "print(os.sched_getaffinity(0), found[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{{{core}}} {{{core}}}"


def rapl(root: Path, *zones: tuple[str, int]) -> Path:
    for name, microjoules in zones:
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "energy_uj").write_text(f"{microjoules}\n")
        (root / name / "max_energy_range_uj").write_text("9000000\n")
    return root


def test_meter__rapl_counts_packages_and_not_their_parts(tmp_path: Path) -> None:
    root = rapl(tmp_path, ("intel-rapl:0", 1_000_000), ("intel-rapl:0:0", 5), ("intel-rapl:1", 2_000_000))
    meter = open_meter(torch.device("cpu"), root)
    before = meter.start()
    assert before == [1.0, 2.0]
    rapl(tmp_path, ("intel-rapl:0", 1_500_000), ("intel-rapl:0:0", 8_000_000), ("intel-rapl:1", 4_000_000))
    assert meter.since(before) == pytest.approx(2.5)
    assert meter.name == "RAPL, all CPU packages"


def test_meter__a_counter_that_started_again(tmp_path: Path) -> None:
    meter = open_meter(torch.device("cpu"), rapl(tmp_path, ("intel-rapl:0", 8_500_000)))
    before = meter.start()
    rapl(tmp_path, ("intel-rapl:0", 250_000))
    assert meter.since(before) == pytest.approx(0.75)  # 9 - 8.5 + 0.25


def test_meter__none_says_why(tmp_path: Path) -> None:
    for root, reason in ((tmp_path / "gone", "no RAPL counters"), (tmp_path, "no RAPL counters")):
        meter = open_meter(torch.device("cpu"), root)
        assert (meter.start(), meter.since(None)) == (None, None)
        assert reason in meter.name
    broken = rapl(tmp_path, ("intel-rapl:0", 1))
    (broken / "intel-rapl:0" / "energy_uj").write_text("secret")
    assert "cannot be read" in open_meter(torch.device("cpu"), broken).name


def test_meter__of_a_gpu_without_a_driver() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    meter = open_meter(torch.device("cuda", 0))
    assert isinstance(meter, Meter)
    assert meter.start() is None
    assert "pynvml" in meter.name or "driver" in meter.name
