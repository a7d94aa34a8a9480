"""What a codec's training lowers: distances of sounds, what latents do not tell, their balance."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, pad

FFT_SIZES = (256, 512, 1024, 2048)
"""Windows of the spectral losses, samples: 11 to 85 ms at 24 kHz."""
_MELS = (24, 48, 80, 120)  # narrower filters would fall between the bins of their window
_ENVELOPES = ((256, 20, 6), (512, 40, 6), (1024, 64, 6))
"""Window in samples, mel filters, frames averaged: 16, 32 and 64 ms."""
_PATCH_FFT, _PATCH_HOP, _PATCH_MELS = 512, 120, 40  # samples: 21 ms every 5 ms


def mel_distance(a: Tensor, b: Tensor) -> Tensor:
    """L1 distance of log-mel spectrograms, mean over `FFT_SIZES`, in nats.

    Args:
        a: audio, [B, 1, samples] at 24 kHz, fp32.
        b: the same shape.
    """
    return spectral_distances(a, b)[0]


def spectral_distances(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Mel distance in nats, and linear spectral distance, over the same spectrograms.

    Args:
        a: audio, [B, 1, samples] at 24 kHz, fp32.
        b: the reference, the same shape.

    Returns:
        `mel_distance`, and the L1 distance of magnitudes over the mean magnitude of `b`, mean over
        `FFT_SIZES`, dimensionless. Two scalars.
    """
    mels, linears = [], []
    for fft_size, filters in zip(FFT_SIZES, _MELS, strict=True):
        spectrum_a, spectrum_b = _magnitudes(a, fft_size), _magnitudes(b, fft_size)
        bank = _mel_bank(fft_size, filters, a.device)
        # the floor keeps silence, most of every channel, from being most of the loss
        log_a, log_b = (torch.log(bank @ spectrum + 1e-3) for spectrum in (spectrum_a, spectrum_b))
        mels.append((log_a - log_b).abs().mean())
        linears.append((spectrum_a - spectrum_b).abs().mean() / (spectrum_b.mean() + 1e-3))
    return torch.stack(mels).mean(), torch.stack(linears).mean()


def envelope_distance(a: Tensor, b: Tensor) -> Tensor:
    """L1 distance of log-mel envelopes, mean over `_ENVELOPES`, in nats.

    A number to validate by, not a loss. Power is averaged over time before the logarithm, so that
    the fine structure of noise and voicing, which no codec of 900 bit/s can copy, does not count:
    speech rebuilt from noise with the original's envelope, which a recogniser understands as well
    as the original, is 0.10 nats away in this measure, and 0.26 in `mel_distance`.

    Args:
        a: audio, [B, 1, samples] at 24 kHz, fp32.
        b: the same shape.
    """
    distances = []
    for fft_size, filters, frames in _ENVELOPES:
        bank = _mel_bank(fft_size, filters, a.device)
        log_a, log_b = (
            torch.log(
                avg_pool1d(bank @ _magnitudes(x, fft_size).square(), frames, frames // 2) + 1e-7
            )
            for x in (a, b)
        )
        distances.append(0.5 * (log_a - log_b).abs().mean())  # of magnitudes, not of power
    return torch.stack(distances).mean()


def log_mel_patches(audio: Tensor, step_samples: int) -> Tensor:
    """What is heard by the end of each step, and not by that of the step before.

    Log-mel spectra of 21 ms windows, one every 5 ms; the last of a step ends with it, as a causal
    codec cannot say what comes later.

    Args:
        audio: [B, 1, samples] at 24 kHz, whole steps, fp32; silence is heard before it.
        step_samples: samples of a step, a multiple of 120.

    Returns:
        [B, steps, frames of a step * 40 mels], natural logarithms of magnitudes.
    """
    padded = pad(audio[:, 0], (_PATCH_FFT - _PATCH_HOP, 0))
    window = _window(_PATCH_FFT, audio.device)
    spectrum = torch.stft(
        padded, _PATCH_FFT, _PATCH_HOP, window=window, center=False, return_complex=True
    )
    bank = _mel_bank(_PATCH_FFT, _PATCH_MELS, audio.device)
    mel = torch.log(bank @ (spectrum.abs() / math.sqrt(_PATCH_FFT)) + 3e-4)  # [B, mels, frames]
    return mel.transpose(1, 2).reshape(len(audio), audio.shape[-1] // step_samples, -1)


class Readout(nn.Module):
    """What a linear map cannot tell of the sound of a step from its latent.

    The error is small only if the encoder has put the spectrum where the quantisers keep it. Two
    spectral losses behind the decoder alone leave it at 0.45 to 0.53 nats after minutes, where 64
    principal components of the same patches reach 0.20: a decoder that is poor itself is a poor
    teacher of the encoder.

    Args:
        channels: of a latent.
        step_samples: samples of a step, a multiple of 120.
    """

    def __init__(self, channels: int, step_samples: int) -> None:
        super().__init__()
        self.step_samples = step_samples
        self.linear = nn.Linear(channels, step_samples // _PATCH_HOP * _PATCH_MELS)

    def forward(self, latent: Tensor, audio: Tensor) -> Tensor:
        """Mean L1 error in nats, a scalar.

        Args:
            latent: as the decoder gets it, [B, channels, steps] fp32.
            audio: what it stands for, [B, 1, steps * step_samples] fp32.
        """
        patches = log_mel_patches(audio, self.step_samples)
        return (self.linear(latent.transpose(1, 2)) - patches).abs().mean()


def _magnitudes(audio: Tensor, fft_size: int) -> Tensor:
    """[B, bins, frames]; of the order of the waveform, whatever the window."""
    window = _window(fft_size, audio.device)
    spectrum = torch.stft(audio[:, 0], fft_size, fft_size // 4, window=window, return_complex=True)
    # abs() has no gradient at zero, where digital silence is
    return (torch.view_as_real(spectrum).square().sum(dim=-1) + 1e-9).sqrt() / math.sqrt(fft_size)


@lru_cache
def _window(fft_size: int, device: torch.device) -> Tensor:
    return torch.hann_window(fft_size, device=device)


@lru_cache
def _mel_bank(fft_size: int, filters: int, device: torch.device) -> Tensor:
    """Triangular filters of equal area, [filters, bins], 24 kHz."""
    top = 2595 * math.log10(1 + 12_000 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, filters + 2) / 2595) - 1)
    hertz = torch.linspace(0, 12_000, fft_size // 2 + 1)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bank = torch.minimum((hertz - low) / (middle - low), (high - hertz) / (high - middle))
    bank = bank.clamp(min=0)
    return (bank / bank.sum(dim=1, keepdim=True).clamp(min=1e-3)).to(device)


class GradientBalance(nn.Module):
    """Weights of losses as shares of the gradient they cause, in units of the first loss.

    After EnCodec's balancer (Defossez et al. 2022, section 3.4): it makes weights independent of
    the scales of the losses, which need not stay in proportion. Here the first loss keeps its own
    scale, so that losses which are not balanced mean the same with and without others.

    Args:
        weights: share of each loss, the first usually 1.
        decay: of the moving average of the gradients' norms.
    """

    def __init__(self, weights: dict[str, float], decay: float = 0.99) -> None:
        super().__init__()
        self.weights = weights
        self.decay = decay
        self.norms: Tensor
        self.register_buffer("norms", torch.zeros(len(weights)))  # 0: not seen yet

    def forward(self, losses: dict[str, Tensor], output: Tensor) -> Tensor:
        """Gradient to send back from `output`; the losses' graphs are kept.

        Args:
            losses: scalars by name, those of `weights`.
            output: what they were computed from, any shape.
        """
        total = torch.zeros_like(output)
        for index, (name, weight) in enumerate(self.weights.items()):
            (gradient,) = torch.autograd.grad(losses[name], output, retain_graph=True)
            norm, average = gradient.norm(), self.norms[index]
            average = torch.where(average > 0, torch.lerp(norm, average, self.decay), norm)
            self.norms[index] = average
            total += weight * self.norms[0] / average.clamp(min=1e-12) * gradient
        return total
