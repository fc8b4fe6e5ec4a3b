from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from signals_factory import RATE_HZ, pictures, tone, two_classes, write_tone

from kd_yolo.config import stock_keys
from kd_yolo.data.signals import DRAWN, train_defaults
from kd_yolo.data.signals_convert import convert_signals
from kd_yolo.errors import ConfigError, DataError, OutputError

SMALL: dict[str, Any] = {"imgsz": 32, "window_s": 0.016}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return two_classes(tmp_path / "raw")


def test_convert_signals__layout_yaml_and_report(raw: Path, tmp_path: Path) -> None:
    report = convert_signals(raw, tmp_path / "out", **SMALL)
    found = pictures(tmp_path / "out")
    assert len(found) == 20
    assert {name.rsplit("/", 1)[0] for name in found} == {f"{s}/{c}" for s in ("train", "val", "test") for c in
                                                         ("normal", "crack")}  # fmt: skip
    assert report.images == {c: {"train": 8, "val": 1, "test": 1} for c in ("crack", "normal")}
    assert report.parts == report.images
    written = yaml.safe_load((tmp_path / "out/signals.yaml").read_text())
    assert tuple(written["parameters"]) == DRAWN
    assert written["parameters"] | {"reference_db": None} == {
        "kind": "spectrogram", "sampling_rate_hz": 8000.0, "window_s": 0.016, "hop_s": 0.004, "low_hz": 0.0,
        "high_hz": 4000.0, "segment_s": None, "dynamic_range_db": 80.0, "reference_db": None, "per_image": False,
        "imgsz": 32,
    }  # fmt: skip
    assert json.loads((tmp_path / "out/conversion.json").read_text())["images"] == report.images
    text = report.to_text()
    assert "8 (8)" in text
    assert "white is" in text
    assert report.to_dict()["format"] == "signals"


def test_convert_signals__pictures_show_the_tones(raw: Path, tmp_path: Path) -> None:
    convert_signals(raw, tmp_path / "out", **SMALL)
    for name, picture in pictures(tmp_path / "out").items():
        # 32 rows for 0 to 4 kHz, highest on top: 1 kHz lies 8 rows from below, 2 kHz 16
        assert np.bincount(picture[:, 4:-4].argmax(axis=0)).argmax() == pytest.approx(
            23.5 if "normal" in name else 15.5, abs=1
        )


def test_convert_signals__one_scale_for_all_keeps_loudness(tmp_path: Path) -> None:
    raw = two_classes(tmp_path / "raw")
    for index in range(10):  # 20 dB below the others
        write_tone(raw / "quiet" / f"q{index}.wav", 1000, 50 + index, amplitude=0.05)
    size = {**SMALL, "imgsz": 65}  # as many rows as bins: nothing is averaged
    report = convert_signals(raw, tmp_path / "out", **size)
    # a tone of amplitude 0.5 peaks at 20 log10(0.5) = -6.0 dB, a little less where no bin meets it
    assert report.parameters["reference_db"] == pytest.approx(-6.0, abs=0.5)
    for name, picture in pictures(tmp_path / "out").items():
        # 20 of 80 dB below white: 255 * (1 - 20 / 80) = 191
        assert int(picture.max()) == pytest.approx(191 if "quiet" in name else 255, abs=4)
    report = convert_signals(raw, tmp_path / "each", per_image=True, **size)
    assert report.parameters["reference_db"] is None
    assert all(picture.max() == 255 for picture in pictures(tmp_path / "each").values())
    report = convert_signals(raw, tmp_path / "fixed", reference_db=14.0, **size)
    assert report.parameters["reference_db"] == 14.0
    louder = pictures(tmp_path / "fixed")
    assert all(int(p.max()) == pytest.approx(128 if "quiet" in n else 191, abs=4) for n, p in louder.items())


def test_convert_signals__reference_is_of_the_training_part_alone(raw: Path, tmp_path: Path) -> None:
    quiet = convert_signals(raw, tmp_path / "a", **SMALL).parameters["reference_db"]
    held = next((tmp_path / "a/test/crack").glob("*.png")).stem
    write_tone(raw / "crack" / f"{held}.wav", 2000, 9, amplitude=0.99)
    report = convert_signals(raw, tmp_path / "b", **SMALL)
    assert (tmp_path / "b/test/crack" / f"{held}.png").is_file()
    assert report.parameters["reference_db"] == quiet


def test_convert_signals__segments_of_one_recording_stay_together(tmp_path: Path) -> None:
    raw = two_classes(tmp_path / "raw", files=6, length_s=1.03)
    report = convert_signals(raw, tmp_path / "out", segment_s=0.25, **SMALL)
    found = pictures(tmp_path / "out")
    assert len(found) == 48
    assert report.dropped_s == pytest.approx(12 * 0.03)
    homes: dict[str, set[str]] = {}
    for name in found:
        split, label, stem = name.split("/")
        homes.setdefault(f"{label}/{stem.split('_s')[0]}", set()).add(split)
    assert len(homes) == 12
    assert all(len(splits) == 1 for splits in homes.values())


@pytest.mark.parametrize("suffix", ["csv", "npy", "mat"])
def test_convert_signals__tables_of_every_kind_give_the_same_pictures(tmp_path: Path, suffix: str) -> None:
    if suffix == "mat":
        scipy_io = pytest.importorskip("scipy.io")
    for label, hz in (("normal", 1000), ("crack", 2000)):
        (tmp_path / "raw" / label).mkdir(parents=True)
        for index in range(4):
            table = np.array([tone(hz, 100 * index + row) for row in range(3)])
            file = tmp_path / "raw" / label / f"{label}{index}.{suffix}"
            if suffix == "csv":
                np.savetxt(file, table.T, delimiter=";", fmt="%.17g")
            elif suffix == "npy":
                np.save(file, table)
            else:
                scipy_io.savemat(file, {"data": table.T})
    how: dict[str, Any] = {} if suffix == "npy" else {"orientation": "columns"}
    report = convert_signals(tmp_path / "raw", tmp_path / "out", sampling_rate_hz=8000, **how, **SMALL)
    assert sum(sum(row.values()) for row in report.parts.values()) == 8
    found = pictures(tmp_path / "out")
    assert len(found) == 24
    assert {re.sub(r".*(_r\d+)$", r"\1", name) for name in found} == {"_r0000", "_r0001", "_r0002"}
    homes = {(n.split("/")[0], re.sub(r"_r\d+$", "", n.split("/")[2])) for n in found}
    assert len(homes) == 8  # no file in two splits
    rows = {n: p for n, p in found.items() if "normal0" in n}
    one = tmp_path / "one"
    for label, hz in (("normal", 1000), ("crack", 2000)):
        for index in range(4):
            (one / label).mkdir(parents=True, exist_ok=True)
            np.save(one / label / f"x{index}.npy", tone(hz, 100 * index))
    convert_signals(one, tmp_path / "single", sampling_rate_hz=8000.0,
                    reference_db=report.parameters["reference_db"], **SMALL)  # fmt: skip
    single = next(p for n, p in pictures(tmp_path / "single").items() if n.endswith("normal/x0"))
    first = next(p for n, p in rows.items() if n.endswith("_r0000"))
    np.testing.assert_array_equal(first, single)


def test_convert_signals__signals_per_part_says_that_rows_are_apart(tmp_path: Path) -> None:
    for label, hz in (("N", 1000), ("D", 2000)):
        (tmp_path / "raw" / label).mkdir(parents=True)
        np.save(tmp_path / "raw" / label / "all.npy", np.array([tone(hz, row) for row in range(20)]))
    with pytest.raises(DataError, match="class 'D': its 20 images come from 1 part"):
        convert_signals(tmp_path / "raw", tmp_path / "out", sampling_rate_hz=8000, **SMALL)
    report = convert_signals(tmp_path / "raw", tmp_path / "out", sampling_rate_hz=8000, signals_per_part=4,
                             split="0.6/0.2/0.2", **SMALL)  # fmt: skip
    assert report.parts == {label: {"train": 3, "val": 1, "test": 1} for label in ("D", "N")}
    for name in pictures(tmp_path / "out"):
        split, label, stem = name.split("/")
        mates = [int(stem[-4:]) // 4 * 4 + k for k in range(4)]
        assert all((tmp_path / f"out/{split}/{label}/all_r{mate:04d}.png").is_file() for mate in mates)


def test_convert_signals__group_by_name(raw: Path, tmp_path: Path) -> None:
    convert_signals(raw, tmp_path / "out", group=r"(\d+)", split="0.6/0.2/0.2", **SMALL)
    split_of = {name.split("/")[2]: name.split("/")[0] for name in pictures(tmp_path / "out")}
    assert all(split_of[f"n{i}"] == split_of[f"c{i}"] for i in range(10))  # part i before and after it cracked


def test_convert_signals__like_draws_new_recordings_alike_and_does_not_split(raw: Path, tmp_path: Path) -> None:
    first = convert_signals(raw, tmp_path / "out", low_hz=200, **SMALL)
    new = tmp_path / "new"
    for file in raw.rglob("*.wav"):
        (new / file.parent.name).mkdir(parents=True, exist_ok=True)
        (new / file.parent.name / file.name).write_bytes(file.read_bytes())
    write_tone(new / "loose.wav", 1000, 77)
    report = convert_signals(new, tmp_path / "again", like=str(tmp_path / "out/signals.yaml"))
    assert report.parameters == first.parameters
    assert "not split" in report.to_text()
    again = pictures(tmp_path / "again")
    assert len(again) == 21
    assert "loose" in again
    for name, picture in pictures(tmp_path / "out").items():
        np.testing.assert_array_equal(picture, again[name.split("/", 1)[1]])
    with pytest.raises(ConfigError, match=r"imgsz=64 contradicts like="):
        convert_signals(new, tmp_path / "x", like=str(tmp_path / "out"), imgsz=64)
    with pytest.raises(ConfigError, match=r"split= does not go with like="):
        convert_signals(new, tmp_path / "x", like=str(tmp_path / "out"), split="kfold:5:0")
    (tmp_path / "other.yaml").write_text("parameters: {kind: spectrogram}\n")
    with pytest.raises(ConfigError, match=r"is not a signals\.yaml"):
        convert_signals(new, tmp_path / "x", like=str(tmp_path / "other.yaml"))


def test_convert_signals__like_refuses_another_length(raw: Path, tmp_path: Path) -> None:
    """A time axis that is squeezed is another picture than the ones that were learned."""
    convert_signals(raw, tmp_path / "out", imgsz=32)
    assert yaml.safe_load((tmp_path / "out/signals.yaml").read_text())["length_s"] == 0.25
    write_tone(tmp_path / "new" / "long.wav", 1000, 7, length_s=1.0)
    with pytest.raises(DataError, match=r"long\.wav: .* their time axes would differ; cut it to that length"):
        convert_signals(tmp_path / "new", tmp_path / "again", like=str(tmp_path / "out/signals.yaml"))


def test_convert_signals__never_replaces_its_own_source(raw: Path, tmp_path: Path) -> None:
    convert_signals(raw, tmp_path / "out", imgsz=32)
    with pytest.raises(ConfigError, match="which would be replaced"):
        convert_signals(tmp_path / "out" / "train", tmp_path / "out")


def test_convert_signals__same_input_same_output(raw: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        convert_signals(raw, tmp_path / name, seed=3, **SMALL)
    first, second = ({p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.png")} for n in "ab")
    assert first == second


def test_convert_signals__replaces_its_own_but_nothing_else(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_signals(raw, out, **SMALL)
    (out / "train/crack/stale.png").write_bytes(b"x")
    convert_signals(raw, out, **SMALL)
    assert not (out / "train/crack/stale.png").exists()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="was not made by kd-yolo"):
        convert_signals(raw, tmp_path / "foreign", **SMALL)


def test_convert_signals__interrupted_leaves_nothing_and_keeps_the_old(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_signals(raw, out, **SMALL)
    before = (out / "conversion.json").read_bytes()

    def stop(done: int, total: int) -> None:
        if done == total - 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_signals(raw, out, seed=9, progress=stop, **SMALL)
    assert (out / "conversion.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


@pytest.mark.parametrize(("params", "message"), [
    ({"hertz": 3}, "unknown key 'hertz'"),
    ({"window": 3}, "unknown key 'window'; did you mean 'window_s'"),
    ({"kind": "wavelet"}, "kind='wavelet' is not valid"),
    ({"imgsz": 8}, "imgsz=8 is not valid"),
    ({"low_hz": 500, "high_hz": 400}, "high_hz must be the larger"),
    ({"high_hz": 5000}, "above half the sampling rate, 4000 Hz"),
    ({"low_hz": 3990}, "fewer than 2 frequencies"),
    ({"window_s": 0.001}, "window_s=0.001 is 8 samples at 8000 Hz"),
    ({"hop_s": 0.05}, "hop_s=0.05 is longer than window_s=0.032"),
    ({"segment_s": 0.01}, "segment_s=0.01 is shorter than window_s=0.032"),
    ({"per_image": True, "reference_db": 0.0}, "exclude each other"),
    ({"group": "x", "signals_per_part": 1}, "give one of them"),
    ({"split": "half"}, "split=half: not understood"),
    ({"like": "gone.yaml"}, r"gone\.yaml"),
])  # fmt: skip
def test_convert_signals__bad_parameters(raw: Path, tmp_path: Path, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        convert_signals(raw, tmp_path / "out", **params)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


@pytest.mark.parametrize(("params", "message"), [
    ({"sampling_rate_hz": 16000}, r"\.wav: sampled at 8000 Hz, but sampling_rate_hz says 16000 Hz"),
    ({"window_s": 0.3}, r"\.wav: 0\.25 s is too short for one window of 0\.3 s"),
    ({"segment_s": 0.3}, r"\.wav: 0\.25 s is shorter than segment_s=0\.3"),
    ({"group": r"n(\d)"}, "does not match 'c0'"),
])  # fmt: skip
def test_convert_signals__files_that_do_not_fit(
    raw: Path, tmp_path: Path, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        convert_signals(raw, tmp_path / "out", **params)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


def test_convert_signals__one_rate_and_one_length(raw: Path, tmp_path: Path) -> None:
    longer = write_tone(raw / "normal/z.wav", 1000, 99, length_s=0.4)
    with pytest.raises(DataError, match=r"z\.wav: 0\.4 s long, but .*c0\.wav is 0\.25 s.*segment_s"):
        convert_signals(raw, tmp_path / "out", **SMALL)
    assert convert_signals(raw, tmp_path / "out", kind="spectrum").images  # an average has no time axis
    assert convert_signals(raw, tmp_path / "out", segment_s=0.2, **SMALL).images
    content = bytearray(longer.read_bytes())
    content[24:28] = (RATE_HZ * 2).to_bytes(4, "little")
    longer.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"z\.wav: sampled at 16000 Hz, but .*c0\.wav says 8000 Hz"):
        convert_signals(raw, tmp_path / "out", segment_s=0.1, **SMALL)


def test_convert_signals__missing_rate_names_the_file(tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / "raw" / label).mkdir(parents=True)
        np.save(tmp_path / "raw" / label / "x.npy", tone(500, ord(label)))
    with pytest.raises(DataError, match=r"x\.npy: states no sampling rate; give it in Hz"):
        convert_signals(tmp_path / "raw", tmp_path / "out")


def test_convert_signals__wav_files_do_not_lend_their_rate_to_others(raw: Path, tmp_path: Path) -> None:
    np.save(raw / "normal/z.npy", tone(500, 1))
    with pytest.raises(DataError, match=r"z\.npy: states no sampling rate"):
        convert_signals(raw, tmp_path / "out", **SMALL)
    report = convert_signals(raw, tmp_path / "out", sampling_rate_hz=8000, **SMALL)
    assert sum(report.images["normal"].values()) == 11


def test_convert_signals__contradictions(raw: Path, tmp_path: Path) -> None:
    (raw / "crack/same.wav").write_bytes((raw / "normal/n3.wav").read_bytes())
    with pytest.raises(DataError, match="crack/same and normal/n3: the same signal under two classes"):
        convert_signals(raw, tmp_path / "out", **SMALL)
    (raw / "crack/same.wav").unlink()
    np.save(raw / "crack/C1.npy", tone(300, 5))
    with pytest.raises(DataError, match="their pictures would have one name"):
        convert_signals(raw, tmp_path / "out", sampling_rate_hz=8000, segment_s=0.25, **SMALL)
    with pytest.raises(DataError, match="no such folder"):
        convert_signals(tmp_path / "gone", tmp_path / "out")
    with pytest.raises(ConfigError, match="lies inside src"):
        convert_signals(raw, raw / "out")


def test_convert_signals__all_black_is_reported(raw: Path, tmp_path: Path) -> None:
    report = convert_signals(raw, tmp_path / "out", reference_db=200.0, **SMALL)
    assert any("20 pictures are all black" in decision for decision in report.decisions)


def test_train_defaults__for_pictures_of_signals_alone(raw: Path, tmp_path: Path) -> None:
    convert_signals(raw, tmp_path / "out", **SMALL)
    found = train_defaults(tmp_path / "out")
    assert found["fliplr"] == 0
    assert found["auto_augment"] is None
    assert set(found) <= set(stock_keys())
    assert train_defaults(raw) == {}
