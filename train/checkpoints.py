"""Checkpoint files: Lightning's for resuming, and safetensors beside it for everybody else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from moshi_ttt.errors import UserError
from moshi_ttt.model import save_trained
from train.data import ConversationData
from train.module import MoshiTTT


class LastCheckpoint(Checkpoint):
    """Keeps `RUN/checkpoints/last.ckpt` up to date, to resume from.

    Lightning's ModelCheckpoint saves every n steps *or* at the end of an epoch, so that the last
    steps of a finished run would be lost; for the best of several checkpoints add one of those
    to `trainer.callbacks`.

    Args:
        every_n_steps: Also save every n optimizer steps; null saves after each epoch only.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(f"checkpoint.every_n_steps={every_n_steps} must be at least 1, or null")
        self.every_n_steps = every_n_steps
        self._saved_step = 0

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Every n optimizer steps."""
        step = trainer.global_step
        if self.every_n_steps and step % self.every_n_steps == 0 and step != self._saved_step:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After each epoch; Lightning calls checkpoints last, so what is saved was evaluated."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        self._saved_step = trainer.global_step
        logger: Any = trainer.logger
        path = Path(logger.log_dir) / "checkpoints" / "last.ckpt"
        trainer.save_checkpoint(path, weights_only=False)


class CheckpointWithWeights(TorchCheckpointIO):
    """Writes the trained weights as `.safetensors` beside every Lightning checkpoint.

    Evaluation and other people read only that file: it holds no pickle.

    Args:
        model: whose config is written with the weights.
        data: whose clip length is.
    """

    def __init__(self, model: MoshiTTT, data: ConversationData) -> None:
        self._model = model
        self._data = data

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write both files, each atomically; the weights first."""
        weights = {
            name.removeprefix("lm."): tensor for name, tensor in checkpoint["state_dict"].items()
        }
        path_of_weights = Path(path).with_suffix(".safetensors")
        save_trained(path_of_weights, weights, self._model.config, self._data.clip_steps)
        super().save_checkpoint(checkpoint, path, storage_options)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove both."""
        super().remove_checkpoint(path)
        Path(path).with_suffix(".safetensors").unlink(missing_ok=True)
