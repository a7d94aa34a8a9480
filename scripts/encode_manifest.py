"""Encode the recordings of a manifest into codes files, about 1 MB an hour.

    python scripts/encode_manifest.py my.jsonl codes/train
    python scripts/encode_manifest.py held_out.jsonl codes/held_out --with-words

Writes OUT/NAME.npz for every recording and OUT/manifest.jsonl, which trains like the manifest of
the audio, without audio and without encoding. Run again it goes on where it stopped; recordings
that changed, or another model, are encoded again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moshi_ttt.data.codes_file import CODES_SUFFIX
from moshi_ttt.data.encode import encode_manifest
from moshi_ttt.errors import UserError
from moshi_ttt.model.source import open_source


def main(args: list[str] | None = None) -> int:
    """Encode as the command line says.

    Returns:
        The exit status: 0, or 2 for a manifest that cannot be used.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifest", type=Path, help="recordings to encode")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--model", default="tiny", help="whose codec and tokenizer: tiny, a folder or a hub id"
    )
    parser.add_argument(
        "--with-words",
        action="store_true",
        help="copy the JSON beside each recording too: alignments, and the probes of held-out sets",
    )
    parser.add_argument(
        "--hours", type=float, help="only the first recordings, as many as fit into it"
    )
    parser.add_argument(
        "--cache_dir", type=Path, default=Path(".cache/codes"), help="cache of encoded audio"
    )
    options = parser.parse_args(args)
    try:
        source = open_source(options.model)
        encode_manifest(
            options.manifest,
            options.out,
            source,
            options.cache_dir,
            with_words=options.with_words,
            hours=options.hours,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in options.out.glob(f"*{CODES_SUFFIX}"))
    print(f"{options.out / 'manifest.jsonl'} ({size / 1e6:.2f} MB of codes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
