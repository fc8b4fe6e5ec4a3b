"""The teacher cache: equal to the live teacher, found again by content, never trusted when damaged, never too large."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from detector_factory import tiny_detector
from taps_factory import Shape, leaves, random_taps
from torch import Tensor

from kd_yolo.config import Recipe
from kd_yolo.distill.base import DetectorSpec, Taps
from kd_yolo.distill.taps import describe, head_strides
from kd_yolo.distill.teacher import map_classes, prepare_teacher
from kd_yolo.distill.teachers.base import Teacher
from kd_yolo.distill.teachers.cache import CachedTeacher, cached, check_repeating_views, from_records, to_records
from kd_yolo.distill.teachers.cache_store import SUFFIX, TOLERANCE, DiskStore, RamStore, Store, compact, decode, encode
from kd_yolo.distill.teachers.detect import DetectTeacher
from kd_yolo.errors import ConfigError, TeacherError

NAMES = {0: "scratch", 1: "dent", 2: "stain"}
READS = frozenset({"neck", "scores", "boxes", "scores_one2one"})
STRIDES = (8, 16, 32)
IDENTITY = {"version": "1", "teachers": ["abc"], "merge": None, "classes": ["scratch"]}


class Counting(Teacher):
    """A detector that counts the images it is asked about."""

    def __init__(self, inner: DetectTeacher) -> None:
        super().__init__()
        self.inner, self.asked = inner, 0
        self.strides, self.provides, self.class_known = inner.strides, inner.provides, inner.class_known

    def describe(self, strides: Sequence[int]) -> DetectorSpec:
        return self.inner.describe(strides)

    def taps(self, images: Tensor, reads: frozenset[str], strides: Sequence[int], hold: int = 1) -> Taps:
        self.asked += len(images)
        return self.inner.taps(images, reads, strides, hold)

    def with_head(self, *args: Any, **keys: Any) -> Taps:
        return self.inner.with_head(*args, **keys)


@pytest.fixture
def teacher() -> Counting:
    return Counting(DetectTeacher(prepare_teacher(tiny_detector(form=None), map_classes(NAMES, NAMES))))


@pytest.fixture(params=["ram", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return RamStore(1.0) if request.param == "ram" else DiskStore(tmp_path / "cache", 1.0, IDENTITY)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Return a function that gives what Ultralytics' logger said."""
    from ultralytics.utils import LOGGER

    monkeypatch.setattr(LOGGER, "handlers", [*LOGGER.handlers, caplog.handler])  # whoever changed the root logger
    monkeypatch.setattr(LOGGER, "propagate", False)
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def ask(teacher: Teacher, pixels: Tensor, reads: frozenset[str] = READS, hold: int = 1) -> Taps:
    return teacher.taps(pixels, reads, STRIDES, hold)


def assert_close(first: Taps, second: Taps) -> None:
    for mine, theirs in zip(leaves(first), leaves(second), strict=True):
        assert mine.shape == theirs.shape
        assert mine.numel() == 0 or float((mine - theirs).abs().max()) <= TOLERANCE
    assert torch.equal(first.anchors, second.anchors)
    assert torch.equal(first.strides, second.strides)


def test_cached__equals_live_and_is_asked_once_whatever_the_batch(teacher: Counting, store: Store) -> None:
    pixels = images(6)
    live, cache = ask(teacher, pixels), CachedTeacher(teacher, store, IDENTITY)
    teacher.asked = 0
    first = ask(cache, pixels)
    assert_close(first, live)
    assert (cache.hits, cache.misses, teacher.asked) == (0, 6, 6)
    order = [5, 0, 3, 3, 1]
    again = ask(cache, pixels[order])
    assert_close(again, ask(teacher.inner, pixels[order]))
    assert (cache.hits, cache.misses, teacher.asked) == (5, 6, 6)
    for mine, theirs in zip(leaves(again), leaves(first), strict=True):
        assert torch.equal(mine, theirs[order])  # a hit is what the miss gave, digit for digit


def test_cached__known_and_new_images_in_one_batch(teacher: Counting, store: Store) -> None:
    cache, old, new = CachedTeacher(teacher, store, IDENTITY), images(2), images(2, seed=1)
    ask(cache, old)
    mixed = torch.stack([new[0], old[1], new[1], old[0]])
    assert_close(ask(cache, mixed), ask(teacher.inner, mixed))
    assert (cache.hits, cache.misses) == (2, 4)


@pytest.mark.parametrize("hold", [0, 1, 2])
def test_cached__inside_of_the_head_with_live_tails(hold: int, teacher: Counting, store: Store) -> None:
    reads, pixels = frozenset({"neck", "scores", "boxes", "head"}), images(2)
    cache, live = CachedTeacher(teacher, store, IDENTITY), ask(teacher, pixels, reads, hold)
    ask(cache, pixels, reads, hold)
    kept = ask(cache, pixels, reads, hold)
    assert cache.hits == 2
    assert kept.head is not None
    assert live.head is not None
    assert_close(kept, live)
    for mine, theirs, tail in zip(kept.head.cls, live.head.cls, kept.head.cls_tail, strict=True):
        assert torch.allclose(tail(kept.head.activate(mine)), tail(live.head.activate(theirs)), atol=2e-2)


def test_cached__neck_maps_are_kept_only_for_those_who_read_them(teacher: Counting, store: Store) -> None:
    cache, reads = CachedTeacher(teacher, store, IDENTITY), frozenset({"scores", "boxes"})
    for _ in range(2):
        taps = ask(cache, images(2), reads)
        assert [tuple(x.shape[1:]) for x in taps.neck] == [(0, 8, 8), (0, 4, 4), (0, 2, 2)]
    assert_close(replace(ask(cache, images(2)), neck=taps.neck), replace(ask(teacher, images(2)), neck=taps.neck))


@pytest.mark.parametrize("change", ["reads", "strides", "hold", "pixel", "identity"])
def test_cached__another_question_is_another_record(change: str, teacher: Counting, store: Store) -> None:
    reads, pixels = frozenset({"head"}), images(1)
    cache = CachedTeacher(teacher, store, IDENTITY)
    cache.taps(pixels, reads, STRIDES, 1)
    if change == "reads":
        cache.taps(pixels, reads | {"neck"}, STRIDES, 1)
    elif change == "strides":
        cache.taps(pixels, reads, (8, 16), 1)
    elif change == "hold":
        cache.taps(pixels, reads, STRIDES, 2)
    elif change == "pixel":
        pixels[0, 0, 0, 0] += 1 / 255
        cache.taps(pixels, reads, STRIDES, 1)
    else:
        CachedTeacher(teacher, store, {**IDENTITY, "teachers": ["def"]}).taps(pixels, reads, STRIDES, 1)
    assert teacher.asked == 2
    cache.taps(images(1), reads, STRIDES, 1)
    assert teacher.asked == 2  # the first question again


def test_cached__autocast_answers_are_kept_apart(teacher: Counting) -> None:
    cache, pixels = CachedTeacher(teacher, RamStore(1.0), IDENTITY), images(1)
    ask(cache, pixels)
    with torch.autocast("cpu", torch.bfloat16):
        half = ask(cache, pixels)
    assert teacher.asked == 2
    assert half.scores.dtype == torch.float32


def test_disk__a_new_process_finds_everything(teacher: Counting, tmp_path: Path) -> None:
    pixels = images(3)
    ask(CachedTeacher(teacher, DiskStore(tmp_path / "cache", 1.0, IDENTITY), IDENTITY), pixels)
    second = CachedTeacher(teacher, DiskStore(tmp_path / "cache", 1.0, IDENTITY), IDENTITY)
    assert_close(ask(second, pixels), ask(teacher.inner, pixels))
    assert (second.hits, second.misses) == (3, 0)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "text"])
def test_disk__a_damaged_file_is_asked_again_with_a_warning(
    damage: str, teacher: Counting, tmp_path: Path, lines: Callable[[], list[str]]
) -> None:
    folder, pixels = tmp_path / "cache", images(2)
    cache = CachedTeacher(teacher, DiskStore(folder, 1.0, IDENTITY), IDENTITY)
    live = ask(cache, pixels)
    file = sorted(folder.rglob(f"*{SUFFIX}"))[0]
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(
        {
            "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "cut": content[:middle],
            "empty": b"",
            "text": b"hello, this is not it",
        }[damage]
    )
    assert_close(ask(cache, pixels), live)
    assert (cache.hits, cache.misses) == (1, 3)
    assert [file.name in line and "damaged" in line for line in lines()].count(True) == 1
    assert_close(ask(cache, pixels), live)
    assert cache.hits == 3  # the file was written anew


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_full__says_so_once_and_goes_on_live(
    kind: str, teacher: Counting, tmp_path: Path, lines: Callable[[], list[str]]
) -> None:
    record = to_records(ask(teacher, images(1)))[0]
    limit_gb = 2.5 * len(encode(record)) / 1e9
    store: Store = RamStore(limit_gb) if kind == "ram" else DiskStore(tmp_path / "c", limit_gb, IDENTITY)
    cache, pixels = CachedTeacher(teacher, store, IDENTITY), images(4)
    for _ in range(2):
        assert_close(ask(cache, pixels), ask(teacher.inner, pixels))
    assert (cache.hits, cache.misses) == (2, 6)
    assert sum("full" in line for line in lines()) == 1
    if kind == "disk":
        assert sum(f.stat().st_size for f in (tmp_path / "c").rglob(f"*{SUFFIX}")) <= limit_gb * 1e9
        later = CachedTeacher(teacher, DiskStore(tmp_path / "c", limit_gb, IDENTITY), IDENTITY)
        ask(later, images(2, seed=9))  # what lies there counts
        ask(later, images(2, seed=9))
        assert later.hits == 0


def test_disk__that_takes_no_more_does_not_end_the_training(
    teacher: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: Callable[[], list[str]]
) -> None:
    cache, pixels = CachedTeacher(teacher, DiskStore(tmp_path / "c", 1.0, IDENTITY), IDENTITY), images(3)

    def no_space(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_space)
    assert_close(ask(cache, pixels), ask(teacher.inner, pixels))
    assert sum("No space left" in line for line in lines()) == 1
    assert not list((tmp_path / "c").rglob(f"*{SUFFIX}"))


@pytest.mark.parametrize(
    ("other", "said"),
    [({"teachers": ["def"]}, "teachers differ"), ({"version": "2"}, "version differ"), ({"classes": []}, "classes")],
)
def test_disk__a_cache_from_another_teacher_is_refused(other: dict[str, Any], said: str, tmp_path: Path) -> None:
    DiskStore(tmp_path / "cache", 1.0, IDENTITY)
    DiskStore(tmp_path / "cache", 1.0, IDENTITY)
    with pytest.raises(TeacherError, match=rf"a cache from another teacher \(.*{said}.*delete the folder") as caught:
        DiskStore(tmp_path / "cache", 1.0, {**IDENTITY, **other})
    assert "\n" not in str(caught.value)


def test_disk__a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"x")
    with pytest.raises(TeacherError, match="no teacher cache"):
        DiskStore(tmp_path / "photos", 1.0, IDENTITY)


def test_cached__from_a_recipe(teacher: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base: dict[str, Any] = {"teacher": "a.pt", "teacher_sha256": "abc", "method": "cwd"}
    made = cached(teacher, Recipe(**base, cache_teacher="disk", cache_dir=str(tmp_path / "c")), NAMES)
    assert isinstance(made.store, DiskStore)
    assert made.identity["teachers"] == ["abc"]
    assert made.title == teacher.title
    with pytest.raises(ConfigError, match="cache_dir=FOLDER"):
        cached(teacher, Recipe(**base, cache_teacher="disk"), NAMES)
    monkeypatch.setenv("WORLD_SIZE", "4")
    shared = cached(teacher, Recipe(**base, cache_teacher="ram", cache_gb=8.0), NAMES)
    assert isinstance(shared.store, RamStore)
    assert shared.store.budget.left == 2e9


@pytest.mark.parametrize("seed", range(4))
def test_records__round_trip(seed: int) -> None:
    taps = random_taps(Shape(), seed)
    records = [decode(encode(record)) for record in to_records(taps)]
    back = from_records(records, (8, 16), torch.device("cpu"))
    for mine, theirs in zip(back.neck, taps.neck, strict=True):
        assert float((mine - theirs).abs().max()) <= TOLERANCE
    assert float((back.boxes - taps.boxes).abs().max()) <= TOLERANCE


def test_compact__half_where_it_is_close_enough_only() -> None:
    assert compact(torch.tensor([1.0001, -3.9])).dtype == torch.float16
    assert compact(torch.tensor([1.0001, 100.03])).dtype == torch.float32  # float16 steps by 0.06 there
    assert compact(torch.tensor([70000.0])).dtype == torch.float32  # beyond float16's range
    assert compact(torch.zeros(0, 4)).shape == (0, 4)


# ---- views ----

STILL = dict.fromkeys(("mosaic", "hsv_h", "hsv_s", "hsv_v", "translate", "scale"), 0.0)


def test_views__still_ones_are_accepted() -> None:
    check_repeating_views(STILL)
    check_repeating_views({**STILL, "fliplr": 0.5, "flipud": 0.5, "erasing": 0.4, "bgr": 0.1})
    check_repeating_views({**STILL, "mosaic": 1.0, "mixup": 0.5, "close_mosaic": 5, "epochs": 5})


@pytest.mark.parametrize(
    "key",
    [
        *("mosaic", "mixup", "cutmix", "copy_paste", "hsv_h", "hsv_s", "hsv_v", "degrees", "translate", "scale"),
        *("shear", "perspective", "multi_scale"),
    ],
)
def test_views__each_random_one_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"set {key}=0, or leave cache_teacher out"):
        check_repeating_views({**STILL, key: 0.1})


def test_views__defaults_count_and_all_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match="set mosaic=0 hsv_h=0 hsv_s=0 hsv_v=0 translate=0 scale=0, or") as caught:
        check_repeating_views({})
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="set scale=0"):
        check_repeating_views({**STILL, "scale": [0.5, 1.5]})
    with pytest.raises(ConfigError, match="set mosaic=0"):
        check_repeating_views({**STILL, "mosaic": 1.0, "close_mosaic": 4, "epochs": 5})


def test_describe__passes_through(teacher: Counting) -> None:
    cache = CachedTeacher(teacher, RamStore(1.0), IDENTITY)
    assert cache.describe(STRIDES) == describe(teacher.inner.model, STRIDES)
    assert list(cache.strides) == head_strides(teacher.inner.model)
    cache.check_reads("any", frozenset({"neck", "scores", "boxes", "head"}))
