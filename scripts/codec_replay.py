"""Training updates as CUDA graphs: thousands of small kernels started by one call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

_WARM_UP_CALLS = 3  # libraries choose their kernels and make their plans before the recording


class Replayed:
    """An update that is recorded at its fourth call with each key, and replayed from then on.

    Everything that differs between calls of one key has to be a tensor that stays in place: the
    audio, which is copied to where the recording reads it, and the learning rate. On a CPU it is
    simply called.

    Args:
        update: takes audio of one shape a key; reads nothing back from the device.
    """

    def __init__(self, update: Callable[[Tensor], None]) -> None:
        self._update = update
        self._calls: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, key: Hashable, audio: Tensor) -> None:
        """Update with `audio`; `key` says all that decides which kernels run."""
        self._calls[key] += 1
        if audio.device.type != "cuda" or self._calls[key] <= _WARM_UP_CALLS:
            self._update(audio)
            return
        if key not in self._recordings:
            graph, recorded = torch.cuda.CUDAGraph(), audio.clone()
            with torch.cuda.graph(graph):
                self._update(recorded)
            self._recordings[key] = graph, recorded
        graph, recorded = self._recordings[key]
        recorded.copy_(audio)
        graph.replay()
