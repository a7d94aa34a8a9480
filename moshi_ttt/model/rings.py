"""moshi's KV rings: find them, describe them, and say which positions they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moshi.modules.streaming import StreamingModule
from moshi.modules.transformer import StreamingMultiheadAttention
from torch import Tensor, nn

from moshi_ttt.model.kept import Kept


def attention_of(layer: nn.Module) -> StreamingMultiheadAttention:
    """The self-attention of a layer, with or without a memory around it."""
    return next(m for m in layer.modules() if isinstance(m, StreamingMultiheadAttention))


def ring_of(attention: StreamingModule) -> Any:
    """The ring of an attention that is streaming."""
    return attention.get_streaming_state()[""].kv_cache


def snapshot(name: str, ring: Any, end_offset: int, positions_per_step: int = 1) -> CacheSnapshot:
    """What `ring` is, with an end offset that the caller knows.

    Args:
        name: path of the attention that owns it.
        ring: a `RingKVCache`, or one with the same `cache` [2, B, H, slots, Dh], `capacity` and
            `respect_exec_mask`; what it keeps besides, `sinks` and `thinning`, it has as
            attributes.
        end_offset: positions written since reset.
        positions_per_step: 2 for Mimi's transformers, which run at 25 Hz; 4 for the tiny codec's.
    """
    cache: Tensor | None = getattr(ring, "cache", None)
    return CacheSnapshot(
        name,
        end_offset,
        ring.capacity,
        heads=0 if cache is None else cache.shape[2],
        head_dim=0 if cache is None else cache.shape[4],
        size_bytes=0 if cache is None else cache.numel() * cache.element_size(),
        batch=0 if cache is None else cache.shape[1],
        exec_mask=getattr(ring, "respect_exec_mask", None),
        sinks=int(getattr(ring, "sinks", 0)),
        thinning=int(getattr(ring, "thinning", 0)),
        positions_per_step=positions_per_step,
    )


def ring_snapshots(
    root: nn.Module, prefix: str = "", positions_per_step: int = 1
) -> list[CacheSnapshot]:
    """Every ring below `root` that exists now, by module path (synchronises with the device).

    Args:
        root: an `LMModel` (its depformer's rings exist within a step only), or a codec.
        prefix: put before the paths; `codec` for a codec, so that nobody takes its rings for
            the language model's.
        positions_per_step: see `snapshot`.
    """
    return [
        snapshot(name, ring_of(module), int(ring_of(module).end_offset.max()), positions_per_step)
        for name, module in root.named_modules(prefix=prefix)
        if isinstance(module, StreamingMultiheadAttention)
        and module.is_streaming
        and ring_of(module) is not None
    ]


def held_positions(ring: Any) -> Tensor:
    """Position that each slot holds after the last write, [B, slots]; -1 where it is empty.

    Slots are laid out as `Kept` says.
    """
    kept = Kept(ring.capacity, *(getattr(ring, name, 0) for name in ("sinks", "thinning")))
    return kept.slots(ring.end_offset.device).held(ring.end_offset - 1)


@dataclass(frozen=True, slots=True)
class CacheSnapshot:
    """One KV ring as it stands after a number of steps.

    Position p is written to slot p modulo capacity; sinks, if there are any, have slots of their
    own before these. With `thinning`, slots are laid out as `Kept` says. Ranges are [first, last],
    both included.
    """

    module: str
    """Path of the attention that owns the ring, e.g. `transformer.layers.3.self_attn`."""
    end_offset: int  # positions written since reset
    capacity: int  # positions
    heads: int = 0  # of the keys; 0 if unknown, as the two below
    head_dim: int = 0
    size_bytes: int = 0
    sinks: int = 0
    """First positions that are never evicted; 0 in moshi's own rings."""
    positions_per_step: int = 1
    """Positions that one step writes: 2 in Mimi's transformers (25 Hz)."""
    batch: int = 0
    """Rows; 0 if unknown."""
    exec_mask: bool | None = None
    """Whether each row stands still while it is masked; None if unknown."""
    thinning: int = 0
    """How often older keys are halved; 0 in moshi's own rings."""

    @property
    def kept(self) -> Kept:
        """Which keys it has."""
        return Kept(self.capacity, self.sinks, self.thinning)

    @property
    def role(self) -> str:
        """Whose ring it is: `temporal`, `depformer`, `codec`, or the first part of the path."""
        root = self.module.split(".")[0]
        return "temporal" if root == "transformer" else root

    @property
    def evicted_steps(self) -> int:
        """Steps that have been overwritten and can no longer be attended to."""
        newest, levels = self.end_offset - 1, self.kept.levels
        return sum(max(0, (newest - first) // by + 1 - size) for first, by, size in levels)

    @property
    def wraps(self) -> int:
        """Completed turns of the ring: times a write went back to its first slot."""
        first, stride, size = self.kept.levels[0]
        return max(0, self.end_offset - 1 - first) // (stride * size)

    @property
    def slot(self) -> int | None:
        """Where the newest position was written; None while the ring is empty."""
        newest, before = self.end_offset - 1, self.sinks
        if newest < self.sinks:
            return newest if newest >= 0 else None
        for first, stride, size in self.kept.levels:
            count, rest = divmod(newest - first, stride)
            if count >= 0 and rest == 0:
                return before + count % size
            before += size
        raise AssertionError("every position has a level")

    @property
    def next_turn(self) -> int:
        """The position that will be the next to go back to the first slot that is no sink's."""
        first, stride, size = self.kept.levels[0]
        return first + (self.wraps + 1) * stride * size

    @property
    def valid_positions(self) -> tuple[int, int] | None:
        """The newest positions, all of them held; None while the ring is empty.

        Sinks are held besides, and some of those that are thinned out.
        """
        if self.end_offset == 0:
            return None
        first = 0 if self.evicted_steps == 0 else self.end_offset - self.kept.window
        return first, self.end_offset - 1

    @property
    def lost_positions(self) -> tuple[int, int] | None:
        """Positions that were held once, none of which still is; None if there are none."""
        first, stride, size = self.kept.levels[0]
        last = self.end_offset - 1 - stride * size
        return None if last < first else (first, last)

    @property
    def overwritten_slots(self) -> tuple[int, int] | None:
        """Slots that the present turn of the ring has written over; None in the first turn.

        None as well where parts of the ring turn by themselves.
        """
        if self.evicted_steps == 0 or self.thinning:
            return None
        return self.sinks, self.sinks + (self.evicted_steps - 1) % self.capacity

    def record(self) -> dict[str, Any]:
        """The ring in `summary.json`."""
        return {
            "module": self.module,
            "role": self.role,
            "capacity": self.capacity,
            "end_offset": self.end_offset,
            "evicted_steps": self.evicted_steps,
            "wraps": self.wraps,
            "valid_positions": self.valid_positions,
            "lost_positions": self.lost_positions,
            "overwritten_slots": self.overwritten_slots,
            "sinks": self.sinks,
            "thinning": self.thinning,
            "heads": self.heads,
            "head_dim": self.head_dim,
            "size_bytes": self.size_bytes,
            "batch": self.batch,
            "exec_mask": self.exec_mask,
            "slot": self.slot,
            "next_turn": self.next_turn,
        }
