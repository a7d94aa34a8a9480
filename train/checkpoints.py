"""Checkpoint files: Lightning's for resuming, and safetensors beside it for everybody else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

from moshi_ttt.model import save_trained
from train.module import MoshiTTT


class CheckpointWithWeights(TorchCheckpointIO):
    """Writes the trained weights as `.safetensors` beside every Lightning checkpoint.

    Evaluation and other people read only that file: it holds no pickle.

    Args:
        model: whose weights and config are written.
        clip_steps: clip length of the training, in steps.
    """

    def __init__(self, model: MoshiTTT, clip_steps: int) -> None:
        self._model = model
        self._clip_steps = clip_steps

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write both files, each atomically; the weights first."""
        weights = {
            name.removeprefix("lm."): tensor for name, tensor in checkpoint["state_dict"].items()
        }
        save_trained(
            Path(path).with_suffix(".safetensors"), weights, self._model.config, self._clip_steps
        )
        super().save_checkpoint(checkpoint, path, storage_options)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove both."""
        super().remove_checkpoint(path)
        Path(path).with_suffix(".safetensors").unlink(missing_ok=True)
