"""Windows dealt out in lanes: a row of the batch goes through recordings from clip to clip."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from moshi_ttt.data.windows import Window, WindowLoader, cut_windows


class LaneLoader(WindowLoader):
    """A `WindowLoader` in whose batches each row goes on where that of the batch before stopped.

    An epoch puts the recordings into an order, each cut into windows that touch, and parts all
    these windows into lanes of equal length, one for each row of each process. Where a lane ends
    within a recording, the next one begins with the rest of it, afresh. All batches are full; what
    is left over, less than a window a lane, is the end of the order, another one in every epoch.

    A batch has one entry more: `continues`, a list of B, tells which rows go on.

    Args:
        recordings: cut into windows.
        clip_steps: length T of a window.
        batch_size: rows B.
        options: as of a `WindowLoader`. A seed orders the recordings, and slides the windows of
            each, by (seed, epoch).
    """

    @property
    def carries(self) -> bool:
        """Whether a row ever goes on: there are two clips of a recording, and two batches."""
        clips = [len(cut_windows([steps], self._clip_steps)) for steps in self._steps]
        return len(self) >= 2 and max(clips) >= 2

    @property
    def _lanes(self) -> int:
        return self._batch_size * self._world_size

    @property
    def windows(self) -> int:
        """Windows an epoch for this process."""
        return len(self) * self._batch_size

    def __len__(self) -> int:
        """Batches an epoch, and windows a lane."""
        return len(self._windows) // self._lanes

    def _deal(self, epoch: int) -> list[Sequence[Window]]:
        order, offsets = list(range(len(self._steps))), None
        if self._seed is not None:
            rng = np.random.default_rng([self._seed, epoch])
            order = rng.permutation(len(self._steps)).tolist()
            offsets = rng.integers(self._clip_steps, size=len(self._steps)).tolist()
        cuts: list[list[Window]] = [[] for _ in self._steps]
        for window in cut_windows(self._steps, self._clip_steps, offsets, touching=True):
            cuts[window[0]].append(window)
        line = list(chain.from_iterable(cuts[index] for index in order))
        first = self._rank * self._batch_size
        lanes = [
            line[lane * len(self) : (lane + 1) * len(self)]
            for lane in range(first, first + self._batch_size)
        ]
        return list(zip(*lanes, strict=True))

    def _batch(self, dealt: Sequence[Sequence[Window]], number: int) -> dict[str, Any]:
        continues = [False] * self._batch_size
        if number > 0:
            continues = [
                (index, start - self._clip_steps) == before
                for (index, start), before in zip(dealt[number], dealt[number - 1], strict=True)
            ]
        return super()._batch(dealt, number) | {"continues": continues}

    def _plan(self) -> dict[str, Any]:
        return super()._plan() | {"carry": True}
