"""Checkpoint files: Lightning's for resuming, and safetensors beside it for everybody else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from moshi_ttt.errors import check_bounds
from moshi_ttt.files import write_atomic
from moshi_ttt.model.weights import save_trained
from train.data import ConversationData
from train.module import MoshiTTT
from train.run_folder import BEST, LAST, PREVIOUS
from train.stopping import Stopped


class RunCheckpoints(Checkpoint):
    """Keeps `last.ckpt`, to resume from, and `best.safetensors` in `RUN/checkpoints`.

    The best weights are those of the validation with the lowest `val/loss`; a run without
    validation has none. Lightning's ModelCheckpoint saves every n steps *or* at the end of an
    epoch, so that the last steps of a finished run would be lost, and the best only as a pickle of
    the whole checkpoint; for more than these two add one of those to `trainer.callbacks`.

    `last.ckpt` is written before the validation of each epoch, or its evaluation if there is none,
    and after that, and where a signal stops the run; the one before it is kept as `previous.ckpt`.

    Args:
        every_n_steps: Also save `last.ckpt` every n optimizer steps; null saves it around the end
            of each epoch only.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        check_bounds("checkpoint.every_n_steps", every_n_steps, least=1, remedy="or use null")
        self.every_n_steps = every_n_steps
        self.best_loss = math.inf
        """Lowest held-out loss so far in nats; infinite before the first validation."""
        self.best_epoch = 0
        """The epoch, from 1, in which `best_loss` was reached."""
        self._saved_step = 0
        self._validates_next = False

    def state_dict(self) -> dict[str, Any]:
        """The best so far, for the checkpoint."""
        return {"best_loss": self.best_loss, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best so far."""
        self.best_loss = state_dict["best_loss"]
        self.best_epoch = state_dict["best_epoch"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What a run resumes from is saved."""
        self._saved_step = trainer.global_step

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Before an epoch's validation and long generation, which may take as long as the epoch."""
        if batch_idx == 0 and not trainer.sanity_checking and trainer.state.fn == "fit":
            self._validates_next = True
            self._save(trainer)
            self._validates_next = False

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let a run that resumes from before a validation begin with it."""
        if self._validates_next:
            loop = checkpoint["loops"]["fit_loop"]
            # as if the first batch had just been begun: such a validation Lightning does again
            for part in ("total", "current"):
                loop["epoch_loop.val_loop.batch_progress"][part]["started"] += 1

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Keep what was trained when a signal stops the run."""
        if isinstance(exception, Stopped) and exception.whole:
            self.save_new(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the weights if none before were as good on the held-out recordings."""
        loss = math.nan if trainer.sanity_checking else float(trainer.callback_metrics["val/loss"])
        if not loss < self.best_loss:
            return
        self.best_loss, self.best_epoch = loss, trainer.current_epoch + 1
        if trainer.is_global_zero:
            model: Any = pl_module
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            path = self._run(trainer) / BEST
            save_trained(path, model.trained_weights(), model.config, data.clip_steps, model.source)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Every n optimizer steps, but for the last of an epoch.

        The end of the epoch saves that one, after its validation: a run that resumed from before
        the validation would skip it.
        """
        step = trainer.global_step
        due = self.every_n_steps and step % self.every_n_steps == 0 and step != self._saved_step
        if due and not trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After each epoch; Lightning calls checkpoints last, so what is saved was evaluated."""
        self._save(trainer)

    def save_new(self, trainer: Trainer) -> None:
        """Save unless it is saved."""
        if trainer.global_step != self._saved_step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self._run(trainer) / LAST, weights_only=False)

    @staticmethod
    def _run(trainer: Trainer) -> Path:
        logger: Any = trainer.logger
        return Path(logger.log_dir)


class SaveBeforeEvaluation(Callback):
    """Saves where an epoch ends without a validation, before a long generation; put it first.

    Lightning puts checkpoints last. Later it would be too late: a signal then stops one of several
    processes, and saving takes all of them.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What a validation saved is saved."""
        for one in trainer.checkpoint_callbacks:
            if isinstance(one, RunCheckpoints):
                one.save_new(trainer)


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
        """Write both files, each atomically; the weights first, which must be finite."""
        weights = {
            name.removeprefix("lm."): tensor for name, tensor in checkpoint["state_dict"].items()
        }
        path_of_weights = Path(path).with_suffix(".safetensors")
        model = self._model
        save_trained(path_of_weights, weights, model.config, self._data.clip_steps, model.source)
        file_path = Path(path)

        def write(file: IO[bytes]) -> None:
            torch.save(checkpoint, file)
            if file_path.name == LAST.name and file_path.is_file():
                file_path.replace(file_path.with_name(PREVIOUS.name))

        # Lightning's own writer goes by way of the temporary folder, often another file system
        write_atomic(file_path, write)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove both."""
        super().remove_checkpoint(path)
        Path(path).with_suffix(".safetensors").unlink(missing_ok=True)
