"""Room for what is recorded, on the device, written at a step that is itself a tensor there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Buffers:
    """Named values of `max_steps` steps of `batch_size` streams; NaN or -1 where not written.

    A write is a tensor operation at an index in device memory, so that a replayed CUDA graph
    writes the step that is being replayed, and not the one that was captured.
    """

    def __init__(self, max_steps: int, batch_size: int, device: torch.device) -> None:
        self._spare = max_steps  # the row of what belongs to no step
        self._shape = (max_steps + 1, batch_size)
        self._device = device
        self._step = torch.full((1,), -1, dtype=torch.long, device=device)
        self._advance = torch.ones_like(self._step)
        self._values: dict[str, Tensor] = {}

    def add(self, columns: int, *names: str, dtype: torch.dtype = torch.float32) -> None:
        """Make room for `columns` values of every step and stream under each name."""
        fill = float("nan") if dtype.is_floating_point else -1
        for name in names:
            shape = (*self._shape, columns)
            self._values[name] = torch.full(shape, fill, dtype=dtype, device=self._device)

    def next_step(self, *_: Any) -> None:
        """Forward pre-hook: what follows belongs to the next step."""
        self._step.add_(self._advance)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What comes in this scope belongs to no step."""
        step = self._step.clone()
        self._step.fill_(self._spare)
        self._advance.zero_()
        try:
            yield
        finally:
            self._step.copy_(step)
            self._advance.fill_(1)

    def write(self, name: str, values: Tensor) -> None:
        """Store the values of all streams, [S, columns], at the current step."""
        target = self._values[name]
        target.index_copy_(0, self._step, values.view(1, *target.shape[1:]).to(target.dtype))

    def fill(self, name: str, values: Tensor) -> None:
        """Store the same values, [columns], at every step and for every stream."""
        self._values[name][:] = values

    @property
    def steps(self) -> int:
        """Steps begun so far (synchronises with the device)."""
        return int(self._step.item()) + 1

    def lacks(self, name: str, steps: int) -> bool:
        """Whether a whole number was not written at one of the first `steps`."""
        return bool((self._values[name][:steps] < 0).any())

    def read(self, first: int, stop: int) -> dict[str, np.ndarray]:
        """Steps `first` to `stop` - 1 by name, [S, columns, steps] (waits for the device)."""
        return {
            name: values[first:stop].permute(1, 2, 0).contiguous().cpu().numpy()
            for name, values in self._values.items()
        }
