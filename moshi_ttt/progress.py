"""Progress of long work: a bar that moves; where that goes to a file, a line now and then."""

from __future__ import annotations

import logging
import sys
from functools import partial
from typing import Any

from tqdm import tqdm

LINE_SEC = 5.0
"""Between two lines, where no one sees a bar move."""


def is_seen() -> bool:
    """Whether progress goes to a terminal."""
    return sys.stderr.isatty()


class _Lines:
    """What bars write, each time on a line of its own."""

    def write(self, text: str) -> None:
        """What a bar draws over what it drew before; a bar that is wiped out is nothing."""
        if text.strip():
            sys.stderr.write(f"{text.strip()}\n")

    def flush(self) -> None:
        """As files have it."""
        sys.stderr.flush()


AS_LINES: dict[str, Any] = {"mininterval": LINE_SEC, "delay": LINE_SEC, "file": _Lines()}
"""Settings of a bar that no one sees; one that ends sooner says nothing."""
progress = partial(tqdm, **({} if is_seen() else AS_LINES))


class LinesBesideBars(logging.Handler):
    """Writes to stderr, above a bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """One record."""
        tqdm.write(self.format(record), file=sys.stderr)
