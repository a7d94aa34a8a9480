"""The three phases of a codec's training, as a LightningModule."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from codec_losses import (
    Discriminator,
    GradientBalance,
    discriminator_loss,
    feature_distance,
    generator_loss,
    spectral_distances,
)
from codec_replay import Replayed
from codec_speech import Speech
from codec_training import codebooks, fit_codebooks, reconstruct, usage_bits
from lightning import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from moshi.models import MimiModel
from torch import Tensor, nn

from moshi_ttt.trace import write_atomic, write_json

BALANCE = {"mel": 1.0, "linear": 0.5, "features": 1.0, "adversarial": 0.5}
"""Shares of the gradient at the output; no waveform loss: phases cost bits that words need."""
COMMITMENT_WEIGHT = 0.25
LOG_EVERY_UPDATES = 50  # reading a number back waits for the device
REPLACE_EVERY_UPDATES = 100  # dead codewords; such an update is not replayed


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How one training goes; shares are of the whole training, 0..1."""

    minutes: float = math.inf
    """Length of the training."""
    updates: float = math.inf
    """The same in optimizer steps of the codec; what is reached first ends it."""
    adversarial: bool = False
    """Whether a discriminator helps in the last phase."""
    rows: int = 24
    """Pieces of an update; every fourth update has a quarter of them, four times as long."""
    piece_steps: int = 32
    """Length of a short piece; 32 steps = 2.56 s."""
    judged_steps: int = 16
    """What the discriminator hears of each piece."""
    filters: int = 32
    """Channels of the discriminator."""
    peak_lr: float = 1e-3
    """Of the codec."""
    discriminator_lr: float = 3e-4
    """Constant: it has to follow the codec to the end."""
    average_decay: float = 0.999
    """Of the moving average of the weights, which is what is written."""
    plain_share: float = 0.1
    """First phase, without quantisation."""
    adversarial_from: float = 0.45
    """Where the last phase begins."""
    bypass_rate: float = 0.2
    """Pieces that pass unquantised in the middle phase."""
    codebook_batches: int = 40
    """Updates' worth of latents that codebooks are first fitted to."""
    updates_per_epoch: int = 500
    """Between validations and checkpoints."""
    seed: int = 0
    """Of weights and pieces."""


class CodecTraining(LightningModule):
    """The three phases of a codec's training.

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
        self.discriminator = Discriminator(recipe.filters) if recipe.adversarial else None
        self.balance = GradientBalance(BALANCE)
        self.recipe = recipe
        self.out = out
        self._speech = speech
        self._held_out = held_out
        self._quantise = False
        self._judged = False
        self._ease_in = torch.zeros(())
        self._replayed = Replayed(self._update)
        self._values: dict[str, Tensor] = {}
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
        self._ease_in = self._ease_in.to(self.device)

    def on_train_start(self) -> None:
        """Start the clock; a resumed training draws other pieces than before."""
        self._begun = time.perf_counter()
        self._quantise = codebooks(self.codec)[0].initialized
        for codebook in codebooks(self.codec):
            codebook.check_unused_every = 10**9  # `training_step` asks for it
            codebook._next_unused_check = 10**9
        torch.manual_seed(self.recipe.seed + self._updates)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the clock."""
        spent_sec = self._spent_sec + time.perf_counter() - self._begun
        checkpoint["course"] = {"updates": self._updates, "spent_sec": spent_sec}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where the clock stood."""
        self._updates = checkpoint["course"]["updates"]
        self._spent_sec = checkpoint["course"]["spent_sec"]

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW of the codec, and of the discriminator if there is one."""
        recipe, on_gpu = self.recipe, self.device.type == "cuda"
        settings: dict[str, Any] = {
            "betas": (0.8, 0.99),
            "weight_decay": 0.01,
            "fused": on_gpu,
            "capturable": on_gpu,
        }
        # a tensor, because a recorded update reads it at every replay
        rate = torch.tensor(recipe.peak_lr, device=self.device)
        found = [torch.optim.AdamW(self.codec.parameters(), rate, **settings)]
        if self.discriminator is not None:
            rate = torch.tensor(recipe.discriminator_lr, device=self.device)
            found.append(torch.optim.AdamW(self.discriminator.parameters(), rate, **settings))
        return list(found)

    def training_step(self, _: int, batch_idx: int) -> None:
        """One update of the codec and, in the last phase, of the discriminator."""
        recipe, progress = self.recipe, self.progress
        if not self._quantise and progress >= recipe.plain_share:
            self._start_quantising()
        self._judged = self.discriminator is not None and progress >= recipe.adversarial_from
        if self._judged:
            self._ease_in.fill_(min(1.0, (progress - recipe.adversarial_from) / 0.05))
        self._optimizers[0].param_groups[0]["lr"].fill_(_rate(progress) * recipe.peak_lr)

        stretch = 4 if self._updates % 4 == 3 else 1
        audio = self._speech.pieces(recipe.rows // stretch, recipe.piece_steps * stretch)
        self._updates += 1
        if self._updates % REPLACE_EVERY_UPDATES == 0:
            for codebook in codebooks(self.codec):
                codebook._next_unused_check = 1
            self._update(audio)
            for codebook in codebooks(self.codec):
                # the package replaces dead codes by latents that still carry their graph
                codebook.embedding_sum.detach_()
                codebook.cluster_usage.detach_()
        else:
            self._replayed((stretch, self._quantise, self._judged), audio)
        self._follow()
        if self._updates % LOG_EVERY_UPDATES == 0:
            self.log_dict({f"train/{name}": value for name, value in self._values.items()})
            self.log("train/lr", self._optimizers[0].param_groups[0]["lr"])
            self.log("mel", self._values["mel"], prog_bar=True, logger=False)
            self.log("done", progress, prog_bar=True, logger=False)

    @property
    def _optimizers(self) -> list[torch.optim.Optimizer]:
        found = self.optimizers(use_pl_optimizer=False)
        return found if isinstance(found, list) else [found]

    def _update(self, audio: Tensor) -> None:
        """Forward, backward and step; everything in it can be recorded into a CUDA graph."""
        recipe = self.recipe
        # weights that were cast for an earlier update must not become part of a recording
        with torch.autocast(
            self.device.type, torch.bfloat16, torch.is_autocast_enabled(), cache_enabled=False
        ):
            bypass_rate = 0.0 if self._judged else recipe.bypass_rate
            copied, commitment = reconstruct(
                self.codec, audio, quantise=self._quantise, bypass_rate=bypass_rate
            )
        # losses begin at a leaf, so that each one's gradient can be weighed before it is sent on
        leaf = copied.detach().reshape(recipe.rows, 1, -1).requires_grad_()
        target = audio.reshape(recipe.rows, 1, -1)
        with torch.autocast(self.device.type, enabled=False):
            mel, linear = spectral_distances(leaf, target)
        losses = {"mel": mel, "linear": linear}
        verdict_loss = None
        if self._judged:
            verdict_loss, more = self._judge(target, leaf)
            losses |= more
        gradient = self.balance(
            losses, leaf, {"features": self._ease_in, "adversarial": self._ease_in}
        )
        optimizers = self._optimizers
        self.codec.zero_grad(set_to_none=True)
        (copied * gradient.view_as(copied)).sum().add(COMMITMENT_WEIGHT * commitment).backward()
        norm = nn.utils.clip_grad_norm_(self.codec.parameters(), 1.0)
        optimizers[0].step()
        if verdict_loss is not None:
            assert self.discriminator is not None
            parameters = list(self.discriminator.parameters())
            self.discriminator.zero_grad(set_to_none=True)
            torch.autograd.backward(verdict_loss, inputs=parameters)
            nn.utils.clip_grad_norm_(parameters, 10.0)
            optimizers[1].step()
            losses["discriminator"] = verdict_loss
        self._values = {name: loss.detach() for name, loss in losses.items()}
        self._values |= {"commitment": commitment.detach(), "gradient_norm": norm}

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop when the time is over."""
        if self.progress >= 1:
            self.trainer.should_stop = True

    def _judge(self, target: Tensor, leaf: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's own loss, and the losses it has for the codec."""
        assert self.discriminator is not None
        # the ends, as the codec hears its past there; a place drawn here would be recorded with all
        samples = self.recipe.judged_steps * self._speech.step_samples
        heard = torch.cat([target, leaf])[..., -samples:]
        verdicts, features = self.discriminator(heard)
        real, copied = zip(*(verdict.chunk(2) for verdict in verdicts), strict=True)
        real_maps, copied_maps = zip(*(feature.chunk(2) for feature in features), strict=True)
        return discriminator_loss(real, copied), {
            "features": feature_distance(real_maps, copied_maps),
            "adversarial": generator_loss(copied),
        }

    def _start_quantising(self) -> None:
        """Fit the codebooks to what the encoder says by now."""
        latents = []
        recipe = self.recipe
        for _ in range(recipe.codebook_batches):
            assert self.codec.encoder_transformer is not None
            audio = self._speech.pieces(recipe.rows, recipe.piece_steps)
            (latent,) = self.codec.encoder_transformer(self.codec.encoder(audio))
            latents.append(self.codec._to_framerate(latent).detach().float())
        with torch.autocast(self.device.type, enabled=False):
            fit_codebooks(self.codec, torch.cat(latents), recipe.rows * recipe.piece_steps)
        self._quantise = True

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
        for kept, current in zip(codebooks(self.average), codebooks(self.codec), strict=True):
            for name in ("embedding_sum", "cluster_usage", "_initialized"):
                getattr(kept, name).copy_(getattr(current, name).detach())
            kept.register_buffer("_embedding", None, persistent=False)
        return self.average

    def validation_step(self, _: int, batch_idx: int) -> None:
        """Distances on speech that is never trained on, and how even the codebooks are used."""
        codec = self.averaged()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(batch_idx)
            audio = self._held_out.pieces(self.recipe.rows, self.recipe.piece_steps)
        copied = reconstruct(codec, audio, quantise=codebooks(codec)[0].initialized)[0]
        with torch.autocast(self.device.type, enabled=False):
            mel, linear = spectral_distances(copied, audio)
        self.log("val/mel", mel, prog_bar=True, batch_size=1)
        self.log("val/linear", linear, batch_size=1)
        for level, codebook in enumerate(codebooks(codec)):
            self.log(f"codebooks/bits_{level}", usage_bits(codebook), batch_size=1)
        if isinstance(self.logger, TensorBoardLogger) and batch_idx == 0:
            rate = codec.sample_rate
            for name, sound in (("original", audio), ("copy", copied)):
                # a few pieces in a row, as one sound
                self.logger.experiment.add_audio(
                    f"val/{name}", sound[:4].flatten()[None].cpu(), self._updates, rate
                )

    def on_validation_end(self) -> None:
        """Write the codec as it is now: a training that is cut off leaves a usable one."""
        if not self.trainer.sanity_checking:
            write_codec(self.averaged(), self.config, self.out)


def _rate(progress: float) -> float:
    """Learning rate over its peak: a short warm-up, then half a cosine down to a hundredth."""
    if progress < 0.02:
        return max(progress / 0.02, 0.01)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.02) / 0.98)))


def write_codec(codec: MimiModel, config: dict[str, Any], folder: Path) -> None:
    """Write weights (fp16) and codebooks (fp32) as moshi's loaders read them."""
    parameters = dict(codec.named_parameters())
    state = {
        name: (value.half() if name in parameters else value.float()).cpu().contiguous()
        for name, value in codec.state_dict().items()
    }
    data = safetensors.torch.save(state)
    write_atomic(folder / "mimi.safetensors", lambda file: file.write(data))
    write_json(folder / "mimi_config.json", config)
