"""Which windows of a generation went bad, and why: each stream by itself.

A window is flagged where one of its measures passes its threshold. Held-out real speech passes them
so seldom that all together raise about one alarm an hour: `scripts/measure_alarms.py` measures it.
What is not measured is NaN, and never flagged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moshi_ttt.clock import Clock
from moshi_ttt.diagnosis.quality import NAN, audio_measures, codes_measures, said_again
from moshi_ttt.diagnosis.spectrum import is_silent

WINDOW_SEC = 5.0
LOOK_BACK_SEC = 20.0  # how long ago something may have been said to be said again
REFERENCE_SEC = 60.0  # of a stream's beginning, that its later surprise is compared with
LEAST_STEPS = 12  # with sound, that noise and the use of codebooks are measured in
LEAST_TOKENS = 8  # that repetition and surprise are measured in

THRESHOLDS = {
    "silence": 4.0,
    "text_loop": 0.51,
    "sound_loop": 0.059,
    "noise": 0.2,
    "clipping": 0.001,
    "code_collapse": 0.097,
    "text_surprise": 7.1,
    "sound_surprise": 2.2,
}
"""Reasons, and the measure above which a window is flagged: `silence`, seconds in which nobody has
spoken, at some step of it; `noise`, spectral flatness; `clipping`, share of samples at full scale;
`code_collapse`, share of the codes that are not new in it. And in the 20 s before its end:
`text_loop` and `sound_loop`, share of the text tokens, and of the sounding codes of the first
codebook, that end a trigram which had been said in the 20 s before; `text_surprise` and
`sound_surprise`, NLL of the text tokens, and of the codes that sound, above the first minute's, in
nats a token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speech:
    """What is known of Moshi's side of one conversation of n steps."""

    text_tokens: np.ndarray  # [n]
    codes: np.ndarray  # [Q, n]
    text_nll: np.ndarray  # [n] nats; NaN where unknown
    sound_nll: np.ndarray  # [n] nats, mean over codebooks; NaN where unknown
    sound: np.ndarray | None
    """Moshi, then the user, [2, samples] of full scale 1; None if the codes have none."""

    def measures(
        self, clock: Clock, padding_ids: Sequence[int], cardinality: int, first: int = 0
    ) -> dict[str, np.ndarray]:
        """By reason, [windows]; see `THRESHOLDS` for units.

        Args:
            clock: of the codes.
            padding_ids: text tokens that say nothing.
            cardinality: entries of a codebook.
            first: step of the first window.
        """
        places = windows(first, len(self.text_tokens), clock.steps(WINDOW_SEC))
        look_back = clock.steps(LOOK_BACK_SEC)
        measures: dict[str, np.ndarray] = {
            reason: np.full(len(places), NAN) for reason in THRESHOLDS
        }

        def lately(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
            return _lately(values, counted & np.isfinite(values), places, look_back)

        said = ~np.isin(self.text_tokens, padding_ids)
        measures["text_loop"] = lately(said_again(self.text_tokens, said, look_back), said)
        measures["text_surprise"] = lately(_surprise(self.text_nll, said, places), said)
        if self.sound is not None:
            steps = self.sound.reshape(2, -1, clock.samples_per_step).astype(np.float64)
            silent = is_silent(steps)  # [2, n]
            quiet_sec = _run_lengths(np.logical_and(*silent)) * clock.step_sec
            measures["silence"] = np.array([quiet_sec[at].max() for at in places])
            heard = ~silent[0]
            again = said_again(self.codes[0], heard, look_back)
            measures["sound_loop"] = lately(again, heard)
            measures["sound_surprise"] = lately(_surprise(self.sound_nll, heard, places), heard)
            for number, at in enumerate(places):
                sound = audio_measures(steps[0, at].ravel(), clock.sample_rate)
                measures["clipping"][number] = sound["clipping_share"]
                spoken = self.codes[:, at][:, heard[at]]
                if spoken.shape[1] >= LEAST_STEPS:
                    used = codes_measures(spoken, cardinality)["codes_used"]
                    measures["noise"][number] = sound["spectral_flatness"]
                    measures["code_collapse"][number] = 1 - used
        return measures


def windows(first: int, stop: int, steps: int) -> list[slice]:
    """Windows side by side from `first` on; the last one may be shorter, down to half."""
    starts = range(first, stop, steps)
    return [slice(at, min(at + steps, stop)) for at in starts if 2 * (stop - at) >= steps]


def _lately(
    values: np.ndarray, counted: np.ndarray, places: Sequence[slice], look_back: int
) -> np.ndarray:
    """Mean of the counted values [n] in the `look_back` steps before the end of each window."""
    means = np.full(len(places), NAN)
    for number, at in enumerate(places):
        behind = slice(max(0, at.stop - look_back), at.stop)
        some = values[behind][counted[behind]]
        if len(some) >= LEAST_TOKENS:
            means[number] = some.mean()
    return means


def _surprise(nll: np.ndarray, counted: np.ndarray, places: Sequence[slice]) -> np.ndarray:
    """NLL [n] above the mean of the counted steps of the first minute; NaN up to its end.

    If there are less than two minutes, the first half takes its place.
    """
    reference = min(len(places) // 2, round(REFERENCE_SEC / WINDOW_SEC))
    if not reference:
        return np.full(len(nll), NAN)
    first = slice(places[0].start, places[reference].start)
    usual = nll[first][counted[first] & np.isfinite(nll[first])]
    surprise = nll - (usual.mean() if len(usual) >= LEAST_TOKENS else NAN)
    surprise[: first.stop] = NAN
    return surprise


def _run_lengths(flags: np.ndarray) -> np.ndarray:
    """How many flags in a row end at each place, [n]."""
    count = np.arange(1, len(flags) + 1)
    lengths: np.ndarray = count - np.maximum.accumulate(np.where(flags, 0, count))
    return lengths


def flag(
    measures: Sequence[Mapping[str, np.ndarray]], clock: Clock, first: int, stop: int
) -> dict[str, Any]:
    """Content of `segments.json`.

    Args:
        measures: what `Speech.measures` gives of each stream.
        clock: of the streams.
        first: step of their first window.
        stop: their length.

    Returns:
        `thresholds` by reason; `window_sec`; `first_step` and `stop_step` of all windows; `shares`
        of the windows of all streams that are flagged, by reason and for `any`, NaN where nothing
        was measured; `segments`, neighbouring windows flagged for one reason: `stream` (its
        number), `reason`, `step`, `stop_step`, `seconds`, `end_sec`, `legacy_token` and the `worst`
        measure.
    """
    places = windows(first, stop, clock.steps(WINDOW_SEC))
    bad = {
        reason: np.array([one[reason] > threshold for one in measures])
        for reason, threshold in THRESHOLDS.items()
    }
    known = {reason: sum(np.isfinite(one[reason]).sum() for one in measures) for reason in bad}
    shares = {
        reason: bad[reason].sum() / count if count else NAN for reason, count in known.items()
    }
    whole = np.any([*bad.values()], axis=0)
    segments = [
        {
            "stream": number,
            "reason": reason,
            "step": places[begin].start,
            "stop_step": places[end - 1].stop,
            "seconds": clock.seconds(places[begin].start),
            "end_sec": clock.seconds(places[end - 1].stop),
            "legacy_token": clock.legacy_tokens(places[begin].start),
            "worst": float(one[reason][begin:end].max()),
        }
        for number, one in enumerate(measures)
        for reason in THRESHOLDS
        for begin, end in runs(bad[reason][number])
    ]
    return {
        "thresholds": THRESHOLDS,
        "window_sec": WINDOW_SEC,
        "first_step": first,
        "stop_step": places[-1].stop if places else first,
        "shares": {"any": float(whole.mean()) if whole.size else NAN, **shares},
        "segments": segments,
    }


def runs(flags: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where flags are set without a gap, as [begin, end)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(int)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
