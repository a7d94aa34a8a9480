"""Take sound out of an encoded set, to see what is recalled from the words alone.

    python scripts/bundle/mute.py build/heldout/manifest.jsonl build/words --model build/tiny
    python scripts/bundle/mute.py build/heldout/manifest.jsonl build/alone --model build/tiny \
        --side user

Writes the same recordings into OUT, their audio unknown (-1: no input, no target), with the words
and probes beside them, and a manifest.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, Literal

from moshi_ttt.command_line import add_model, parse, program_parser
from moshi_ttt.data import CodesFormat, read_manifest
from moshi_ttt.data.codes_file import read_codes, write_codes
from moshi_ttt.data.text import ZERO_TOKEN
from moshi_ttt.errors import run_program, settings_at
from moshi_ttt.files import write_bytes
from moshi_ttt.model.source import open_source
from moshi_ttt.rows import Rows

Side = Literal["own", "user", "both"]


def main(manifest: Path, out: Path, *, model: str, side: Side = "both") -> None:
    """Write the set without the sound of a side.

    Raises:
        UserError: the manifest, a recording or the model cannot be read.
    """
    with settings_at("", source="--model"):
        source = open_source(model)
    rows, made_with = Rows.of(source), CodesFormat.of(source)
    silent = {"own": [rows.own], "user": [rows.user], "both": [rows.own, rows.user]}[side]
    lines = []
    for entry in read_manifest(manifest)[0]:
        codes = read_codes(entry.path, made_with).clone()
        for one in silent:
            codes[one] = ZERO_TOKEN
        write_codes(out / entry.path.name, codes, made_with, f"{entry.path.name} without {side}")
        beside = entry.alignments_path.read_bytes()
        write_bytes(out / entry.alignments_path.name, beside)
        seconds = round(source.clock.seconds(codes.shape[-1]), 4)
        lines.append(json.dumps({"path": entry.path.name, "duration": seconds}) + "\n")
    write_bytes(out / "manifest.jsonl", "".join(lines).encode())


if __name__ == "__main__":
    parser = program_parser(__doc__)
    add: Any = parser.add_argument
    add("manifest", type=Path, help="Encoded recordings.")
    add("out", type=Path, help="Folder to write.")
    add_model(parser, required=True)
    add("--side", type=Side, default="both", help="Whose sound to take out.")
    run_program(partial(main, **vars(parse(parser, None))))
