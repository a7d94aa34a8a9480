"""Tables of a report: what became of the attention rings, and the events."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from moshi_ttt.clock import Clock
from moshi_ttt.diagnosis.jumps import spans
from moshi_ttt.report import html


def rings_table(rings: Sequence[Mapping[str, Any]], clock: Clock) -> str:
    """Rings that moved alike share a row; only temporal rings count in steps."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for ring in rings:
        kind = ring["module"].split(".")[0]
        key = (kind, ring["capacity"], ring["end_offset"], ring["evicted_steps"], ring["wraps"])
        groups.setdefault(key, []).append(ring)
    rows = [
        (
            ", ".join(_folded([ring["module"] for ring in alike])),
            capacity,
            f"{clock.seconds(capacity):.2f}" if kind == "transformer" else None,
            end,
            evicted,
            wraps,
            _range(alike[0]["valid_positions"]),
            _range(alike[0]["lost_positions"]),
            _range(alike[0]["overwritten_slots"]),
            _shape(alike[0]),
            sum(ring["size_bytes"] for ring in alike) / 2**20 or None,
        )
        for (kind, capacity, end, evicted, wraps), alike in groups.items()
    ]
    header = (
        "module",
        "capacity",
        "capacity (s)",
        "end offset",
        "evicted",
        "turns",
        "holds positions",
        "lost positions",
        "slots written over in this turn",
        "heads x channels",
        "MiB",
    )
    note = (
        "Rings of the temporal transformer count steps. The depformer's count codebooks within "
        "one step and start anew at each, so they have no length in seconds."
    )
    return html.table(header, rows) + html.paragraph(note, kind="note")


def _range(ends: Sequence[int] | None) -> str | None:
    return None if ends is None else f"{ends[0]} to {ends[1]}"


def _shape(ring: Mapping[str, Any]) -> str | None:
    return f"{ring['heads']} x {ring['head_dim']}" if ring["heads"] else None


def _folded(modules: Sequence[str]) -> list[str]:
    """`transformer.layers.[0-3].self_attn` for the paths of four layers."""
    layers: dict[tuple[str, ...], list[int]] = {}
    for module in modules:
        parts = re.split(r"\.(\d+)\.", module, maxsplit=1)
        numbers = layers.setdefault((parts[0], *parts[2:]), [])
        numbers += [int(number) for number in parts[1:2]]
    return [
        f"{key[0]}.[{spans(sorted(numbers))}].{key[1]}" if numbers else key[0]
        for key, numbers in layers.items()
    ]


def events_table(events: Sequence[Mapping[str, Any]]) -> str:
    """Lines of `events.jsonl`, without the values of every single layer."""
    if not events:
        return html.paragraph("None were recorded.")
    rows = []
    for event in events:
        detail = []
        for key, value in event.items():
            if key in ("event", "step", "seconds", "legacy_token", "layers") or value is None:
                continue
            if key == "modules":
                value = ", ".join(_folded(value))
            elif isinstance(value, list):
                value = ", ".join(
                    f"{one:.3g}" if isinstance(one, float) else str(one) for one in value
                )
            elif isinstance(value, float):
                value = f"{value:.3g}"
            detail.append(f"{key.replace('_', ' ')}: {value}")
        place = (event["step"], f"{event['seconds']:.2f}", event["legacy_token"])
        rows.append((str(event["event"]).replace("_", " "), *place, "; ".join(detail)))
    return html.table(("event", "step", "seconds", "legacy token", "detail"), rows)
