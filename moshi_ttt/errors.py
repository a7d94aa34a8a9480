"""The one exception for mistakes a user can mend."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class UserError(ValueError):
    """Bad input; the message names key or file, the value got, the rule and the remedy."""


def run_program(main: Callable[[], Result]) -> Result:
    """Call a program's main function; a `UserError` ends it without a traceback, with status 2."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
