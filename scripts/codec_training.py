"""Teach a small Mimi to copy speech, with moshi's own modules and nothing adversarial.

Three things make it train where the plain recipe collapses: weights scaled so that every
convolution puts out unit variance on real audio, a first phase without quantisation, and codebooks
fitted to thousands of latents instead of to the one batch the package would take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from moshi.models import MimiModel
from moshi.quantization.core_vq import EuclideanCodebook
from torch import Tensor, nn
from torch.nn import functional

_SEGMENT_STEPS = 13  # 1.04 s
_LATENT_STEPS = 375  # 30 s at once: attention over all of the audio would not fit
_BATCH = 4
_PEAK_LR = 1e-3
_PLAIN_SHARE = 0.5  # of the updates, without quantisation
_COMMITMENT_WEIGHT = 0.25
_FFT_SIZES = (256, 512, 1024, 2048)
_MELS = 64


def scale_to_unit_variance(codec: MimiModel, audio: Tensor) -> None:
    """Rescale every convolution, in the order of one forward pass, to unit output variance.

    Args:
        codec: a freshly built codec; changed in place.
        audio: speech, [B, 1, samples]; the decoder's output gets its standard deviation.
    """

    def rescale(conv: Any, _: object, output: Tensor) -> Tensor:
        std = output.std().clamp(min=1e-6)
        conv.weight.data /= std
        return output / std

    convolutions = [m for m in codec.modules() if isinstance(m, nn.Conv1d | nn.ConvTranspose1d)]
    for conv in convolutions:
        if conv.bias is not None:
            conv.bias.data.zero_()
    hooks = [conv.register_forward_hook(rescale) for conv in convolutions]
    _set_quantisation(codec, on=False)
    with torch.no_grad():
        codec.train()(audio)
    for hook in hooks:
        hook.remove()
    last = [m for m in codec.decoder.modules() if isinstance(m, nn.Conv1d)][-1]
    last.weight.data *= audio.std()


def train(codec: MimiModel, audio: Tensor, updates: int, generator: torch.Generator) -> None:
    """Train `codec` in place on random pieces of `audio`, then leave it in eval mode.

    Args:
        codec: as `scale_to_unit_variance` leaves it.
        audio: mono speech, [samples].
        updates: optimizer steps over the whole training.
        generator: draws the pieces.
    """
    optimizer = torch.optim.AdamW(codec.parameters(), lr=_PEAK_LR, betas=(0.8, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _PEAK_LR, total_steps=updates, pct_start=0.05, final_div_factor=100
    )
    pieces = _pieces(audio, codec.frame_size, generator)
    quantised_from = round(_PLAIN_SHARE * updates)
    for update in range(updates):
        if update == quantised_from:
            fit_codebooks(codec, audio, generator)
            _set_quantisation(codec, on=True)
        codec.train()
        piece = next(pieces)
        result = codec(piece)
        loss = mel = mel_distance(result.x, piece)
        if update >= quantised_from:
            loss = mel + _COMMITMENT_WEIGHT * result.penalty
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for codebook in codebooks(codec):
            # the package replaces dead codes by latents that still carry their graph
            codebook.embedding_sum.detach_()
            codebook.cluster_usage.detach_()
        if update % 100 == 0 or update == updates - 1:
            print(
                f"codec update {update}/{updates}: mel {mel.item():.3f} nats, "
                f"commitment {result.penalty.item():.3f}",
                flush=True,
            )
    codec.eval()


@torch.no_grad()
def fit_codebooks(codec: MimiModel, audio: Tensor, generator: torch.Generator) -> None:
    """K-means of every level on the residuals that the levels before it leave.

    Args:
        codec: changed in place; left in eval mode.
        audio: mono speech, [samples]; every 80 ms of it gives one latent.
        generator: draws the first centroids.
    """
    codec.eval()
    samples = _LATENT_STEPS * codec.frame_size
    rows = audio[: len(audio) // samples * samples].reshape(-1, 1, 1, samples)
    latents = torch.cat([codec.encode_to_latent(row, quantize=False) for row in rows], dim=2)
    for quantizer in _quantizers(codec):
        residual = quantizer.input_proj(latents)[0].T.contiguous()  # [steps, dimension]
        for layer in quantizer.vq.layers:
            codebook = layer._codebook
            centroids, counts = _kmeans(residual, codebook.codebook_size, generator)
            codebook.cluster_usage.copy_(counts)
            codebook.embedding_sum.copy_(centroids * counts[:, None])
            codebook._initialized.fill_(1)
            codebook.register_buffer("_embedding", None, persistent=False)
            residual = residual - codebook.decode(codebook.encode(residual))


def codebooks(codec: MimiModel) -> list[EuclideanCodebook]:
    """All codebooks, the semantic one first."""
    return [m for m in codec.quantizer.modules() if isinstance(m, EuclideanCodebook)]


def mel_distance(a: Tensor, b: Tensor) -> Tensor:
    """L1 distance of log-mel spectrograms at several resolutions, in nats.

    Args:
        a: audio, [B, 1, samples] at 24 kHz.
        b: the same shape.
    """
    distances = [functional.l1_loss(_log_mel(a, size), _log_mel(b, size)) for size in _FFT_SIZES]
    return torch.stack(distances).mean()


def _log_mel(audio: Tensor, fft_size: int) -> Tensor:
    """[B, mels, frames], nats."""
    spectrum = torch.stft(
        audio[:, 0],
        fft_size,
        fft_size // 4,
        window=torch.hann_window(fft_size),
        return_complex=True,
    )
    # the floor keeps silence, most of every channel, from being most of the loss
    return torch.log(_mel_bank(fft_size) @ (spectrum.abs() / math.sqrt(fft_size)) + 1e-3)


@lru_cache
def _mel_bank(fft_size: int) -> Tensor:
    """Triangular filters of equal area, [mels, bins], 24 kHz."""
    top = 2595 * math.log10(1 + 12_000 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, _MELS + 2) / 2595) - 1)
    hertz = torch.linspace(0, 12_000, fft_size // 2 + 1)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bank = torch.minimum((hertz - low) / (middle - low), (high - hertz) / (high - middle))
    bank = bank.clamp(min=0)
    return bank / bank.sum(dim=1, keepdim=True).clamp(min=1e-3)


def _pieces(audio: Tensor, frame_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches [B, 1, samples], drawn in proportion to loudness: speech is the subject."""
    length = _SEGMENT_STEPS * frame_size
    loudness = audio.unfold(0, length, frame_size).std(dim=1)
    while True:
        chosen = torch.multinomial(loudness, _BATCH, generator=generator) * frame_size
        yield torch.stack([audio[i : i + length] for i in chosen.tolist()])[:, None]


def _quantizers(codec: MimiModel) -> list[Any]:
    """The semantic and the acoustic residual quantizer."""
    return [codec.quantizer.rvq_first, codec.quantizer.rvq_rest]


def _set_quantisation(codec: MimiModel, on: bool) -> None:
    for quantizer in _quantizers(codec):
        quantizer.no_quantization_rate = 0.0 if on else 1.0


def _kmeans(
    samples: Tensor, clusters: int, generator: torch.Generator, iterations: int = 30
) -> tuple[Tensor, Tensor]:
    """Centroids [clusters, D] and how many samples [N, D] each one serves, at least 1."""
    order = torch.randperm(len(samples), generator=generator)
    centroids = samples[order[:clusters]].clone()
    for _ in range(iterations):
        nearest = torch.cdist(samples, centroids).argmin(dim=1)
        counts = torch.bincount(nearest, minlength=clusters)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, samples)
        centroids = sums / counts.clamp(min=1)[:, None]
        # an empty cluster starts again at a sample; quiet recordings have many equal ones
        empty = torch.nonzero(counts == 0).flatten()
        picked = torch.randint(len(samples), (len(empty),), generator=generator)
        centroids[empty] = samples[picked]
    return centroids, counts.clamp(min=1).float()
