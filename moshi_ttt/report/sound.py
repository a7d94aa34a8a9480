"""What a stream sounds like, as a figure: spectrogram, words and user along the same time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.signal import spectrogram

from moshi_ttt.evaluation.transcript import Spoken
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.report.style import mark, styled

FLOOR_DB = -80.0
ROW_SEC = 20.0  # more words than are said in it cannot be read beside each other
MAX_ROWS = 6
WORD_SEC = 0.25  # what a line of text takes
USER_COLOR = "#f0a860"
ENVELOPE_POINTS = 400


@styled
def audio_figure(path: Path, trace: Trace, words: Spoken) -> Figure:
    """Rows of `ROW_SEC`, at most `MAX_ROWS`: Moshi's spectrogram, its words, when the user talks.

    Args:
        path: of the sound; left Moshi, right the user.
        trace: of the same stream, for its positions.
        words: of the same stream.
    """
    with soundfile.SoundFile(path) as file:
        rate, total_sec = file.samplerate, file.frames / file.samplerate
        frames = round(MAX_ROWS * ROW_SEC * rate)
        samples = file.read(frames, dtype="float32", always_2d=True)  # [samples, channels]
    seconds = len(samples) / rate
    rows = max(1, int(np.ceil(seconds / ROW_SEC - 1e-3)))
    figure = Figure(figsize=(10, 0.8 + 1.9 * rows))
    panels = figure.subplots(2 * rows, 1, height_ratios=[1.4, 1.2] * rows)
    marks = {name: trace.clock.seconds(step) for name, step in trace.critical_steps().items()}
    for row, picture in enumerate(panels[::2]):
        below, first = panels[2 * row + 1], row * ROW_SEC
        piece = samples[round(first * rate) : round((first + ROW_SEC) * rate)]
        _spectrum(picture, piece[:, 0], rate, first)
        here = {name: at for name, at in marks.items() if first < at < first + ROW_SEC}
        mark(picture, here, first + ROW_SEC, color="white", paper="black")
        _words(below, words, first)
        _user(below, piece[:, -1], rate, first)
        for axes in (picture, below):
            axes.set_xlim(first, first + ROW_SEC)
    part = "" if seconds >= total_sec else f", the first {seconds:g} of {total_sec:g} s"
    panels[0].set_title(f"What is heard, {path.stem}{part}")
    panels[-1].set_xlabel("time (s)")
    return figure


def _spectrum(axes: Axes, samples: np.ndarray, rate: int, first_sec: float) -> None:
    """Of Moshi's voice, [samples]; the loudest is the piece's own."""
    axes.grid(False)
    axes.set_ylabel("Moshi (kHz)")
    axes.tick_params(labelbottom=False)
    if len(samples) < 1024:
        return
    hertz, times, size = spectrogram(samples, rate, nperseg=1024, mode="magnitude")
    decibels = 20 * np.log10(np.maximum(size, 1e-12))
    axes.imshow(
        np.maximum(decibels - decibels.max(), FLOOR_DB),
        aspect="auto",
        origin="lower",
        extent=(first_sec, first_sec + float(times[-1] + times[0]), 0, float(hertz[-1]) / 1000),
        cmap="magma",
    )


def _words(axes: Axes, words: Spoken, first_sec: float) -> None:
    """Where they begin, or a little later, so that each can be read."""
    axes.set_yticks([])
    axes.set_ylim(0, 1)
    free_sec = first_sec
    for seconds, word in words:
        if first_sec <= seconds < first_sec + ROW_SEC:
            at_sec = max(seconds, free_sec)
            free_sec = at_sec + WORD_SEC
            # what a model says may look like markup
            axes.text(at_sec, 0.97, word, rotation=-65, va="top", fontsize=7.5, parse_math=False)


def _user(axes: Axes, samples: np.ndarray, rate: int, first_sec: float) -> None:
    """When the user talks: the outline of [samples], at the foot."""
    axes.set_ylabel("user", color=USER_COLOR, loc="bottom", fontsize=8)
    pieces = np.array_split(np.abs(samples), min(ENVELOPE_POINTS, max(1, len(samples))))
    height = np.array([piece.max(initial=0.0) for piece in pieces])
    at = first_sec + np.linspace(0, len(samples) / rate, len(height))
    axes.fill_between(at, 0, 0.2 * height / max(0.05, height.max()), color=USER_COLOR, linewidth=0)
