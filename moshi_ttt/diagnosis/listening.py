"""Is a jump audible? Measures of text and sound before and after each critical position.

Writes nothing and reads no file: an evaluation gives it a finished trace and its sound, and stores
what comes back as `quality.json` and short sound files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import sentencepiece
import torch
from moshi.models.compression import MimiModel

from moshi_ttt.clock import Clock
from moshi_ttt.data.codes import decode_recording
from moshi_ttt.diagnosis.jumps import Jump
from moshi_ttt.diagnosis.quality import (
    Measure,
    around,
    audio_measures,
    codes_measures,
    measure_around,
    nll_measures,
    text_measures,
)
from moshi_ttt.instruments.critical import by_step
from moshi_ttt.instruments.trace import Trace

Windows = tuple[tuple[int, int], tuple[int, int]]
"""Before and after a position, each [first, stop) in steps."""
PIECE_STARTS_WORD = "\u2581"  # sentencepiece's mark of a blank


def word_starts(tokenizer: sentencepiece.SentencePieceProcessor) -> np.ndarray:
    """Whether each text token starts a word, [vocabulary]."""
    pieces = (tokenizer.id_to_piece(token) for token in range(tokenizer.get_piece_size()))
    return np.array([piece.startswith(PIECE_STARTS_WORD) for piece in pieces])


def decode(codec: MimiModel, codes: np.ndarray) -> np.ndarray:
    """Sound of `codes` [N, Q, n], [N, samples] within -1..1."""
    # one by one: what a CPU decodes at once soon leaves its cache
    audio = torch.stack([decode_recording(codec, row) for row in torch.from_numpy(codes)])
    sound: np.ndarray = audio.clamp(-1, 1).numpy()
    return sound


def listening_positions(trace: Trace, jumps: Sequence[Jump]) -> dict[int, list[str]]:
    """Names by step, in order: structural positions after the prompt; `jump`, `jump 2` ..."""
    structural = trace.critical_steps().items()
    positions = {name: step for name, step in structural if step > trace.free_from}
    for number, step in enumerate(sorted({jump.step for jump in jumps}), 1):
        positions["jump" if number == 1 else f"jump {number}"] = step
    return by_step(positions)


def listen(
    trace: Trace,
    jumps: Sequence[Jump],
    nll: Mapping[str, Any],
    *,
    window_steps: int,
    starts_word: np.ndarray,
    cardinality: int,
    sound: np.ndarray | None,
) -> dict[str, Any]:
    """Content of `quality.json`.

    Args:
        trace: of the generation.
        jumps: found in it.
        nll: content of `nll.json`.
        window_steps: length of the windows before and after a position.
        starts_word: what `word_starts` says of the tokenizer.
        cardinality: entries of a codebook.
        sound: of all streams, [S, samples]; None if the codes have none.

    Returns:
        `window_steps`, `window_sec`; `audible`, whether there was sound; `whole`, means over
        streams of the text and code measures of all that came after the prompt; `positions`, each
        with `names`, `step`, `seconds`, `legacy_token`, the windows `before` and `after` ([first,
        stop) in steps) and `measures` by name, as `quality.compare` gives them.
    """
    clock, (streams, steps) = trace.clock, trace.text_tokens.shape

    def tokens_and_codes(stream: int, first: int, stop: int) -> dict[str, float]:
        text = text_measures(
            trace.text_tokens[stream, first:stop],
            trace.text_padding_ids,
            starts_word=starts_word,
            step_sec=clock.step_sec,
        )
        return text | codes_measures(trace.codes[stream, :, first:stop], cardinality)

    def measures_around(windows: Windows) -> dict[str, dict[str, float]]:
        measures = measure_around(windows, streams, tokens_and_codes)
        if sound is not None:
            measures |= measure_around(windows, streams, _audio(sound, clock))
        # the loss is one value over all recordings, so it has no streams to pair
        return measures | measure_around(windows, 1, lambda _, *window: nll_measures(nll, *window))

    positions = []
    for step, names in listening_positions(trace, jumps).items():
        windows = around(step, window_steps, first=trace.free_from, stop=steps)
        if windows is not None:
            place = _place(names, step, windows, clock)
            positions.append(place | {"measures": measures_around(windows)})
    whole = [tokens_and_codes(stream, trace.free_from, steps) for stream in range(streams)]
    return {
        "window_steps": window_steps,
        "window_sec": clock.seconds(window_steps),
        "audible": sound is not None,
        "whole": {name: float(np.mean([one[name] for one in whole])) for name in whole[0]},
        "positions": positions,
    }


def _audio(sound: np.ndarray, clock: Clock) -> Measure:
    """Audio measures of streams whose sound is [S, samples]."""

    def measure(stream: int, first: int, stop: int) -> dict[str, float]:
        cut = slice(first * clock.samples_per_step, stop * clock.samples_per_step)
        return audio_measures(sound[stream, cut], clock.sample_rate)

    return measure


def _place(names: Sequence[str], step: int, windows: Windows, clock: Clock) -> dict[str, Any]:
    """Where a position lies, and the windows around it."""
    return {
        "names": names,
        "step": step,
        "seconds": clock.seconds(step),
        "legacy_token": clock.legacy_tokens(step),
        "before": windows[0],
        "after": windows[1],
    }


def cut_outs(quality: Mapping[str, Any], wav: np.ndarray, samples_per_step: int) -> dict[str, Any]:
    """Sound around each position, by the first of its names.

    Args:
        quality: what `listen` returned.
        wav: a whole stream, [samples, channels].
        samples_per_step: of the clock.

    Returns:
        Name, e.g. `2C` or `legacy_token_6000`, to [samples, channels].
    """
    return {
        place_tag(position["names"][0]): wav[
            position["before"][0] * samples_per_step : position["after"][1] * samples_per_step
        ]
        for position in quality["positions"]
    }


def place_tag(name: str) -> str:
    """Name of a position as it stands in file names and TensorBoard tags."""
    return name.replace(" ", "_")
