"""Progress of a training as lines, for files and pipes."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from moshi_ttt.progress import LINE_SEC


class ProgressLines(Callback):
    """Writes a line every few seconds, where a progress bar would write one each step."""

    def __init__(self) -> None:
        self._written_sec = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Where the epoch is, and what a progress bar would show."""
        self._write(trainer, "train", batch_idx, trainer.num_training_batches)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """The same for the held-out clips."""
        self._write(trainer, "validate", batch_idx, sum(trainer.num_val_batches))

    def _write(self, trainer: Trainer, what: str, batch_idx: int, batches: float) -> None:
        now_sec = time.monotonic()
        if now_sec < self._written_sec + LINE_SEC and batch_idx + 1 < batches:
            return
        self._written_sec = now_sec
        values = "".join(f" {name}={v:.4g}" for name, v in trainer.progress_bar_metrics.items())
        place = f"epoch={trainer.current_epoch + 1} batch={batch_idx + 1}/{batches}"
        trainer.print(f"{what} {place} step={trainer.global_step}{values}", flush=True)
