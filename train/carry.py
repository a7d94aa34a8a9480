"""What is carried from one training batch to the next: the memories of the rows that go on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from moshi.models.lm import LMModel
from torch import Tensor

from moshi_ttt.memory import MemoryState
from moshi_ttt.model.branch import MemorySwaps
from moshi_ttt.model.forward import indices
from moshi_ttt.model.hybrid import memory_carried
from train.resume import gathered

Memories = dict[int, MemoryState]
"""Of the rows of a batch, by layer index."""
Scope = Callable[[LMModel], AbstractContextManager[dict[int, MemorySwaps]]]

logger = logging.getLogger(__name__)


class Carry:
    """Keeps the memories at the end of a training batch, detached, for the next one.

    It keeps what the batch in hand began from as well: a checkpoint that is saved before that batch
    has been trained on goes on with it again.
    """

    def __init__(self) -> None:
        self._before: Memories = {}
        self._after: Memories = {}
        self._trained_before: int | None = None  # batches, when the one in hand was begun
        self.again: Scope = _nothing
        """Scope of the backward of the last forward, in which its beginning is the same."""

    @contextmanager
    def reading(
        self, lm: LMModel, continues: Sequence[bool] | None, trainer: Any
    ) -> Iterator[None]:
        """Scope of the forward of a training batch.

        Args:
            lm: the model.
            continues: rows that go on where those of the batch before stopped; None if the data
                does not carry, and then nothing is kept.
            trainer: counts the batches that were trained on.
        """
        self._before = self._after = {} if continues is None else _on(lm.device, self._after)
        self._trained_before = _trained_batches(trainer)
        self.again = _nothing
        if continues is None:
            yield
            return
        rows = torch.zeros(len(continues), dtype=torch.bool, device=lm.device)
        begin: Memories = {}
        if any(continues) and _rows_of(self._before) == len(continues):
            # after a batch whose loss was not finite, rows begin afresh
            rows = rows.index_fill(0, indices(continues, lm.device), True) & _finite(self._before)
            begin = self._before
        self.again = partial(memory_carried, memories=begin, rows=rows)
        with self.again(lm) as swaps:
            yield
        self._after = {
            index: {name: one.detach() for name, one in swap.last.items()}
            for index, swap in swaps.items()
            if swap.last is not None
        }

    def save(self, checkpoint: dict[str, Any], trainer: Any) -> None:
        """Put in what the next batch to be trained on goes on from, in each process."""
        in_hand = _trained_batches(trainer) == self._trained_before
        memories = _on(torch.device("cpu"), self._before if in_hand else self._after)
        if memories:  # in all processes or in none
            checkpoint["carried"] = gathered(memories, trainer.world_size)

    def load(self, checkpoint: Mapping[str, Any], trainer: Any, mini_batch_steps: int) -> None:
        """Go on from what `save` put in, if anything.

        Other mini-batches may have ended before the step where a memory stopped: nothing is carried
        then. With other processes an epoch begins, and carries nothing from the one before.
        """
        states: Sequence[Memories] = checkpoint.get("carried", [])
        memories = states[trainer.global_rank] if len(states) == trainer.world_size else {}
        phases = (int(state["phase"].max()) for state in memories.values() if "phase" in state)
        if max(phases, default=0) >= mini_batch_steps:
            logger.warning(
                "model.memory.mini_batch_steps=%d is less than in the checkpoint; what it carries "
                "(data.carry) is dropped, and recordings go on with an empty memory",
                mini_batch_steps,
            )
            memories = {}
        self._after, self._trained_before = memories, None


def _trained_batches(trainer: Any) -> int:
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed


def _nothing(lm: LMModel) -> AbstractContextManager[dict[int, MemorySwaps]]:
    return nullcontext({})


def _rows_of(memories: Memories) -> int:
    return next((len(state["updates"]) for state in memories.values()), 0)


def _on(device: torch.device, memories: Memories) -> Memories:
    return {
        index: {name: one.to(device) for name, one in state.items()}
        for index, state in memories.items()
    }


def _finite(memories: Memories) -> Tensor:
    """Rows all of whose memories are finite, [B]; nothing waits for the device."""
    sums = [
        one.flatten(1).sum(1)
        for state in memories.values()
        for one in state.values()
        if one.is_floating_point()
    ]
    return torch.stack(sums).isfinite().all(0)
