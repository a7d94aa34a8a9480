"""Damage valid input at random and see that only `UserError` comes of it: `python fuzz.py`.

Each case damages one file of a small data set (manifest, alignments and probes, codes file, or
audio) and reads it the way check_manifest.py does. Prints what was refused and what was accepted;
an exception of another kind is printed with the seed of its case. Exit status 1 if there was one.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from moshi_ttt.command_line import parse, program_parser
from moshi_ttt.data import CodesFormat, ManifestCheck, check_manifest
from moshi_ttt.data.codes_file import write_codes
from moshi_ttt.errors import UserError, run_program
from moshi_ttt.model.source import TINY, ModelSource, open_source

AUDIO_SEC = 0.16
LONGEST_SEC = 5  # a case that takes longer hangs
HEADER_BYTES = 100
MEMORY = Path("/dev/shm")  # rewriting a file on a disk takes longer than reading it twice
PROBE = {
    "kind": "code",
    "answered_by": "SPEAKER_MAIN",
    "answer": [["four", [0.0, 0.1]]],
    "gap_sec": 40.2,
    "chance": 0.1,
    "class": "own",
    "asked_at": 0.0,
    "unseen": ["key"],
}
TOKENS = (
    *(b"null", b"true", b"-1", b"1e308", b"NaN", b"9" * 400, b"[" * 2000, b"{", b"]", b'"', b","),
    *(b"\\ud800", b"\\u0000", b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\n", b"\x00" * 4),
    *(b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"PK\x01\x02", b"..", b"/", b"\\\\", b"0" * 300),
)


def main(args: list[str] | None = None) -> int:
    """Run as many cases as the command line says.

    Returns:
        The exit status: 0, or 1 if anything but a `UserError` came of a case.
    """
    parser = program_parser(__doc__)
    add: Any = parser.add_argument
    add("--cases", type=int, default=100_000, help="Files to damage and read.")
    add("--seed", type=int, default=0, help="Of the first case; each has the next.")
    options = parse(parser, args)
    source = open_source(TINY)
    outcomes: Counter[tuple[str, str]] = Counter()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        files = _write_valid(Path(name), source)
        reader = _Reader(Path(name), source)
        for seed in range(options.seed, options.seed + options.cases):
            path, outcome = _case(random.Random(seed), files, reader)
            outcomes[path.name, outcome] += 1
            if outcome not in ("accepted", "refused"):
                print(f"seed {seed}: {path.name}: {outcome}")
    for (name, outcome), count in sorted(outcomes.items()):
        print(f"{name:16} {count:>8}  {outcome}")
    wrong = sum(n for (_, what), n in outcomes.items() if what not in ("accepted", "refused"))
    seconds = time.perf_counter() - started
    print(f"{options.cases} cases in {seconds:.0f} s, {wrong} with an exception of another kind")
    return int(wrong > 0)


class _Hang(BaseException):
    """A case that took too long; nobody who catches an `Exception` may take it for one."""


class _Reader:
    """Checks the data set as check_manifest.py does."""

    def __init__(self, folder: Path, source: ModelSource) -> None:
        self._folder = folder
        self._clock = source.clock
        self._tokenizer = source.tokenizer()
        self._format = CodesFormat.of(source)

    def check(self, manifest: str) -> ManifestCheck:
        return check_manifest(
            self._folder / manifest,
            self._clock,
            self._tokenizer,
            decode=True,
            codes_format=self._format,
        )


def _write_valid(folder: Path, source: ModelSource) -> dict[Path, tuple[bytes, str]]:
    """A data set without problems: by file, its content and a manifest that leads to it."""
    files = {}
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (round(AUDIO_SEC * 24_000), 2))
    words = {"alignments": [["four", [0.0, 0.1], "SPEAKER_MAIN"]], "probes": [PROBE]}
    for name in ("a.wav", "a.flac", "a.ogg"):
        subtype = "FLOAT" if name.endswith("wav") else None
        soundfile.write(folder / name, samples, 24_000, subtype)
    (folder / "a.json").write_text(json.dumps(words))
    codes = torch.zeros(1 + source.n_q, 2, dtype=torch.int64)
    write_codes(folder / "b.npz", codes, CodesFormat.of(source), "x")
    for name in ("a.wav", "a.flac", "a.ogg", "b.npz"):
        line = {"path": name, "duration": AUDIO_SEC}
        manifest = folder / f"{name}.jsonl"
        manifest.write_text(json.dumps(line))
        files[folder / name] = (folder / name).read_bytes(), manifest.name
    for name in ("a.json", "a.wav.jsonl", "b.npz.jsonl"):
        reader = name if name.endswith(".jsonl") else "a.wav.jsonl"
        files[folder / name] = (folder / name).read_bytes(), reader
    return files


def _case(
    rng: random.Random, files: dict[Path, tuple[bytes, str]], reader: _Reader
) -> tuple[Path, str]:
    """Damage one file, read it, restore it."""
    path = rng.choice(list(files))
    content, manifest = files[path]
    path.write_bytes(_damage(rng, content))
    try:
        with _time_limit():
            outcome = "refused" if reader.check(manifest).problems else "accepted"
    except UserError:
        outcome = "refused"
    except (Exception, _Hang) as error:
        outcome = f"{type(error).__name__}: {error!s:.120}"
    path.write_bytes(content)
    return path, outcome


def _damage(rng: random.Random, content: bytes) -> bytes:
    """Change bits, cut, repeat or insert, up to four times."""
    found = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(found) + 1)
        if rng.randrange(2):  # headers are short, and most can go wrong there
            start = min(start, rng.randrange(HEADER_BYTES))
        end = min(len(found), start + rng.choice((1, 1, 2, 4, 16, 200)))
        match rng.randrange(5):
            case 0 if start < len(found):
                found[start] ^= 1 << rng.randrange(8)
            case 1:
                del found[start:end]
            case 2:
                found[start:start] = found[start:end] * rng.choice((1, 2, 50))
            case 3:
                found[start:end] = rng.choice(TOKENS)
            case _:
                found[start:start] = rng.choice(TOKENS)
    return bytes(found)


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise `_Hang` within what takes too long."""

    def stop(*_: object) -> None:
        raise _Hang(f"took more than {LONGEST_SEC} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST_SEC)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    sys.exit(run_program(main))
