"""How often does real speech look broken? Thresholds of the monitor, and how often they err.

    python scripts/measure_alarms.py --model tiny
    python scripts/measure_alarms.py --checkpoint last.ckpt --manifest my_held_out.jsonl

Decodes and reads held-out recordings as an evaluation does what it generated, and prints the
thresholds that real speech passes as seldom as wanted (those of the bundled recordings are in
`moshi_ttt/diagnosis/monitor.py`), and how often each recording passes those of the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from jsonargparse import ArgumentParser
from scipy.stats import chi2

from moshi_ttt.command_line import add_device, add_held_out, add_subjects, parse, program_parser
from moshi_ttt.data import read_recordings
from moshi_ttt.data.bundled import bundled_held_out
from moshi_ttt.diagnosis.listening import decode
from moshi_ttt.diagnosis.monitor import THRESHOLDS, WINDOW_SEC, runs
from moshi_ttt.errors import UserError, check_bounds, run_program
from moshi_ttt.evaluation.talk import speech_of
from moshi_ttt.model.subject import Subject, open_subject
from moshi_ttt.progress import progress
from moshi_ttt.rows import Rows

LEAST_RECORDINGS = 3
LEAST = 1e-3  # threshold, where real speech has nothing of the kind, as it has no clipping
Measures = Mapping[str, np.ndarray]
"""By reason, of the windows of one recording."""


def main(args: list[str] | None = None) -> None:
    """Measure, and print the table."""
    options = parse(_parser(), args)
    if bool(options.model) == bool(options.checkpoint):
        raise UserError("give --model SOURCE or --checkpoint FILE")
    check_bounds("--per_hour", options.per_hour, above=0)
    subject = open_subject(
        options.checkpoint or options.model, options.device, dtype=options.dtype, base=options.base
    )
    manifest = options.manifest or bundled_held_out(subject.source)
    recordings = read_recordings(subject.source, manifest, options.cache_dir)
    found = [
        one
        for one in measured(subject, [one.codes for one in recordings])
        if all(np.isfinite(values).any() for values in one.values())
    ]
    if len(found) < LEAST_RECORDINGS:
        raise UserError(
            f"{manifest} holds {len(found)} recordings with sound on both sides, as long as every "
            f"measure needs; {LEAST_RECORDINGS} or more are needed, give them with --manifest"
        )
    print("\n".join(table(found, options.per_hour)))


def measured(subject: Subject, recordings: Sequence[torch.Tensor]) -> Iterator[Measures]:
    """Measures of each recording [K, T] whose sound is known."""
    lm, source, rows = subject.lm, subject.source, Rows.of(subject.lm)
    codec = source.codec(lm.device)
    padding = (source.text_padding_id, source.end_of_text_padding_id)
    for codes in progress(recordings, desc="measuring", unit="recording"):
        if (codes < 0).any():
            continue
        sound = decode(codec, np.stack([codes[rows.own].numpy(), codes[rows.user].numpy()]))
        yield speech_of(lm, codes, sound).measures(source.clock, padding, lm.card)


def thresholds(recordings: Sequence[Measures], per_hour: float) -> dict[str, float]:
    """What all reasons together pass `per_hour` times an hour, each as often as the others.

    The largest measures of the recordings are taken to follow a Gumbel distribution, fitted by its
    moments: so seldom an alarm is further out than what a few hours hold.
    """
    found = {}
    for reason in THRESHOLDS:
        most = np.array([np.nanmax(one[reason]) for one in recordings])
        hours = float(np.mean([len(one[reason]) for one in recordings])) * WINDOW_SEC / 3600
        scale = most.std(ddof=1) * np.sqrt(6) / np.pi
        alarms = hours * per_hour / len(THRESHOLDS)  # of one recording
        found[reason] = max(LEAST, float(most.mean() - scale * (np.euler_gamma + np.log(alarms))))
    return found


def table(recordings: Sequence[Measures], per_hour: float) -> list[str]:
    """Thresholds, and how often each recording passes those of the others, as lines of text."""
    hours = sum(len(one["silence"]) for one in recordings) * WINDOW_SEC / 3600
    alarms = dict.fromkeys(THRESHOLDS, 0)
    for number, one in enumerate(recordings):
        others = [*recordings[:number], *recordings[number + 1 :]]
        for reason, threshold in thresholds(others, per_hour).items():
            alarms[reason] += len([*runs(one[reason] > threshold)])
    lines = ["| reason | median of real speech | threshold | false alarms |", "|---|---|---|---|"]
    for reason, threshold in thresholds(recordings, per_hour).items():
        usual = float(np.nanmedian(np.concatenate([one[reason] for one in recordings])))
        lines.append(f"| `{reason}` | {usual:.3g} | {threshold:.2g} | {alarms[reason]} |")
    count = sum(alarms.values())
    low, high = chi2.ppf(0.025, 2 * count) / 2 if count else 0.0, chi2.ppf(0.975, 2 * count + 2) / 2
    each = ", ".join(f"{one / hours:.2g}" for one in (low, high))
    return [
        *lines,
        f"{count} false alarms in {hours:.2f} h of {len(recordings)} recordings, each with the "
        f"thresholds of the others: {count / hours:.2g} an hour [{each}]; {per_hour:g} wanted.",
    ]


def _parser() -> ArgumentParser:
    parser = program_parser(__doc__)
    add_subjects(parser)
    add_held_out(parser)
    add_device(parser)
    parser.add_argument(
        "--per_hour", type=float, default=1.0, help="False alarms an hour that are acceptable."
    )
    return parser


if __name__ == "__main__":
    run_program(main)
