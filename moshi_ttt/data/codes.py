"""Encoding and decoding whole recordings, however long, to what one pass over them would give."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from moshi.models.compression import MimiModel
from moshi.modules.transformer import StreamingMultiheadAttention
from torch import Tensor, nn

MAX_PIECE_STEPS = 3000  # 240 s; attention needs time and memory in the square of it
CONVOLUTION_STEPS = 13  # 1.04 s; Mimi's convolutions look back 0.3 s


@torch.no_grad()
def encode_recording(
    codec: MimiModel, audio: Tensor, max_piece_steps: int = MAX_PIECE_STEPS
) -> Tensor:
    """Codes of every channel, one below the other.

    A long recording is cut into pieces, and each piece is encoded behind as much of the past as
    the codec can see, so that cutting changes nothing but rounding. Streaming would not do: with
    two positions a step, Mimi's ring (250) overwrites a key that is still to be read, and its
    codes drift from those of one pass after the first 10 s.

    Args:
        codec: Mimi, not streaming; K codebooks set.
        audio: [channels, samples] at the codec's rate; the last step is padded with silence.
        max_piece_steps: longest stretch encoded at once, the past included.

    Returns:
        [channels * K, T] int64 on the CPU.
    """
    device = next(codec.parameters()).device
    # one channel at a time: half the memory, and no batch effects
    return torch.cat([_encode_channel(codec, row.to(device), max_piece_steps) for row in audio])


def _encode_channel(codec: MimiModel, samples: Tensor, max_piece_steps: int) -> Tensor:
    """[samples] -> [K, T] int64 on the CPU."""
    step_samples = codec.frame_size
    steps = -(-len(samples) // step_samples)
    past_steps = visible_past_steps(codec, codec.encoder_transformer)
    pieces = []
    for begin, first, end in _cuts(steps, past_steps, max_piece_steps):
        stretch = samples[begin * step_samples : end * step_samples]
        codes = codec.encode(stretch[None, None])[0]  # [K, end - begin]
        pieces.append(codes[:, first - begin :].cpu())
    return torch.cat(pieces, dim=1)


@torch.no_grad()
def decode_recording(
    codec: MimiModel, codes: Tensor, max_piece_steps: int = MAX_PIECE_STEPS
) -> Tensor:
    """Sound of one side's codes, cut into pieces as `encode_recording` cuts.

    Args:
        codec: Mimi, not streaming; K codebooks set.
        codes: [K, T].
        max_piece_steps: longest stretch decoded at once, the past included.

    Returns:
        [T * samples of a step] fp32 on the CPU.
    """
    device = next(codec.parameters()).device
    past_steps = visible_past_steps(codec, codec.decoder_transformer)
    pieces = []
    for begin, first, end in _cuts(codes.shape[1], past_steps, max_piece_steps):
        sound = codec.decode(codes[None, :, begin:end].to(device))[0, 0]
        pieces.append(sound[(first - begin) * codec.frame_size :].float().cpu())
    return torch.cat(pieces)


def _cuts(steps: int, past_steps: int, max_piece_steps: int) -> Iterator[tuple[int, int, int]]:
    """Pieces of `steps`: where each begins to be read, where what is kept of it begins, its end.

    A codec that sees less is cut finer: a fifth of each piece is past that is read again.
    """
    piece_steps = max(2 * past_steps, min(max_piece_steps, 5 * past_steps))
    end = 0
    while end < steps:
        first, begin = end, max(0, end - past_steps)
        end = min(steps, begin + piece_steps)
        yield begin, first, end


def visible_past_steps(codec: MimiModel, transformer: nn.Module | None) -> int:
    """Steps before a step that can decide what becomes of it: 80.7 s for Mimi's eight layers.

    Args:
        codec: Mimi.
        transformer: its `encoder_transformer` for codes, its `decoder_transformer` for sound.
    """
    assert transformer is not None, "Mimi has a transformer on each side"
    positions = 0
    for module in transformer.modules():
        if isinstance(module, StreamingMultiheadAttention):
            assert module.context is not None, "a codec without a window sees all of its past"
            positions += module.context - 1
    positions_per_step = round(codec.encoder_frame_rate / codec.frame_rate)
    return -(-positions // positions_per_step) + CONVOLUTION_STEPS
