"""Reports for people and programs: GitHub Markdown, aligned plain text for a terminal, plain data for JSON."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any


class PairReport(ABC):
    """Base of a report dataclass that people read as a list of names and values."""

    @abstractmethod
    def rows(self) -> list[tuple[str, str]]:
        """Return names and values; the first one is the headline."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        content = asdict(self)  # type: ignore[call-overload]
        return {key: str(value) if isinstance(value, Path) else value for key, value in content.items()}

    def to_markdown(self) -> str:
        """Return a table of two columns."""
        head, *rows = self.rows()
        return markdown_table(head, rows)

    def to_text(self) -> str:
        """Return aligned lines for a terminal."""
        return text_pairs(self.rows())


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; cells must not hold a line break."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def text_pairs(rows: Sequence[tuple[str, str]]) -> str:
    """Return ``name  value`` lines with the values aligned."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
