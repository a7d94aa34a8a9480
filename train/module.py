"""The LightningModule: losses, optimiser, and what a checkpoint holds."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from moshi.models.lm import LMModel
from torch import Tensor, nn
from torchmetrics import MeanMetric

from moshi_ttt.errors import UserError, settings_at
from moshi_ttt.memory import MemoryConfig
from moshi_ttt.model.branch import BranchStats
from moshi_ttt.model.build import (
    Dtype,
    ModelConfig,
    Trained,
    build_lm,
    check_fits,
    trainable_groups,
)
from moshi_ttt.model.hybrid import observe_branches
from moshi_ttt.model.lora import LoraConfig
from moshi_ttt.model.source import ModelSource, open_source
from moshi_ttt.model.weights import check_start, start_from
from moshi_ttt.teacher_forcing.distillation import DistillationConfig, base_output, divergence
from moshi_ttt.teacher_forcing.losses import LossConfig, magnitude_penalty, read_clips
from moshi_ttt.teacher_forcing.nll import PositionNLL
from train.carry import Carry
from train.checkpointing import Checkpointing, choose_checkpointing
from train.logged import branch_scalars, gradient_norms, parameter_counts
from train.optim import OptimConfig, adamw, apply_settings, clip_gradients
from train.resume import check_resumes, gathered, random_states, restore_random_states

# the output gate starts at zero and shields the memory behind it until its first update
GRADIENT_CHECK_STEPS = 3


class MoshiTTT(LightningModule):
    """Moshi with a test-time-training memory.

    Nothing is loaded until training starts, so that mistakes in a config cost no GPU time.

    Args:
        source: `tiny` (bundled), a folder in moshi's layout, a hub id such as
            `kyutai/moshiko-pytorch-bf16`, or `moshi7b-random` (random weights, mechanics only).
        dtype: Storage of the base weights; memories and LoRA are always float32.
        context_steps: Attention window and ring capacity C of the temporal transformer in steps
            of 80 ms, in training and in generation; null keeps the checkpoint's own.
        sinks: First steps that stay visible beside the window, in training and in generation.
        thinning: How often older keys are halved, with as many keys as the window has: 3 sees two
            fifths of it whole, then every 2nd, 4th, 8th step, three times as far; 0: all of it.
        farthest_steps: How far away a key, e.g. a sink, may seem; null: as far as it is.
        gradient_checkpointing: Recompute each layer in the backward pass: less memory, more time.
            `auto` tries one step beforehand, and does it where the GPU's memory asks for it.
        init_from: Start from trained weights: `tiny` (the memory bundled with that model), or the
            `.safetensors` file of another run; a part of what trains now is enough.
        train: What learns: `memory` or `lora` or `memory+lora` on a frozen Moshi, `base` (Moshi's
            own weights, nothing added), or `full` (Moshi and a memory).
        memory: The test-time-training memory.
        lora: Low-rank adapters, where `train` asks for them.
        loss: Weights of the loss terms.
        distillation: What the base itself teaches, read with another window.
        optim: Optimiser and learning rates.
    """

    lm: LMModel
    source: ModelSource

    def __init__(
        self,
        source: str = "tiny",
        dtype: Dtype = "float32",
        context_steps: int | None = None,
        sinks: int = 0,
        thinning: int = 0,
        farthest_steps: int | None = None,
        gradient_checkpointing: Checkpointing = "auto",
        init_from: str | None = None,
        train: Trained = "memory",
        memory: MemoryConfig = MemoryConfig(),  # noqa: B008 (frozen)
        lora: LoraConfig = LoraConfig(),  # noqa: B008
        loss: LossConfig = LossConfig(),  # noqa: B008
        distillation: DistillationConfig = DistillationConfig(),  # noqa: B008
        optim: OptimConfig = OptimConfig(),  # noqa: B008
    ) -> None:
        super().__init__()
        with settings_at("model"):
            self.config = ModelConfig(
                source=source,
                dtype=dtype,
                context_steps=context_steps,
                sinks=sinks,
                thinning=thinning,
                farthest_steps=farthest_steps,
                train=train,
                memory=memory,
                lora=lora,
            )
        with settings_at("model.distillation"):
            distillation.check_fits(train)
        self.loss_config = loss
        self.distillation = distillation
        self.optim_config = optim
        self.gradient_checkpointing = gradient_checkpointing
        self.init_from = init_from
        self._silent_groups: set[str] = set()
        self._rng: dict[str, Tensor] = {}
        self._carry = Carry()
        # a checkpoint holds what trains; the base comes from its source again
        self.strict_loading = False

    def check(self) -> None:
        """Find the checkpoint and hold the config against it, before data is encoded.

        Raises:
            UserError: no such model, or one that the config or the trained weights do not fit.
        """
        with settings_at("model"):
            self.source = open_source(self.config.source)
            check_fits(self.config, self.source)
            if self.init_from is not None:
                check_start(self.init_from, self.config, self.source)

    def configure_model(self) -> None:
        """Lightning's hook for expensive construction."""
        if hasattr(self, "lm"):
            return
        if not hasattr(self, "source"):
            self.check()
        with settings_at("model"):
            self.lm = build_lm(
                self.config, self.source, self.device, self.gradient_checkpointing is True
            )
            if self.init_from is not None:
                start_from(self.lm, self.init_from)
        self.lm.train()  # moshi loads in eval mode and Lightning keeps what it finds
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        with settings_at("model.loss"):
            self.loss_config.check_fits(self.lm.context, data.clip_steps)
        self.val_nll = PositionNLL(data.clip_steps, windows=1)
        self.val_loss = MeanMetric()

    def on_fit_start(self) -> None:
        """Say how much trains, and what it takes."""
        if self.gradient_checkpointing == "auto":
            choose_checkpointing(self, self.trainer)
        counts = parameter_counts(self.lm, self._groups)
        self.print("parameters: " + ", ".join(f"{name} {n:,}" for name, n in counts.items()))
        self._silent_groups = set(self._groups)

    @cached_property
    def _groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """`trainable_groups`, found once."""
        return trainable_groups(self.lm)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch of clips; `codes` [B, K, T]."""
        codes: Tensor = batch["codes"]
        heard, config, logs = batch.get("heard"), self.loss_config, self._logs_this_step
        taught = self.distillation.teaches_audio
        predicted = heard and config.predicted(heard, self.global_step, taught)
        teacher = None
        if self.distillation.weight:
            teacher = base_output(self.lm, codes, self.distillation, heard, predicted)
        scope: AbstractContextManager[dict[int, list[BranchStats]]] = nullcontext({})
        if logs or config.magnitude_reg:
            scope = observe_branches(self.lm)
        carried = self._carry.reading(self.lm, batch.get("continues"), self.trainer)
        with carried, scope as stats:
            output, text_loss, audio_loss = read_clips(self.lm, codes, config, heard, predicted)
        loss = config.likelihood(text_loss, audio_loss)
        values = {"train/text_loss": text_loss, "train/audio_loss": audio_loss}
        if predicted is not None and not any(predicted):  # left out, it would stay what it was
            values["train/audio_loss"] = torch.full_like(audio_loss, torch.nan)
        if teacher is not None:
            values["train/divergence"] = divergence(output, teacher, self.distillation.groups)
            loss = loss + self.distillation.weight * values["train/divergence"]
        if stats:
            penalty = magnitude_penalty(stats, config)
            if config.magnitude_reg:
                loss = loss + config.magnitude_reg * penalty
            values["train/magnitude_penalty"] = penalty
        self.log("train/loss", loss.detach(), prog_bar=True)
        if logs:
            for layer, (one,) in stats.items():
                values |= branch_scalars(one, f"layer_{layer:02d}")
            self.log_dict({name: value.detach() for name, value in values.items()})
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """With activation checkpointing the clips are read again here, from the same memories."""
        with self._carry.again(self.lm):
            super().backward(loss, *args, **kwargs)

    @property
    def _logs_this_step(self) -> bool:
        """Whether a logger writes this optimizer step; what is for it alone is only computed then.

        Each scalar costs a little of the CPU's time, which a small model does not have.
        """
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return bool(self.loggers) and every > 0 and (self.global_step + 1) % every == 0

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss and per-stream NLL of held-out clips."""
        codes, heard = batch["codes"], batch.get("heard")
        output, text_loss, audio_loss = read_clips(self.lm, codes, self.loss_config, heard)
        self.val_nll.update(self.lm, output, codes, heard)
        self.val_loss.update(self.loss_config.likelihood(text_loss, audio_loss), len(codes))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the epoch, exact over all processes."""
        self.log("val/loss", self.val_loss.compute(), prog_bar=True)
        for group, nll in self.val_nll.compute().items():
            self.log(f"val/nll/{group}", nll.float())
        self.val_loss.reset()
        self.val_nll.reset()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log gradient norms; a group that never gets a gradient is an error."""
        logs = self._logs_this_step
        if not logs and not self._silent_groups:
            return
        norms = gradient_norms(self._groups)
        self._silent_groups -= {name for name in self._silent_groups if norms[name] > 0}
        if logs:
            self.log_dict({f"train/grad_norm/{name}": norm for name, norm in norms.items()})
        if self._silent_groups and self.global_step + 1 >= GRADIENT_CHECK_STEPS:
            raise UserError(
                f"no gradient reached {', '.join(sorted(self._silent_groups))} in "
                f"{GRADIENT_CHECK_STEPS} optimizer steps; it would not train. Check model.train, "
                "model.memory.layers and model.loss"
            )

    @property
    def _fuses(self) -> bool:
        """Whether AdamW is one kernel a group; fp16's scaler needs the gradients apart from it."""
        return self.device.type == "cuda" and self.trainer.precision != "16-mixed"

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning clips, which in mixed precision takes every fused optimizer for one of fp16.

        Without fp16's scaler the gradients are what they seem, and there is nothing to refuse.
        """
        if not (self._fuses and gradient_clip_val):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the groups, and a schedule over all optimizer steps of the run."""
        config = self.optim_config
        optimizer = adamw(self._groups, config, fused=self._fuses)
        total_steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: config.factor(step, total_steps)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def trained_weights(self) -> dict[str, Tensor]:
        """Trainable parameters by their name in the LM."""
        groups = self._groups.values()
        return {name: p.data for group in groups for name, p in group.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what trains, random states and carried memories; the frozen base is not copied."""
        checkpoint["state_dict"] = {f"lm.{n}": p for n, p in self.trained_weights().items()}
        checkpoint["rng"] = gathered(random_states(self.device), self.trainer.world_size)
        self._carry.save(checkpoint, self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, and go on with what it has of this process."""
        check_resumes(checkpoint, self.trained_weights())
        self._rng = checkpoint["rng"][self.global_rank % len(checkpoint["rng"])]
        self._carry.load(checkpoint, self.trainer, self.config.memory.mini_batch_steps)

    def on_train_start(self) -> None:
        """Rates are those of the config; random states go back last, after all that might draw."""
        trainer: Any = self.trainer
        optimizer, schedule = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
        apply_settings(optimizer, schedule, adamw(self._groups, self.optim_config, fused=False))
        restore_random_states(self._rng, self.device)
        self._rng = {}
