"""What a codec's training lowers: spectral distances, a discriminator's verdict, their balance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

FFT_SIZES = (256, 512, 1024, 2048)
"""Windows of the spectral losses, samples: 11 to 85 ms at 24 kHz."""
_MELS = (24, 48, 80, 120)  # narrower filters would fall between the bins of their window
_JUDGED_GAIN = 10.0  # speech is at -26 dB; the discriminator hears it at about unit level


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


class Discriminator(nn.Module):
    """Tells originals from copies by complex spectrograms at several resolutions.

    The MS-STFT discriminator of EnCodec (Defossez et al. 2022, section 3.4), with fewer scales.

    Args:
        filters: channels of the hidden layers.
        fft_sizes: one network for each, samples.
    """

    def __init__(self, filters: int = 32, fft_sizes: tuple[int, ...] = (2048, 1024, 512)) -> None:
        super().__init__()
        self.fft_sizes = fft_sizes
        self.networks = nn.ModuleList(_spectrogram_network(filters) for _ in fft_sizes)

    def forward(self, audio: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Judge `audio` [B, 1, samples] fp32.

        Returns:
            Of every scale the verdicts [B, 1, frames, bins'], positive for original; and the
            feature maps of all hidden layers of all scales.
        """
        verdicts, features = [], []
        for fft_size, network in zip(self.fft_sizes, self.networks, strict=True):
            window = _window(fft_size, audio.device)
            spectrum = torch.stft(
                _JUDGED_GAIN * audio[:, 0],
                fft_size,
                fft_size // 4,
                window=window,
                normalized=True,
                return_complex=True,
            )
            # [B, real and imaginary, frames, bins]
            value = torch.view_as_real(spectrum).permute(0, 3, 2, 1)
            value = value.contiguous(memory_format=torch.channels_last)
            assert isinstance(network, nn.ModuleList)
            for conv in network[:-1]:
                value = functional.leaky_relu(conv(value), 0.2)
                features.append(value)
            verdicts.append(network[-1](value))
        return verdicts, features


def _spectrogram_network(filters: int) -> nn.ModuleList:
    def conv(inputs: int, outputs: int, bins: int, stride: int = 1, dilation: int = 1) -> nn.Module:
        layer = nn.Conv2d(
            inputs,
            outputs,
            (3, bins),  # frames, bins
            stride=(1, stride),
            dilation=(dilation, 1),
            padding=(dilation, bins // 2),
        )
        # torch's own initialisation loses the signal in six layers, and with it half a minute
        nn.init.kaiming_normal_(layer.weight, a=0.2)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
        return weight_norm(layer)

    layers = [conv(2, filters, 9)]
    layers += [conv(filters, filters, 9, stride=2, dilation=dilation) for dilation in (1, 2, 4)]
    layers += [conv(filters, filters, 3), conv(filters, 1, 3)]
    return nn.ModuleList(layers)


def discriminator_loss(real: Sequence[Tensor], copied: Sequence[Tensor]) -> Tensor:
    """Hinge loss of verdicts about originals and about copies; 2 for an undecided judge."""
    losses = [
        functional.relu(1 - r.float()).mean() + functional.relu(1 + c.float()).mean()
        for r, c in zip(real, copied, strict=True)
    ]
    return torch.stack(losses).mean()


def generator_loss(copied: Sequence[Tensor]) -> Tensor:
    """What fooling the judge would lower: minus the mean verdict about copies."""
    return -torch.stack([c.float().mean() for c in copied]).mean()


def feature_distance(real: Sequence[Tensor], copied: Sequence[Tensor]) -> Tensor:
    """L1 distance of feature maps over their mean magnitude, mean over all layers."""
    distances = [
        (r.detach().float() - c.float()).abs().mean() / (r.detach().float().abs().mean() + 1e-5)
        for r, c in zip(real, copied, strict=True)
    ]
    return torch.stack(distances).mean()


class GradientBalance(nn.Module):
    """Weights of losses as shares of the gradient they cause, in units of the first loss.

    After EnCodec's balancer (Defossez et al. 2022, section 3.4): it makes weights independent of
    the scales of the losses. Here the first loss keeps its own scale, so that the commitment loss,
    which is not balanced, means the same with and without others.

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

    def forward(
        self, losses: dict[str, Tensor], output: Tensor, scales: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Gradient to send back from `output`; the losses' graphs are kept.

        Args:
            losses: scalars by name, any of `weights`, the first of them always.
            output: what they were computed from, any shape.
            scales: on the weights of some, for easing them in.
        """
        names = list(self.weights)
        total = torch.zeros_like(output)
        for name, loss in losses.items():
            (gradient,) = torch.autograd.grad(loss, output, retain_graph=True)
            index = names.index(name)
            norm, average = gradient.norm(), self.norms[index]
            average = torch.where(average > 0, torch.lerp(norm, average, self.decay), norm)
            self.norms[index] = average
            weight = self.weights[name] * (scales or {}).get(name, 1.0)
            total += weight * self.norms[0] / average.clamp(min=1e-12) * gradient
        return total
