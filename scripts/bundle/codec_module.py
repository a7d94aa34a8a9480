"""The three phases of a codec's training, as a LightningModule."""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import Any

import torch
from codec_losses import GradientBalance, Readout, envelope_distance, spectral_distances
from codec_recipe import Phase, Recipe, learning_rate
from codec_replay import Replayed, Values
from codec_speech import Speech
from codec_training import (
    codebooks,
    copy_codebooks,
    fit_codebooks,
    freeze_encoder,
    latents_of,
    quantizers,
    reconstruct,
    split_latents,
    usage_bits,
    write_codec,
)
from lightning import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from moshi.models import MimiModel
from torch import Tensor, nn

BALANCE = {"mel": 1.0, "linear": 0.5}
"""Shares of the gradient at the output; no waveform loss: phases cost bits that words need. No
discriminator either: in trainings of minutes it did harm."""
COMMITMENT_WEIGHT = 0.25
READOUT_WEIGHT = 4.0
LOG_EVERY_UPDATES = 50  # reading a number back waits for the device
REPLACE_EVERY_UPDATES = 40  # dead codewords; such an update is not replayed


class CodecTraining(LightningModule):
    """The training of a codec, in the order of `Phase`.

    Args:
        codec: freshly built; trained in place.
        config: what it was built from, written beside the weights.
        speech: to train on.
        held_out: to validate on.
        recipe: how.
        out: folder of the result.
    """

    def __init__(
        self,
        codec: MimiModel,
        config: dict[str, Any],
        speech: Speech,
        held_out: Speech,
        recipe: Recipe,
        out: Path,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.codec = codec
        self.config = config
        self.average = copy.deepcopy(codec).eval().requires_grad_(False)
        self.balance = GradientBalance(BALANCE)
        self.readout = Readout(config["seanet"]["dimension"], speech.step_samples)
        self.recipe = recipe
        self.out = out
        self._speech = speech
        self._held_out = held_out
        self._phase = Phase.PLAIN
        self._replayed = Replayed(self._update)
        self._updates = 0
        self._spent_sec = 0.0
        self._begun = math.nan

    # -- the course of the training

    @property
    def progress(self) -> float:
        """Share of the training that is done, 0..1 and a little over."""
        spent_sec = self._spent_sec + time.perf_counter() - self._begun
        return max(self._updates / self.recipe.updates, spent_sec / 60 / self.recipe.minutes)

    def on_fit_start(self) -> None:
        """Put the audio where the model is."""
        self._speech.to(self.device)
        self._held_out.to(self.device)

    def on_train_start(self) -> None:
        """Start the clock; a resumed training draws other pieces than before."""
        self._begun = time.perf_counter()
        if self._phase is Phase.DECODER:
            freeze_encoder(self.codec)
        for codebook in codebooks(self.codec):
            codebook.check_unused_every = 10**9  # `training_step` asks for it
            codebook._next_unused_check = 10**9
        # checkpoints are read on the CPU, and a rate there would be recorded as a constant
        self._settings["lr"] = self._settings["lr"].to(self.device)
        torch.manual_seed(self.recipe.seed + self._updates)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the clock."""
        spent_sec = self._spent_sec + time.perf_counter() - self._begun
        checkpoint["course"] = {
            "updates": self._updates,
            "spent_sec": spent_sec,
            "phase": int(self._phase),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where the clock stood."""
        self._updates = checkpoint["course"]["updates"]
        self._spent_sec = checkpoint["course"]["spent_sec"]
        self._phase = Phase(checkpoint["course"]["phase"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW of the codec and its readout."""
        on_gpu = self.device.type == "cuda"
        return torch.optim.AdamW(
            [*self.codec.parameters(), *self.readout.parameters()],
            # a tensor, because a recorded update reads it at every replay
            torch.tensor(self.recipe.peak_lr, device=self.device),
            betas=(0.8, 0.99),
            weight_decay=0.01,
            fused=on_gpu,
            capturable=on_gpu,
        )

    def training_step(self, _: int, batch_idx: int) -> None:
        """One update."""
        recipe, progress = self.recipe, self.progress
        if self._phase is Phase.PLAIN and progress >= recipe.plain_share:
            self._enter(Phase.QUANTISED)
        elif self._phase is Phase.QUANTISED and progress >= 1 - recipe.decoder_share:
            self._enter(Phase.DECODER)
        self._settings["lr"].fill_(learning_rate(progress) * recipe.peak_lr)

        stretch = 4 if self._updates % 4 == 3 else 1
        audio = self._pieces(stretch)
        self._updates += 1
        if self._quantise and self._updates % REPLACE_EVERY_UPDATES == 0:
            for codebook in codebooks(self.codec):
                codebook._next_unused_check = 1
            values = self._replayed.plainly(audio)
            for codebook in codebooks(self.codec):
                # the package replaces dead codes by latents that still carry their graph
                codebook.embedding_sum.detach_()
                codebook.cluster_usage.detach_()
        else:
            values = self._replayed((stretch, self._phase), audio)
        self._follow()
        if self._updates % LOG_EVERY_UPDATES == 0:
            self.log_dict({f"train/{name}": value for name, value in values.items()})
            self.log("train/lr", self._settings["lr"])
            self.log("mel", values["mel"], prog_bar=True, logger=False)
            self.log("done", progress, prog_bar=True, logger=False)

    @property
    def _quantise(self) -> bool:
        return self._phase is not Phase.PLAIN

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        found = self.optimizers(use_pl_optimizer=False)
        assert isinstance(found, torch.optim.Optimizer)
        return found

    @property
    def _settings(self) -> dict[str, Any]:
        (group,) = self._optimizer.param_groups
        return group

    def _update(self, audio: Tensor) -> Values:
        """Forward, backward and step; everything in it can be recorded into a CUDA graph."""
        recipe, optimizer = self.recipe, self._optimizer
        # weights that were cast for an earlier update must not become part of a recording
        with torch.autocast(
            self.device.type, torch.bfloat16, torch.is_autocast_enabled(), cache_enabled=False
        ):
            copied, latent, commitment = reconstruct(
                self.codec,
                audio,
                quantise=self._quantise,
                bypass_rate=recipe.bypass_rate if self._phase is Phase.QUANTISED else 0.0,
            )
        # what balances begins at a leaf: each gradient is weighed before they are sent on together
        leaf = copied.detach().reshape(recipe.rows, 1, -1).requires_grad_()
        with torch.autocast(self.device.type, enabled=False):
            mel, linear = spectral_distances(leaf, audio.reshape(recipe.rows, 1, -1))
            readout = self.readout(latent, audio)
        losses = {"mel": mel, "linear": linear}
        gradient = self.balance(losses, leaf)
        optimizer.zero_grad()
        beside = COMMITMENT_WEIGHT * commitment + READOUT_WEIGHT * readout
        (copied * gradient.view_as(copied)).sum().add(beside).backward()
        norm = nn.utils.clip_grad_norm_(self._settings["params"], 1.0)
        optimizer.step()
        losses |= {"readout": readout, "commitment": commitment, "gradient_norm": norm}
        return {name: value.detach() for name, value in losses.items()}

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop when the time is over."""
        if self.progress >= 1:
            self.trainer.should_stop = True

    def _pieces(self, stretch: int = 1) -> Tensor:
        recipe = self.recipe
        return self._speech.pieces(
            recipe.rows // stretch, recipe.piece_steps * stretch, recipe.detune
        )

    @torch.no_grad()
    def _enter(self, phase: Phase) -> None:
        """Begin a phase that quantises, with codebooks fitted to what the encoder says by now."""
        recipe = self.recipe
        if phase is Phase.DECODER:
            # what is kept in the end is the average, and it is the better encoder
            torch._foreach_copy_(list(self.codec.parameters()), list(self.average.parameters()))
            freeze_encoder(self.codec)
        latents = torch.cat(
            [latents_of(self.codec, self._pieces()) for _ in range(recipe.codebook_batches)]
        )
        with torch.autocast(self.device.type, enabled=False):
            split_latents(self.codec, latents, self.readout.linear.weight)
            fit_codebooks(self.codec, latents, recipe.rows * recipe.piece_steps)
        for kept, current in zip(quantizers(self.average), quantizers(self.codec), strict=True):
            torch._foreach_copy_(list(kept.parameters()), list(current.parameters()))
        self._phase = phase

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average of the weights."""
        # a young average must not remember the first weights
        decay = min(self.recipe.average_decay, (1 + self._updates) / (10 + self._updates))
        torch._foreach_lerp_(
            list(self.average.parameters()), list(self.codec.parameters()), 1 - decay
        )

    # -- the result

    def averaged(self) -> MimiModel:
        """The codec to keep: averaged weights and, as they average themselves, the codebooks."""
        copy_codebooks(self.codec, self.average)
        return self.average

    def validation_step(self, _: int, batch_idx: int) -> None:
        """Distances on speech that is never trained on, and how even the codebooks are used."""
        codec = self.averaged()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(batch_idx)
            audio = self._held_out.pieces(self.recipe.rows, self.recipe.piece_steps)
        copied, latent, _commitment = reconstruct(codec, audio, quantise=self._quantise)
        with torch.autocast(self.device.type, enabled=False):
            mel, linear = spectral_distances(copied, audio)
            envelope = envelope_distance(copied, audio)
            readout = self.readout(latent, audio)
        self.log("val/mel", mel, prog_bar=True, batch_size=1)
        self.log("val/linear", linear, batch_size=1)
        self.log("val/envelope", envelope, batch_size=1)
        self.log("val/readout", readout, batch_size=1)
        for level, codebook in enumerate(codebooks(codec)):
            self.log(f"codebooks/bits_{level}", usage_bits(codebook), batch_size=1)
        if isinstance(self.logger, TensorBoardLogger) and batch_idx == 0:
            rate = codec.sample_rate
            for name, sound in (("original", audio), ("copy", copied)):
                # a few pieces in a row, as one sound
                self.logger.experiment.add_audio(
                    f"val/{name}", sound[:4].flatten()[None].cpu(), self._updates, rate
                )

    def on_train_epoch_end(self) -> None:
        """Write a checkpoint to go on from.

        Lightning's own callback would not: it waits for steps of optimizers that Lightning has
        wrapped, and what the wrapper does cannot be recorded.
        """
        self.trainer.save_checkpoint(self.out / "last.ckpt")

    def on_validation_end(self) -> None:
        """Write the codec as it is now: a training that is cut off leaves a usable one."""
        write_codec(self.averaged(), self.config, self.out)
