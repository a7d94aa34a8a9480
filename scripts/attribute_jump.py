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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser, set_parsing_settings
from moshi.models.lm import LMModel
from tqdm import tqdm

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
from moshi_ttt.attribution.matrix import MatrixConfig, conditions
from moshi_ttt.attribution.verdict import Verdict, judge
from moshi_ttt.data import EncodedRecording, read_recordings
from moshi_ttt.data.bundled import bundled_held_out
from moshi_ttt.errors import UserError, run_program
from moshi_ttt.files import write_json
from moshi_ttt.generation.observer import EachStep
from moshi_ttt.generation.prompts import choose_prompts
from moshi_ttt.generation.users import silence_codes
from moshi_ttt.model.build import Dtype
from moshi_ttt.model.hybrid import hybrid_layers
from moshi_ttt.model.sinks import AttentionControls
from moshi_ttt.model.source import ModelSource, open_source
from moshi_ttt.model.weights import load_trained
from moshi_ttt.report.attribution import write_page
from moshi_ttt.rows import Rows

TRIAL_STEPS = 40  # generated to measure the speed before the cost is printed
QUICK_PROMPT_SEC = 2.0


@dataclass
class Subject:
    """A model under test: opened when its first unfinished cell runs."""

    name: str
    load: Callable[[], tuple[LMModel, ModelSource, int | None]]


def main(args: list[str] | None = None) -> Verdict:
    """Do what the command line says.

    Returns:
        The verdict that was written.
    """
    options = _parser().parse_args(args)
    subjects = _subjects(options)
    if not torch.cuda.is_available() or options.device == "cpu":
        # steps of a small model are too short to share: a second thread only spins
        torch.set_num_threads(1)
    out = Path(options.out or f"runs/attribute/{subjects[0].name}")
    lm, source, trained_steps = subjects[0].load()
    matrix = _matrix(options, lm)
    clock = source.clock
    prompt_steps = clock.steps(matrix.prompt_sec)
    matrix.check_prompt(prompt_steps)
    manifest = Path(options.manifest or bundled_held_out(source))
    recordings = read_recordings(source, manifest, Path(options.cache_dir))
    streams, forced = _streams(recordings, lm, source, matrix, prompt_steps)
    cells: list[Cell] = []
    for number, subject in enumerate(subjects):
        if number:
            lm, source, trained_steps = subject.load()
        planned = conditions(
            matrix,
            model=subject.name,
            trained_steps=trained_steps,
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
        del lm
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
        with tqdm(total=len(missing) * steps, unit="step") as bar:
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
    short = Streams(
        streams.codes[..., :TRIAL_STEPS], streams.silence, streams.prompt_steps, streams.seeds
    )
    timed = EachStep(lambda _: times.append(time.monotonic()))
    run_cell(lm, controls, condition, short, seed=seed, observers=[timed])
    warm = len(times) // 2
    return (len(times) - 1 - warm) / max(times[-1] - times[warm], 1e-9)


def _matrix(options: Any, lm: LMModel) -> MatrixConfig:
    assert lm.context is not None
    # the model's own ring is the largest: a longer one would attend further than it ever did
    sizes = (1 / 4, 3 / 8, 1 / 2) if options.quick else (1 / 2, 3 / 4, 1)
    values = {name: value for name, value in vars(options.matrix).items() if value is not None}
    values.setdefault("capacities", tuple(round(size * lm.context) for size in sizes))
    if options.quick:
        values = {"prompt_sec": QUICK_PROMPT_SEC, "starts": (100,), "steps_past_2c": 120} | values
    return MatrixConfig(quick=options.quick, **values)


def _subjects(options: Any) -> list[Subject]:
    if bool(options.model) == bool(options.checkpoint):
        raise UserError("give either --model SOURCE or --checkpoint FILE [FILE ...]")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def vanilla() -> tuple[LMModel, ModelSource, int | None]:
        source = open_source(options.model)
        lm = source.lm(device=device, dtype=getattr(torch, options.dtype or "float32"))
        return lm, source, None

    def trained(path: Path) -> tuple[LMModel, ModelSource, int | None]:
        lm, source, _, trained_steps = load_trained(path, device)
        return lm, source, trained_steps

    if options.model:
        return [Subject(Path(options.model).name, vanilla)]
    if options.dtype:
        raise UserError("--dtype goes with --model; a checkpoint brings its own")
    subjects = []
    for file in map(Path, options.checkpoint):
        run = file.absolute().parent.parent
        subjects.append(
            Subject(f"{run.parent.name}-{run.name}-{file.stem}", partial(trained, file))
        )
    if len({one.name for one in subjects}) < len(subjects):
        raise UserError("--checkpoint names one file twice; give different ones")
    return subjects


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
    starts = choose_prompts(recordings, matrix.prompts, matrix.steps if forced else prompt_steps)
    silence = silence_codes(source.codec(), source.clock, Rows.of(lm).user_codebooks).cpu()
    streams = streams_from(
        starts, silence, steps=matrix.steps, prompt_steps=prompt_steps, seeds=matrix.seeds
    )
    return streams, forced


def _parser() -> ArgumentParser:
    # the docstring under each config field is its help text
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=__doc__)
    add: Any = parser.add_argument
    add("--model", type=str | None, help="Vanilla model: tiny, a folder or a hub id.")
    add("--checkpoint", nargs="+", help="Trained models; the first gets the whole matrix.")
    add("--quick", action="store_true", help="Smaller rings and fewer cells.")
    add("--dtype", type=Dtype | None, help="Weights' type, with --model only (float32).")
    add("--manifest", type=str | None, help="Recordings; default: the bundled held-out ones.")
    add("--cache_dir", type=str, default=".cache/codes", help="Cache of encoded audio.")
    add("--device", type=str | None, help="Default: cuda if there is one.")
    add("--out", type=str | None, help="Folder to write.")
    add(
        "--matrix.capacities",
        type=list[int] | None,
        help="Ring capacities C in steps; default: half, three quarters and all of the model's.",
    )
    add("--matrix.sinks", type=int | None, help="First positions kept in cells with sinks (4).")
    add("--matrix.starts", type=list[int] | None, help="Other start positions (100, 5000).")
    add("--matrix.prompts", type=int | None, help="Starting points in the recordings (3).")
    add("--matrix.seeds", type=int | None, help="Continuations of each (3).")
    add("--matrix.user", type=Literal["recording", "silence"] | None, help="In plain runs.")
    add("--matrix.prompt_sec", type=float | None, help="Seconds forced first (4; quick: 2).")
    add("--matrix.steps_past_2c", type=int | None, help="Steps after the largest 2C (150).")
    add("--matrix.seed", type=int | None, help="Seed of the sampling (0).")
    return parser


if __name__ == "__main__":
    run_program(main)
