"""What watches a generation without changing it: recorders, logs, progress bars, clocks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Observer(Protocol):
    """Told of every step; what fits this shape is one, inheriting spares what does nothing."""

    def attached(self) -> AbstractContextManager[None]:
        """Scope of the run: opened before the first step, closed after the last or an error.

        Hooks on the model belong in here, so that they are part of a CUDA graph and leave again.
        """
        return nullcontext()

    def after_step(self, step: int, /) -> None:
        """Called with each finished step, from 0; outside of any graph."""
        return

    def reading_again(self, first: int, remembers: bool, /) -> AbstractContextManager[None]:
        """Scope in which steps from `first` to the last one are read once more, in a new start.

        They have been told of and are not again: what is seen in here belongs to no step.
        `remembers`: whether memories go on from what they were before `first`, or begin afresh.
        """
        return nullcontext()

    def finish(self, steps: int, /) -> None:
        """Called once, after the last of `steps` steps, while the streaming state still exists."""
        return


class EachStep(Observer):
    """Calls a function with each finished step, e.g. to move a progress bar."""

    def __init__(self, call: Callable[[int], object]) -> None:
        self._call = call

    def after_step(self, step: int, /) -> None:
        """Call it."""
        self._call(step)
