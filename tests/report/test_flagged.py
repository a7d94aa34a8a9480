"""What the report says of talk that went bad."""

from __future__ import annotations

from typing import Any

import numpy as np
from synthetic_trace import make_trace

from moshi_ttt.clock import Clock
from moshi_ttt.diagnosis.monitor import THRESHOLDS, flag
from moshi_ttt.files import plain
from moshi_ttt.report.figures import pixels
from moshi_ttt.report.flagged import REASONS, cues, flagged_figure, flagged_section
from moshi_ttt.report.text import CAPTIONS


def segments(**bad: list[int]) -> Any:
    """Content of `segments.json` of 4 streams; the second has these windows flagged."""
    fine = {reason: np.zeros(12) for reason in THRESHOLDS}
    broken = fine | {reason: np.isin(np.arange(12), at) * 9.0 for reason, at in bad.items()}
    return plain(flag([fine, broken, fine, fine], Clock(), 100, 100 + 12 * 63))


def test_every_reason_has_words() -> None:
    assert list(REASONS) == list(THRESHOLDS)


def test_the_section_says_how_much_when_and_why() -> None:
    text = "\n".join(flagged_section(segments(silence=[2, 3], noise=[7]), Clock()))
    assert "Of 60 s of each stream 6% is flagged: nobody speaks 4%, noise 2%." in text
    assert text.count("<tr>") == 3
    assert "<td>nobody speaks</td><td>9 s</td>" in text
    assert "18.1" in text
    assert "28.2" in text
    calm = "\n".join(flagged_section(segments(), Clock()))
    assert "0% is flagged." in calm
    assert "<table>" not in calm
    nothing = flagged_section(plain(flag([], Clock(), 0, 0)), Clock())
    assert "shorter than a window" in nothing[1]


def test_a_player_has_the_times_of_its_own_stream() -> None:
    found = segments(noise=[7], silence=[8])
    assert "Flagged: 43-48 s noise; 48-53 s nobody speaks." in cues(found, 1)
    assert cues(found, 0) == ""
    # of an evaluation from before
    assert cues(None, 1) == ""


def test_a_strip_of_each_stream_is_drawn() -> None:
    trace = make_trace()
    figure = flagged_figure(segments(silence=[2, 3], noise=[7]), trace)
    spans = [collection.get_paths() for collection in figure.axes[0].collections]
    assert len(spans) == len(trace.streams) + 2
    assert pixels(figure).std() > 5
    assert "flagged" in CAPTIONS
