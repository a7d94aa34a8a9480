"""`report.html` of a run, and the comparison of several: one file each, for any browser.

Everything is inside the page: figures as PNG, audio as Ogg Vorbis, no script, no network. What a
reader wants to know comes first; what is the same in every run, or for experts, is folded away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from moshi_ttt.evaluation.folder import CONFIG, Evaluation, find_evaluations, unique_labels
from moshi_ttt.files import write_bytes
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.report import html
from moshi_ttt.report.asked import asked_finding
from moshi_ttt.report.audible import audible_section, seam_section
from moshi_ttt.report.comparison import comparison_lines, comparison_section
from moshi_ttt.report.context import context_table
from moshi_ttt.report.figures import evaluation_pictures, png, png_of
from moshi_ttt.report.flagged import cues, flagged_section
from moshi_ttt.report.glance import at_a_glance
from moshi_ttt.report.headline import headline
from moshi_ttt.report.overlays import comparison_figures
from moshi_ttt.report.recall_words import recall_finding, recall_numbers, rivals_finding
from moshi_ttt.report.style import MAX_CURVES
from moshi_ttt.report.tables import (
    evaluations_table,
    events_table,
    facts_table,
    half_life_table,
    positions_table,
    rings_table,
)
from moshi_ttt.report.text import (
    CAPTIONS,
    COMPARISON_CAPTIONS,
    GLOSSARY,
    PROBE_GLOSSARY,
    clock_note,
    findings,
)

CHANNELS = "Left: Moshi, right: the user. The start is the prompt, a recording."
Figures = dict[str, str]
"""HTML by the name of the figure; what has been shown is taken out."""


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
    figures = _figures(latest, trace, (drawn or {}).get(latest.folder))
    body = [
        html.paragraph(f"{labels[-1]}. {clock_note(trace.clock)}", kind="lead"),
        html.bullets(headline(latest, trace)),
        html.table((), at_a_glance(run_folder, evaluations, trace)),
        *_first_sound(latest),
        *_measured(latest, trace, figures),
        *_heard(latest, trace, figures),
    ]
    if len(evaluations) > 1:
        body += [
            "<h2>All evaluations of this run</h2>",
            *comparison_section(dict(shown), traces),
            evaluations_table(labels, evaluations),
            *_comparison(traces, dict(shown)),
            *_players(labels[0], evaluations[0], range(len(evaluations[0].audio[:1]))),
        ]
    body += ["<h2>For experts</h2>", *_folded(run_folder, latest, trace, figures)]
    title = f"Long generation: {_name(run_folder)}"
    return _write(run_folder / "report.html", title, [*body, *_glossary(evaluations)])


def compare_report(
    folders: Sequence[Path], out: Path, say: Callable[[str], object] = print
) -> Path:
    """Write one page that lays several runs over each other.

    Args:
        folders: runs, of which the latest evaluation is taken, or evaluation folders.
        out: file to write.
        say: takes each line of what matters most in it.

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
    for line in comparison_lines(by_label, traces):
        say(line)
    clock = traces[labels[0]].clock
    body = [html.paragraph(clock_note(clock), kind="lead"), *comparison_section(by_label, traces)]
    for label, trace in traces.items():
        lines = [*headline(by_label[label], trace), *findings(trace, by_label[label].jumps)]
        body += [f"<h3>{html.escape(label)}</h3>", html.bullets(lines)]
    body += ["<h2>Side by side</h2>", evaluations_table(labels, evaluations)]
    body += ["<h2>Overlays</h2>", *_comparison(traces, by_label)]
    body += ["<h2>Listen</h2>", html.paragraph(CHANNELS, kind="note")]
    for label, one in by_label.items():
        body += _players(label, one, range(len(one.audio[:1])))
    return _write(out, "Comparison of long generations", [*body, *_glossary(evaluations)])


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


def _figures(
    evaluation: Evaluation, trace: Trace, pictures: Mapping[str, np.ndarray] | None
) -> Figures:
    if pictures is None:
        pictures = evaluation_pictures(evaluation, trace)
    return {
        name: html.figure(png_of(picture), CAPTIONS[name], f"{trace.label}: {name}")
        for name, picture in pictures.items()
    }


def _first_sound(evaluation: Evaluation) -> list[str]:
    name = evaluation.summary["streams"][0]
    return [
        html.player(path, f"Listen: {name}. {CHANNELS}") + cues(evaluation.segments, 0)
        for path in evaluation.audio[:1]
    ]


def _measured(evaluation: Evaluation, trace: Trace, figures: Figures) -> Iterator[str]:
    """Loss, recall, norms with the critical positions, and the memory."""
    if "nll" in figures:
        yield "<h2>Loss on recordings</h2>"
        yield from context_table(evaluation.contexts)
        yield figures.pop("nll")
    if "recall" in figures and evaluation.recall is not None:
        yield "<h2>Recall</h2>"
        found = recall_finding(trace, evaluation.recall)
        told = asked_finding(evaluation.recall, trace), rivals_finding(evaluation.recall, trace)
        yield html.paragraph(" ".join([found, *chain(*told)]))
        yield from (figures.pop(name) for name in ("recall", "asked") if name in figures)
        yield from recall_numbers(evaluation.recall)
    yield "<h2>Norms, and the critical positions</h2>"
    yield html.points(findings(trace, evaluation.jumps))
    yield figures.pop("input_norm")
    yield positions_table(trace)
    if "memory" in figures:
        yield "<h2>The memory</h2>"
        yield from (figures.pop(name) for name in ("memory", "fast_weights") if name in figures)
        yield half_life_table(trace)


def _heard(evaluation: Evaluation, trace: Trace, figures: Figures) -> Iterator[str]:
    """What it sounds like: spectrogram and words of the first stream, the sound of the others."""
    if evaluation.audio:
        yield "<h2>Listen</h2>"
        yield figures.pop("audio")
        yield from _players(trace.label, evaluation, range(1, len(evaluation.audio)))
    if evaluation.segments is not None:
        yield from flagged_section(evaluation.segments, trace.clock)
        yield figures.pop("flagged")
    yield from audible_section(evaluation.quality, evaluation.cuts)
    yield from seam_section(evaluation.quality)


def _players(label: str, evaluation: Evaluation, streams: Iterable[int]) -> Iterator[str]:
    """Streams, each with its words."""
    names, words = evaluation.summary["streams"], evaluation.transcripts
    for row in streams:
        yield html.player(evaluation.audio[row], f"{label}: {names[row]}")
        yield cues(evaluation.segments, row)
        yield html.transcript(words[row])


def _folded(
    run_folder: Path, evaluation: Evaluation, trace: Trace, figures: Figures
) -> Iterator[str]:
    """What is the same in every run, or for experts."""
    yield html.folded("What happens inside the layers", "".join(figures.values()))
    yield html.folded("What was run", facts_table(evaluation, trace))
    if (path := run_folder / CONFIG).exists():
        yield html.details("Configuration (config.yaml)", path.read_text(encoding="utf-8"))
    rings = rings_table(evaluation.summary["rings"], trace.clock)
    yield html.folded("Attention rings at the end", rings)
    yield html.folded("Events", events_table(evaluation.events))


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


def _glossary(evaluations: Sequence[Evaluation]) -> list[str]:
    entries = dict(GLOSSARY)
    if any(evaluation.recall is not None for evaluation in evaluations):
        entries |= PROBE_GLOSSARY
    terms = (
        f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>"
        for term, text in entries.items()
    )
    return [html.folded("Words", f"<dl>{''.join(terms)}</dl>")]
