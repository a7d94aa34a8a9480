"""What the user does while Moshi talks."""

from __future__ import annotations

import torch
from moshi.models.compression import MimiModel
from torch import Tensor

from moshi_ttt.clock import Clock
from moshi_ttt.rows import Rows


def silence_codes(codec: MimiModel, clock: Clock, codebooks: int) -> Tensor:
    """[codebooks, 1] codes that the codec settles on when nothing is said."""
    silence = torch.zeros(1, 1, clock.steps(4.0) * clock.samples_per_step)
    with torch.no_grad():
        codes = codec.encode(silence.to(next(codec.parameters()).device))
    return codes[0, :codebooks, -1:]


def user_codes(
    codes: Tensor, silence: Tensor, rows: Rows, *, silent_from: int | None = None
) -> Tensor:
    """What the user says at every step, [P, K_user, T].

    Args:
        codes: recordings [P, K, T]; what is not known (-1) is heard as silence.
        silence: what `silence_codes` gave, [K_user, 1].
        rows: which of the codes are the user's.
        silent_from: step from which on the user is silent; None goes on as recorded.
    """
    heard = codes[:, rows.user]
    user = torch.where(heard >= 0, heard, silence)
    if silent_from is not None:
        user[..., silent_from:] = silence
    return user
