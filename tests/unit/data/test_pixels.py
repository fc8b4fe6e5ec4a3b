from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from data_factory import read_pixels, write_image
from numpy.typing import NDArray
from PIL import Image

from kd_yolo.data.pixels import BadImageError, decode, examine, in_threads, look, similar_pairs
from kd_yolo.data.samples import image_size


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tif", ".webp"])
def test_decode__whole_images(tmp_path: Path, suffix: str) -> None:
    pixels, _, warning = decode(write_image(tmp_path / f"a{suffix}", 1))
    assert pixels.shape == (30, 40, 3)
    assert pixels.dtype == np.uint8
    assert not warning


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tif", ".webp"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_decode__truncated_images_are_refused(tmp_path: Path, suffix: str, share: float) -> None:
    file = write_image(tmp_path / f"a{suffix}", 1, 200, 200)
    code = file.read_bytes()
    file.write_bytes(code[: int(len(code) * share)])
    with pytest.raises(BadImageError, match=r"truncated|decoded"):
        decode(file)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"<html>404</html>", "not an image"), (b"\xff\xd8\xff\xe0", "decoded")]
)
def test_decode__no_image(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(content)
    with pytest.raises(BadImageError, match=message):
        decode(file)


def test_decode__missing_and_too_small(tmp_path: Path) -> None:
    with pytest.raises(BadImageError, match="cannot be read"):
        decode(tmp_path / "none.jpg")
    with pytest.raises(BadImageError, match="9x30 pixels"):
        decode(write_image(tmp_path / "a.png", 1, 9, 30))


def test_decode__bytes_after_a_jpeg_are_a_warning(tmp_path: Path) -> None:
    file = write_image(tmp_path / "a.jpg", 1)
    file.write_bytes(file.read_bytes() + b"trailer")
    assert "re-encodes" in decode(file)[2]


def test_examine__pixels_digest_sees_through_the_container(tmp_path: Path) -> None:
    first = write_image(tmp_path / "a.png", 1)
    pixels = read_pixels(first, cv2.IMREAD_GRAYSCALE)
    cv2.imwrite(str(tmp_path / "b.bmp"), pixels)
    cv2.imwrite(str(tmp_path / "c.png"), cv2.cvtColor(pixels, cv2.COLOR_GRAY2BGR))
    pixels[0, 0] ^= 1
    cv2.imwrite(str(tmp_path / "d.png"), pixels)
    a, b, c, d = (examine(tmp_path / name) for name in ("a.png", "b.bmp", "c.png", "d.png"))
    assert a.pixels_digest == b.pixels_digest == c.pixels_digest != d.pixels_digest
    assert len({a.bytes_digest, b.bytes_digest, c.bytes_digest, d.bytes_digest}) == 4
    assert (a.width, a.height) == (40, 30)


def test_examine__size_follows_exif_turning(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.new("L", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    facts = examine(tmp_path / "a.jpg")
    assert (facts.width, facts.height) == (20, 40)


def test_look__blind_to_light_but_not_to_content() -> None:
    rng = np.random.default_rng(0)
    scene, other = (cv2.resize(rng.normal(0, 25, (30, 30)).astype(np.float32), (200, 200)) for _ in range(2))
    light = np.linspace(-15, 15, 200, dtype=np.float32)[None]

    def photo(values: NDArray[np.float32]) -> NDArray[np.uint8]:
        return np.repeat(np.clip(values + 120, 0, 255).astype(np.uint8)[..., None], 3, axis=2)

    first = look(photo(scene))
    assert float(np.linalg.norm(first)) == pytest.approx(1, abs=1e-5)
    assert float(first @ look(photo(0.6 * scene - 30 + light))) > 0.95
    assert float(first @ look(photo(other))) < 0.5


def test_similar_pairs__finds_each_pair_once_over_block_borders() -> None:
    rng = np.random.default_rng(0)
    looks = rng.normal(size=(1500, 64)).astype(np.float32)
    looks[1400], looks[1450] = looks[3], looks[1420]
    looks /= np.linalg.norm(looks, axis=1, keepdims=True)
    assert [(i, j) for i, j, _ in similar_pairs(looks)] == [(3, 1400), (1420, 1450)]


def test_in_threads__keeps_order_and_hands_over_bad_images(tmp_path: Path) -> None:
    files = [write_image(tmp_path / f"{i}.png", i) for i in range(20)]
    files[7].write_bytes(b"")
    results = list(in_threads(examine, files))
    assert [file for file, _ in results] == files
    assert [i for i, (_, result) in enumerate(results) if isinstance(result, BadImageError)] == [7]


def test_decode__a_file_that_is_no_image_installs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ultralytics replaces PIL.Image.open by a version that tries to install a package for unknown formats
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("PIL.Image.open was called")

    monkeypatch.setattr(Image, "open", refuse)
    (tmp_path / "a.jpg").write_bytes(b"no image at all")
    with pytest.raises(BadImageError):
        decode(tmp_path / "a.jpg")
    with pytest.raises(BadImageError):
        image_size(tmp_path / "a.jpg")
    assert image_size(write_image(tmp_path / "b.png", 1)) == (40, 30)
