"""How fast a training is, and how long it will take."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Pace(Callback):
    """Logs steps and tokens a second, how many times real time that is, GPU memory and time left.

    Lightning's `ThroughputMonitor` waits for the device at every batch, counts what is done between
    epochs as training, and is silent for its first hundred batches; its `DeviceStatsMonitor` logs a
    hundred numbers of the allocator.
    """

    def __init__(self) -> None:
        self._since_sec = self._ended_sec = time.monotonic()
        self._pause_sec = 0.0  # between the last two epochs: validation, generation
        self._first_step = 0
        self._trained_sec = 0.0  # since the first step of this process
        self._begin_interval()

    def _begin_interval(self) -> None:
        self._interval_sec, self._optimizer_steps, self._steps, self._tokens = 0.0, 0, 0, 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What comes before the first step is a pause as well."""
        self._ended_sec = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run does not begin at 0."""
        self._first_step = self._last_step = trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The pause ends."""
        self._since_sec = time.monotonic()
        self._pause_sec = self._since_sec - self._ended_sec

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is no training, in the middle of an epoch either."""
        self._since_sec = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and log as often as losses are."""
        self._ended_sec = time.monotonic()
        lap_sec = self._ended_sec - self._since_sec
        self._since_sec = self._ended_sec
        rows, streams, steps = batch["codes"].shape
        self._trained_sec += lap_sec
        self._interval_sec += lap_sec
        self._steps += rows * steps * trainer.world_size
        self._tokens += rows * streams * steps * trainer.world_size
        if trainer.global_step == self._last_step:  # gradients are being accumulated
            return
        self._last_step = trainer.global_step
        self._optimizer_steps += 1
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.loggers and every and trainer.global_step % every == 0:
            pl_module.log("speed/left_min", self._left_sec(trainer) / 60, prog_bar=True)
            pl_module.log_dict(self._rates(pl_module))
            self._begin_interval()

    def _rates(self, pl_module: Any) -> dict[str, float]:
        """Since the last log, over all processes."""
        rates = {
            "speed/optimizer_steps_per_sec": self._optimizer_steps / self._interval_sec,
            "speed/steps_per_sec": self._steps / self._interval_sec,
            "speed/tokens_per_sec": self._tokens / self._interval_sec,
        }
        step_sec = pl_module.source.clock.step_sec
        rates["speed/times_real_time"] = rates["speed/steps_per_sec"] * step_sec
        if pl_module.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(pl_module.device)
            rates["speed/peak_gpu_gib"] = peak / 2**30
        return rates

    def _left_sec(self, trainer: Trainer) -> float:
        """What is left at the pace so far, with a pause like the last one after each epoch."""
        done = trainer.global_step - self._first_step
        left = trainer.estimated_stepping_batches - trainer.global_step
        in_epoch = -(-trainer.num_training_batches // trainer.accumulate_grad_batches)
        return left * self._trained_sec / done + (left // in_epoch + 1) * self._pause_sec
