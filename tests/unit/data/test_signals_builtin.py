from __future__ import annotations

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from signals_factory import pictures

from kd_yolo.data import signals_builtin
from kd_yolo.data.signals_builtin import make_knock_synth, resolve_signals_builtin
from kd_yolo.data.signals_wav import read_wav
from kd_yolo.errors import ConfigError, OutputError


def digests(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.wav"))
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_make_knock_synth__layout_and_form(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    out = make_knock_synth(tmp_path / "k", parts=3, knocks=2, progress=lambda done, total: seen.append((done, total)))
    assert sorted(digests(out)) == sorted(
        f"{c}/{c}_{p:03d}/knock_{k}.wav" for c in ("crack", "normal") for p in range(3) for k in range(2)
    )
    assert seen[0] == (0, 12)
    assert seen[-1] == (12, 12)
    values, rate = read_wav(out / "crack/crack_000/knock_0.wav")
    assert (values.shape, rate) == ((1, 8000), 16000)


def test_make_knock_synth__each_part_depends_on_seed_class_and_number_alone(tmp_path: Path) -> None:
    few, many = digests(make_knock_synth(tmp_path / "a", 2, 2)), digests(make_knock_synth(tmp_path / "b", 4, 2))
    assert few.items() <= many.items()
    assert len(set(many.values())) == 16
    other = digests(make_knock_synth(tmp_path / "c", 2, 2, seed=1))
    assert not set(other.values()) & set(few.values())


def test_make_knock_synth__bad_arguments_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="parts=0"):
        make_knock_synth(tmp_path / "k", parts=0)
    with pytest.raises(ConfigError, match="seed=-1"):
        make_knock_synth(tmp_path / "k", seed=-1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="was not made by kd-yolo"):
        make_knock_synth(tmp_path / "mine", 1, 1)


def test_resolve_signals_builtin__made_once_and_again_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(signals_builtin.MADE, "parts", 12)
    monkeypatch.setitem(signals_builtin.MADE, "knocks", 2)
    home = resolve_signals_builtin("knock-synth", tmp_path)
    assert home == tmp_path / "knock-synth"
    assert len(pictures(home)) == 48
    said = capsys.readouterr()
    assert said.out == ""
    assert "48/48" in said.err
    before = (home / "conversion.json").stat().st_mtime_ns
    assert resolve_signals_builtin("knock-synth", tmp_path) == home
    assert (home / "conversion.json").stat().st_mtime_ns == before
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(signals_builtin.MADE, "knocks", 1)
    resolve_signals_builtin("knock-synth", tmp_path)
    assert len(pictures(home)) == 24
    (home / "conversion.json").write_text("{cut o")  # still there, so the folder is known as ours
    resolve_signals_builtin("knock-synth", tmp_path)
    assert json.loads((home / "conversion.json").read_text())["resolved_from"]


def test_resolve_signals_builtin__unknown_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is knock-synth"):
        resolve_signals_builtin("knock", tmp_path)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NDArray[np.uint8]]:
    return pictures(resolve_signals_builtin("knock-synth", tmp_path_factory.mktemp("root")))


def features(drawn: dict[str, NDArray[np.uint8]], *splits: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    names = [name for name in drawn if name.split("/")[0] in splits]
    small = [cv2.resize(drawn[name], (32, 128), interpolation=cv2.INTER_AREA).ravel() / 255 for name in names]
    return np.array(small), np.array(["/crack/" in name for name in names])


def test_knock_synth__no_part_is_in_two_splits(drawn: dict[str, NDArray[np.uint8]]) -> None:
    homes: dict[str, set[str]] = {}
    for name in drawn:
        split, label, stem = name.split("/")
        homes.setdefault(f"{label}/{stem.split('_knock')[0]}", set()).add(split)
    assert len(homes) == 200
    assert all(len(splits) == 1 for splits in homes.values())


def test_knock_synth__can_be_learnt_but_not_from_a_single_number(drawn: dict[str, NDArray[np.uint8]]) -> None:
    x, y = features(drawn, "train")
    seen, truth = features(drawn, "val", "test")
    loud = x.mean(axis=1)
    limits = np.quantile(loud, np.linspace(0.02, 0.98, 49))
    best = max(limits, key=lambda limit: abs(((loud > limit) == y).mean() - 0.5))
    by_loudness = ((seen.mean(axis=1) > best) == truth).mean()
    assert max(by_loudness, 1 - by_loudness) < 0.75

    mean, sd = x.mean(axis=0), x.std(axis=0) + 0.02
    x, seen = (x - mean) / sd, (seen - mean) / sd
    centers = np.stack([x[~y].mean(axis=0), x[y].mean(axis=0)])
    by_center = ((((seen[:, None] - centers) ** 2).sum(axis=2).argmin(axis=1) == 1) == truth).mean()
    assert 0.65 < by_center < 0.9

    dual = np.linalg.solve(x @ x.T + len(x) * np.eye(len(x)), np.where(y, 1.0, -1.0))  # ridge regression
    by_line = ((seen @ x.T @ dual > 0) == truth).mean()
    assert 0.8 < by_line < 0.97
