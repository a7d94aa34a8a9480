"""`report.html` of a run, and the comparison of several: one file each, for any browser.

Everything is inside the page: figures as PNG, audio as Ogg Vorbis, no script, no network.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moshi_ttt.clock import Clock
from moshi_ttt.diagnosis.jumps import ratios_at, spans
from moshi_ttt.evaluation.folder import CONFIG, Evaluation, find_evaluations, unique_labels
from moshi_ttt.files import write_bytes
from moshi_ttt.instruments.critical import WHY
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.report import html
from moshi_ttt.report.audible import audible_section
from moshi_ttt.report.comparison import comparison_section
from moshi_ttt.report.figures import evaluation_pictures, png, png_of
from moshi_ttt.report.headline import headline
from moshi_ttt.report.overlays import comparison_figures
from moshi_ttt.report.recall_words import recall_finding, recall_numbers
from moshi_ttt.report.style import MAX_CURVES
from moshi_ttt.report.tables import events_table, rings_table
from moshi_ttt.report.text import (
    CAPTIONS,
    COMPARISON_CAPTIONS,
    GLOSSARY,
    PROBE_GLOSSARY,
    clock_note,
    findings,
)

PLAYED_CLIPS = 2


def write_report(
    run_folder: Path, drawn: Mapping[Path, Mapping[str, np.ndarray]] | None = None
) -> Path:
    """Write `report.html` about every finished evaluation of a run.

    Args:
        run_folder: holds `longgen/*/`, and `config.yaml` if it was a training run; one evaluation
            folder by itself is accepted too.
        drawn: evaluation folder to what `evaluation_pictures` gave, to save drawing it again.

    Returns:
        The report.

    Raises:
        UserError: no finished evaluation, or one that cannot be read.
    """
    evaluations = find_evaluations(run_folder)
    labels = unique_labels(evaluations, [one.folder.name for one in evaluations])
    latest = evaluations[-1]
    shown = _evenly(list(zip(labels, evaluations, strict=True)))
    traces = {label: evaluation.trace() for label, evaluation in shown}
    trace = traces[labels[-1]]
    body = [
        html.bullets(headline(latest, trace)),
        html.paragraph(clock_note(trace.clock), kind="lead"),
        "<h2>What happened</h2>",
        html.paragraph(f"The latest evaluation, {labels[-1]}, in plain words:"),
        html.bullets(_findings(latest, trace)),
        _positions_table(trace),
        "<h2>What was run</h2>",
        _facts_table(latest, trace),
        *_config(run_folder),
        "<h2>All evaluations of this run</h2>",
        *comparison_section(dict(shown), traces),
        _evaluations_table(labels, evaluations),
        f"<h2>The latest evaluation: {html.escape(labels[-1])}</h2>",
        *_evaluation_figures(latest, trace, (drawn or {}).get(latest.folder)),
        *recall_numbers(latest.recall),
    ]
    if len(evaluations) > 1:
        body += ["<h2>Across the evaluations</h2>", *_comparison(traces, dict(shown))]
    body += [
        *audible_section(latest.quality, latest.cuts),
        *_audio({labels[-1]: latest, labels[0]: evaluations[0]}.items()),
        "<h2>Attention rings at the end</h2>",
        rings_table(latest.summary["rings"], trace.clock),
        "<h2>Events</h2>",
        events_table(latest.events),
        *_glossary(evaluations),
    ]
    title = f"Long generation: {_name(run_folder)}"
    return _write(run_folder / "report.html", title, body)


def compare_report(folders: Sequence[Path], out: Path) -> Path:
    """Write one page that lays several runs over each other.

    Args:
        folders: runs, of which the latest evaluation is taken, or evaluation folders.
        out: file to write.

    Raises:
        UserError: a folder without a finished evaluation.
    """
    evaluations = [find_evaluations(folder)[-1] for folder in folders]
    names = [_name(folder) for folder in folders]
    labels = [
        f"{name}, {one.label}" if name not in one.label else one.label
        for name, one in zip(names, evaluations, strict=True)
    ]
    if len(set(labels)) < len(labels):  # the same run twice, or runs of one name
        labels = [f"{label} [{number}]" for number, label in enumerate(labels, 1)]
    traces = {label: one.trace() for label, one in zip(labels, evaluations, strict=True)}
    by_label = dict(zip(labels, evaluations, strict=True))
    clock = traces[labels[0]].clock
    body = [html.paragraph(clock_note(clock), kind="lead"), "<h2>What happened</h2>"]
    for label, trace in traces.items():
        body += [
            f"<h3>{html.escape(label)}</h3>",
            html.bullets(
                [*headline(by_label[label], trace), *findings(trace, by_label[label].jumps)]
            ),
        ]
    body += ["<h2>Compared</h2>", *comparison_section(by_label, traces)]
    body += ["<h2>Side by side</h2>", _evaluations_table(labels, evaluations)]
    body += ["<h2>Overlays</h2>", *_comparison(traces, by_label), *_audio(by_label.items())]
    body += _glossary(evaluations)
    return _write(out, "Comparison of long generations", body)


def _write(path: Path, title: str, body: Iterable[str]) -> Path:
    write_bytes(path, html.page(title, body).encode())
    return path


def _name(folder: Path) -> str:
    """`long60s/000` for a numbered run, the folder's own name otherwise."""
    folder = folder.resolve()
    return f"{folder.parent.name}/{folder.name}" if folder.name.isdigit() else folder.name


def _evenly(items: Sequence[Any]) -> list[Any]:
    """At most `MAX_CURVES` items, evenly spaced, with the first and the last."""
    chosen = np.linspace(0, len(items) - 1, min(MAX_CURVES, len(items))).round().astype(int)
    return [items[index] for index in chosen]


def _findings(evaluation: Evaluation, trace: Trace) -> list[str]:
    lines = findings(trace, evaluation.jumps)
    if evaluation.recall is not None:
        lines.append(recall_finding(trace, evaluation.recall))
    return lines


def _positions_table(trace: Trace) -> str:
    rows = []
    for name, step in sorted(trace.critical_steps().items(), key=lambda item: item[1]):
        ratios = ratios_at(trace, step)
        middle = float(np.nanmedian(ratios)) if np.isfinite(ratios).any() else None
        rows.append((name, *_clocks(step, trace.clock), middle, WHY[name]))
    header = ("position", "step", "seconds", "legacy token", "norm after / before", "what it is")
    return html.table(header, rows)


def _clocks(step: int, clock: Clock) -> tuple[int, str, int]:
    return step, f"{clock.seconds(step):.2f}", clock.legacy_tokens(step)


def _facts_table(evaluation: Evaluation, trace: Trace) -> str:
    clock = trace.clock
    hybrid = "none (vanilla Moshi)"
    if trace.hybrid_layers:
        hybrid = f"{spans(trace.hybrid_layers)} of 0-{trace.input_norm.shape[1] - 1}"
    trained = "unknown" if trace.trained_steps is None else _length(trace.trained_steps, clock)
    return html.table(
        (),
        (
            ("model", trace.source),
            ("layers with a memory", hybrid),
            ("generated", _length(trace.steps, clock)),
            ("prompt, forced from a recording", _length(trace.prompt_steps, clock)),
            ("context C", _length(trace.context_steps, clock)),
            ("trained on clips of", trained),
            ("streams", "; ".join(trace.streams)),
            ("wall time", f"{evaluation.summary['wall_sec']:.1f} s"),
            ("speed", f"{evaluation.summary['steps_per_sec']:.1f} steps a second"),
            ("folder", f"{evaluation.folder.parent.name}/{evaluation.folder.name}"),
        ),
    )


def _length(steps: int, clock: Clock) -> str:
    return (
        f"{steps} steps ({clock.seconds(steps):.2f} s, {clock.legacy_tokens(steps)} legacy tokens)"
    )


def _config(run_folder: Path) -> list[str]:
    path = run_folder / CONFIG
    return [html.details("Configuration (config.yaml)", path.read_text())] if path.exists() else []


def _evaluations_table(labels: Sequence[str], evaluations: Sequence[Evaluation]) -> str:
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


def _evaluation_figures(
    evaluation: Evaluation, trace: Trace, pictures: Mapping[str, np.ndarray] | None
) -> list[str]:
    if pictures is None:
        pictures = evaluation_pictures(evaluation, trace)
    return [
        html.figure(png_of(picture), CAPTIONS[name], f"{trace.label}: {name}")
        for name, picture in pictures.items()
    ]


def _comparison(traces: Mapping[str, Trace], by_label: Mapping[str, Evaluation]) -> list[str]:
    figures = comparison_figures(
        traces,
        {label: by_label[label].nll for label in traces},
        {label: by_label[label].recall for label in traces},
    )
    return [
        html.figure(png(figure), COMPARISON_CAPTIONS[name], f"comparison: {name}")
        for name, figure in figures.items()
    ]


def _audio(evaluations: Iterable[tuple[str, Evaluation]]) -> list[str]:
    players = [
        html.player(path, f"{label}: {path.stem}")
        for label, evaluation in evaluations
        for path in evaluation.audio[:PLAYED_CLIPS]
    ]
    note = "Left: Moshi, right: the user. The start is the prompt, a recording."
    return ["<h2>Listen</h2>", html.paragraph(note, kind="note"), *players] if players else []


def _glossary(evaluations: Sequence[Evaluation]) -> list[str]:
    entries = dict(GLOSSARY)
    if any(evaluation.recall is not None for evaluation in evaluations):
        entries |= PROBE_GLOSSARY
    terms = (
        f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>"
        for term, text in entries.items()
    )
    return ["<h2>Words</h2>", f"<dl>{''.join(terms)}</dl>"]
