"""Does reading further back help, or hurt? Loss of the same seconds behind contexts of any length.

    python scripts/measure_context.py tiny runs/long60s/000/checkpoints/best.safetensors

Each model (a source, or a trained checkpoint) reads the same held-out stretches teacher-forced,
having read the second before them, then the 5 s before them, and so on. Loss against position mixes
what the model can do with what happens to be said there; here only the context differs. A model
that was trained on short clips gets worse from that length on. Writes OUT/context.json and
OUT/context.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from moshi_ttt.teacher_forcing.contexts import CONTEXT_SEC, TARGET_SEC, nll_behind, stretches

import moshi_ttt  # isort: skip  # noqa: F401 - before moshi: it decides whether moshi compiles

import torch
from matplotlib.figure import Figure
from moshi.models.lm import LMModel

from moshi_ttt.data import read_recordings
from moshi_ttt.data.bundled import bundled_held_out
from moshi_ttt.errors import UserError, run_program
from moshi_ttt.files import write_bytes, write_json
from moshi_ttt.model.source import ModelSource, open_source
from moshi_ttt.model.weights import load_trained
from moshi_ttt.report import png
from moshi_ttt.report.style import legend_below, run_colors, styled
from moshi_ttt.teacher_forcing.nll import STREAMS


@styled
def context_figure(
    curves: dict[str, dict[str, list[float]]], marks_sec: dict[str, float], stretches: int
) -> Figure:
    """Loss against context, a panel a stream and a curve a model.

    Args:
        curves: label to what `nll_behind` gave.
        marks_sec: names of context lengths to point at.
        stretches: how many were read.
    """
    figure = Figure(figsize=(10, 7))
    panels = figure.subplots(len(STREAMS), 1, sharex=True)
    for axes, stream in zip(panels, STREAMS, strict=True):
        for color, (label, values) in zip(run_colors(len(curves)), curves.items(), strict=True):
            axes.plot(CONTEXT_SEC, values[stream], "o-", markersize=4, color=color, label=label)
        axes.set_ylabel(f"{stream.replace('_', ' ')}\n(nats a token)")
        for name, seconds in marks_sec.items():
            axes.axvline(seconds, color="0.3", linestyle="--", linewidth=1)
            if axes is panels[0]:
                axes.annotate(
                    name,
                    (seconds, 1.0),
                    xycoords=("data", "axes fraction"),
                    xytext=(2, 3),
                    textcoords="offset points",
                    fontsize=8,
                )
    panels[-1].set_xlabel(
        f"seconds read before the {TARGET_SEC:g} s that are measured ({stretches} stretches)"
    )
    panels[0].set_title("The same held-out seconds behind contexts of different lengths", pad=18)
    if len(curves) > 1:
        legend_below(figure, panels[0])
    return figure


def open_model(name: str, device: str) -> tuple[LMModel, ModelSource, int | None]:
    """LM, source and trained steps (None: unknown) of a checkpoint file or a model source."""
    if Path(name).suffix in (".safetensors", ".ckpt"):
        lm, source, _, trained_steps = load_trained(Path(name), device)
        return lm, source, trained_steps
    source = open_source(name)
    return source.lm(device=device), source, None


def main() -> None:
    """Measure every model and write the numbers and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", help="model sources, or checkpoints")
    parser.add_argument("--heldout", type=Path, help="manifest; default: the bundled one")
    parser.add_argument("--out", type=Path, default=Path("runs/context"), help="folder to write")
    parser.add_argument("--cache-dir", type=Path, default=Path(".cache/codes"))
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    curves: dict[str, dict[str, list[float]]] = {}
    marks_sec: dict[str, float] = {}
    for name in arguments.models:
        lm, source, trained_steps = open_model(name, device)
        heldout = arguments.heldout or bundled_held_out(source)
        pieces = stretches(read_recordings(source, heldout, arguments.cache_dir), source.clock)
        if not pieces:
            raise UserError(
                f"no recording of {heldout} lasts "
                f"{max(CONTEXT_SEC) + TARGET_SEC:g} s; give longer ones with --heldout"
            )
        curves[name] = nll_behind(lm, pieces, source.clock)
        if lm.context is not None:
            marks_sec["C"] = source.clock.seconds(lm.context)
        if trained_steps is not None:
            seconds = source.clock.seconds(trained_steps)
            marks_sec[f"clips of {seconds:.0f} s"] = seconds
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(
        arguments.out / "context.json",
        {"context_sec": CONTEXT_SEC, "stretches": len(pieces), "nll": curves},
    )
    figure = context_figure(curves, marks_sec, len(pieces))
    write_bytes(arguments.out / "context.png", png(figure))
    print(f"{arguments.out / 'context.json'}, {arguments.out / 'context.png'}")


if __name__ == "__main__":
    run_program(main)
