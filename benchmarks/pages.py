"""Measured tables inside pages: a block between two marks that a script writes anew."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from kd_yolo.errors import ConfigError
from kd_yolo.files import write_text

ROOT = Path(__file__).resolve().parents[1]


def pages_of(value: object, name: str) -> list[str]:
    """Return the pages that ``pages=README.md,docs/recipe.md`` names, each of which has the marks.

    Raises:
        ConfigError: There is no such page, or not each mark once, in order.
    """
    pages = [page for page in str(value).split(",") if page]
    for page in pages:
        check_block(page, name)
    return pages


def write_block(page: str, name: str, text: str) -> None:
    """Put a text between ``<!-- name -->`` and ``<!-- /name -->`` of a page of this project.

    Raises:
        ConfigError: The page does not have each mark once, in order.
    """
    path = ROOT / page
    write_text(path, replace_block(path.read_text(encoding="utf-8"), name, text, page))


def check_block(page: str, name: str) -> None:
    """Refuse a page of this project without the marks, before anything is measured for it.

    Raises:
        ConfigError: There is no such page, or not each mark once, in order.
    """
    if not (ROOT / page).is_file():
        raise ConfigError(f"{page}: no such page in this project")
    replace_block((ROOT / page).read_text(encoding="utf-8"), name, "", page)


def replace_block(content: str, name: str, text: str, page: str = "README.md") -> str:
    """Return a page's content with another text between the marks.

    Raises:
        ConfigError: It does not have each mark once, in order.
    """
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, start, rest = content.partition(first)
    _, end, after = rest.partition(last)
    if not start or not end or first in rest or last in after:
        raise ConfigError(f"{page}: needs {first} and {last} once each, in this order")
    return f"{before}{start}\n{text}\n{end}{after}"


def spread(values: Sequence[float]) -> str:
    """Return mean ± sd (n - 1); a single value alone, nothing for none."""
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else ""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
