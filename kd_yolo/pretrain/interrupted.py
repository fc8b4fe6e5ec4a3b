"""What an interrupted pretraining leaves, and whether another one may go on with it."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kd_yolo.checkpoints import DAMAGE
from kd_yolo.errors import CheckpointError, ConfigError
from kd_yolo.files import sha256, written_aside
from kd_yolo.nn.student import StudentSpec
from kd_yolo.pretrain.settings import PretrainConfig

CONTENTS = {"peer_content": "from", "model_content": "model", "images_content": "images"}


def part_file(out: Path) -> Path:
    """Return where a pretraining that writes ``out`` keeps its state while it runs."""
    return out.with_name(f".{out.stem}.part.pt")


def identity(config: PretrainConfig, spec: StudentSpec, peer: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Return everything that decides what a pretraining computes, as plain data.

    Files count by their content, images by name and size: a folder may have moved, but not changed.
    """
    root = os.path.commonpath([str(file.parent) for file in files])
    listed = [f"{os.path.relpath(file, root)} {file.stat().st_size}" for file in files]
    structure = {key: value for key, value in spec.cfg.items() if key != "yaml_file"}
    digests = {
        "peer_content": sha256(peer),
        "model_content": sha256(spec.weights) if spec.weights else _digest(json.dumps(structure, default=str)),
        "images_content": _digest("\n".join(listed)),
    }
    return {**config.model_dump(exclude={"resume", "out", "trust", "peer", "model", "images"}), **digests}


def save_part(part: Path, name: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write the state aside and rename it.

    Raises:
        OutputError: The file cannot be written.
    """
    buffer = io.BytesIO()  # torch.save to a file reports a full disk in its own words; writing bytes is an OSError
    torch.save({"identity": dict(name), **state}, buffer)
    with written_aside(part) as aside:
        aside.write_bytes(buffer.getbuffer())


def load_part(part: Path, name: Mapping[str, Any]) -> dict[str, Any]:
    """Return what another process left.

    Raises:
        CheckpointError: It is damaged.
        ConfigError: It belongs to a pretraining with other keys.
    """
    try:
        content: dict[str, Any] = torch.load(part, map_location="cpu", weights_only=True)
        kept = dict(content["identity"])
    except (*DAMAGE, TypeError, AttributeError) as error:
        raise damaged(part) from error
    other = [key for key in name if name[key] != kept.get(key)]
    if other:
        key = other[0]
        what = f"another {CONTENTS[key]}" if key in CONTENTS else f"{key}={kept.get(key)}, not {key}={name[key]}"
        raise ConfigError(
            f"{part}: an interrupted pretraining with {what}; finish it with its own keys, or give resume=false to "
            "begin anew"
        )
    return content


def damaged(part: Path) -> CheckpointError:
    """Return the error that says what to do with a state that cannot be used."""
    return CheckpointError(f"{part}: damaged; delete it, or give resume=false to begin anew")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
