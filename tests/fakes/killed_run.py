"""A training run in a process of its own, killed at a chosen call."""

from __future__ import annotations

import os
import pkgutil
import signal
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from train.fit import main


@dataclass(frozen=True)
class Kill:
    """At the `call`-th call of a function that has an argument ending in `ending`."""

    function: str  # module:Class.name
    call: int = 1
    ending: str = ""


def run(arguments: list[str], kill: Kill | None) -> int | None:
    """Train as the command line does.

    Returns:
        The exit status; that of a signal is negative.
    """
    # forked from a process that has imported everything and started nothing
    context = get_context("forkserver")
    context.set_forkserver_preload(["killed_run"])
    process = context.Process(target=_train, args=(arguments, kill))
    process.start()
    process.join()
    return process.exitcode


def _train(arguments: list[str], kill: Kill | None) -> None:
    if kill is not None:
        _arm(kill)
    main(arguments)


def _arm(kill: Kill) -> None:
    owner, _, name = kill.function.rpartition(".")
    holder = pkgutil.resolve_name(owner)
    original, left = getattr(holder, name), kill.call

    def called(*args: Any, **settings: Any) -> Any:
        nonlocal left
        left -= not kill.ending or any(str(one).endswith(kill.ending) for one in args)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **settings)

    setattr(holder, name, called)
