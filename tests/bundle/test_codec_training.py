"""A small Mimi and what lets it be trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from codec_fakes import STEP_SAMPLES, tones
from moshi.models import loaders
from torch import Tensor


def test_kmeans_finds_separate_clusters_and_uses_every_word(script: Any) -> None:
    torch.manual_seed(0)
    centres = 10 * torch.randn(8, 4)
    samples = (centres[:, None] + 0.1 * torch.randn(8, 50, 4)).flatten(0, 1)
    centroids, counts = script("codec_training").kmeans(samples, 16)
    assert (counts >= 1).all()
    assert torch.cdist(samples, centroids).min(dim=1).values.max() < 1
    # more words than samples, as in a very quiet recording
    centroids, counts = script("codec_training").kmeans(torch.ones(3, 4), 16)
    assert centroids.eq(1).all()


def test_fitted_codebooks_are_all_used_and_lower_the_error_level_by_level(
    script: Any, codec_config: dict[str, Any]
) -> None:
    training = script("codec_training")
    torch.manual_seed(0)
    codec = loaders.get_mimi(None, codec_config, num_codebooks=3).requires_grad_(False)
    latents = torch.randn(8, 16, 64)
    training.fit_codebooks(codec, latents, 32)
    codes = codec.quantizer.encode(latents)  # [8, 3, 64]
    for level, codebook in enumerate(training.codebooks(codec)):
        assert codebook.initialized
        assert len(codes[:, level].unique()) == 16
        assert codebook.cluster_usage.sum() == pytest.approx(32, rel=0.05)
    rest = codec.quantizer.rvq_rest
    target = rest.input_proj(latents)
    errors = [
        float((rest.vq.decode(rest.vq.encode(target, n)) - target).square().mean()) for n in (1, 2)
    ]
    assert errors[1] < errors[0] < float(target.square().mean())


def test_splitting_keeps_the_sum_and_gives_the_first_quantizer_the_largest_components(
    script: Any, codec_config: dict[str, Any]
) -> None:
    training = script("codec_training")
    torch.manual_seed(0)
    codec = loaders.get_mimi(None, codec_config, num_codebooks=3).requires_grad_(False)
    first, rest = training.quantizers(codec)
    # of 16 channels, 10 are what two quantizers of 2 and 8 dimensions can pass on
    mixed = torch.randn(16, 10) @ torch.randn(10, 8 * 64)
    latents = mixed.view(16, 8, 64).transpose(0, 1)
    readout = torch.randn(40, 16)

    def parts() -> list[Tensor]:
        return [one.output_proj(one.input_proj(latents)) for one in (first, rest)]

    def heard(part: Tensor) -> Tensor:
        return (readout @ part.transpose(0, 1).flatten(1)).T  # [N, 40]

    before = sum(parts())
    training.split_latents(codec, latents, readout)
    after = parts()
    torch.testing.assert_close(sum(after), before, atol=1e-3, rtol=1e-3)
    spread = torch.linalg.svdvals(heard(sum(after)) - heard(sum(after)).mean(dim=0))
    assert first.input_proj.weight[2:].eq(0).all()
    scores = torch.cat([first.input_proj(latents)[:, :2], rest.input_proj(latents)], dim=1)
    scores = scores.transpose(0, 1).flatten(1)
    correlation = torch.corrcoef(scores)
    torch.testing.assert_close(correlation, torch.eye(10), atol=1e-3, rtol=0)
    deviation = scores.std(dim=1)
    torch.testing.assert_close(
        deviation / deviation[0], spread[:10] / spread[0], atol=1e-3, rtol=1e-3
    )


def test_the_first_quantizer_keeps_to_its_components_while_training(
    script: Any, codec_config: dict[str, Any]
) -> None:
    training = script("codec_training")
    torch.manual_seed(0)
    codec = loaders.get_mimi(None, codec_config, num_codebooks=3)
    latents = torch.randn(4, 16, 64)
    training.split_latents(codec, latents, torch.randn(40, 16))
    training.fit_codebooks(codec, latents, 32)
    audio = tones(1)[None, None, : 12 * STEP_SAMPLES]
    copied, latent, commitment = training.reconstruct(codec.train(), audio, quantise=True)
    (copied.square().mean() + latent.square().mean() + commitment).backward()
    first, rest = training.quantizers(codec)
    assert first.input_proj.weight.grad[:2].abs().max() > 0
    assert rest.input_proj.weight.grad.abs().amax(dim=(1, 2)).min() > 0
    assert first.input_proj.weight.grad[2:].eq(0).all()
    assert first.output_proj.weight.grad[:, 2:].eq(0).all()


def test_scaling_drives_the_encoders_activations_harder_and_nothing_else(
    script: Any, codec_config: dict[str, Any]
) -> None:
    training = script("codec_training")
    torch.manual_seed(0)
    codec = loaders.get_mimi(None, codec_config, num_codebooks=3)
    audio = tones(2)[None, None, : 24 * STEP_SAMPLES]
    training.scale_convolutions(codec, audio)
    in_encoder = set(codec.encoder.modules())
    encoder: list[float] = []
    others: list[float] = []
    for module in codec.modules():
        if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
            found = encoder if module in in_encoder else others
            module.register_forward_hook(lambda _m, _i, out, to=found: to.append(float(out.std())))
    with torch.no_grad():
        copied, latent, _ = training.reconstruct(codec, audio, quantise=False)
    assert encoder == pytest.approx([6] * (len(encoder) - 1) + [1], rel=1e-3)
    # the last one makes the sound; the sum of both quantisers' projections is the latent
    assert others[:-1] == pytest.approx([1] * (len(others) - 1), rel=1e-3)
    assert 0.5 < float(latent.std()) < 2
    assert others[-1] == pytest.approx(float(audio.std()), rel=1e-3)
    assert float(copied.std()) == pytest.approx(float(audio.std()), rel=0.2)


def test_readout_teaches_the_encoder_through_the_quantisers_without_the_decoder(
    script: Any, codec_config: dict[str, Any]
) -> None:
    training = script("codec_training")
    torch.manual_seed(0)
    codec = loaders.get_mimi(None, codec_config, num_codebooks=3)
    training.fit_codebooks(codec.requires_grad_(False), torch.randn(4, 16, 64), 32)
    codec.train().requires_grad_(True)
    audio = tones(1)[None, None, : 12 * STEP_SAMPLES]
    _, latent, _ = training.reconstruct(codec, audio, quantise=True)
    script("codec_losses").Readout(16, STEP_SAMPLES)(latent, audio).backward()
    for name, parameter in codec.encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in codec.decoder.parameters())


def test_the_codecs_latents_are_at_50_hertz_and_its_transformers_see_four_seconds(
    script: Any,
) -> None:
    codec_config = script("codec_training").CODEC_CONFIG
    codec = loaders.get_mimi(None, codec_config, num_codebooks=8)
    assert codec.encoder_frame_rate == 50
    assert codec.frame_rate == 12.5
    assert codec_config["transformer"]["context"] == 4 * codec.encoder_frame_rate


def test_reconstruct_quantised_equals_the_packages_own_forward(
    script: Any, codec_config: dict[str, Any]
) -> None:
    training = script("codec_training")
    torch.manual_seed(0)
    codec = loaders.get_mimi(None, codec_config, num_codebooks=3)
    training.fit_codebooks(codec, torch.randn(4, 16, 64), 32)
    audio = tones(1)[None, None, : 12 * STEP_SAMPLES]
    with torch.no_grad():
        copied, _, _ = training.reconstruct(codec, audio, quantise=True)
        torch.testing.assert_close(copied, codec(audio).x)
