"""Encode the recordings of a manifest into codes files, about 1 MB an hour.

    python scripts/encode_manifest.py my.jsonl codes/train
    python scripts/encode_manifest.py held_out.jsonl codes/held_out --with_words

Writes OUT/NAME.npz for every recording (NAME-2.npz for another of that name) and
OUT/manifest.jsonl, which trains like the manifest of the audio, without audio and without encoding.
Run again it goes on where it stopped; recordings that changed, or another model, are encoded again.
Codec and tokenizer are those of `--model`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from moshi_ttt.command_line import add_cache_dir, add_model, parse, program_parser
from moshi_ttt.data.codes_file import CODES_SUFFIX
from moshi_ttt.data.encode import encode_manifest
from moshi_ttt.errors import run_program, settings_at
from moshi_ttt.model.source import TINY, open_source


def main(args: list[str] | None = None) -> None:
    """Encode as the command line says.

    Raises:
        UserError: the manifest cannot be used, or there is no such model.
    """
    options = parse(_parser(), args)
    with settings_at("", source="--model"):
        source = open_source(options.model)
    encode_manifest(
        options.manifest,
        options.out,
        source,
        options.cache_dir,
        with_words=options.with_words,
        hours=options.hours,
    )
    size = sum(path.stat().st_size for path in options.out.glob(f"*{CODES_SUFFIX}"))
    print(f"{options.out / 'manifest.jsonl'} ({size / 1e6:.2f} MB of codes)")


def _parser() -> ArgumentParser:
    parser = program_parser(__doc__)
    add: Any = parser.add_argument
    add("manifest", type=Path, help="Recordings to encode.")
    add("out", type=Path, help="Folder to write.")
    add_model(parser, default=TINY)
    add(
        "--with_words",
        action="store_true",
        help="Copy the JSON beside each recording too: alignments, and probes of held-out sets.",
    )
    add("--hours", type=float, help="Only the first recordings, as many as fit; null: all.")
    add_cache_dir(parser)
    return parser


if __name__ == "__main__":
    run_program(main)
