"""Windows of equal length over recordings, dealt out in epochs that can be interrupted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from moshi_ttt.data.recordings import EncodedRecording
from moshi_ttt.data.text import ZERO_TOKEN
from moshi_ttt.errors import UserError

Window = tuple[int, int]  # index of the recording, first step


def cut_windows(
    recording_steps: Sequence[int],
    clip_steps: int,
    offsets: Sequence[int] | None = None,
    *,
    touching: bool = False,
) -> list[Window]:
    """Consecutive windows from step 0 of every recording, or slid along it.

    What is left at the end becomes a window too, padded, if it fills a quarter of a clip or is
    all there is; a shorter rest would cost a whole row and teach next to nothing.

    With offsets the equally many windows slide, back to back, through a span that is centred on
    the recording and one clip longer than they are; one that would stick out is moved inside. So
    the first one begins at step 0 about half the time, as every generation does, and over many
    epochs each step is seen about 0.4 to 2 times as often as the average one. A recording
    shorter than a clip stays one padded window.

    Args:
        recording_steps: length of each recording.
        clip_steps: length T of a window.
        offsets: one for each recording, 0..T-1.
        touching: slide all windows of a recording as one, so that each begins where the one before
            stops; the last is padded by at most 7/8. A lone one is moved inside all the same.
    """
    windows = []
    for index, steps in enumerate(recording_steps):
        starts = [
            start
            for start in range(0, steps, clip_steps)
            if start == 0 or 4 * (steps - start) >= clip_steps
        ]
        if offsets is not None:
            span_steps = (len(starts) + 1) * clip_steps
            first = (steps - span_steps + 1) // 2 + offsets[index]
            if touching and len(starts) > 1:
                starts = [max(0, first) + start for start in starts]
            else:
                starts = [max(0, min(first + start, steps - clip_steps)) for start in starts]
        windows += [(index, start) for start in starts]
    return windows


class WindowLoader:
    """Batches of windows: finite epochs, one share a process, resumable anywhere.

    With a seed it is an endless sequence of epochs, each shuffled and cut elsewhere, and every
    pass gives the next `len(self)` batches of it; a pass that a resumed run begins in mid-epoch
    goes on from there. Without a seed every pass is the same. Codes are in memory (6 MB an hour),
    so there is nothing for worker processes to do.

    Args:
        recordings: cut into windows.
        clip_steps: length T of a window.
        batch_size: rows B; the last batch of an epoch may have fewer.
        seed: slides and shuffles the windows by (seed, epoch) and gives every process equally
            many, leaving out up to world_size - 1 of them, others each epoch. None cuts from step
            0, keeps the order and leaves nothing out.
        rank: of this process.
        world_size: number of processes.
        trained_batches: counts batches trained on; a checkpoint saved because of an exception
            must not count the batch in hand. None takes every batch given out as trained on.

    Raises:
        UserError: fewer windows than processes.
    """

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
        self._steps = [recording.steps for recording in recordings]
        # steps of each recording whose audio is known, [T]
        self._known = [(one.codes[1:] != ZERO_TOKEN).any(dim=0) for one in recordings]
        self._windows = cut_windows(self._steps, clip_steps)  # as many in every epoch
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
        self._given_batches = 0  # of this epoch
        self._trained_before: int | None = None  # the last batch was given

    @property
    def windows(self) -> int:
        """Windows an epoch for this process."""
        count = len(self._windows)
        if self._seed is None:
            return len(range(self._rank, count, self._world_size))
        return count // self._world_size

    def __len__(self) -> int:
        """Batches an epoch for this process."""
        return -(-self.windows // self._batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches of `codes` [B, 17, T] int64, `start_step` [B] int64 and two lists of B.

        `recording` names each row's; `heard` tells whether any of its audio is known, so that
        nobody has to ask a GPU.
        """
        if self._seed is None:
            self._epoch = self._given_batches = 0
        dealt = self._deal(self._epoch)
        for _ in range(len(self)):
            if self._given_batches == len(self):
                self._epoch, self._given_batches = self._epoch + 1, 0
                dealt = self._deal(self._epoch)
            number = self._given_batches
            self._given_batches += 1
            if self._trained_batches is not None:
                self._trained_before = self._trained_batches()
            yield self._batch(dealt, number)

    def state_dict(self) -> dict[str, Any]:
        """Position in the data, the same on every process."""
        epoch, done = self._epoch, self._given_batches
        if self._trained_batches is not None and self._trained_batches() == self._trained_before:
            done -= 1  # the last one is in hand
        if done == len(self):
            epoch, done = epoch + 1, 0
        return {"epoch": epoch, "done_batches": done, "plan": self._plan()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            UserError: that was within an epoch of other windows, batches or processes.
        """
        new = self._plan()
        old = dict.fromkeys(new) | {"carry": False} | state["plan"]  # before there were lanes
        if state["done_batches"] and old != new:
            changes = [f"{key} {old[key]} -> {new[key]}" for key in new if old[key] != new[key]]
            raise UserError(
                f"the checkpoint stopped after {state['done_batches']} batches of epoch "
                f"{state['epoch']}, and the rest of that epoch is undefined now ("
                f"{', '.join(changes)}); restore the data settings, or resume from a checkpoint "
                "of the end of an epoch"
            )
        self._epoch, self._given_batches = state["epoch"], state["done_batches"]
        self._trained_before = None

    def _deal(self, epoch: int) -> list[Sequence[Window]]:
        """This process's batches of an epoch."""
        share = self._share(epoch)
        firsts = range(0, len(share), self._batch_size)
        return [share[first : first + self._batch_size] for first in firsts]

    def _share(self, epoch: int) -> list[Window]:
        """This process's windows in the order of an epoch."""
        if self._seed is None:
            return self._windows[self._rank :: self._world_size]
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(len(self._windows)).tolist()
        offsets = rng.integers(self._clip_steps, size=len(self._steps)).tolist()
        windows = cut_windows(self._steps, self._clip_steps, offsets)
        dealt = len(order) - len(order) % self._world_size
        return [windows[index] for index in order[self._rank : dealt : self._world_size]]

    def _batch(self, dealt: Sequence[Sequence[Window]], number: int) -> dict[str, Any]:
        windows = dealt[number]
        clips = [
            self._recordings[index].codes[:, start : start + self._clip_steps]
            for index, start in windows
        ]
        # padded with the zero token after the end of the recording; pinned, because a transfer of
        # ordinary memory waits for all that the GPU has been given
        pinned = torch.cuda.is_available()
        size = len(clips), len(clips[0]), self._clip_steps
        codes = torch.full(size, ZERO_TOKEN, dtype=torch.int64, pin_memory=pinned)
        for row, clip in zip(codes, clips, strict=True):
            row[:, : clip.shape[-1]] = clip
        return {
            "codes": codes,
            "start_step": torch.tensor([start for _, start in windows], pin_memory=pinned),
            "recording": [self._recordings[index].name for index, _ in windows],
            "heard": [
                bool(self._known[index][start : start + self._clip_steps].any())
                for index, start in windows
            ],
        }

    def _plan(self) -> dict[str, Any]:
        """What the batches depend on."""
        recordings = [(recording.name, recording.steps) for recording in self._recordings]
        return {
            "recordings": hashlib.sha256(repr(recordings).encode()).hexdigest()[:16],
            "clip_steps": self._clip_steps,
            "batch_size": self._batch_size,
            "carry": False,
            "seed": self._seed,
            "world_size": self._world_size,
        }
