"""Tiny made-up copies of the layouts that anomaly data sets are published in."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray


def write_pixels(path: Path, pixels: NDArray[np.uint8]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    done, code = cv2.imencode(path.suffix, pixels)
    assert done
    path.write_bytes(code.tobytes())
    return path


def write_photo(path: Path, seed: int, size: tuple[int, int] = (24, 32), grey: bool = False) -> Path:
    """Write a texture that no other seed gives; size is height, width."""
    shape = size if grey else (*size, 3)
    return write_pixels(path, np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def square_mask(size: tuple[int, int] = (24, 32), value: int = 255, side: int = 6) -> NDArray[np.uint8]:
    mask = np.zeros(size, np.uint8)
    mask[4 : 4 + side, 8 : 8 + side] = value
    return mask


def mvtec_tree(root: Path, train: int = 4, good: int = 2, defects: tuple[str, ...] = ("crack", "hole")) -> Path:
    """Every folder numbers its images from 000, so that stems repeat across folders."""
    seed = sum(map(ord, root.name)) * 1000
    for folder, count in (("train/good", train), ("test/good", good), *((f"test/{d}", 2) for d in defects)):
        for index in range(count):
            seed += 1
            write_photo(root / folder / f"{index:03d}.png", seed)
    for number, defect in enumerate(defects):
        for index in range(2):
            mask = square_mask(side=6 + 2 * number + index)
            write_pixels(root / "ground_truth" / defect / f"{index:03d}_mask.png", mask)
    return root


def btad_tree(root: Path) -> Path:
    """Bmp images, png masks of the same stem."""
    for seed, name in enumerate(("train/ok/0000", "train/ok/0001", "test/ok/0000", "test/ko/0000", "test/ko/0001")):
        write_photo(root / f"{name}.bmp", 77 + seed)
    for index in range(2):
        write_pixels(root / "ground_truth/ko" / f"{index:04d}.png", square_mask(side=5 + index))
    return root


def tile_tree(root: Path, free: int = 12) -> Path:
    """Free tiles in pairs of two exposures; one free tile looks like a cracked one; one mask empty, one of specks."""
    for index in range(free):
        rng = np.random.default_rng(index // 2)
        base = cv2.resize(rng.uniform(0, 160, (12, 12)).astype(np.float32), (64, 64), interpolation=cv2.INTER_CUBIC)
        exposed = np.clip(base * (1 + 0.2 * (index % 2)) + 20, 0, 255).astype(np.uint8)
        write_pixels(root / "MT_Free/Imgs" / f"exp{index % 2}_num_{1000 + 7 * index}.jpg", exposed)
        write_pixels(root / "MT_Free/Imgs" / f"exp{index % 2}_num_{1000 + 7 * index}.png", np.zeros((64, 64), np.uint8))
    for index, (side, value) in enumerate(((12, 255), (9, 200), (2, 255), (5, 90))):
        rng = np.random.default_rng(0 if index == 0 else 100 + index)  # the first looks like the first free pair
        base = cv2.resize(rng.uniform(0, 160, (12, 12)).astype(np.float32), (64, 64), interpolation=cv2.INTER_CUBIC)
        write_pixels(root / "MT_Crack/Imgs" / f"exp1_num_{index}.jpg", np.clip(base + 40, 0, 255).astype(np.uint8))
        mask = square_mask((64, 64), value, side)
        mask[60, 60] = 255 if index < 2 else 0  # a speck beside the region
        write_pixels(root / "MT_Crack/Imgs" / f"exp1_num_{index}.png", mask)
    (root / "README.md").write_text("as published")
    return root
