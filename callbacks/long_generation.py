"""Instrumented long generation before training and after each epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.tensorboard import log_evaluation
from moshi_ttt.errors import check_bounds, settings_at
from moshi_ttt.evaluation.config import LongRunConfig
from moshi_ttt.evaluation.evaluate import evaluate
from moshi_ttt.report import write_report


class LongGeneration(Callback):
    """Generate past the second turn of the ring, record everything, write the report.

    It borrows the model between epochs and hands it back exactly as it was: training with and
    without it gives the same weights. Under several processes the first one generates and the
    others wait.

    Args:
        run: What to generate and how.
        every_n_epochs: Generate after every n-th epoch (and before the first); 0 switches it off.
    """

    def __init__(
        self,
        run: LongRunConfig = LongRunConfig(),  # noqa: B008 (frozen)
        every_n_epochs: int = 1,
    ) -> None:
        check_bounds("long_generation.every_n_epochs", every_n_epochs, least=0)
        self.run = run
        self.every_n_epochs = every_n_epochs

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Epoch 0: what the model does before it has learnt anything."""
        if trainer.global_step == 0 and self.every_n_epochs:
            self._evaluate(trainer, pl_module, epoch=0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After every n-th epoch."""
        epoch = trainer.current_epoch + 1
        if self.every_n_epochs and epoch % self.every_n_epochs == 0:
            self._evaluate(trainer, pl_module, epoch)

    def _evaluate(self, trainer: Trainer, pl_module: Any, epoch: int) -> None:
        if trainer.is_global_zero:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            logger: Any = trainer.logger
            run_folder = Path(logger.log_dir)
            folder = run_folder / "longgen" / f"epoch_{epoch:03d}"
            with settings_at("long_generation.run"):
                evaluate(
                    pl_module.lm,
                    pl_module.source,
                    data.val_recordings(),
                    self.run,
                    folder,
                    label=f"epoch {epoch}",
                    trained_steps=data.clip_steps,
                )
            pictures = log_evaluation(logger.experiment, folder, trainer.global_step)
            write_report(run_folder, {folder: pictures})
        trainer.strategy.barrier("long generation")
