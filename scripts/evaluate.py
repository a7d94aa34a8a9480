"""Measure a checkpoint, or vanilla Moshi, past its context; or compare runs.

    python scripts/evaluate.py --checkpoint runs/long60s/000/checkpoints/last.ckpt --seconds 120
    python scripts/evaluate.py --model tiny --seconds 120
    python scripts/evaluate.py --model tiny --log-interval 100 | grep event=ring_turn
    python scripts/evaluate.py --compare runs/long60s/000 runs/evaluate/tiny_120s

The same instrumented generation as after each training epoch, and the same report.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, set_parsing_settings

from moshi_ttt.data import read_recordings
from moshi_ttt.data.bundled import bundled_held_out
from moshi_ttt.errors import UserError, run_program
from moshi_ttt.evaluation.config import LongRunConfig
from moshi_ttt.evaluation.evaluate import evaluate
from moshi_ttt.model.build import Dtype
from moshi_ttt.model.source import open_source
from moshi_ttt.model.weights import load_trained
from moshi_ttt.report import compare_report, write_report


def main(args: list[str] | None = None) -> Path:
    """Do what the command line says.

    Returns:
        The report.
    """
    options = _parser().parse_args(args)
    chosen = [name for name in ("checkpoint", "model", "compare") if getattr(options, name)]
    if len(chosen) != 1:
        raise UserError("give exactly one of --checkpoint FILE, --model SOURCE, --compare RUN RUN")
    for name in ("context_steps", "dtype"):
        if getattr(options, name) is not None and not options.model:
            raise UserError(f"--{name} goes with --model; a checkpoint brings its own")
    if options.compare:
        folders = [Path(folder) for folder in options.compare]
        return compare_report(folders, Path(options.out or "runs/compare.html"))
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.checkpoint:
        checkpoint = Path(options.checkpoint)
        run_folder = checkpoint.absolute().parent.parent
        lm, source, _, trained_steps = load_trained(checkpoint, device)
        label = f"{run_folder.parent.name}/{run_folder.name} {checkpoint.stem}"
        default_out = checkpoint.parent.parent / "evaluate" / checkpoint.stem
    else:
        source, trained_steps = open_source(options.model), None
        lm = source.lm(
            device=device,
            dtype=getattr(torch, options.dtype or "float32"),
            context_steps=options.context_steps,
        )
        label = f"{source.name} (vanilla)"
        default_out = Path("runs/evaluate") / Path(source.name).name
    run = LongRunConfig(
        seconds=options.seconds,
        log_interval_steps=options.log_interval,
        **vars(options.run),
    )
    assert lm.context is not None
    seconds = round(source.clock.seconds(run.steps(source.clock, lm.context)))
    out = Path(options.out or f"{default_out}_{seconds}s")
    manifest = Path(options.manifest or bundled_held_out(source))
    recordings = read_recordings(source, manifest, Path(options.cache_dir))
    evaluate(
        lm,
        source,
        recordings,
        run,
        out / "longgen" / "evaluation",
        label=label,
        trained_steps=trained_steps,
    )
    return write_report(out)


def _parser() -> ArgumentParser:
    # the docstring under each config field is its help text
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=__doc__)
    add: Any = parser.add_argument
    add("--checkpoint", type=str | None, help="A .ckpt (its .safetensors is read) of a run.")
    add("--model", type=str | None, help="Vanilla control: tiny, a folder or a hub id.")
    add("--compare", nargs="+", help="Run or evaluation folders to overlay.")
    add("--seconds", type=float | None, help="Length; default: 150 steps past 2C.")
    add(
        "--log-interval",
        type=int,
        default=0,
        help="Also log as text, every n steps and at every critical position; 0: off.",
    )
    add("--context_steps", type=int | None, help="Ring capacity C, with --model only.")
    add("--dtype", type=Dtype | None, help="Weights' type, with --model only (float32).")
    add("--manifest", type=str | None, help="Recordings; default: the bundled held-out ones.")
    add("--cache_dir", type=str, default=".cache/codes", help="Cache of encoded audio.")
    add("--device", type=str | None, help="Default: cuda if there is one.")
    add("--out", type=str | None, help="Folder (or file, with --compare) to write.")
    parser.add_class_arguments(LongRunConfig, "run", skip={"seconds", "log_interval_steps"})
    return parser


if __name__ == "__main__":
    print(f"report: {run_program(main)}")
