"""Windows of equal length over recordings, dealt out in epochs that can be interrupted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from moshi_ttt.data.recordings import EncodedRecording
from moshi_ttt.data.text import ZERO_TOKEN
from moshi_ttt.errors import UserError

Window = tuple[int, int]  # index of the recording, first step


def cut_windows(recording_steps: Sequence[int], clip_steps: int) -> list[Window]:
    """Consecutive windows from step 0 of every recording.

    What is left at the end becomes a window too, padded, if it fills a quarter of a clip or is
    all there is; a shorter rest would cost a whole row and teach next to nothing.
    """
    return [
        (index, start)
        for index, steps in enumerate(recording_steps)
        for start in range(0, steps, clip_steps)
        if start == 0 or 4 * (steps - start) >= clip_steps
    ]


class WindowLoader:
    """Batches of windows: finite epochs, one share a process, resumable in mid-epoch.

    Codes are in memory (6 MB an hour), so there is nothing for worker processes to do. Lightning
    sees a loader with `state_dict`, saves it with its checkpoints, and calls `set_epoch` on
    `sampler`.

    Args:
        recordings: cut into windows.
        clip_steps: length T of a window.
        batch_size: rows B; the last batch of an epoch may have fewer.
        seed: shuffles by (seed, epoch) and gives every process equally many windows, leaving out
            up to world_size - 1 of them, others each epoch. None keeps the order and leaves
            nothing out.
        rank: of this process.
        world_size: number of processes.
        trained_batches: tells how many batches of this epoch have been trained on; a checkpoint
            saved because of an exception must not count the batch in hand. None counts every
            batch given out.

    Raises:
        UserError: fewer windows than processes.
    """

    batch_sampler = None  # Lightning reads it of every loader that has a sampler

    def __init__(
        self,
        recordings: Sequence[EncodedRecording],
        clip_steps: int,
        batch_size: int,
        *,
        seed: int | None,
        rank: int = 0,
        world_size: int = 1,
        trained_batches: Callable[[], int] | None = None,
    ) -> None:
        self._recordings = recordings
        self._windows = cut_windows([recording.steps for recording in recordings], clip_steps)
        if len(self._windows) < world_size:
            raise UserError(
                f"the manifest gives {len(self._windows)} window(s) of {clip_steps} steps for "
                f"{world_size} process(es); every process needs one: add recordings, shorten "
                "data.duration_sec or use fewer devices"
            )
        self._clip_steps = clip_steps
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._trained_batches = trained_batches
        self._epoch = 0
        self._given_batches = 0
        self._resume_from: dict[str, Any] | None = None

    @property
    def sampler(self) -> WindowLoader:
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self._epoch = epoch
        self._given_batches = 0

    @property
    def windows(self) -> int:
        """Windows an epoch for this process."""
        return len(self._share(0))

    def __len__(self) -> int:
        """Batches an epoch for this process, whether or not some are already done."""
        return -(-self.windows // self._batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches of `codes` [B, 17, T] int64, `start_step` [B] int64 and `recording` (names)."""
        # Lightning makes the iterator before it sets the epoch; nothing runs here until the first
        # batch is asked for
        share = self._share(self._epoch)
        self._given_batches = self._done_batches()
        for batch in range(self._given_batches, len(self)):
            rows = share[batch * self._batch_size : (batch + 1) * self._batch_size]
            self._given_batches += 1
            yield self._collate([self._windows[row] for row in rows])

    def _share(self, epoch: int) -> Sequence[int]:
        """Indices of this process's windows in the order of an epoch."""
        count = len(self._windows)
        if self._seed is None:
            return range(self._rank, count, self._world_size)
        order = np.random.default_rng([self._seed, epoch]).permutation(count).tolist()
        return order[self._rank : count - count % self._world_size : self._world_size]

    def _collate(self, windows: Sequence[Window]) -> dict[str, Any]:
        return {
            "codes": torch.stack([self._cut(*window) for window in windows]),
            "start_step": torch.tensor([start for _, start in windows]),
            "recording": [self._recordings[index].name for index, _ in windows],
        }

    def _cut(self, index: int, start: int) -> Tensor:
        """[17, T], padded with the zero token after the end of the recording."""
        codes = self._recordings[index].codes[:, start : start + self._clip_steps]
        return pad(codes, (0, self._clip_steps - codes.shape[-1]), value=ZERO_TOKEN)

    def _plan(self) -> dict[str, Any]:
        """What the order of batches depends on."""
        windows = [(self._recordings[index].name, start) for index, start in self._windows]
        return {
            "windows": hashlib.sha256(repr(windows).encode()).hexdigest()[:16],
            "clip_steps": self._clip_steps,
            "batch_size": self._batch_size,
            "seed": self._seed,
            "world_size": self._world_size,
        }

    def state_dict(self) -> dict[str, Any]:
        """Position in the data, the same on every process."""
        if self._resume_from is not None:  # nothing was given out since
            return self._resume_from
        done = self._given_batches
        if self._trained_batches is not None:
            done = min(done, self._trained_batches())
        return {"epoch": self._epoch, "done_batches": done, "plan": self._plan()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, if that epoch is the next to be iterated."""
        self._resume_from = state

    def _done_batches(self) -> int:
        """Batches of this epoch that the run before the interruption has trained on."""
        state, self._resume_from = self._resume_from, None
        if state is None or state["epoch"] != self._epoch:
            return 0
        changed = {key: value for key, value in self._plan().items() if value != state["plan"][key]}
        if changed and state["done_batches"]:
            raise UserError(
                f"the checkpoint stopped in the middle of epoch {self._epoch} with "
                f"{ {key: state['plan'][key] for key in changed} }, this run has {changed}; what "
                "is left of that epoch is undefined: restore the data settings, or resume from a "
                "checkpoint of the end of an epoch"
            )
        return int(state["done_batches"])
