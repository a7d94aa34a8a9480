"""The LightningModule: losses, optimiser, and what a checkpoint holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from moshi.models.lm import LMModel
from torch import Tensor
from torchmetrics import MeanMetric

from moshi_ttt.errors import UserError, check_fields, settings_at
from moshi_ttt.memory import MemoryConfig
from moshi_ttt.model.build import (
    Dtype,
    ModelConfig,
    Trained,
    build_lm,
    check_fits,
    trainable_groups,
)
from moshi_ttt.model.forward import forward
from moshi_ttt.model.hybrid import observe_branches
from moshi_ttt.model.lora import LoraConfig
from moshi_ttt.model.source import ModelSource, open_source
from moshi_ttt.model.weights import start_from
from moshi_ttt.teacher_forcing.losses import LossConfig, lm_losses, magnitude_penalty
from moshi_ttt.teacher_forcing.nll import PositionNLL

# the output gate starts at zero and shields the memory behind it until its first update
GRADIENT_CHECK_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay, one learning rate a group."""

    lr_memory: float = 1e-3
    """Peak learning rate of the memories (projections, initial fast weights, write and
    forgetting gates)."""
    lr_gates: float = 1e-2
    """Peak learning rate of the output gates."""
    lr_rest: float = 1e-4
    """Peak learning rate of everything else that trains: LoRA, or the base weights."""
    weight_decay: float = 0.01
    """Decoupled weight decay of the projection matrices; nothing else decays."""
    beta1: float = 0.9
    """AdamW's decay of the gradient mean."""
    beta2: float = 0.95
    """AdamW's decay of the squared gradient."""
    warmup_fraction: float = 0.05
    """Part of all optimizer steps spent warming up, 0..1."""
    final_lr_fraction: float = 0.1
    """Learning rate at the end, as a part of the peak, 0..1."""

    def __post_init__(self) -> None:
        check_fields(self, "lr_memory", "lr_gates", "lr_rest", above=0)
        check_fields(self, "weight_decay", least=0)
        check_fields(
            self, "beta1", "beta2", "warmup_fraction", "final_lr_fraction", least=0, most=1
        )

    def factor(self, step: int, total_steps: int) -> float:
        """Learning rate at an optimizer step, as a part of the peak; never 0."""
        warmup_steps = max(1, round(self.warmup_fraction * total_steps))
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_lr_fraction + (1 - self.final_lr_fraction) * cosine


class MoshiTTT(LightningModule):
    """Moshi with a test-time-training memory.

    Nothing is loaded until training starts, so that mistakes in a config cost no GPU time.

    Args:
        source: `tiny` (bundled), a folder in moshi's layout, a hub id such as
            `kyutai/moshiko-pytorch-bf16`, or `moshi7b-random` (random weights, mechanics only).
        dtype: Storage of the base weights; memories and LoRA are always float32.
        context_steps: Attention window and ring capacity C of the temporal transformer in steps
            of 80 ms, in training and in generation; null keeps the checkpoint's own.
        gradient_checkpointing: Recompute each layer in the backward pass; less memory, more time.
        init_from: Start from the trained weights of another run: its `.safetensors` file; a part of
            what trains now is enough.
        train: What learns: `memory` or `lora` or `memory+lora` on a frozen Moshi, `base` (Moshi's
            own weights, nothing added), or `full` (Moshi and a memory).
        memory: The test-time-training memory.
        lora: Low-rank adapters, where `train` asks for them.
        loss: Weights of the loss terms.
        optim: Optimiser and learning rates.
    """

    lm: LMModel
    source: ModelSource

    def __init__(
        self,
        source: str = "tiny",
        dtype: Dtype = "float32",
        context_steps: int | None = None,
        gradient_checkpointing: bool = False,
        init_from: str | None = None,
        train: Trained = "memory",
        memory: MemoryConfig = MemoryConfig(),  # noqa: B008 (frozen)
        lora: LoraConfig = LoraConfig(),  # noqa: B008
        loss: LossConfig = LossConfig(),  # noqa: B008
        optim: OptimConfig = OptimConfig(),
    ) -> None:
        super().__init__()
        with settings_at("model"):
            self.config = ModelConfig(
                source=source,
                dtype=dtype,
                context_steps=context_steps,
                train=train,
                memory=memory,
                lora=lora,
            )
        self.loss_config = loss
        self.optim_config = optim
        self.gradient_checkpointing = gradient_checkpointing
        self.init_from = init_from
        self._silent_groups: set[str] = set()
        self._rng: dict[str, Tensor] = {}
        # a checkpoint holds what trains; the base comes from its source again
        self.strict_loading = False

    def check(self) -> None:
        """Find the checkpoint and hold the config against it, before data is encoded.

        Raises:
            UserError: no such model, or one that the config does not fit.
        """
        with settings_at("model"):
            self.source = open_source(self.config.source)
            check_fits(self.config, self.source)

    def configure_model(self) -> None:
        """Lightning's hook for expensive construction."""
        if hasattr(self, "lm"):
            return
        if not hasattr(self, "source"):
            self.check()
        with settings_at("model"):
            self.lm = build_lm(self.config, self.source, self.device, self.gradient_checkpointing)
        if self.init_from is not None:
            start_from(self.lm, Path(self.init_from), self.source)
        # moshi loads in eval mode and Lightning keeps the mode it finds; dropout needs this
        self.lm.train()
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.val_nll = PositionNLL(data.clip_steps, windows=1)
        self.val_loss = MeanMetric()

    def on_fit_start(self) -> None:
        """Say how much trains."""
        groups = trainable_groups(self.lm)
        frozen = sum(p.numel() for p in self.lm.parameters() if not p.requires_grad)
        counts = {name: sum(p.numel() for p in group.values()) for name, group in groups.items()}
        self.print(
            "parameters: "
            + ", ".join(f"{name} {count:,} trainable" for name, count in counts.items())
            + f", {frozen:,} frozen"
        )
        if self.logger is not None:
            counts["frozen"] = frozen
            tags = {f"parameters/{name}": float(count) for name, count in counts.items()}
            self.logger.log_metrics(tags, step=self.global_step)
        self._silent_groups = set(groups)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch of clips; `codes` [B, K, T]."""
        codes: Tensor = batch["codes"]
        with observe_branches(self.lm) as stats:
            output = forward(self.lm, codes)
        text_loss, audio_loss = lm_losses(self.lm, output, codes, self.loss_config)
        loss = text_loss + audio_loss
        logs = {"train/text_loss": text_loss, "train/audio_loss": audio_loss}
        if stats:
            penalty = magnitude_penalty(stats, self.loss_config)
            if self.loss_config.magnitude_reg:
                loss = loss + self.loss_config.magnitude_reg * penalty
            logs["train/magnitude_penalty"] = penalty
            for layer, (one,) in stats.items():
                # undefined at padding, which has no residual in layer 0
                logs[f"train/branch_ratio/layer_{layer:02d}"] = one.ratio.nanmean()
                logs[f"train/branch_ratio_max/layer_{layer:02d}"] = one.ratio.nan_to_num().max()
                logs[f"train/raw_branch_ratio/layer_{layer:02d}"] = one.raw_ratio.nanmean()
                logs[f"train/gate/layer_{layer:02d}"] = one.gate_rms
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log_dict({name: value.detach() for name, value in logs.items()})
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss of held-out clips, and NLL of each group of rows."""
        codes: Tensor = batch["codes"]
        output = forward(self.lm, codes)
        self.val_nll.update(self.lm, output, codes)
        text_loss, audio_loss = lm_losses(self.lm, output, codes, self.loss_config)
        self.val_loss.update(text_loss + audio_loss, len(codes))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the epoch, exact over all processes."""
        self.log("val/loss", self.val_loss.compute(), prog_bar=True)
        for group, nll in self.val_nll.compute().items():
            self.log(f"val/nll/{group}", nll.float())
        self.val_loss.reset()
        self.val_nll.reset()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log gradient norms; a group that never gets a gradient is an error."""
        for name, group in trainable_groups(self.lm).items():
            gradients = [p.grad for p in group.values() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
            self.log(f"train/grad_norm/{name}", norm)
            if name in self._silent_groups and norm > 0:
                self._silent_groups.remove(name)
        if self._silent_groups and self.global_step + 1 >= GRADIENT_CHECK_STEPS:
            raise UserError(
                f"no gradient reached {', '.join(sorted(self._silent_groups))} in "
                f"{GRADIENT_CHECK_STEPS} optimizer steps; it would not train. Check model.train, "
                "model.memory.layers and model.loss"
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the groups, and a schedule over all optimizer steps of the run."""
        config = self.optim_config
        rates = {"memory": config.lr_memory, "gates": config.lr_gates, "rest": config.lr_rest}
        groups = []
        for name, parameters in trainable_groups(self.lm).items():
            matrices = [p for p in parameters.values() if p.ndim == 2]
            others = [p for p in parameters.values() if p.ndim != 2]
            for kind, members, decay in (
                ("matrices", matrices, config.weight_decay),
                ("others", others, 0.0),
            ):
                if members:
                    groups.append(
                        {
                            "name": f"{name}/{kind}",
                            "params": members,
                            "lr": rates[name],
                            "weight_decay": decay,
                        }
                    )
        optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2))
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
        groups = trainable_groups(self.lm).values()
        return {name: p.data for group in groups for name, p in group.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what trains and the random states; the frozen base is not copied."""
        checkpoint["state_dict"] = {f"lm.{n}": p for n, p in self.trained_weights().items()}
        own = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.device)
        states = [own] * self.trainer.world_size
        if len(states) > 1:  # every process draws its own dropout
            torch.distributed.all_gather_object(states, own)
        checkpoint["rng"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, and go on with its random states."""
        expected = {f"lm.{name}" for name in self.trained_weights()}
        found = set(checkpoint["state_dict"])
        if expected != found:
            differing = sorted(expected ^ found)
            raise UserError(
                f"the checkpoint trains other weights than this config ({len(differing)} differ, "
                f"e.g. {differing[0]}); resume with the config saved beside it"
            )
        states = checkpoint["rng"]
        self._rng = states[self.global_rank % len(states)]

    def on_train_start(self) -> None:
        """Random states go back last, after everything that might draw."""
        if self._rng:
            torch.set_rng_state(self._rng["cpu"].cpu())
        if "cuda" in self._rng and self.device.type == "cuda":
            torch.cuda.set_rng_state(self._rng["cuda"].cpu(), self.device)
        self._rng = {}
