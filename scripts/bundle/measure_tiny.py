r"""What the base does before anybody adds a memory: numbers and figures of docs/tiny_moshi.md.

    python scripts/bundle/measure_tiny.py                   # the bundle, writes docs/tiny_moshi/
    python scripts/bundle/measure_tiny.py --model build/tiny --train build/train/manifest.jsonl \
        --manifest build/heldout/manifest.jsonl --out build/baseline

Held-out loss of each group of rows beside what a unigram and a copying model lose; loss against
position on stretches that start anywhere behind the greeting of a conversation, which is easier
than the rest; input norms while talking freely and while reading; recall of probes against their
gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser

from moshi_ttt.command_line import add_device, add_held_out, add_model, parse, program_parser
from moshi_ttt.data import EncodedRecording, read_recordings
from moshi_ttt.data.bundled import bundled_held_out
from moshi_ttt.errors import UserError, run_program
from moshi_ttt.evaluation.config import LongRunConfig
from moshi_ttt.evaluation.evaluate import evaluate
from moshi_ttt.evaluation.folder import Evaluation
from moshi_ttt.files import write_bytes, write_json
from moshi_ttt.model.source import ASSETS, TINY, TINY_CLIP_SEC, ModelSource
from moshi_ttt.model.subject import open_subject
from moshi_ttt.report import png, recall_figure
from moshi_ttt.report.figures import nll_figure, norm_figure
from moshi_ttt.report.recall import gap_positions
from moshi_ttt.rows import Rows
from moshi_ttt.teacher_forcing.contexts import clips, nll_by_position
from moshi_ttt.teacher_forcing.recordings import read_teacher_forced

WINDOW_SEC = 5.0
NLL_RECORDINGS = 12  # the first ones, for loss and recall of whole recordings
SPACING_SEC = 23.0  # between the starts of two stretches, and ahead of the first


def baselines(
    train: Sequence[EncodedRecording],
    heldout: Sequence[EncodedRecording],
    rows: range,
    card: int,
) -> dict[str, float]:
    """Held-out NLL of rows in nats a token, of models fitted to the training recordings.

    `uniform` knows the vocabulary, `unigram` how often each token occurs (plus one), `copy` mixes
    the unigram with the token before, in the share that fits the training recordings best.
    """
    unigram_nll, copy_nll = [], []
    for row in rows:
        known = torch.cat([one.codes[row] for one in train]).numpy()
        unigram = np.bincount(known, minlength=card) + 1.0
        unigram /= unigram.sum()
        repeats = float(np.mean(np.concatenate([_repeats(one, row) for one in train])))
        # a repeat is either copied or drawn again by chance
        by_chance = float((unigram**2).sum())
        share = max(0.0, (repeats - by_chance) / (1 - by_chance))
        for one in heldout:
            tokens = one.codes[row].numpy()[1:]
            unigram_nll.append(-np.log(unigram[tokens]))
            mixed = (1 - share) * unigram[tokens] + share * _repeats(one, row)
            copy_nll.append(-np.log(mixed))
    return {
        "uniform": float(np.log(card)),
        "unigram": float(np.concatenate(unigram_nll).mean()),
        "copy": float(np.concatenate(copy_nll).mean()),
    }


def _repeats(recording: EncodedRecording, row: int) -> np.ndarray:
    tokens = recording.codes[row].numpy()
    return tokens[1:] == tokens[:-1]


def write_figures(out: Path, by_position: dict[str, Any], free: Path, forced: Path) -> None:
    """Write norms of both runs, loss against position, and recall where there are probes, as PNG.

    Args:
        out: folder to write.
        by_position: what `nll_by_position` gave.
        free: evaluation folder of the run that talks.
        forced: evaluation folder of the run that reads.
    """
    evaluations = {"free": Evaluation.load(free), "forced": Evaluation.load(forced)}
    traces = {name: evaluation.trace() for name, evaluation in evaluations.items()}
    figures = {
        f"input_norm_{name}": norm_figure(traces[name], evaluations[name].jumps)
        for name in evaluations
    }
    trace, recall = traces["forced"], evaluations["forced"].recall
    figures["nll"] = nll_figure({"held out, teacher-forced": by_position}, [trace])
    if recall is not None:
        figures["recall"] = recall_figure(recall, gap_positions(trace))
    for name, figure in figures.items():
        write_bytes(out / f"{name}.png", png(figure))


def losses_by_group(
    lm: Any,
    train: Sequence[EncodedRecording],
    heldout: Sequence[EncodedRecording],
    clip_steps: int,
) -> dict[str, dict[str, float]]:
    """Held-out NLL of each group of rows in clips of the trained length, and of simpler models."""
    in_clips = nll_by_position(lm, clips(heldout, clip_steps, clip_steps), clip_steps)
    rows = Rows.of(lm)
    return {
        group: {
            **baselines(
                train,
                heldout,
                range(rows.count)[part],
                lm.text_card if group == "text" else lm.card,
            ),
            "lm_in_clips": in_clips[group][0],
        }
        for group, part in rows.groups.items()
    }


def long_runs(
    lm: Any,
    source: ModelSource,
    heldout: Sequence[EncodedRecording],
    seconds: float,
    runs: Path,
) -> dict[str, Any]:
    """Scalars of a run that talks (`free`) and of one that reads (`forced`), written to `runs`."""
    clock = source.clock
    # the same for both runs, and slow
    read = read_teacher_forced(
        lm, heldout[:NLL_RECORDINGS], clock.steps(seconds), clock.steps(WINDOW_SEC)
    )
    scalars = {}
    for name, prompt_sec in (("free", 10.0), ("forced", seconds)):
        scalars[name] = evaluate(
            lm,
            source,
            heldout,
            LongRunConfig(
                seconds=seconds,
                prompt_sec=prompt_sec,
                # nothing is drawn where everything is forced: seeds would give equal streams
                prompts=4 if name == "free" else 8,
                seeds=2 if name == "free" else 1,
                audio_streams=1,
            ),
            runs / name,
            label=f"{source.name}, {name}",
            trained_steps=clock.steps(TINY_CLIP_SEC),
            read=read,
        )
    return scalars


def main(args: list[str] | None = None) -> None:
    """Measure and write `baseline.json` and the figures."""
    options = parse(_parser(), args)
    subject = open_subject(options.model, options.device)
    lm, source, clock = subject.lm, subject.source, subject.source.clock
    manifest = options.manifest or bundled_held_out(source)
    train = read_recordings(source, options.train, options.cache_dir)
    heldout = read_recordings(source, manifest, options.cache_dir)

    spacing_steps = clock.steps(SPACING_SEC)
    stretches = clips(heldout, clock.steps(options.seconds), spacing_steps, spacing_steps)
    if not stretches:
        raise UserError(
            f"no recording of {manifest} lasts {options.seconds + SPACING_SEC:g} s; lower --seconds"
        )
    by_position = nll_by_position(lm, stretches, clock.steps(WINDOW_SEC))
    losses = losses_by_group(lm, train, heldout, clock.steps(TINY_CLIP_SEC))
    scalars = long_runs(lm, source, heldout, options.seconds, options.runs)
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(
        options.out / "baseline.json",
        {
            "model": source.name,
            "heldout": {
                "recordings": len(heldout),
                "hours": sum(clock.seconds(one.steps) for one in heldout) / 3600,
                "probes": sum(len(one.probes) for one in heldout),
                "stretches": len(stretches),
            },
            "nll": losses,
            "nll_by_position": by_position,
            "recall": Evaluation.load(options.runs / "free").recall,
            "free": scalars["free"],
            "forced": scalars["forced"],
        },
    )
    write_figures(options.out, by_position, options.runs / "free", options.runs / "forced")


def _parser() -> ArgumentParser:
    parser = program_parser(__doc__)
    add: Any = parser.add_argument
    add_model(parser, default=TINY)
    train = ASSETS / "conversations" / "train" / "manifest.jsonl"
    add("--train", type=Path, default=train, help="Recordings that the baselines are fitted to.")
    add_held_out(parser)
    add_device(parser)
    add("--out", type=Path, default=Path("docs/tiny_moshi"), help="Folder to write.")
    add("--runs", type=Path, default=Path("runs/baseline"), help="Folder of the raw evaluations.")
    add("--seconds", type=float, default=150.0, help="Length of the long stretches.")
    return parser


if __name__ == "__main__":
    run_program(main)
