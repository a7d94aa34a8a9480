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

from moshi_ttt.report.context import context_figure
from moshi_ttt.teacher_forcing.contexts import ContextSweep

import moshi_ttt  # isort: skip  # noqa: F401 - before moshi: it decides whether moshi compiles

import torch
from moshi.models.lm import LMModel

from moshi_ttt.data import read_recordings
from moshi_ttt.data.bundled import bundled_held_out
from moshi_ttt.errors import UserError, run_program
from moshi_ttt.files import write_bytes, write_json
from moshi_ttt.model.source import ModelSource, open_source
from moshi_ttt.model.weights import load_trained
from moshi_ttt.report import png

SWEEP = ContextSweep()


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
        recordings = read_recordings(source, heldout, arguments.cache_dir)
        pieces = SWEEP.stretches(recordings, source.clock)
        if not pieces:
            raise UserError(
                f"no recording of {heldout} lasts "
                f"{SWEEP.longest_sec:g} s; give longer ones with --heldout"
            )
        curves[name] = SWEEP.nll(lm, pieces, source.clock)
        if lm.context is not None:
            marks_sec["C"] = source.clock.seconds(lm.context)
        if trained_steps is not None:
            seconds = source.clock.seconds(trained_steps)
            marks_sec[f"clips of {seconds:.0f} s"] = seconds
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(
        arguments.out / "context.json",
        {"context_sec": SWEEP.context_sec, "stretches": len(pieces), "nll": curves},
    )
    figure = context_figure(SWEEP, curves, marks_sec, len(pieces))
    write_bytes(arguments.out / "context.png", png(figure))
    print(f"{arguments.out / 'context.json'}, {arguments.out / 'context.png'}")


if __name__ == "__main__":
    run_program(main)
