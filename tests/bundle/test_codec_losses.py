from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from codec_fakes import SAMPLE_RATE, STEP_SAMPLES, tones
from torch import Tensor


@pytest.fixture
def losses() -> Any:
    """scripts/bundle/codec_losses.py."""
    return importlib.import_module("codec_losses")


def slow_mel(frame: np.ndarray, filters: int) -> np.ndarray:
    """Mel magnitudes of one frame, filter by filter, [filters]."""
    size = len(frame)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    magnitude = np.abs(np.fft.rfft(frame * window)) / math.sqrt(size)
    top = 2595 * math.log10(1 + 12_000 / 700)
    edges = [700 * (10 ** (top * i / (filters + 1) / 2595) - 1) for i in range(filters + 2)]
    row = []
    for low, middle, high in zip(edges, edges[1:], edges[2:], strict=False):
        weights = [
            max(0.0, min((f - low) / (middle - low), (high - f) / (high - middle)))
            for f in np.linspace(0, 12_000, size // 2 + 1)
        ]
        row.append(np.dot(weights, magnitude) / max(sum(weights), 1e-3))
    return np.array(row)


def slow_mel_distance(a: np.ndarray, b: np.ndarray, fft_size: int, filters: int) -> float:
    """One resolution of the distance, frame by frame."""

    def log_mel(x: np.ndarray) -> np.ndarray:
        padded = np.pad(x, fft_size // 2, mode="reflect")
        starts = range(0, len(padded) - fft_size + 1, fft_size // 4)
        rows = [slow_mel(padded[start : start + fft_size], filters) for start in starts]
        return np.log(np.array(rows) + 1e-3)

    return float(np.abs(log_mel(a) - log_mel(b)).mean())


def noise(seed: int, seconds: float = 1) -> Tensor:
    """[1, 1, samples], 20 dB louder in its second half."""
    generator = torch.Generator().manual_seed(seed)
    samples = round(seconds * SAMPLE_RATE)
    level = torch.where(torch.arange(samples) < samples // 2, 0.1, 1.0)
    return (torch.randn(samples, generator=generator) * level)[None, None]


def test_mel_distance_equals_a_slow_reference(losses: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "FFT_SIZES", (256,))
    monkeypatch.setattr(losses, "_MELS", (24,))
    a, b = tones(0.1, 0), tones(0.1, 1) * 0.5
    measured = float(losses.mel_distance(a[None, None], b[None, None]))
    expected = slow_mel_distance(a.double().numpy(), b.double().numpy(), 256, 24)
    assert measured == pytest.approx(expected, rel=1e-3)


def test_spectral_distances_of_equal_sounds_are_zero_and_finite_in_silence(losses: Any) -> None:
    sound = tones(0.5)[None, None]
    assert [float(d) for d in losses.spectral_distances(sound, sound)] == [0, 0]
    silence = torch.zeros(1, 1, 9600, requires_grad=True)
    sum(losses.spectral_distances(silence, sound[..., :9600])).backward()
    assert silence.grad is not None
    assert silence.grad.isfinite().all()


def test_envelope_distance_is_zero_for_equal_sounds_and_counts_level_in_nats(losses: Any) -> None:
    sound = noise(0)
    assert float(losses.envelope_distance(sound, sound)) == 0
    halved = float(losses.envelope_distance(sound / 2, sound))
    assert halved == pytest.approx(math.log(2), rel=0.02)


def test_envelope_distance_ignores_the_fine_structure_that_mel_distance_counts(losses: Any) -> None:
    one, other = noise(0), noise(1)
    reversed_envelope = noise(1).flip(-1)
    assert losses.envelope_distance(one, other) < 0.6 * losses.mel_distance(one, other)
    # but not the envelope: 20 dB of magnitude are 2.3 nats
    assert losses.envelope_distance(one, reversed_envelope) > 1.8


def test_log_mel_patches_equal_a_slow_reference(losses: Any) -> None:
    steps = 2
    sound = tones(1)[4000 : 4000 + steps * STEP_SAMPLES]
    patches = losses.log_mel_patches(sound[None, None], STEP_SAMPLES)
    assert patches.shape == (1, steps, STEP_SAMPLES // 120 * 40)
    past = np.concatenate([np.zeros(512), sound.double().numpy()])
    frames = []
    for heard in range(120, len(sound) + 1, 120):  # samples heard by the end of the frame
        frames.append(np.log(slow_mel(past[heard : heard + 512], 40) + 3e-4))
    expected = torch.from_numpy(np.stack(frames)).reshape(1, steps, -1)
    torch.testing.assert_close(patches.double(), expected, atol=1e-3, rtol=1e-3)


def test_log_mel_patches_of_a_step_end_with_it_and_do_not_look_ahead(losses: Any) -> None:
    sound = tones(1)[: 6 * STEP_SAMPLES][None, None]
    whole = losses.log_mel_patches(sound, STEP_SAMPLES)
    changed = sound.clone()
    changed[..., 3 * STEP_SAMPLES :] = torch.randn(3 * STEP_SAMPLES)
    after = losses.log_mel_patches(changed, STEP_SAMPLES)
    torch.testing.assert_close(after[:, :3], whole[:, :3], atol=0, rtol=0)
    # the first frame of the step already hears what changed
    assert (after[:, 3, :40] - whole[:, 3, :40]).abs().mean() > 1


def test_readout_error_is_zero_only_for_latents_that_hold_the_patches_of_their_step(
    losses: Any,
) -> None:
    sound = tones(1)[: 4 * STEP_SAMPLES][None, None]
    patches = losses.log_mel_patches(sound, STEP_SAMPLES)  # [1, 4, 640]
    readout = losses.Readout(640, STEP_SAMPLES)
    torch.nn.init.eye_(readout.linear.weight)
    torch.nn.init.zeros_(readout.linear.bias)
    latent = patches.transpose(1, 2)
    with torch.no_grad():
        assert float(readout(latent, sound)) == pytest.approx(0, abs=1e-5)
        assert float(readout(latent + 0.5, sound)) == pytest.approx(0.5, rel=1e-4)
        assert float(readout(latent.roll(1, dims=2), sound)) > 0.1


def test_balanced_gradients_do_not_depend_on_the_scale_of_a_loss(losses: Any) -> None:
    output = torch.randn(100, requires_grad=True)

    def combined(factor: float) -> Tensor:
        balance = losses.GradientBalance({"a": 1.0, "b": 2.0})
        values = {"a": output.square().mean(), "b": factor * output.abs().mean()}
        return balance(values, output)

    torch.testing.assert_close(combined(1), combined(1000))
    (own,) = torch.autograd.grad(output.square().mean(), output)
    (other,) = torch.autograd.grad(output.abs().mean(), output)
    expected = own + 2 * own.norm() / other.norm() * other
    torch.testing.assert_close(combined(1), expected)
