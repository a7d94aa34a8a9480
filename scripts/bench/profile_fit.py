"""Where the time of a real fit goes: takes what train/fit.py takes.

    python scripts/bench/profile_fit.py --config long60s.yaml --trainer.max_steps 40 \
        --long_generation.every_n_epochs 0
    python scripts/bench/profile_fit.py --config long60s.yaml --config moshiko.yaml \
        --config moshi7b_random.yaml --trainer.max_steps 60 --long_generation.every_n_epochs 0

Batches 11 to 30 are timed as they run, batches 31 to 35 once more under torch's profiler, and the
run ends. Prints the time of a batch, how much of it passes between two batches (loading, logging),
how long the GPU is busy with it, and what takes longest. Profiled batches are slower: the time of
a batch is that of those before.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from moshi_ttt.errors import run_program
from train.fit import main as fit

WARMUP, TIMED, PROFILED = 10, 20, 5


class FitProfile(Callback):
    """Times batches, profiles some more, prints what it found and ends the run."""

    def __init__(self) -> None:
        self._started_sec = self._ended_sec = self._between_sec = 0.0
        self._batch_ms = self._between_ms = 0.0
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count what has passed since the last batch."""
        done = trainer.fit_loop.total_batch_idx
        if done == WARMUP:
            self._started_sec = _now()
        elif done > WARMUP:
            self._between_sec += time.perf_counter() - self._ended_sec

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Begin with the profiler, or end."""
        done = trainer.fit_loop.total_batch_idx + 1
        if done == WARMUP + TIMED:
            self._batch_ms = 1000 * (_now() - self._started_sec) / TIMED
            self._between_ms = 1000 * self._between_sec / TIMED
            self._profiler.start()
        elif done == WARMUP + TIMED + PROFILED:
            _now()
            self._profiler.stop()
            print(self._table())
            trainer.should_stop = True
        self._ended_sec = time.perf_counter()

    def _table(self) -> str:
        lines = [f"{self._batch_ms:.1f} ms a batch, {self._between_ms:.1f} of it between batches"]
        by = "self_cpu_time_total"
        if torch.cuda.is_available():
            on_gpu = [one for one in self._profiler.events() if one.device_type == DeviceType.CUDA]
            # an annotation spans all the waiting between its kernels
            kernels = [one for one in on_gpu if not one.is_user_annotation]
            spans = ((one.time_range.start, one.time_range.end) for one in kernels)
            busy_ms = busy_us(spans) / 1000 / PROFILED
            lines.append(
                f"GPU busy for {busy_ms:.1f} ms ({busy_ms / self._batch_ms:.0%}) with "
                f"{len(kernels) / PROFILED:.0f} kernels a batch"
            )
            by = "self_cuda_time_total"
        averages = self._profiler.key_averages()
        lines.append(averages.table(sort_by=by, row_limit=25, max_name_column_width=60))
        return "\n".join(lines)


def busy_us(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans of time, some of which overlap: streams run side by side."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def _now() -> float:
    """Seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main(args: Sequence[str] | None = None) -> None:
    """Fit, and print the table on the way."""
    given = sys.argv[1:] if args is None else args
    fit([*given, "--trainer.callbacks+", f"{FitProfile.__module__}.FitProfile"])


if __name__ == "__main__":
    run_program(main)
