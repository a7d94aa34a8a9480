"""The speech that a codec is trained on: all recordings as one track, cut where it is loud."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from codec_training import CODEC_CONFIG
from torch import Tensor

from moshi_ttt.data import read_manifest
from moshi_ttt.data.audio import read_audio
from moshi_ttt.data.manifest import raise_together
from moshi_ttt.errors import UserError

_SILENCE_FLOOR = 0.1  # chance of a silent piece, relative to one of mean loudness


def span_steps(steps: int, detune: float) -> int:
    """Steps of the track that a piece of `steps` may reach over, played as fast as it may be."""
    return math.ceil(steps * math.exp(detune)) + 1


class Speech:
    """All recordings as one mono track, cut into pieces on the device that it lies on.

    Args:
        samples: int16, [samples].
        step_samples: samples of a step.
    """

    def __init__(self, samples: Tensor, step_samples: int) -> None:
        self.step_samples = step_samples
        self.samples = samples[: len(samples) // step_samples * step_samples]
        steps = self.samples.view(-1, step_samples)
        # in parts: all of it in fp32 would be twice its size
        power = torch.cat([(part / 2**15).square().mean(dim=1) for part in steps.split(10_000)])
        sums = power.double().cumsum(0)
        self._power_before = torch.cat([sums.new_zeros(1), sums])  # of step i, and of the end

    def to(self, device: torch.device) -> Speech:
        """Move in place."""
        self.samples = self.samples.to(device)
        self._power_before = self._power_before.to(device)
        return self

    def pieces(self, rows: int, steps: int, detune: float = 0.0) -> Tensor:
        """Random pieces, [rows, 1, steps * step_samples] fp32, in proportion to loudness.

        Args:
            rows: how many.
            steps: length of each.
            detune: half of them are played faster or slower by up to this natural logarithm.
        """
        span = span_steps(steps, detune)
        loudness = self._power_before[span:] - self._power_before[:-span]
        loudness = (loudness.clamp(min=0) / span).sqrt().float()[:-1]
        weights = loudness + _SILENCE_FLOOR * loudness.mean() + 1e-9
        start = torch.multinomial(weights, rows, replacement=True) * self.step_samples
        # real recordings do not begin where a step of this track does
        start = start + torch.randint_like(start, self.step_samples)
        offsets = torch.arange(steps * self.step_samples, device=start.device)
        if not detune:
            return (self.samples[start[:, None] + offsets] / 2**15)[:, None]
        chosen = torch.rand(rows, 1, device=start.device) < 0.5
        logarithm = detune * (2 * torch.rand(rows, 1, device=start.device) - 1) * chosen
        return self._interpolated(start[:, None], offsets * logarithm.double().exp())[:, None]

    def _interpolated(self, start: Tensor, offsets: Tensor) -> Tensor:
        """Catmull-Rom between the samples, exact at whole offsets; [rows, samples] fp32."""
        whole = offsets.long()
        t = (offsets - whole).float()
        # the first sample of a piece has no neighbour to its left if the track begins there
        first, second, third, fourth = (
            self.samples[(start + whole + shift).clamp(min=0)] / 2**15 for shift in (-1, 0, 1, 2)
        )
        slopes = 0.5 * (third - first), 0.5 * (fourth - second)
        step = third - second
        return (
            second
            + t * slopes[0]
            + t**2 * (3 * step - 2 * slopes[0] - slopes[1])
            + t**3 * (slopes[0] + slopes[1] - 2 * step)
        )

    @classmethod
    def read(cls, manifests: list[Path]) -> Speech:
        """Both channels of every recording, one after the other.

        Raises:
            UserError: a manifest or a recording cannot be read.
        """
        rate, frame_rate = CODEC_CONFIG["sample_rate"], CODEC_CONFIG["frame_rate"]
        paths = []
        for manifest in manifests:
            entries, problems = read_manifest(manifest)
            raise_together(str(manifest), problems)
            paths += [entry.path for entry in entries]

        def read(path: Path) -> Tensor:
            return (read_audio(path, rate) * 2**15).round().clamp(-(2**15), 2**15 - 1).short()

        with ThreadPoolExecutor() as pool:
            samples = torch.cat([channels.flatten() for channels in pool.map(read, paths)])
        return cls(samples, round(rate / frame_rate))

    def split(self, share: float, at_least_steps: int) -> tuple[Speech, Speech]:
        """Two tracks: most of this one, and its end.

        Raises:
            UserError: too short for both.
        """
        steps = len(self.samples) // self.step_samples
        held = max(round(share * steps), at_least_steps)
        if steps - held < at_least_steps:
            needed = 2 * at_least_steps * self.step_samples / CODEC_CONFIG["sample_rate"]
            raise UserError(
                f"the manifests hold {steps * self.step_samples / CODEC_CONFIG['sample_rate']:.1f} "
                f"s of audio (both channels together); training needs {needed:.1f} s or more: add "
                "recordings"
            )
        cut = (steps - held) * self.step_samples
        return (
            Speech(self.samples[:cut], self.step_samples),
            Speech(self.samples[cut:], self.step_samples),
        )
