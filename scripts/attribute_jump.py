"""Find out why the norm changes in a long generation, by controlled experiments.

    python scripts/attribute_jump.py --model tiny
    python scripts/attribute_jump.py --model tiny --quick
    python scripts/attribute_jump.py --checkpoint a/checkpoints/last.ckpt b/checkpoints/last.ckpt

Runs a matrix of generations that differ in one thing at a time (ring capacity, sinks, start
position, free or forced or a silent user, gates of the memory, training length), compares them
stream by stream, and ends in `verdict.json`, `attribution.html` and a verdict in words. Finished
cells are kept: started again with the same settings, only what is missing runs.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from moshi.models.lm import LMModel

from moshi_ttt.attribution.cells import (
    Streams,
    load_cell,
    run_cell,
    save_cell,
    streams_from,
    weights_fingerprint,
)
from moshi_ttt.attribution.conditions import Cell, Condition
from moshi_ttt.attribution.evidence import Evidence
from moshi_ttt.attribution.matrix import (
    MatrixConfig,
    conditions,
    least_capacity,
    usual_capacities,
)
from moshi_ttt.attribution.verdict import Verdict, judge
from moshi_ttt.clock import Clock
from moshi_ttt.command_line import add_device, add_held_out, add_subjects, parse, program_parser
from moshi_ttt.data import EncodedRecording, read_recordings
from moshi_ttt.data.bundled import bundled_held_out
from moshi_ttt.errors import UserError, run_program, settings_at
from moshi_ttt.files import write_json
from moshi_ttt.generation.observer import EachStep
from moshi_ttt.generation.prompts import choose_prompts
from moshi_ttt.generation.users import silence_codes
from moshi_ttt.model.hybrid import hybrid_layers
from moshi_ttt.model.sinks import AttentionControls
from moshi_ttt.model.source import ModelSource
from moshi_ttt.model.subject import open_subject, short_name
from moshi_ttt.progress import progress
from moshi_ttt.report.attribution import write_page
from moshi_ttt.rows import Rows

TRIAL_STEPS = 40  # generated to measure the speed before the cost is printed
QUICK: dict[str, Any] = {"prompt_sec": 2.0, "starts": (100,), "steps_past_2c": 120}
"""Settings of the matrix under `--quick`, unless given."""


def main(args: list[str] | None = None) -> Verdict:
    """Do what the command line says.

    Returns:
        The verdict that was written.
    """
    parser = _parser()
    options = parse(parser, args)
    # what was left out depends on the model and on --quick
    given = parse(parser, args, defaults=False).get("matrix", Namespace())
    models = _models(options)
    out = options.out or Path("runs/attribute") / short_name(models[0])
    subject = open_subject(models[0], options.device, dtype=options.dtype, base=options.base)
    source, clock = subject.source, subject.source.clock
    with settings_at("matrix"):
        matrix = _matrix(vars(given), options.quick, subject.lm, clock)
        prompt_steps = clock.steps(matrix.prompt_sec)
        matrix.check_prompt(prompt_steps)
    manifest = options.manifest or bundled_held_out(source)
    recordings = read_recordings(source, manifest, options.cache_dir)
    streams, forced = _streams(recordings, subject.lm, source, matrix, prompt_steps)
    cells: list[Cell] = []
    for number, model in enumerate(models):
        if number:
            subject = open_subject(model, options.device, dtype=options.dtype, base=options.base)
        lm = subject.lm
        planned = conditions(
            matrix,
            model=short_name(model),
            trained_steps=subject.trained_steps,
            has_memory=bool(hybrid_layers(lm)),
            forced=forced,
        )
        if number:
            # of further models, only the plain runs: where does each of them change?
            planned = planned[: len(matrix.capacities)]
        settings = {
            "weights": weights_fingerprint(lm),
            "streams": streams.fingerprint(),
            "prompt_steps": prompt_steps,
            "steps": matrix.steps,
            "seeds": matrix.seeds,
            "seed": matrix.seed,
        }
        cells += _run(lm, planned, streams, matrix.seed, settings, out / "cells")
        del lm, subject
        gc.collect()
    evidence = Evidence(cells)
    verdict = judge(evidence, clock)
    write_json(out / "verdict.json", verdict.record())
    write_page(out / "attribution.html", evidence, verdict, cells, clock)
    print(f"\n{verdict.text()}\n\nreport: {out / 'attribution.html'}")
    return verdict


def _run(
    lm: LMModel,
    planned: Sequence[Condition],
    streams: Streams,
    seed: int,
    settings: dict[str, Any],
    folder: Path,
) -> list[Cell]:
    """Cells of one model: read what is finished, run the rest."""
    found = {one: load_cell(folder, one, settings) for one in planned}
    missing = [one for one, cell in found.items() if cell is None]
    if missing:
        controls = AttentionControls(lm)
        steps = streams.codes.shape[-1]
        rate = _steps_per_sec(lm, controls, missing[0], streams, seed)
        batch = len(streams.prompts)
        print(
            f"{missing[0].model}: {len(planned)} cells of {steps} steps x {batch} streams, "
            f"{len(planned) - len(missing)} finished already; at {rate:.0f} steps/s the other "
            f"{len(missing)} take about {len(missing) * steps / rate / 60:.1f} min"
        )
        with progress(total=len(missing) * steps, unit="step") as bar:
            for one in missing:
                bar.set_description(one.name)
                moved = EachStep(lambda _: bar.update())
                cell = run_cell(lm, controls, one, streams, seed=seed, observers=[moved])
                save_cell(folder, cell, settings)
                found[one] = cell
    return [cell for cell in found.values() if cell is not None]


def _steps_per_sec(
    lm: LMModel, controls: AttentionControls, condition: Condition, streams: Streams, seed: int
) -> float:
    """Measured on the first steps of the cell that runs next, after a few to warm up."""
    times: list[float] = []
    short = replace(
        streams,
        codes=streams.codes[..., :TRIAL_STEPS],
        user_speaks=streams.user_speaks[:, :TRIAL_STEPS],
    )
    timed = EachStep(lambda _: times.append(time.monotonic()))
    run_cell(lm, controls, condition, short, seed=seed, observers=[timed])
    warm = len(times) // 2
    return (len(times) - 1 - warm) / max(times[-1] - times[warm], 1e-9)


def _matrix(given: dict[str, Any], quick: bool, lm: LMModel, clock: Clock) -> MatrixConfig:
    assert lm.context is not None
    settings = {"capacities": (lm.context,)} | (QUICK if quick else {}) | given
    matrix = MatrixConfig(quick=quick, **settings)
    if "capacities" in given:
        return matrix
    least = least_capacity(clock.steps(matrix.prompt_sec))
    return replace(matrix, capacities=usual_capacities(lm.context, least, quick))


def _models(options: Any) -> list[str | Path]:
    """Sources or checkpoints, which come later into the names of files."""
    if bool(options.model) == bool(options.checkpoint):
        raise UserError("give either --model SOURCE or --checkpoint FILE [FILE ...]")
    models = options.model or options.checkpoint
    if len({short_name(one) for one in models}) < len(models):
        raise UserError("--checkpoint or --model names one twice; give different ones")
    return list(models)


def _streams(
    recordings: Sequence[EncodedRecording],
    lm: LMModel,
    source: ModelSource,
    matrix: MatrixConfig,
    prompt_steps: int,
) -> tuple[Streams, bool]:
    """What all cells read, and whether it is long enough to be forced throughout."""
    forced = max(one.codes.shape[-1] for one in recordings) > matrix.steps
    if not forced:
        longest = max(one.codes.shape[-1] for one in recordings)
        print(
            f"no held-out recording has more than {matrix.steps} steps (the longest: {longest}); "
            "teacher-forced cells are left out, and drift stays undecided"
        )
    starts = choose_prompts(
        recordings, matrix.prompts, matrix.steps if forced else prompt_steps, matrix.steps
    )
    codec, rows = source.codec(), Rows.of(lm)
    silence = silence_codes(codec, source.clock, rows.user_codebooks).cpu()
    streams = streams_from(
        starts,
        silence,
        steps=matrix.steps,
        prompt_steps=prompt_steps,
        seeds=matrix.seeds,
        codec=codec,
        rows=rows,
    )
    return streams, forced


def _parser() -> ArgumentParser:
    parser = program_parser(__doc__)
    add: Any = parser.add_argument
    # the first of several gets the whole matrix
    add_subjects(parser, several=True)
    add("--quick", action="store_true", help="Smaller rings, fewer cells, shorter prompts.")
    add_held_out(parser)
    add_device(parser)
    add("--out", type=Path, help="Folder to write; null: runs/attribute/MODEL.")
    add(
        "--matrix.capacities",
        type=tuple[int, ...],
        help="Ring capacities C in steps; null: half, three quarters and all of the model's, "
        "or as near to it as its window allows.",
    )
    parser.add_class_arguments(MatrixConfig, "matrix", skip={"capacities", "quick"})
    return parser


if __name__ == "__main__":
    run_program(main)
