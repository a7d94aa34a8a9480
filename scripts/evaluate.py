"""Measure a checkpoint, or vanilla Moshi, past its context; or compare runs.

    python scripts/evaluate.py --checkpoint runs/long60s/000/checkpoints/last.ckpt --seconds 120
    python scripts/evaluate.py --checkpoint last.ckpt --context_steps 500  # another window
    python scripts/evaluate.py --checkpoint last.ckpt --sinks 4 --inner_rate 0.5
    python scripts/evaluate.py --checkpoint last.ckpt --thinning 3  # older keys thinned out
    python scripts/evaluate.py --checkpoint last.ckpt --run.chunk_sec 15  # in chunks
    python scripts/evaluate.py --model tiny --seconds 120
    python scripts/evaluate.py --model tiny --log_interval 8s | grep event=ring_turn
    python scripts/evaluate.py --model tiny --input me.wav --output moshi.wav   # what it answers
    python scripts/evaluate.py --compare runs/long60s/000 runs/evaluate/tiny_120s

The same instrumented generation as after each training epoch, and the same report. Nothing is
overwritten: each call writes to a new folder, `OUT/000`, `OUT/001`, ..., with its settings in
`config.yaml`; an `OUT` given to `--compare` means the newest of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from moshi_ttt.command_line import add_device, add_held_out, add_subjects, parse, program_parser
from moshi_ttt.data import read_recordings
from moshi_ttt.data.bundled import bundled_held_out
from moshi_ttt.errors import UserError, run_program, settings_at
from moshi_ttt.evaluation.config import LongRunConfig
from moshi_ttt.evaluation.evaluate import evaluate
from moshi_ttt.evaluation.folder import CONFIG, Evaluation, find_evaluations, write_wav
from moshi_ttt.evaluation.reply import reply
from moshi_ttt.files import claim_folder, write_bytes
from moshi_ttt.model.subject import Subject, open_subject, short_name
from moshi_ttt.report import compare_report, headline, write_report


def main(args: list[str] | None = None) -> Path:
    """Do what the command line says.

    Returns:
        The report, or the transcript of an answer.
    """
    parser = _parser()
    options = parse(parser, args)
    chosen = [name for name in ("checkpoint", "model", "compare") if getattr(options, name)]
    if len(chosen) != 1:
        raise UserError("give exactly one of --checkpoint FILE, --model SOURCE, --compare RUN RUN")
    if options.compare:
        for folder in options.compare:
            find_evaluations(folder)
        out = claim_folder(options.out or Path("runs/compare"), "--out")
        return compare_report(options.compare, out / "report.html")
    if (options.input is None) != (options.output is None):
        raise UserError("--input and --output go together: a recording, and the WAV file to write")
    subject = open_subject(
        options.checkpoint or options.model,
        options.device,
        dtype=options.dtype,
        context_steps=options.context_steps,
        base=options.base,
        sinks=options.sinks,
        thinning=options.thinning,
        farthest_steps=options.farthest_steps,
        inner_rate=options.inner_rate,
    )
    return _answer(subject, options) if options.input else _evaluate(subject, options, parser)


def _answer(subject: Subject, options: Namespace) -> Path:
    """Let it answer a recording; the transcript, beside the sound."""
    with settings_at("run"):
        said = reply(subject.lm, subject.source, options.input, LongRunConfig(**vars(options.run)))
    write_wav(options.output, said.sound, subject.source.clock.sample_rate)
    transcript: Path = options.output.with_suffix(".txt")
    write_bytes(transcript, said.transcript().encode())
    print(said.transcript(), end="")
    return transcript


def _evaluate(subject: Subject, options: Namespace, parser: ArgumentParser) -> Path:
    """Let it talk, and measure; the report."""
    lm, source = subject.lm, subject.source
    with settings_at("run", seconds="--seconds", log_interval="--log_interval"):
        run = LongRunConfig(
            seconds=options.seconds,
            log_interval=options.log_interval,
            **vars(options.run),
        )
    assert lm.context is not None
    seconds = round(source.clock.seconds(run.steps(source.clock, lm.context)))
    if options.checkpoint:
        beside, name = options.checkpoint.parent.parent / "evaluate", options.checkpoint.stem
    else:
        beside, name = Path("runs/evaluate"), short_name(options.model)
    changes = {
        "C": options.context_steps,
        "sinks": options.sinks,
        "thinning": options.thinning,
        "farthest": options.farthest_steps,
        "rate": options.inner_rate,
        "chunk": run.chunk_sec,
    }
    changed = "".join(f"_{key}{one:g}" for key, one in changes.items() if one is not None)
    manifest = options.manifest or bundled_held_out(source)
    recordings = read_recordings(source, manifest, options.cache_dir)
    out = claim_folder(options.out or beside / f"{name}_{seconds}s{changed}", "--out")
    write_bytes(out / CONFIG, parser.dump(options).encode())
    folder = out / "longgen" / "evaluation"
    with settings_at("run"):
        evaluate(
            lm,
            source,
            recordings,
            run,
            folder,
            label=subject.label + run.said,
            trained_steps=subject.trained_steps,
        )
    evaluation = Evaluation.load(folder)
    print("\n".join(headline(evaluation, evaluation.trace())))
    return write_report(out)


def _parser() -> ArgumentParser:
    parser = program_parser(__doc__)
    add: Any = parser.add_argument
    add_subjects(parser)
    add("--config", action="config", help="Settings of an earlier call: its config.yaml.")
    add("--compare", type=Path, nargs="+", help="Run or evaluation folders to overlay.")
    add(
        "--context_steps",
        type=int,
        help="Ring capacity C to try it with; null: its own, or what it was trained with.",
    )
    add("--sinks", type=int, help="First steps that are never evicted; null: as it was trained.")
    add(
        "--thinning",
        type=int,
        help="How often older keys are halved within C, 3: every eighth is left; null: likewise.",
    )
    add(
        "--farthest_steps",
        type=int,
        help="How far away a key may seem, e.g. the trained window - 1; null: likewise.",
    )
    add(
        "--inner_rate",
        type=float,
        help="Multiplies the write gates of the memory, 0 stops it; null: as it was trained.",
    )
    add("--input", type=Path, help="Recording of a user, to be answered instead of an evaluation.")
    add("--output", type=Path, help="WAV file of the answer; a .txt beside it has its words.")
    add("--seconds", type=float, help="Length; null: 150 steps past 2C.")
    add(
        "--log_interval",
        type=int | str,
        default=0,
        help="Also log as text: every 100 steps (100), 8 seconds (8s) or 800 legacy tokens "
        "(800tokens), and at every critical position; 0: off.",
    )
    add_held_out(parser)
    add_device(parser)
    add("--out", type=Path, help="Folder to write a new one in; null: named after what is asked.")
    parser.add_class_arguments(LongRunConfig, "run", skip={"seconds", "log_interval"})
    return parser


if __name__ == "__main__":
    print(f"written: {run_program(main)}")
