"""JSON that strangers wrote: what cannot be meant is a ValueError, whatever its shape."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from moshi_ttt.errors import UserError
from moshi_ttt.files import require_readable

PATHS_REMEDY = "paths are relative to the manifest: correct the path or remove the line"
DEEPEST = 20  # nesting; what this project reads has five levels
LONGEST_INTEGER = 20  # characters; a longer one is nearer to infinity than to a number of seconds


def read_text(path: Path, what: str, remedy: str) -> str:
    """The text of a UTF-8 file, without the byte-order mark that some editors put first.

    Args:
        path: the file.
        what: it is, for the message.
        remedy: what to do if it cannot be read.

    Raises:
        UserError: it cannot be read.
    """
    require_readable(path, what, remedy)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{what} {path} cannot be read ({error}); save it as UTF-8, or {remedy}"
        ) from error


def parse_json(text: str) -> Any:
    """Parse, and hold what was parsed to what can be handled and printed.

    Raises:
        ValueError: not JSON, nested without end, the same key twice in an object, or lone
            surrogates, which no file can hold. Integers of many digits become floats.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} deep") from None
    _check(value, 0)
    return value


def is_number(value: Any) -> bool:
    """Whether JSON had a number here; Python takes true and false for some."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:40]!r} is there twice")
    return found


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= LONGEST_INTEGER else float(digits)


def _check(value: Any, depth: int) -> None:
    if depth > DEEPEST:
        raise ValueError(f"nested more than {DEEPEST} deep")
    if isinstance(value, str):
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(f"{value[:40]!r} holds half a character; write it in UTF-8")
    elif isinstance(value, list):
        for item in value:
            _check(item, depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check(key, depth + 1)
            _check(item, depth + 1)
