"""What one long generation leaves behind: arrays, events and a summary, in one folder.

Layout of the folder: `traces.npz` (arrays of `Trace`), `summary.json` (its other fields and
what was derived from it), `events.jsonl` (one event a line), `nll.json`, `quality.json`,
`probes.json` (if the recordings held any), `audio/*.wav`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moshi_ttt.clock import LEGACY_TOKENS_PER_STEP, Clock
from moshi_ttt.errors import UserError
from moshi_ttt.files import plain, write_atomic
from moshi_ttt.model.rings import CacheSnapshot


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
