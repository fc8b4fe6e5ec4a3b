"""Progress on stderr, so that stdout stays free for results."""

from __future__ import annotations

import sys
from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (done, all)."""


def stderr_progress(title: str) -> Progress:
    """Return a callback that keeps one line up to date on a terminal and writes only start and end elsewhere."""

    def show(done: int, total: int) -> None:
        terminal = sys.stderr.isatty()
        if terminal and (done % 25 == 0 or done == total):
            print(f"\r{title}  {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif not terminal and done in {0, total}:
            print(f"{title}  {done}/{total}", file=sys.stderr, flush=True)

    return show


def silent(_done: int, _total: int) -> None:
    """Show nothing."""
