"""Latency of each step, without waiting for the device."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import torch


class StepTimer:
    """Marks in the device's queue (its CUDA stream), or the host's clock where there is none."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []

    def start(self) -> None:
        """The first step begins now."""
        self._marks.clear()
        self.mark()

    def mark(self) -> None:
        """A step ends when everything launched so far is done."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def read_ms(self, first: int, stop: int) -> np.ndarray:
        """Time from the end of each step's predecessor to its own end, [stop - first].

        NaN for steps that were not marked; waits for the last one of them.
        """
        values = np.full(stop - first, np.nan, dtype=np.float32)
        marks = self._marks[first : stop + 1]
        if self._on_gpu and marks:
            marks[-1].synchronize()
        for row, (before, after) in enumerate(itertools.pairwise(marks)):
            values[row] = before.elapsed_time(after) if self._on_gpu else 1000 * (after - before)
        return values
