"""A text log of a generation while it runs, one event a line, for people who grep.

    event=ring_turn step=750 seconds=60.00 legacy_token=6000 turn=2 lost_steps=376 ...

Fields are `key=value` without blanks inside; lists are joined by commas; what is undefined is
left out. Between two lines nothing is read from the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from moshi_ttt.clock import Clock
from moshi_ttt.diagnosis.quality import text_measures
from moshi_ttt.errors import check_bounds
from moshi_ttt.generation.observer import Observer
from moshi_ttt.instruments.critical import Lengths, by_step, critical_steps
from moshi_ttt.instruments.events import (
    Event,
    cache_events,
    position_event,
    turn_events,
)
from moshi_ttt.instruments.recorder import Recorder

_LISTED_LAYERS = ("input_norm",)  # of the values by layer; all of them are in events.jsonl


def event_line(record: Mapping[str, Any]) -> str:
    """One line for one line of `events.jsonl`."""
    fields = {key: value for key, value in record.items() if key not in ("modules", "layers")}
    layers = record.get("layers", {})
    fields |= {f"{name}_by_layer": layers[name] for name in _LISTED_LAYERS if name in layers}
    parts = ((key, _text(key, value)) for key, value in fields.items())
    return " ".join(f"{key}={text}" for key, text in parts if text is not None)


def log_events(
    events: Iterable[Event], clock: Clock, write: Callable[[str], object] = print
) -> None:
    """One line an event; `write` takes each line."""
    for event in events:
        write(event_line(event.record(clock)))


def _text(key: str, value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if key == "seconds" or key.endswith("_sec"):
            return f"{value:.2f}"
        return str(int(value)) if value.is_integer() else f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(_text(key, one) or "nan" for one in value)
    return str(value).replace(" ", "_")


class ConsoleLog(Observer):
    """Reports a running generation at every n-th step and at every critical position.

    Args:
        recorder: of the run.
        clock: of the run.
        steps: length of the run.
        context_steps: capacity C.
        interval_steps: steps between two `progress` lines.
        write: takes each line, e.g. `tqdm.write`.
        prompt_steps: forced steps at the start.
        trained_steps: clip length of the training; None if unknown.
        text_padding_ids: text tokens that say nothing.
    """

    def __init__(
        self,
        recorder: Recorder,
        clock: Clock,
        *,
        steps: int,
        context_steps: int,
        interval_steps: int,
        write: Callable[[str], object],
        prompt_steps: int = 0,
        trained_steps: int | None = None,
        text_padding_ids: Sequence[int] = (3, 0),
    ) -> None:
        check_bounds("log_interval", interval_steps, least=1, remedy="use e.g. 100")
        self._recorder = recorder
        self._clock = clock
        self._interval_steps = interval_steps
        self._write = write
        self._padding = text_padding_ids
        lengths = Lengths(context_steps, steps, prompt_steps, trained_steps)
        self._positions = by_step(critical_steps(lengths))
        self._context_steps = context_steps
        self._read_to = 0

    def after_step(self, step: int, /) -> None:
        """Reads and writes only when a line is due; the recorder has to be told first."""
        if step == 0:
            self._log(cache_events(self._recorder.rings, self._clock))
        turns = step >= self._context_steps and step % self._context_steps == 0
        names = self._positions.get(step, [])
        if not (names or turns or step % self._interval_steps == 0):
            return
        temporal = [ring for ring in self._recorder.rings if ring.role == "temporal"]
        first, self._read_to = self._read_to, step + 1
        block = self._recorder.read(first, step + 1)
        events = turn_events(block["ring_end_offset"][0], temporal, self._clock, first_step=first)
        event = position_event(
            "critical_position" if names else "progress",
            step,
            block,
            at=step - first,
            ring=temporal[0],
            clock=self._clock,
            names=names,
        )
        texts = [text_measures(row[row >= 0], self._padding) for row in block["text_input"]]
        for name in ("padding_share", "repetition"):
            values = [text[name] for text in texts if not math.isnan(text[name])]
            if values:
                event.detail[f"text_{name}"] = sum(values) / len(values)
        # since the last line: one step alone is mostly noise
        event.detail["step_ms"] = float(block["step_ms"].mean())
        self._log([*events, event])

    def _log(self, events: Iterable[Event]) -> None:
        log_events(events, self._clock, self._write)
