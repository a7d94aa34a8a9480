"""What one long generation leaves behind: arrays, events and a summary, in one folder.

Layout of the folder: `traces.npz` (arrays of `Trace`), `summary.json` (its other fields and
what was derived from it), `events.jsonl` (one event a line), `audio/*.wav`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from moshi_ttt.clock import LEGACY_TOKENS_PER_STEP, Clock
from moshi_ttt.errors import UserError


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN becomes null."""
    text = json.dumps(_plain(value), indent=2, allow_nan=False) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


@dataclass(frozen=True, slots=True)
class CacheSnapshot:
    """One KV ring as it stands after a number of steps."""

    module: str
    """Path of the attention that owns the ring, e.g. `transformer.layers.3.self_attn`."""
    end_offset: int  # steps written since reset
    capacity: int  # steps

    @property
    def evicted_steps(self) -> int:
        """Steps that have been overwritten and can no longer be attended to."""
        return max(0, self.end_offset - self.capacity)

    @property
    def wraps(self) -> int:
        """Completed turns of the ring: times a write went back to slot 0."""
        return max(0, self.end_offset - 1) // self.capacity

    def record(self) -> dict[str, Any]:
        """The ring in `summary.json`."""
        return {
            "module": self.module,
            "capacity": self.capacity,
            "end_offset": self.end_offset,
            "evicted_steps": self.evicted_steps,
            "wraps": self.wraps,
        }


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at one step of a generation."""

    kind: str
    """`cache_created`, `first_eviction`, `ring_turn` or `jump`."""
    step: int
    detail: dict[str, Any] = field(default_factory=dict)

    def record(self, clock: Clock) -> dict[str, Any]:
        """The line of `events.jsonl`, with the position in all three clocks."""
        return {
            "event": self.kind,
            "step": self.step,
            "seconds": clock.seconds(self.step),
            "legacy_token": clock.legacy_tokens(self.step),
            **self.detail,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """Per-step records of one long generation.

    S streams (rows of the batch), L layers of the temporal transformer, M hybrid layers (those
    with a memory; 0 for vanilla Moshi), T steps. A value that was not measured is NaN.
    """

    label: str
    """Who was measured, for titles and legends: `epoch 3`, `tiny (vanilla)`."""
    source: str
    """Model source the weights came from: `tiny`, a hub id or a folder."""
    clock: Clock
    context_steps: int
    """Capacity C of the temporal rings."""
    prompt_steps: int
    """Steps at the start whose tokens were forced from a recording."""
    trained_steps: int | None
    """Clip length the weights were trained on; None if unknown."""
    streams: Sequence[str]
    """Names of the S streams: prompt and seed."""
    hybrid_layers: Sequence[int]
    """Layer indices, in the order of the M axis."""
    rings: Sequence[CacheSnapshot]
    """Every ring at the end of the run."""

    input_norm: np.ndarray  # [S, L, T] L2 norm of each layer's input; the notes called it "resid"
    branch_raw_norm: np.ndarray  # [S, M, T] L2 norm of the branch before the gate
    branch_norm: np.ndarray  # [S, M, T] L2 norm of what is added to the residual
    branch_ratio: np.ndarray  # [S, M, T] branch_norm / norm of the residual it is added to
    gate: np.ndarray  # [S, M, T] root mean square of the output gate over channels
    inner_updates: np.ndarray  # [S, M, T] inner updates so far, as the rule counts them
    ring_end_offset: np.ndarray  # [S, L, T] steps written to each layer's ring since reset
    text_entropy: np.ndarray  # [S, T] nats, of the text logits at temperature 1
    audio_entropy: np.ndarray  # [S, T] nats, of Moshi's own first codebook
    text_tokens: np.ndarray  # [S, T - 1] text tokens, forced ones included
    codes: np.ndarray  # [S, Q, T - 1] Moshi's own codebooks, aligned (delays undone)

    @property
    def steps(self) -> int:
        """Generated steps T."""
        return self.input_norm.shape[-1]

    def critical_steps(self) -> dict[str, int]:
        """Structural positions that a change could be explained by, inside the run.

        Keys: `C` (first eviction), `2C` (last position that saw the first key leaves the ring),
        `prompt end`, `trained length`, `legacy token 6000`.
        """
        positions = {"C": self.context_steps, "2C": 2 * self.context_steps}
        if self.prompt_steps:
            positions["prompt end"] = self.prompt_steps
        if self.trained_steps is not None:
            positions["trained length"] = self.trained_steps
        positions["legacy token 6000"] = 6000 // LEGACY_TOKENS_PER_STEP
        return {name: step for name, step in positions.items() if 0 < step < self.steps}

    def save(self, folder: Path) -> None:
        """Write `traces.npz` into `folder`, atomically."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        meta = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _ARRAYS
        }
        text = json.dumps(_plain(meta))
        write_atomic(
            folder / "traces.npz",
            lambda file: np.savez_compressed(file, meta=np.array(text), **arrays),
        )

    @classmethod
    def load(cls, folder: Path) -> Trace:
        """Read what `save` wrote.

        Raises:
            UserError: no readable `traces.npz` in `folder`.
        """
        path = folder / "traces.npz"
        try:
            with np.load(path, allow_pickle=False) as data:
                meta = json.loads(str(data["meta"]))
                arrays = {name: data[name] for name in _ARRAYS}
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{path} is not a trace ({error}); give a folder that a long generation wrote, "
                "e.g. RUN/longgen/epoch_000"
            ) from error
        meta["clock"] = Clock(**meta["clock"])
        meta["rings"] = [CacheSnapshot(**ring) for ring in meta["rings"]]
        return cls(**meta, **arrays)


def ring_events(trace: Trace) -> list[Event]:
    """Creation, first eviction and turns of the rings, from the recorded end offsets.

    The temporal rings are read step by step; those that moved alike share one event.
    """
    created: dict[int, list[str]] = {}
    for ring in trace.rings:
        created.setdefault(ring.capacity, []).append(ring.module)
    events = [
        Event("cache_created", 0, {"capacity_steps": capacity, "modules": modules})
        for capacity, modules in created.items()
    ]
    capacity = trace.context_steps
    written = trace.ring_end_offset[0]  # [L, T]; every stream runs in step
    modules = [ring.module for ring in trace.rings if ring.module.startswith("transformer.")]
    for turn in range(1, 1 + max(0, int(written.max()) - 1) // capacity):
        # the write that starts turn n is the first one after n * capacity steps
        step_of = (written > turn * capacity).argmax(axis=1)
        for step in sorted(set(step_of.tolist())):
            rings = [name for name, at in zip(modules, step_of, strict=True) if at == step]
            if turn == 1:
                events.append(Event("first_eviction", step, {"modules": rings, "lost_step": 0}))
            events.append(Event("ring_turn", step, {"turn": turn, "modules": rings}))
    return events


_ARRAYS = (
    "input_norm",
    "branch_raw_norm",
    "branch_norm",
    "branch_ratio",
    "gate",
    "inner_updates",
    "ring_end_offset",
    "text_entropy",
    "audio_entropy",
    "text_tokens",
    "codes",
)
