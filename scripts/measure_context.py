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
from collections.abc import Sequence
from operator import methodcaller
from pathlib import Path

import moshi_ttt  # isort: skip  # noqa: F401 - before moshi: it decides whether moshi compiles

import torch
from matplotlib.figure import Figure
from moshi.models.lm import LMModel, LMOutput
from tqdm import tqdm

from moshi_ttt.clock import Clock
from moshi_ttt.data import EncodedRecording, read_recordings
from moshi_ttt.errors import UserError, run_program
from moshi_ttt.loading import ASSETS, ModelSource, open_source
from moshi_ttt.metrics import STREAMS, PositionNLL
from moshi_ttt.model import load_trained
from moshi_ttt.report import png
from moshi_ttt.report.style import legend_below, run_colors, styled
from moshi_ttt.trace import write_atomic, write_json

HELDOUT = ASSETS / "conversations" / "heldout" / "manifest.jsonl"
CONTEXT_SEC = (1, 5, 10, 15, 20, 25, 30, 60, 100)  # behind none, every model is surprised
TARGET_SEC = 5.0
SPACING_SEC = 40.0  # between two stretches of a recording
BATCH = 4


@torch.no_grad()
def nll_behind(
    lm: LMModel, recordings: Sequence[EncodedRecording], starts: Sequence[int], clock: Clock
) -> dict[str, list[float]]:
    """Loss of the stretches behind each of `CONTEXT_SEC`.

    Args:
        lm: in eval mode.
        recordings: where the stretches are.
        starts: first step of each stretch, of the recording of the same index.
        clock: of the codec.

    Returns:
        Nats a token by stream of `PositionNLL`, one value a context.
    """
    found: dict[str, list[float]] = {stream: [] for stream in STREAMS}
    counted = clock.steps(TARGET_SEC)
    for context_sec in tqdm(CONTEXT_SEC, desc="contexts"):
        context_steps = clock.steps(context_sec)
        pieces = [
            one.codes[:, start - context_steps : start + counted]
            for one, start in zip(recordings, starts, strict=True)
        ]
        metric = PositionNLL(counted, 1).to(lm.device)
        for first in range(0, len(pieces), BATCH):
            codes = torch.stack(pieces[first : first + BATCH]).to(lm.device)
            metric.update(lm, _last(lm(codes), counted), codes[..., -counted:])
        for stream, values in found.items():
            values += metric.record()[stream]
    return found


def _last(output: LMOutput, steps: int) -> LMOutput:
    return LMOutput(
        output.logits[:, :, -steps:],
        output.mask[:, :, -steps:],
        output.text_logits[:, :, -steps:],
        output.text_mask[:, :, -steps:],
    )


def stretches(
    recordings: Sequence[EncodedRecording], clock: Clock
) -> tuple[list[EncodedRecording], list[int]]:
    """Recording and first step of every stretch that has the longest context before it."""
    furthest = clock.steps(max(CONTEXT_SEC))
    found = [
        (one, start)
        for one in recordings
        for start in range(
            furthest, one.steps - clock.steps(TARGET_SEC) + 1, clock.steps(SPACING_SEC)
        )
    ]
    return [one for one, _ in found], [start for _, start in found]


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
    parser.add_argument("--heldout", type=Path, default=HELDOUT, help="manifest of what is read")
    parser.add_argument("--out", type=Path, default=Path("runs/context"), help="folder to write")
    parser.add_argument("--cache-dir", type=Path, default=Path(".cache/codes"))
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    curves: dict[str, dict[str, list[float]]] = {}
    marks_sec: dict[str, float] = {}
    for name in arguments.models:
        lm, source, trained_steps = open_model(name, device)
        recordings, starts = stretches(
            read_recordings(source, arguments.heldout, arguments.cache_dir), source.clock
        )
        if not starts:
            raise UserError(
                f"no recording of {arguments.heldout} lasts "
                f"{max(CONTEXT_SEC) + TARGET_SEC:g} s; give longer ones with --heldout"
            )
        curves[name] = nll_behind(lm, recordings, starts, source.clock)
        if lm.context is not None:
            marks_sec["C"] = source.clock.seconds(lm.context)
        if trained_steps is not None:
            seconds = source.clock.seconds(trained_steps)
            marks_sec[f"clips of {seconds:.0f} s"] = seconds
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(
        arguments.out / "context.json",
        {"context_sec": CONTEXT_SEC, "stretches": len(starts), "nll": curves},
    )
    figure = context_figure(curves, marks_sec, len(starts))
    write_atomic(arguments.out / "context.png", methodcaller("write", png(figure)))
    print(f"{arguments.out / 'context.json'}, {arguments.out / 'context.png'}")


if __name__ == "__main__":
    run_program(main)
