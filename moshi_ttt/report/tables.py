"""Tables of a report: positions, settings, evaluations, attention rings, events."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moshi_ttt.clock import Clock
from moshi_ttt.diagnosis.jumps import ratios_at, spans
from moshi_ttt.evaluation.folder import Evaluation
from moshi_ttt.instruments.critical import WHY
from moshi_ttt.instruments.trace import Trace
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


def positions_table(trace: Trace) -> str:
    """Where each structural position is, and what the norm does there."""
    rows = []
    for name, step in sorted(trace.critical_steps().items(), key=lambda item: item[1]):
        ratios = ratios_at(trace, step)
        middle = float(np.nanmedian(ratios)) if np.isfinite(ratios).any() else None
        rows.append((name, *_clocks(step, trace.clock), middle, WHY[name]))
    header = ("position", "step", "seconds", "legacy token", "norm after / before", "what it is")
    return html.table(header, rows)


def half_life_table(trace: Trace) -> str:
    """How long the heads of each memory hold what they wrote; nothing if that was not measured."""
    half_lives = trace.half_life_sec
    if not half_lives.size or np.isnan(half_lives).any():
        return ""
    shown = np.percentile(half_lives, (0, 50, 100), axis=1).T
    rows = [
        [str(layer), *(_duration(sec) for sec in times)]
        for layer, times in zip(trace.hybrid_layers, shown, strict=True)
    ]
    header = ("layer", "fastest head: half is gone after", "middle", "slowest head")
    note = (
        "A head that hardly forgets has more and more written on top of each other: look at recall "
        "late in a conversation, and train with data.carry."
    )
    return html.table(header, rows) + html.paragraph(note, kind="note")


def _duration(sec: float) -> str:
    """A time in the largest unit that it is twice as long as."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if sec >= 2 * size:
            return f"{sec / size:.3g} {unit}"
    return f"{sec:.2g} s"


def _clocks(step: int, clock: Clock) -> tuple[int, str, int]:
    return step, f"{clock.seconds(step):.2f}", clock.legacy_tokens(step)


def facts_table(evaluation: Evaluation, trace: Trace) -> str:
    """What was run, in all three clocks, and what does not change while it runs."""
    clock = trace.clock
    trained = "unknown" if trace.trained_steps is None else _length(trace.trained_steps, clock)
    rows = [
        ("generated", _length(trace.steps, clock)),
        ("prompt, forced from a recording", _length(trace.prompt_steps, clock)),
        ("context C", _length(trace.context_steps, clock)),
        ("trained on clips of", trained),
        ("streams", "; ".join(trace.streams)),
        ("speed", f"{evaluation.summary['steps_per_sec']:.1f} steps a second"),
        ("folder", f"{evaluation.folder.parent.name}/{evaluation.folder.name}"),
    ]
    if trace.hybrid_layers:
        gates = zip(trace.hybrid_layers, trace.gate[0, :, -1], strict=True)
        texts = [f"layer {layer}: {gate:.3g}" for layer, gate in gates]
        rows.append(("gates, RMS over channels", "; ".join(texts)))
    return html.table((), rows)


def _length(steps: int, clock: Clock) -> str:
    return (
        f"{steps} steps ({clock.seconds(steps):.2f} s, {clock.legacy_tokens(steps)} legacy tokens)"
    )


def evaluations_table(labels: Sequence[str], evaluations: Sequence[Evaluation]) -> str:
    """A row for each evaluation of a run."""
    header = (
        "evaluation",
        "steps",
        "jumps",
        "largest: step",
        "seconds",
        "legacy token",
        "ratio",
        "ratio at C",
        "ratio at 2C",
        "norm, end / start",
        "branch ratio",
        "text entropy, end",
        "audio entropy, end",
        "steps / s",
    )
    rows = []
    for label, evaluation in zip(labels, evaluations, strict=True):
        scalars = evaluation.scalars

        def middle(pattern: str, scalars: dict[str, float] = scalars) -> float | None:
            values = [value for tag, value in scalars.items() if re.fullmatch(pattern, tag)]
            return float(np.median(values)) if values else None

        step = scalars.get("longgen/jump/step")
        token = scalars.get("longgen/jump/legacy_token")
        rows.append(
            (
                label,
                evaluation.summary["steps"],
                sum(not jump.gradual for jump in evaluation.jumps),
                None if step is None else int(step),
                scalars.get("longgen/jump/seconds"),
                None if token is None else int(token),
                scalars.get("longgen/jump/ratio"),
                middle(r"longgen/ratio_at_C/layer_\d+"),
                middle(r"longgen/ratio_at_2C/layer_\d+"),
                middle(r"longgen/input_norm/layer_\d+/growth"),
                middle(r"memory/branch_ratio/layer_\d+"),
                scalars.get("longgen/entropy/text/end"),
                scalars.get("longgen/entropy/audio/end"),
                evaluation.summary["steps_per_sec"],
            )
        )
    note = "Values of several layers are medians over the layers; entropies in nats."
    return html.table(header, rows) + html.paragraph(note, kind="note")
