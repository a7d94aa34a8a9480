"""Latency of each step, without waiting for the device."""

from __future__ import annotations

import time
from array import array
from itertools import pairwise
from typing import Any

import numpy as np
import torch

MARKS_KEPT = 512
"""A mark of a GPU takes 600 bytes of the host: half an hour of them would look like a leak."""


class StepTimer:
    """Marks in the device's queue (its CUDA stream), or the host's clock where there is none."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []
        self._ms = array("f")  # of the steps before the first mark

    def start(self) -> None:
        """The first step begins now."""
        self._marks.clear()
        self._ms = array("f")
        self.mark()

    def mark(self) -> None:
        """A step ends when everything launched so far is done."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())
        if len(self._marks) > 2 * MARKS_KEPT:
            self._read(MARKS_KEPT)  # the device was there long ago

    def read_ms(self, first: int, stop: int) -> np.ndarray:
        """Time from the end of each step's predecessor to its own end, [stop - first].

        NaN for steps that were not marked; waits for the last one that was.
        """
        self._read(len(self._marks) - 1)
        values = np.full(stop - first, np.nan, dtype=np.float32)
        marked = self._ms[first:stop]
        values[: len(marked)] = marked
        return values

    def _read(self, steps: int) -> None:
        """Put times in the place of the first marks; waits for them."""
        marks = self._marks[: steps + 1]
        if self._on_gpu and marks:
            marks[-1].synchronize()
        for before, after in pairwise(marks):
            self._ms.append(before.elapsed_time(after) if self._on_gpu else 1000 * (after - before))
        del self._marks[:steps]
