r"""Does reading further back help, or hurt? Loss of the same seconds behind contexts of any length.

    python scripts/measure_context.py --model tiny \
        --checkpoint runs/long60s/000/checkpoints/best.safetensors

Each model (a source, or a trained checkpoint) reads the same held-out stretches teacher-forced,
having read the second before them, then the 5 s before them, and so on. Loss against position mixes
what the model can do with what happens to be said there; here only the context differs. A model
that was trained on short clips gets worse from that length on. Writes OUT/context.json and
OUT/context.png.
"""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from moshi_ttt.command_line import add_device, add_held_out, add_subjects, parse, program_parser
from moshi_ttt.data import read_recordings
from moshi_ttt.data.bundled import bundled_held_out
from moshi_ttt.errors import UserError, run_program
from moshi_ttt.files import write_bytes, write_json
from moshi_ttt.model.subject import open_subject
from moshi_ttt.report import png
from moshi_ttt.report.context import context_figure
from moshi_ttt.teacher_forcing.contexts import ContextSweep

SWEEP = ContextSweep()


def main(args: list[str] | None = None) -> None:
    """Measure every model and write the numbers and the figure."""
    options = parse(_parser(), args)
    models = [*(options.model or ()), *(options.checkpoint or ())]
    if not models:
        raise UserError("give --model SOURCE [SOURCE ...], --checkpoint FILE [FILE ...] or both")
    curves: dict[str, dict[str, list[float]]] = {}
    marks_sec: dict[str, float] = {}
    for name in models:
        # the type goes with the sources among them, the base with the checkpoints
        is_source = name in (options.model or ())
        subject = open_subject(
            name,
            options.device,
            dtype=options.dtype if is_source else None,
            base=None if is_source else options.base,
        )
        lm, clock = subject.lm, subject.source.clock
        manifest = options.manifest or bundled_held_out(subject.source)
        recordings = read_recordings(subject.source, manifest, options.cache_dir)
        pieces = SWEEP.stretches(recordings, clock)
        if not pieces:
            raise UserError(
                f"no recording of {manifest} lasts "
                f"{SWEEP.longest_sec:g} s; give longer ones with --manifest"
            )
        curves[str(name)] = SWEEP.nll(lm, pieces, clock)
        if lm.context is not None:
            marks_sec["C"] = clock.seconds(lm.context)
        if subject.trained_steps is not None:
            seconds = clock.seconds(subject.trained_steps)
            marks_sec[f"clips of {seconds:.0f} s"] = seconds
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(
        options.out / "context.json",
        {"context_sec": SWEEP.context_sec, "stretches": len(pieces), "nll": curves},
    )
    figure = context_figure(SWEEP, curves, marks_sec, len(pieces))
    write_bytes(options.out / "context.png", png(figure))
    print(f"{options.out / 'context.json'}, {options.out / 'context.png'}")


def _parser() -> ArgumentParser:
    parser = program_parser(__doc__)
    add_subjects(parser, several=True)
    add_held_out(parser)
    add_device(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/context"), help="Folder to write.")
    return parser


if __name__ == "__main__":
    run_program(main)
