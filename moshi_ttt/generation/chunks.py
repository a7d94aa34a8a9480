"""Chunked generation: at each seam attention begins afresh, with the last seconds read again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from moshi.models.lm import LMGen

from moshi_ttt.generation.observer import Observer
from moshi_ttt.generation.saved import load_memories, save_memories
from moshi_ttt.memory import MemoryState


@dataclass(frozen=True, slots=True)
class Chunks:
    """How a generation is cut."""

    steps: int
    """From one seam to the next; the first one is so far from the start."""
    reprompt_steps: int
    """Read again at a seam, fewer than `steps`."""
    keep_memory: bool = True
    """Whether memories go on over a seam; otherwise they begin afresh with what is read again."""

    def __post_init__(self) -> None:
        assert 0 < self.reprompt_steps < self.steps

    def seams(self, run_steps: int) -> range:
        """The steps before which a run of `run_steps` begins again."""
        return range(self.steps, run_steps, self.steps)


class Seams:
    """Begins again at each seam; tensor operations between steps only, CUDA graphs go on.

    A memory that is kept goes back to what it was before the first step that is read again, so
    that it learns no step twice.

    Args:
        chunks: where the seams are; None: nowhere.
        lm_gen: the generation; it streams.
        read: takes a step, forced to what was said in it if it has been taken before.
        observers: are told what is read again.
    """

    def __init__(
        self,
        chunks: Chunks | None,
        lm_gen: LMGen,
        read: Callable[[int], None],
        observers: Sequence[Observer],
    ) -> None:
        self._chunks, self._lm_gen, self._read = chunks, lm_gen, read
        self._observers = observers
        self._memories: dict[int, MemoryState] = {}

    def before(self, step: int) -> None:
        """To be called before each step."""
        chunks, lm = self._chunks, self._lm_gen.lm_model
        if chunks is None:
            return
        if chunks.keep_memory and (step + chunks.reprompt_steps) % chunks.steps == 0:
            self._memories = save_memories(lm)
        if step == 0 or step % chunks.steps:
            return
        self._lm_gen.reset_streaming()
        load_memories(lm, self._memories)
        first = step - chunks.reprompt_steps
        with ExitStack() as scope:
            for observer in self._observers:
                scope.enter_context(observer.reading_again(first, chunks.keep_memory))
            for again in range(first, step):
                self._read(again)
