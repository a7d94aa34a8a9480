"""Where in the recordings a generation starts."""

from __future__ import annotations

from collections.abc import Sequence

from moshi_ttt.data import EncodedRecording
from moshi_ttt.errors import UserError


def choose_prompts(
    recordings: Sequence[EncodedRecording], prompts: int, prompt_steps: int
) -> list[tuple[EncodedRecording, int]]:
    """Starting points: round robin over the recordings, then evenly spaced within each.

    Raises:
        UserError: no recording is as long as the prompt.
    """
    usable = [one for one in recordings if one.steps >= prompt_steps]
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
