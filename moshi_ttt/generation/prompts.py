"""Where in the recordings a generation starts, and the streams that start there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moshi_ttt.clock import Clock
from moshi_ttt.data import EncodedRecording
from moshi_ttt.errors import UserError
from moshi_ttt.generation.users import user_codes
from moshi_ttt.rows import TEXT_ROW, Rows

Start = tuple[EncodedRecording, int]
"""A recording, and the step of it that a generation begins with."""


def choose_prompts(
    recordings: Sequence[EncodedRecording], prompts: int, prompt_steps: int, steps: int
) -> list[Start]:
    """Starting points: round robin over the recordings, then evenly spaced within each.

    Those that last as long as the generation come first: where a recording ends, its user is
    silent, and what Moshi says to silence is not what it said before.

    Args:
        recordings: held-out ones.
        prompts: how many.
        prompt_steps: length of each.
        steps: length of the generation.

    Raises:
        UserError: no recording is as long as the prompt.
    """
    usable = [one for one in recordings if one.steps >= prompt_steps]
    usable.sort(key=lambda one: one.steps < steps)
    if not usable:
        raise UserError(
            f"no held-out recording is as long as the prompt of {prompt_steps} steps; lower "
            "prompt_sec or add a longer held-out recording"
        )
    rounds = -(-prompts // len(usable))
    starts = []
    for number in range(prompts):
        recording = usable[number % len(usable)]
        room = recording.steps - prompt_steps
        starts.append((recording, room * (number // len(usable)) // rounds))
    return starts


def cut_recordings(starts: Sequence[Start], steps: int) -> Tensor:
    """Codes from each start on, [P, K, steps]; what a recording lacks at its end is -1."""
    rows = []
    for recording, start in starts:
        piece = recording.codes[:, start : start + steps]
        missing = steps - piece.shape[-1]
        rows.append(torch.nn.functional.pad(piece, (0, missing), value=-1))
    return torch.stack(rows)


@dataclass(frozen=True, slots=True)
class Batch:
    """What the S streams of one generation are given."""

    prompt: Tensor  # [S, K, P] forced codes, P = T if text is forced to the end; -1: not forced
    user: Tensor  # [S, K_user, T] what the user says, prompt included
    names: list[str]  # of the S streams


def seeded_batch(
    starts: Sequence[Start],
    silence: Tensor,
    clock: Clock,
    *,
    steps: int,
    prompt_steps: int,
    seeds: int,
    rows: Rows,
    silent_user: bool = False,
    told_text: bool = False,
) -> Batch:
    """Every start as many times as there are seeds, side by side.

    Args:
        starts: what `choose_prompts` gave.
        silence: what `silence_codes` gave, [K_user, 1].
        clock: of the recordings.
        steps: length T.
        prompt_steps: forced steps P.
        seeds: continuations of each start.
        rows: which of the codes are the user's.
        silent_user: nothing is heard after the prompt; otherwise silence follows the recording.
        told_text: after the prompt, text is forced on, as long as the recording lasts, and sound is
            not.
    """
    codes = cut_recordings(starts, steps)
    prompt = codes[..., :prompt_steps]
    if told_text:
        prompt = codes.clone()
        prompt[:, TEXT_ROW + 1 :, prompt_steps:] = -1
    user = user_codes(codes, silence, rows, silent_from=prompt_steps if silent_user else None)
    return Batch(
        prompt.repeat_interleave(seeds, dim=0),
        user.repeat_interleave(seeds, dim=0),
        [
            f"{recording.name} from {clock.seconds(start):.0f} s, seed {seed}"
            for recording, start in starts
            for seed in range(seeds)
        ],
    )
