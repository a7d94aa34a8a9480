"""A stream saved in its middle, and taken up again: rings, memories, tokens on their way.

moshi's `get_streaming_state` of an `LMGen` holds besides CUDA graphs, and functions of the model
that it came from: it cannot be written to a file, and a copy of it goes on using that other model.
And it ends at the `LMGen`, whose model streams apart. So only values travel, in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from moshi.models.lm import LMGen, LMModel
from moshi.modules.streaming import State
from moshi.modules.transformer import RingKVCache
from torch import Tensor

from moshi_ttt.errors import UserError
from moshi_ttt.memory import MemoryState
from moshi_ttt.model.hybrid import HybridLayer, hybrid_layers
from moshi_ttt.model.kept import KeptRing

SavedStream = dict[str, Tensor | int]
"""Values by module and name; plain enough for `torch.load(..., weights_only=True)`."""


def save_stream(lm_gen: LMGen) -> SavedStream:
    """Copy the whole state of a generation that is streaming, memories included.

    The states of random number generators are the caller's.
    """
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, _, _, value in _values(lm_gen)
    }


@torch.no_grad()
def load_stream(lm_gen: LMGen, saved: SavedStream) -> None:
    """Go on where `save_stream` was called; `lm_gen` streams, at any step, with the same weights.

    Every value is written where the present one lies, so that captured CUDA graphs see it.

    Raises:
        UserError: the stream saved is of another shape: streams, ring, memory; nothing has
            been changed then.
    """
    present = list(_values(lm_gen))
    if (names := {name for name, *_ in present}) != saved.keys():
        odd = sorted(names ^ saved.keys())
        raise UserError(f"the saved stream is of another model: only one of them has {odd[0]}")
    for name, _, key, value in present:
        mine, other = _shape(key, value), _shape(key, saved[name])
        if mine != other:
            raise UserError(f"{name} was saved as {other} and is {mine}; set both up alike")
    for name, holder, key, value in present:
        new = saved[name]
        if isinstance(value, Tensor) and isinstance(new, Tensor):
            value.copy_(new)
        else:
            setattr(holder, key, new)


def save_memories(lm: LMModel) -> dict[int, MemoryState]:
    """Copy the memories of a model that streams, by layer."""
    return {
        index: {name: value.clone() for name, value in _memory(layer).items()}
        for index, layer in hybrid_layers(lm).items()
    }


@torch.no_grad()
def load_memories(lm: LMModel, saved: Mapping[int, MemoryState]) -> None:
    """Give some layers of a model that streams the memories that `save_memories` copied."""
    for index, memory in saved.items():
        present = _memory(hybrid_layers(lm)[index])
        for name, value in memory.items():
            present[name].copy_(value)


def _memory(layer: HybridLayer) -> MemoryState:
    memory: MemoryState = layer.branch.get_streaming_state()[""].memory
    return memory


def _shape(key: str, value: Tensor | int) -> object:
    """What must be alike."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return None if key == "offset_cpu" else value  # what moshi counts; others are settings


def _values(lm_gen: LMGen) -> Iterator[tuple[str, Any, str, Tensor | int]]:
    """Every tensor and whole number: name, where it is held and by which key, value."""
    for part, module in (("gen", lm_gen), ("lm", lm_gen.lm_model)):
        for path, state in module.get_streaming_state().items():
            assert state is not None, "a stream is saved and loaded while it streams"
            yield from _below(f"{part}.{path}", state)


def _below(path: str, holder: Any) -> Iterator[tuple[str, Any, str, Tensor | int]]:
    items = holder if isinstance(holder, dict) else vars(holder)
    for key, value in items.items():
        if isinstance(value, Tensor) or type(value) is int:
            yield f"{path}.{key}", holder, key, value
        elif isinstance(value, (dict, State, RingKVCache, KeptRing)):
            yield from _below(f"{path}.{key}", value)
