"""What was measured at every step of one long generation.

An evaluation keeps it as `traces.npz`; `moshi_ttt.evaluation.folder` says what lies beside it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

import numpy as np

from moshi_ttt.clock import Clock
from moshi_ttt.errors import UserError
from moshi_ttt.files import plain, write_atomic
from moshi_ttt.instruments.attention_mass import PARTS
from moshi_ttt.instruments.critical import Lengths, critical_steps
from moshi_ttt.model.rings import CacheSnapshot

PerLayer = Annotated[np.ndarray, "SLT"]
PerMemory = Annotated[np.ndarray, "SMT"]
PerStep = Annotated[np.ndarray, "ST"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """Per-step records of one long generation.

    The arrays' axes, which are checked: S streams (rows of the batch), L layers of the temporal
    transformer, M hybrid layers (those with a memory; 0 for vanilla Moshi), T steps, t steps less
    the last one, Q codebooks of Moshi, A layers whose attention was looked at, N looks (both 0 if
    not asked for), P `attention_mass.PARTS`. A value that was not measured is NaN.

    Raises:
        ValueError: arrays whose axes do not agree.
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
    channels: int
    """Channels D of the residual stream."""
    text_padding_ids: Sequence[int]
    """Text tokens that say nothing: padding, and its last step before a word."""

    input_norm: PerLayer
    """L2 norm of each layer's input; the notes called it "resid"."""
    input_max: PerLayer
    """Largest absolute value of the input's channels."""
    input_max_channel: PerLayer
    """The channel that has it."""
    attention_norm: PerLayer
    """L2 norm of what attention adds."""
    ffn_norm: PerLayer
    """L2 norm of what the feed-forward block adds."""
    ring_end_offset: PerLayer
    """Steps written to each layer's ring since reset."""
    branch_raw_norm: PerMemory
    """L2 norm of the branch before the gate."""
    branch_norm: PerMemory
    """L2 norm of what is added to the residual."""
    branch_ratio: PerMemory
    """`branch_norm` over the norm of the residual it is added to."""
    gate: PerMemory
    """Root mean square of the output gate over channels."""
    inner_updates: PerMemory
    """Inner updates so far, as the rule counts them."""
    fast_weight_norm: PerMemory
    """L2 norm of all fast weights, held between looks."""
    fast_weight_distance: PerMemory
    """L2 norm of what parts them from where they began, held between looks."""
    write_gate: PerMemory
    """How strongly the step is written, 0..1, mean over heads."""
    forgetting: PerMemory
    """Rate of forgetting, 1 / forgetting time in steps, mean over heads."""
    head_forgetting: Annotated[np.ndarray, "MH"]
    """The same of each head, mean over streams and steps."""
    text_entropy: PerStep
    """Of the text logits at temperature 1, nats."""
    audio_entropy: PerStep
    """Of Moshi's own first codebook, nats."""
    text_tokens: Annotated[np.ndarray, "St"]
    """Text tokens, forced ones included."""
    codes: Annotated[np.ndarray, "SQt"]
    """Moshi's own codebooks, aligned (delays undone)."""
    step_ms: Annotated[np.ndarray, "T"]
    """Latency of the step."""
    attention_mass: Annotated[np.ndarray, "SANP"]
    """Shares of the attention, mean over heads."""
    attention_mass_layers: Annotated[np.ndarray, "A"]
    """Layer indices."""
    attention_mass_steps: Annotated[np.ndarray, "N"]
    """Steps that were looked at."""

    def __post_init__(self) -> None:
        steps = self.input_norm.shape[-1]
        sizes = {"S": len(self.streams), "M": len(self.hybrid_layers), "P": len(PARTS)}
        sizes |= {"T": steps, "t": steps - 1}
        for name, axes in _axes_by_name().items():
            shape = getattr(self, name).shape
            wanted = tuple(
                sizes.setdefault(axis, size) for axis, size in zip(axes, shape, strict=False)
            )
            if shape != wanted or len(shape) != len(axes):
                raise ValueError(f"{name} is {list(shape)}; its axes {axes} are {list(wanted)}")

    @property
    def input_rms(self) -> np.ndarray:
        """Root mean square of each layer's input over channels, [S, L, T]."""
        return self.input_norm / np.sqrt(self.channels)

    @property
    def fast_weight_change(self) -> np.ndarray:
        """`fast_weight_distance` over `fast_weight_norm`, [S, M, T]: 0 as they began.

        It is 1 where they began at 0, and NaN while they are 0.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.fast_weight_distance / self.fast_weight_norm

    @property
    def half_life_sec(self) -> np.ndarray:
        """Seconds after which half of what each head wrote is gone, [M, H]; inf: it stays."""
        with np.errstate(divide="ignore"):
            return np.log(2) / self.head_forgetting * self.clock.step_sec

    @property
    def steps(self) -> int:
        """Generated steps T."""
        return self.input_norm.shape[-1]

    @property
    def lengths(self) -> Lengths:
        """What the critical positions of the run follow from."""
        return Lengths(self.context_steps, self.steps, self.prompt_steps, self.trained_steps)

    @property
    def free_from(self) -> int:
        """First step the model generated by itself; 0 if all of it was forced.

        The last step's token is none of the T - 1 that come out: a prompt of T - 1 steps forces
        all of them.
        """
        return self.prompt_steps if self.prompt_steps < self.text_tokens.shape[-1] else 0

    def critical_steps(self) -> dict[str, int]:
        """Step of each structural position inside the run, by its name in `critical.POSITIONS`."""
        return critical_steps(self.lengths, structural=True)

    def save(self, folder: Path) -> None:
        """Write `traces.npz` into `folder`, atomically."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        arrays = {name: values.pop(name) for name in _axes_by_name()}
        text = json.dumps(plain(values))
        write_atomic(
            folder / "traces.npz",
            lambda file: np.savez_compressed(file, meta=np.array(text), **arrays),
        )

    @classmethod
    def load(cls, folder: Path) -> Trace:
        """Read what `save` wrote.

        Raises:
            UserError: no readable `traces.npz` in `folder`, or one of another version.
        """
        path = folder / "traces.npz"
        try:
            with np.load(path, allow_pickle=False) as data:
                meta = json.loads(str(data["meta"]))
                arrays = {name: data[name] for name in _axes_by_name()}
            meta["clock"] = Clock(**meta["clock"])
            meta["rings"] = [CacheSnapshot(**ring) for ring in meta["rings"]]
            return cls(**meta, **arrays)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not a trace of this version ({error}); give a folder that a long "
                "generation wrote, e.g. RUN/longgen/epoch_000, or evaluate again to write it anew"
            ) from error


@functools.cache
def _axes_by_name() -> dict[str, str]:
    """The arrays of a `Trace` in the order of its fields, with a letter for each of their axes."""
    hints = get_type_hints(Trace, include_extras=True).items()
    return {name: get_args(hint)[1] for name, hint in hints if hasattr(hint, "__metadata__")}
