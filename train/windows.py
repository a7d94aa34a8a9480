"""Attention windows that differ from batch to batch, so that a memory cannot count on one."""

from __future__ import annotations

import math
import random
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from moshi_ttt.errors import UserError, check_bounds, settings_at
from moshi_ttt.model.sinks import check_thinning
from moshi_ttt.model.window import set_window


class RandomWindows(Callback):
    """Draws the attention window of each training batch, log-uniform between two lengths.

    Validation and long generation keep `model.context_steps`. The draw follows from the number of
    the batch, so that a run that is resumed goes on as it would have.

    Args:
        shortest_steps: Shortest window, steps of 80 ms; null switches it off.
        longest_steps: Longest window.
    """

    def __init__(self, shortest_steps: int | None = None, longest_steps: int | None = None) -> None:
        if (shortest_steps is None) != (longest_steps is None):
            raise UserError(
                f"windows.shortest_steps={shortest_steps} and windows.longest_steps="
                f"{longest_steps}: both or neither; give both, e.g. 63 and 375"
            )
        if shortest_steps is not None and longest_steps is not None:
            check_bounds("windows.shortest_steps", shortest_steps, least=2)
            remedy = "the longest window cannot be shorter than windows.shortest_steps"
            check_bounds(
                "windows.longest_steps", longest_steps, least=shortest_steps, remedy=remedy
            )
        self.shortest_steps, self.longest_steps = shortest_steps, longest_steps
        self._own_steps: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the window that the model has."""
        module: Any = pl_module
        self._own_steps = module.lm.context
        if self.shortest_steps is not None:
            check_thinning("model.thinning", module.config.thinning, self.shortest_steps)
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            with settings_at("model.loss"):
                module.loss_config.check_fits(self.longest_steps, data.clip_steps)

    def draw(self, step: int, batch: int) -> int:
        """The window of a batch of an optimizer step."""
        assert self.shortest_steps is not None
        assert self.longest_steps is not None
        share = random.Random(f"window {step} {batch}").random()
        low, high = math.log(self.shortest_steps), math.log(self.longest_steps)
        return round(math.exp(low + share * (high - low)))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set it for forward and backward: activation checkpointing runs the forward in both."""
        if self.shortest_steps is not None:
            module: Any = pl_module
            steps = self.draw(trainer.global_step, batch_idx)
            set_window(module.lm, steps)
            pl_module.log("train/window_steps", float(steps))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Back to what the model has."""
        if self.shortest_steps is not None:
            module: Any = pl_module
            set_window(module.lm, self._own_steps)
