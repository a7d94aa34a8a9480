"""A small Mimi: its config, and what lets moshi's own modules be trained.

Six things make it train in minutes where the plain recipe collapses: weights scaled so that every
convolution's output has a known variance on real audio, a first phase without quantisation,
codebooks fitted to thousands of latents instead of to the one batch the package would take, both
quantizers given different parts of the latents, losses weighted by the gradients they cause
(`codec_losses.GradientBalance`) instead of by their values, and a loss at the latents themselves
(`codec_losses.Readout`), which the encoder learns from before the decoder is good enough to teach
it anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from moshi.models import MimiModel, loaders
from moshi.quantization.core_vq import EuclideanCodebook
from torch import Tensor, nn

from moshi_ttt.files import write_bytes, write_json

CARD = 512
CODEC_DIM = 128
CODEC_CONFIG: dict[str, Any] = loaders._mimi_config | {
    "seanet": loaders._seanet_kwargs
    | {
        "dimension": CODEC_DIM,
        # with 16 filters and 25 Hz words were lost in the encoder, not in quantisers or decoder
        "n_filters": 24,
        # 50 Hz ahead of the resampling, whose stride is 4 then: the transformers get twice Mimi's
        # positions for the order of sounds within a step
        "ratios": [8, 5, 4, 3],
    },
    "quantizer": {
        # 64 principal components of a step's log-mel spectra come within 0.20 nats of them
        "dimension": 64,
        "n_q": 8,
        "bins": CARD,
        "input_dimension": CODEC_DIM,
        "output_dimension": CODEC_DIM,
    },
    "transformer": loaders._transformer_kwargs
    | {
        "d_model": CODEC_DIM,
        "num_heads": 4,
        "num_layers": 3,
        # scales that start at 0.01 would keep the layers out of a training of minutes
        "layer_scale": None,
        # 4 s at 50 Hz: training pieces of 10 s then show every position a full window
        "context": 200,
        "dim_feedforward": 4 * CODEC_DIM,
        "input_dimension": CODEC_DIM,
        "output_dimensions": [CODEC_DIM],
    },
}
ENCODER_GAIN = 6.0
"""Standard deviation ahead of the encoder's activations: ELU bends within one unit of zero, so
that at unit variance the quiet sounds, 30 dB below the loud, would pass it as if it were linear."""
FIRST_COMPONENTS = 2
"""Principal components that the first quantizer has to itself. Its one codebook cannot hold more:
with 16, as a training that was left alone chose, it lost half of their variance and made 63 % of
all quantisation noise; with 3 the noise is higher too."""
_KMEANS_ITERATIONS = 30


def latents_of(codec: MimiModel, audio: Tensor) -> Tensor:
    """What the quantizer gets, [B, channels, steps] fp32, of audio [B, 1, samples], whole steps."""
    assert codec.encoder_transformer is not None
    (latent,) = codec.encoder_transformer(codec.encoder(audio))
    return codec._to_framerate(latent).float()


def reconstruct(
    codec: MimiModel, audio: Tensor, *, quantise: bool, bypass_rate: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode and decode, as `MimiModel.forward` does it, with the quantizer kept in fp32.

    The package cannot do the first phase (its forward would fit codebooks to the first batch) nor
    autocast (codebooks are fp32 sums, and adding bf16 latents to them is an error), and it copies
    a number to the device, which cannot be recorded into a CUDA graph.

    Args:
        codec: in training mode codebooks follow the latents, in eval mode nothing changes.
        audio: [B, 1, samples], whole steps.
        quantise: replace latents by codewords; if not, only the quantizers' projections act.
        bypass_rate: share of the pieces whose latents are not replaced all the same.

    Returns:
        The audio again, [B, 1, samples] fp32; the latents it was made from, [B, channels, steps];
        and the commitment loss, mean over the codebooks (zero if not `quantise`).
    """
    assert codec.decoder_transformer is not None
    latent = latents_of(codec, audio)
    with torch.autocast(audio.device.type, enabled=False):
        outputs, penalties = [], []
        for quantizer in quantizers(codec):
            projected = quantizer.input_proj(latent)
            if quantise:
                result = quantizer.vq(projected, n_q=quantizer.n_q)
                penalties.append(result.loss)
                passed = torch.rand(len(audio), 1, 1, device=audio.device) < bypass_rate
                projected = torch.where(passed, projected, result.quantized)
            outputs.append(quantizer.output_proj(projected))
        latent = torch.stack(outputs).sum(dim=0)
        penalty = torch.cat(penalties).mean() if quantise else latent.new_zeros(())
    (decoded,) = codec.decoder_transformer(codec._to_encoder_framerate(latent))
    return codec.decoder(decoded).float(), latent, penalty


def scale_convolutions(codec: MimiModel, audio: Tensor) -> None:
    """Rescale every convolution, in the order of one forward pass, to a known output variance.

    The standard deviation becomes `ENCODER_GAIN` ahead of the encoder's activations, that of
    `audio` at the decoder's output, and 1 everywhere else, the latents included.

    Args:
        codec: a freshly built codec; changed in place.
        audio: speech, [B, 1, samples].
    """
    *ahead_of_activations, _ = (m for m in codec.encoder.modules() if isinstance(m, nn.Conv1d))

    def rescale(conv: Any, _: object, output: Tensor) -> Tensor:
        std = ENCODER_GAIN if conv in ahead_of_activations else 1.0
        gain = std / output.std().clamp(min=1e-6)
        conv.weight.data *= gain
        return output * gain

    convolutions = [m for m in codec.modules() if isinstance(m, nn.Conv1d | nn.ConvTranspose1d)]
    for conv in convolutions:
        if conv.bias is not None:
            conv.bias.data.zero_()
    hooks = [conv.register_forward_hook(rescale) for conv in convolutions]
    with torch.no_grad():
        reconstruct(codec, audio, quantise=False)
    for hook in hooks:
        hook.remove()
    last = [m for m in codec.decoder.modules() if isinstance(m, nn.Conv1d)][-1]
    last.weight.data *= audio.std()


@torch.no_grad()
def split_latents(codec: MimiModel, latents: Tensor, readout: Tensor) -> None:
    """Give each quantizer principal components of its own, and all of them together the same sum.

    Mimi's two quantizers do not follow one another: both see the same latents, and what they make
    of them is added up. The components are those of what a linear readout makes of that sum, so
    that an error in any direction costs what it costs to the ear. The first quantizer gets the
    `FIRST_COMPONENTS` largest; its other dimensions become zero, and no gradient moves them again.

    Args:
        codec: changed in place, its codebooks excepted: they have to be fitted after this.
        latents: what its encoder says about many pieces, [B, channels, steps].
        readout: weight of a linear map from the sum to a spectrum, [values, channels].
    """
    first, rest = quantizers(codec)
    z = latents.transpose(1, 2).flatten(0, 1).double()  # [N, channels]
    ahead = torch.stack(
        [_matrix(one.output_proj) @ _matrix(one.input_proj) for one in (first, rest)]
    ).sum(dim=0)
    summed = z @ ahead.T
    heard = readout.double() @ (summed - summed.mean(dim=0)).T  # [values, N]
    _, directions = torch.linalg.eigh(heard @ heard.T)
    directions = directions.flip(1)[:, : FIRST_COMPONENTS + rest.dimension]  # largest first
    analysis = directions.T @ readout.double() @ ahead  # [components, channels]
    scores = z @ analysis.T
    # at the latents' own scale, or the commitment loss would mean something else
    scale = z.square().mean().sqrt() / scores[:, FIRST_COMPONENTS:].square().mean().sqrt()
    analysis, scores = scale * analysis, scale * scores
    # least squares; a component that the latents do not have stays zero
    inverse = torch.linalg.pinv(scores.T @ scores, hermitian=True)
    synthesis = summed.T @ scores @ inverse  # [channels, components]
    for one, own in ((first, slice(FIRST_COMPONENTS)), (rest, slice(FIRST_COMPONENTS, None))):
        used = analysis[own].shape[0]
        for projection, matrix in (
            (one.input_proj.weight[:used, :, 0], analysis[own]),
            (one.output_proj.weight[:, :used, 0], synthesis[:, own]),
        ):
            projection.copy_(matrix)
        one.input_proj.weight[used:] = 0
        one.output_proj.weight[:, used:] = 0


def _matrix(projection: nn.Conv1d) -> Tensor:
    return projection.weight[:, :, 0].double()


@torch.no_grad()
def fit_codebooks(codec: MimiModel, latents: Tensor, latents_per_update: int) -> None:
    """K-means of every level on the residuals that the levels before it leave.

    Args:
        codec: changed in place.
        latents: what its encoder says about many pieces, [B, channels, steps].
        latents_per_update: how many one training update brings; the package's moving averages
            start as heavy as that, or codewords could not follow the encoder for long.
    """
    share = latents_per_update / (latents.shape[0] * latents.shape[2])
    for quantizer in quantizers(codec):
        residual = quantizer.input_proj(latents).transpose(1, 2).flatten(0, 1)  # [N, dimension]
        for layer in quantizer.vq.layers:
            codebook = layer._codebook
            centroids, counts = kmeans(residual, codebook.codebook_size)
            codebook.cluster_usage.copy_(counts * share)
            codebook.embedding_sum.copy_(centroids * counts[:, None] * share)
            codebook._initialized.fill_(1)
            codebook.register_buffer("_embedding", None, persistent=False)
            residual = residual - codebook.decode(codebook.encode(residual))


def kmeans(samples: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Centroids [clusters, D] and how many samples [N, D] each one serves, at least 1."""
    order = torch.randperm(len(samples), device=samples.device)
    # with fewer samples than clusters some start, and stay, equal
    centroids = samples[order[torch.arange(clusters, device=samples.device) % len(samples)]].clone()
    counts = torch.ones(clusters, device=samples.device)
    for _ in range(_KMEANS_ITERATIONS):
        nearest = torch.cdist(samples, centroids).argmin(dim=1)
        counts = torch.bincount(nearest, minlength=clusters).to(samples)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, samples)
        # an empty cluster starts again at a sample; quiet recordings have many equal ones
        picked = samples[torch.randint(len(samples), (clusters,), device=samples.device)]
        means = sums / counts.clamp(min=1)[:, None]
        centroids = torch.where(counts[:, None] > 0, means, picked)
    return centroids, counts.clamp(min=1)


def quantizers(codec: MimiModel) -> list[Any]:
    """The semantic and the acoustic residual quantizer."""
    return [codec.quantizer.rvq_first, codec.quantizer.rvq_rest]


def codebooks(codec: MimiModel) -> list[EuclideanCodebook]:
    """All codebooks, the semantic one first."""
    return [m for m in codec.quantizer.modules() if isinstance(m, EuclideanCodebook)]


def copy_codebooks(source: MimiModel, target: MimiModel) -> None:
    """Give a codec the codebooks of another one of the same structure."""
    for kept, current in zip(codebooks(target), codebooks(source), strict=True):
        for name in ("embedding_sum", "cluster_usage", "_initialized"):
            getattr(kept, name).copy_(getattr(current, name).detach())
        kept.register_buffer("_embedding", None, persistent=False)


def freeze_encoder(codec: MimiModel) -> None:
    """Stop whatever decides which codes a sound gets from learning."""
    for part in (
        codec.encoder,
        codec.encoder_transformer,
        codec.downsample,
        *(quantizer.input_proj for quantizer in quantizers(codec)),
    ):
        part.requires_grad_(False)


def usage_bits(codebook: EuclideanCodebook) -> Tensor:
    """Entropy of the running use of a codebook's words, bits."""
    share = codebook.cluster_usage / codebook.cluster_usage.sum()
    return -(share * share.clamp(min=1e-12).log2()).sum()


def write_codec(codec: MimiModel, config: dict[str, Any], folder: Path) -> None:
    """Write weights (fp16) and codebooks (fp32) as moshi's loaders read them."""
    parameters = dict(codec.named_parameters())
    state = {
        name: (value.half() if name in parameters else value.float()).cpu().contiguous()
        for name, value in codec.state_dict().items()
    }
    write_bytes(folder / "mimi.safetensors", safetensors.torch.save(state))
    write_json(folder / "mimi_config.json", config)
