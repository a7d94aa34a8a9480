"""The one exception for mistakes a user can mend, and the checks of settings that raise it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")


class UserError(ValueError):
    """Bad input; the message names key or file, the value got, the rule and the remedy."""


class SettingError(UserError):
    """A setting that cannot be used.

    Args:
        key: its name where it was checked; `settings_at` says where the user finds it.
        problem: what follows the key in the message: value, rule and remedy.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(key, problem)
        self.key = key
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.key}{self.problem}"


@contextmanager
def settings_at(place: str, **keys: str) -> Iterator[None]:
    """Let a `SettingError` name its setting as it is called where the user sets it.

    A config knows its fields and not where it stands: the same one is `long_generation.run` in
    training and `run` in evaluation. Whoever holds it says so; holders of holders may nest.

    Args:
        place: goes before the key, with a dot between them; nothing if empty.
        keys: whole names of settings that stand elsewhere, e.g. `seconds="--seconds"`.
    """
    try:
        yield
    except SettingError as error:
        below = f"{place}.{error.key}" if place else error.key
        raise SettingError(keys.get(error.key, below), error.problem) from error


def check_setting(holds: bool, key: str, value: object, rule: str) -> None:
    """Raise a `SettingError` unless the rule holds; `rule` says what it is and what to do."""
    if not holds:
        raise SettingError(key, f"={value} {rule}")


def check_bounds(
    key: str,
    value: float | None,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    remedy: str = "",
) -> None:
    """Hold a number against its bounds; NaN is never within them.

    Args:
        key: name of the setting.
        value: None, where it is allowed at all, is within any bounds.
        least: smallest value.
        above: what it must be larger than.
        most: largest value.
        below: what it must be smaller than.
        remedy: what to do, where the rule does not say it.

    Raises:
        SettingError: out of bounds.
    """
    if value is None:
        return
    bounds = (
        ("at least", least, least is None or value >= least),
        ("above", above, above is None or value > above),
        ("at most", most, most is None or value <= most),
        ("below", below, below is None or value < below),
    )
    rule = " and ".join(f"{word} {bound:g}" for word, bound, _ in bounds if bound is not None)
    holds = all(within for *_, within in bounds)
    check_setting(holds, key, value, f"must be {rule}{'; ' if remedy else ''}{remedy}")


def check_fields(config: object, *names: str, **bounds: Any) -> None:
    """`check_bounds` of several fields of a config."""
    for name in names:
        check_bounds(name, getattr(config, name), **bounds)


def run_program(main: Callable[[], Result]) -> Result:
    """Call a program's main function; a `UserError` ends it without a traceback, with status 2.

    What the terminal cannot print, such as a name in another alphabet, it prints escaped.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
