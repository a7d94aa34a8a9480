"""Checkpoint files: Lightning's for resuming, and safetensors beside it for everybody else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from moshi_ttt.model import save_trained
from train.data import ConversationData
from train.module import MoshiTTT


class Checkpoint(ModelCheckpoint):
    """Lightning's, whose `last.ckpt` is also written at the end of every epoch.

    With `every_n_train_steps`, Lightning's own saves nothing there, and the last steps of a
    finished run would be lost.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what `every_n_train_steps` left out."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._last_global_step_saved != trainer.global_step:
            assert self.dirpath is not None
            trainer.save_checkpoint(
                Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
            )


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
