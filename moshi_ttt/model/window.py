"""How far the temporal attention of a training forward sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moshi.models.lm import LMModel

from moshi_ttt.model.rings import attention_of


def set_window(lm: LMModel, steps: int | None) -> None:
    """Let each step see itself and the `steps` - 1 before it, or all of them; not while streaming.

    Args:
        lm: the model; its depformer is not touched.
        steps: of 80 ms.
    """
    lm.context = steps
    for layer in lm.transformer.layers:
        attention = attention_of(layer)
        assert not attention.is_streaming, "a ring cannot change"
        attention.context = steps


@contextmanager
def window(lm: LMModel, steps: int | None) -> Iterator[None]:
    """`set_window` inside the scope.

    Close it after `backward`, if there is one: activation checkpointing runs the forward once more.
    """
    before = lm.context
    set_window(lm, steps)
    try:
        yield
    finally:
        set_window(lm, before)
