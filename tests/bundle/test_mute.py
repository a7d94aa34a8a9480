"""Recordings without the sound of a side."""

from __future__ import annotations

import json
from pathlib import Path

import mute
import pytest

from moshi_ttt.data import read_manifest
from moshi_ttt.data.codes_file import read_codes
from moshi_ttt.model.source import ASSETS, open_source
from moshi_ttt.rows import Rows


@pytest.mark.parametrize("side", ["own", "user", "both"])
def test_the_sound_of_a_side_goes_and_all_else_stays(tmp_path: Path, side: mute.Side) -> None:
    before = read_manifest(ASSETS / "conversations/heldout/manifest.jsonl")[0][0]
    line = json.dumps({"path": str(before.path), "duration": before.duration_sec})
    (tmp_path / "one.jsonl").write_text(line)
    mute.main(tmp_path / "one.jsonl", tmp_path / "out", model="tiny", side=side)
    (after,) = read_manifest(tmp_path / "out/manifest.jsonl")[0]
    assert after.alignments_path.read_bytes() == before.alignments_path.read_bytes()
    found, expected = (read_codes(one.path, None) for one in (after, before))
    rows = Rows.of(open_source("tiny"))
    for name, part in (("own", rows.own), ("user", rows.user)):
        if side in (name, "both"):
            expected[part] = -1
    assert found.equal(expected)
    assert found[0].ge(0).all()
