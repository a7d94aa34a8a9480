"""Which keys attention still has: a window, sinks, and older keys that are thinned out.

One rule for both forms: training masks by it, and a ring of a stream is laid out by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moshi_ttt.compiling import fused

Level = tuple[int, int, int]
"""Positions that are kept equally long: the first, the stride to the next, and how many."""
MOST_THINNING = 10
"""Thinned further, a key in a thousand is left."""
_FOR_GOOD = 2**40  # steps; no stream is as long


class Slots(NamedTuple):
    """What each slot of a ring takes: every `stride`-th position from `first` on, in its turn.

    All int64 [slots]. Of `size` slots that take the same positions, this is the `place`-th.
    """

    first: Tensor
    stride: Tensor
    size: Tensor
    place: Tensor

    def held(self, newest: Tensor) -> Tensor:
        """Position that each slot holds after `newest` [B] was written, [B, slots]; -1: none."""
        latest = (newest[:, None] - self.first) // self.stride
        count = latest - (latest - self.place) % self.size
        return torch.where(count >= 0, self.first + self.stride * count, -1)


@dataclass(frozen=True, slots=True)
class Kept:
    """Which positions a query sees, and where a ring of `capacity` slots and the sinks' has them.

    Positions are counted behind the sinks. With `thinning` n, those that 2^n divides are kept
    longest; those that only 2^(n - 1) divides half as long or less, and so on, to the odd ones.
    Each kind has its own part of the ring, in which it turns, so that nothing is moved: a query
    sees all of the last `window` steps, then every second, every fourth, ..., and what is kept is
    kept until it would be thinned again. 0 is a window with a hard edge.
    """

    capacity: int
    sinks: int = 0
    thinning: int = 0

    def __post_init__(self) -> None:
        assert self.thinning == 0 or self.capacity >= self.thinning + 2, "a part without a slot"

    @property
    def levels(self) -> list[Level]:
        """All positions but the sinks, each once; those that are kept longest come first."""
        # as many odd ones as of twice, four times ..., so that each step back reaches twice as far
        part = self.capacity // (self.thinning + 2)
        return [
            (self.sinks, 2**self.thinning, self.capacity - self.thinning * part),
            *((self.sinks + 2**n, 2 ** (n + 1), part) for n in reversed(range(self.thinning))),
        ]

    @property
    def window(self) -> int:
        """Steps all of which are seen, the query's own included."""
        return min(stride * size for _, stride, size in self.levels)

    def further(self, steps: int) -> list[Level]:
        """The `levels` whose keys are seen from more than `steps` away."""
        return [(first, by, size) for first, by, size in self.levels if by * size > steps + 1]

    def lifetimes(self, positions: Tensor) -> Tensor:
        """Steps that keys are seen for, the own included, like `positions`."""
        steps = torch.full_like(positions, _FOR_GOOD)
        for first, stride, size in self.levels:
            behind = positions - first
            steps = torch.where((behind >= 0) & (behind % stride == 0), stride * size, steps)
        return steps

    def seen(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether positions `query` see positions `key`, broadcast."""
        return (query >= key) & (query - key < self.lifetimes(key))

    def slots(self, device: torch.device) -> Slots:
        """The ring: sinks first, then the `levels`, [sinks + capacity]."""
        taken = [(sink, _FOR_GOOD, 1, 0) for sink in range(self.sinks)]
        for first, stride, size in self.levels:
            taken += [(first, stride, size, place) for place in range(size)]
        return Slots(*torch.tensor(taken, device=device).unbind(1))


class KeptRing:
    """Keys and values of a stream, as `Kept` has them; as moshi's ring where that keeps a window.

    Keys are stored rotated by their true position, as moshi stores them. Where the distance to a
    key is bounded, those that may be further away are kept unrotated besides, and are rotated anew
    in each step. Tensor operations only: it lives inside a CUDA graph.

    Args:
        batch_size: rows B.
        num_heads: key heads H.
        dim_per_head: channels of a head D.
        kept: what is kept.
        farthest_steps: how far away a key may seem; None: as far as it is.
        device: of the cache.
        dtype: of the cache.
    """

    respect_exec_mask = True

    def __init__(
        self,
        batch_size: int,
        num_heads: int,
        dim_per_head: int,
        kept: Kept,
        farthest_steps: int | None = None,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.capacity, self.sinks, self.thinning = kept.capacity, kept.sinks, kept.thinning
        self.farthest_steps = farthest_steps
        self.slots = kept.slots(device)
        slots = kept.sinks + kept.capacity
        shape = batch_size, num_heads
        self.cache = torch.zeros(2, *shape, slots, dim_per_head, device=device, dtype=dtype)
        self.end_offset = torch.zeros(batch_size, device=device, dtype=torch.long)
        self._far = 0  # slots, the first ones
        if farthest_steps is not None:
            self._far = kept.sinks + sum(size for *_, size in kept.further(farthest_steps))
        # and one for those that are no such key
        spare = self._far + 1
        self.unrotated = torch.zeros(*shape, spare, dim_per_head, device=device, dtype=dtype)

    def reset(self, reset_mask: Tensor) -> None:
        """Forget the rows of `reset_mask` [B]: nothing that they wrote is read again."""
        self.end_offset.masked_fill_(reset_mask, 0)

    def write(
        self, rotated: Tensor, unrotated: Tensor, v: Tensor, exec_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write one step.

        Args:
            rotated: keys, [B, H, 1, D].
            unrotated: the same before their rotation.
            v: values, [B, H, 1, D].
            exec_mask: [B]; a row that is False writes where its next step will write again.

        Returns:
            What is added to the scores of all slots, [B, 1, 1, slots], and the positions that the
            first slots are to be seen at, those of `far_keys`, [B, F].
        """
        slot, added, positions = _turn(
            self.end_offset, exec_mask, self.slots, self._far, self.farthest_steps, v.dtype
        )
        slot = slot.view(-1, 1, 1, 1).expand(v.shape)
        self.cache[0].scatter_(2, slot, rotated)
        self.cache[1].scatter_(2, slot, v)
        if self._far:
            self.unrotated.scatter_(2, slot.clamp(max=self._far), unrotated)
        return added, positions

    @property
    def far_keys(self) -> tuple[Tensor, Tensor]:
        """The keys that may be further away than they seem, [B, H, F, D]: as kept, and as seen."""
        return self.unrotated[:, :, : self._far], self.cache[0, :, :, : self._far]


@fused
def _turn(
    end_offset: Tensor,
    exec_mask: Tensor,
    slots: Slots,
    far: int,
    farthest_steps: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Make room for one step: its slot [B], what `KeptRing.write` returns; counts the step."""
    held = slots.held(end_offset)
    slot = (held == end_offset[:, None]).int().argmax(dim=1)
    added = torch.zeros_like(held, dtype=dtype).masked_fill(held < 0, float("-inf"))
    nearest = 0 if farthest_steps is None else end_offset[:, None] - farthest_steps
    positions = held[:, :far].clamp(min=nearest)
    end_offset.copy_(torch.where(exec_mask, end_offset + 1, end_offset))
    return slot, added[:, None, None], positions
