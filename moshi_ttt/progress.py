"""Progress of long work: a bar that moves; where that goes to a file, a line now and then."""

from __future__ import annotations

import logging
import sys
from functools import partial

from tqdm import tqdm

LINE_SEC = 5.0
"""Between two lines, where no one sees a bar move."""


def is_seen() -> bool:
    """Whether progress goes to a terminal."""
    return sys.stderr.isatty()


progress = partial(tqdm, mininterval=0.1 if is_seen() else LINE_SEC)


class LinesBesideBars(logging.Handler):
    """Writes to stderr, above a bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """One record."""
        tqdm.write(self.format(record), file=sys.stderr)
