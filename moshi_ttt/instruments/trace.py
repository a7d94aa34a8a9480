"""What one long generation leaves behind: arrays, events and a summary, in one folder.

Layout of the folder: `traces.npz` (arrays of `Trace`), `summary.json` (its other fields and
what was derived from it), `events.jsonl` (one event a line), `nll.json`, `quality.json`,
`probes.json` (if the recordings held any), `audio/*.wav`.
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


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content`, atomically."""
    write_atomic(path, lambda file: file.write(content))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN becomes null."""
    text = json.dumps(plain(value), indent=2, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def plain(value: Any) -> Any:
    """What JSON can hold: dataclasses as dicts, arrays as lists, NaN and infinities as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


@dataclass(frozen=True, slots=True)
class CacheSnapshot:
    """One KV ring as it stands after a number of steps.

    Position p is written to slot p modulo capacity; sinks, if there are any, have slots of their
    own before these. Ranges are [first, last], both included.
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

    @property
    def role(self) -> str:
        """Whose ring it is: `temporal`, `depformer`, `codec`, or the first part of the path."""
        root = self.module.split(".")[0]
        return "temporal" if root == "transformer" else root

    @property
    def evicted_steps(self) -> int:
        """Steps that have been overwritten and can no longer be attended to."""
        return max(0, self.end_offset - self.sinks - self.capacity)

    @property
    def wraps(self) -> int:
        """Completed turns of the ring: times a write went back to its first slot."""
        return max(0, self.end_offset - self.sinks - 1) // self.capacity

    @property
    def valid_positions(self) -> tuple[int, int] | None:
        """The newest positions, all of them held; None while the ring is empty.

        Sinks are held besides.
        """
        if self.end_offset == 0:
            return None
        return (0 if self.evicted_steps == 0 else self.end_offset - self.capacity), (
            self.end_offset - 1
        )

    @property
    def lost_positions(self) -> tuple[int, int] | None:
        """Positions that were held once and are no longer; None if there are none."""
        if self.evicted_steps == 0:
            return None
        return self.sinks, self.sinks + self.evicted_steps - 1

    @property
    def overwritten_slots(self) -> tuple[int, int] | None:
        """Slots that the present turn of the ring has written over; None in the first turn."""
        if self.evicted_steps == 0:
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
            "heads": self.heads,
            "head_dim": self.head_dim,
            "size_bytes": self.size_bytes,
        }


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at one step of a generation."""

    kind: str
    """`cache_created`, `first_eviction`, `ring_turn`, `critical_position`, `jump`; a live log also
    has `progress`."""
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

    # since the first version: older traces lack these and read as not measured, all NaN
    channels: int = 0
    """Channels D of the residual stream; 0 if unknown."""
    text_padding_ids: Sequence[int] = (3, 0)
    """Text tokens that say nothing: padding, and its last step before a word."""
    # [S, L, T]: largest absolute value of the input's channels, and the channel that has it
    input_max: np.ndarray = None  # type: ignore[assignment]
    input_max_channel: np.ndarray = None  # type: ignore[assignment]
    # [S, L, T]: L2 norms of what attention and the feed-forward block add
    attention_norm: np.ndarray = None  # type: ignore[assignment]
    ffn_norm: np.ndarray = None  # type: ignore[assignment]
    # [S, M, T]: L2 norm of all fast weights (held between looks), write gate (0..1) and rate of
    # forgetting (1 / forgetting time in steps), the latter two as means over heads
    fast_weight_norm: np.ndarray = None  # type: ignore[assignment]
    write_gate: np.ndarray = None  # type: ignore[assignment]
    forgetting: np.ndarray = None  # type: ignore[assignment]
    step_ms: np.ndarray = None  # type: ignore[assignment]  # [T] latency
    # [S, A, N, 3] (see `attention_mass.PARTS`), [A] layer indices, [N] steps; empty if not asked
    attention_mass: np.ndarray = None  # type: ignore[assignment]
    attention_mass_layers: np.ndarray = None  # type: ignore[assignment]
    attention_mass_steps: np.ndarray = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        streams, layers, steps = self.input_norm.shape
        shapes = {"layer": (streams, layers, steps), "memory": self.gate.shape, "step": (steps,)}
        shapes |= {"mass": (streams, 0, 0, 3), "list": (0,)}
        for name, kind in _ADDED.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, np.full(shapes[kind], np.nan, dtype=np.float32))

    @property
    def input_rms(self) -> np.ndarray:
        """Root mean square of each layer's input over channels, [S, L, T]."""
        return self.input_norm / np.sqrt(self.channels or np.nan)

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
        names = (*_ARRAYS, *_ADDED)
        arrays = {name: getattr(self, name) for name in names}
        meta = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in names
        }
        text = json.dumps(plain(meta))
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
                arrays |= {name: data[name] for name in _ADDED if name in data}
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{path} is not a trace ({error}); give a folder that a long generation wrote, "
                "e.g. RUN/longgen/epoch_000"
            ) from error
        meta["clock"] = Clock(**meta["clock"])
        meta["rings"] = [CacheSnapshot(**ring) for ring in meta["rings"]]
        return cls(**meta, **arrays)


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
_ADDED = {
    "input_max": "layer",
    "input_max_channel": "layer",
    "attention_norm": "layer",
    "ffn_norm": "layer",
    "fast_weight_norm": "memory",
    "write_gate": "memory",
    "forgetting": "memory",
    "step_ms": "step",
    "attention_mass": "mass",
    "attention_mass_layers": "list",
    "attention_mass_steps": "list",
}
