"""Training updates as CUDA graphs: thousands of small kernels started by one call."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

Values = dict[str, Tensor]
_WARM_UP_CALLS = 3  # libraries choose their kernels and make their plans before the recording


class Replayed:
    """An update that is recorded at its fourth call with each key, and replayed from then on.

    Everything that differs between calls of one key has to be a tensor that stays in place: the
    audio, which is copied to where the recording reads it, and the learning rate. On a CPU it is
    simply called.

    Updates that are not replayed run on the recordings' own stream too. A weight's node in the
    backward graph (AccumulateGrad) remembers the stream of the forward that made it, and lives as
    long as anything of that forward does. A recording that meets one made on the default stream
    would have to wait for that stream, and fails: "legacy stream would depend on a capturing
    stream".

    Args:
        update: takes audio of one shape a key, gives numbers to watch; reads nothing back from the
            device.
    """

    def __init__(self, update: Callable[[Tensor], Values]) -> None:
        self._update = update
        self._calls: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor, Values]] = {}
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, key: Hashable, audio: Tensor) -> Values:
        """Update with `audio`; `key` says all that decides which kernels run.

        Returns:
            What the update gave; the next one with this key may write over it.
        """
        if audio.device.type != "cuda":
            return self._update(audio)
        self._calls[key] += 1
        if self._calls[key] <= _WARM_UP_CALLS:
            return self.plainly(audio)
        if key not in self._recordings:
            graph, recorded = torch.cuda.CUDAGraph(), audio.clone()
            gc.collect()  # what is left of an earlier backward must not be freed in a recording
            with torch.cuda.graph(graph, stream=self._stream):
                values = self._update(recorded)
            self._recordings[key] = graph, recorded, values
        graph, recorded, values = self._recordings[key]
        recorded.copy_(audio)
        graph.replay()
        return values

    def plainly(self, audio: Tensor) -> Values:
        """Update without recording or replaying."""
        if audio.device.type != "cuda":
            return self._update(audio)
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            values = self._update(audio)
        torch.cuda.current_stream().wait_stream(self._stream)
        return values
