"""Find configuration by name: a local file first, then the built-in of that name."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from kd_yolo.errors import ConfigError, nearest

KINDS = ("models", "methods", "datasets", "targets")


def builtin_root() -> Path:
    """Return the folder of the packaged YAML files."""
    return Path(str(files("kd_yolo.cfg")))


def builtin_names(kind: str) -> list[str]:
    """Return the names (file stems) of the built-in YAML files of a kind, sorted."""
    return sorted(path.stem for path in (builtin_root() / kind).glob("*.yaml"))


def find(kind: str, name: str) -> Path:
    """Return the YAML file that ``name`` stands for.

    Args:
        kind: One of ``models``, ``methods``, ``datasets``, ``targets``.
        name: A path to a YAML file, or the name of a built-in with or without ``.yaml``.

    Raises:
        ConfigError: Nothing was found; the message lists both places that were looked at.
    """
    local = Path(name).expanduser()
    if local.suffix in {".yaml", ".yml"} and local.is_file():
        return local.resolve()
    stem = local.stem if local.suffix in {".yaml", ".yml"} else local.name
    builtin = builtin_root() / kind / f"{stem}.yaml"
    if str(local.parent) == "." and builtin.is_file():
        return builtin
    known = builtin_names(kind)
    if local.exists():
        raise ConfigError(f"{kind[:-1]} '{name}': is not a YAML file; give one, or a built-in ({', '.join(known)})")
    raise ConfigError(
        f"{kind[:-1]} '{name}' not found: no file {local} and no built-in of that name "
        f"(built-in: {', '.join(known) or 'none'}){nearest(stem, known)}"
    )


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: The file is unreadable, not YAML, empty or not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        line = str(error).splitlines()[0]
        raise ConfigError(f"{path}: not valid YAML ({line}); correct the file") from error
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise ConfigError(f"{path}: {found}, but 'key: value' lines are needed")
    return content
