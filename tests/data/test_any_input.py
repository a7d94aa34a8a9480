"""Whatever stands in the files of a manifest, the outcome is a check or a `UserError`."""

from __future__ import annotations

import importlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_fakes import CLOCK, LetterTokenizer, write_manifest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from moshi_ttt.data import CodesFormat, ManifestCheck, check_manifest
from moshi_ttt.data.codes_file import read_codes
from moshi_ttt.errors import UserError

SECONDS = 0.5
FORMAT = CodesFormat("codec-1", "letters", 4, (3, 0), 64, 128)
# the files are written anew in each example
any_input = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=8)  # lone surrogates too
    | st.sampled_from([10**400, "a.wav", "b.wav", "../a.wav", "hi", "SPEAKER_MAIN", 0.1])
)
keys = st.text(max_size=4) | st.sampled_from(["path", "duration", "alignments", "probes", "word"])
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4)
)
times = st.floats(0, SECONDS) | scalars
rows = st.lists(
    st.tuples(
        st.text("abc", max_size=3) | values,
        st.tuples(times, times) | values,
        st.sampled_from(["SPEAKER_MAIN", "SPEAKER_USER"]) | scalars,
    )
    | st.fixed_dictionaries({"word": scalars, "start": times, "end": times, "speaker": scalars})
    | values,
    max_size=6,
)
probe_fields: dict[str, Any] = {
    "kind": values,
    "answered_by": st.sampled_from(["SPEAKER_MAIN"]) | values,
    "answer": st.lists(st.tuples(st.text("abc", max_size=3), st.tuples(times, times))) | values,
    "gap_sec": times,
    "chance": times,
    "class": st.sampled_from(["own", "heard"]) | values,
    "asked_at": times,
    "asked_until": times,
    "unseen": values,
}
probes = st.lists(st.fixed_dictionaries({}, optional=probe_fields) | values, max_size=3) | values


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_manifest(tmp_path / "m.jsonl", {"a.wav": SECONDS})


def check(manifest: Path) -> ManifestCheck:
    found = check_manifest(manifest, CLOCK, LetterTokenizer(), decode=False, codes_format=FORMAT)
    importlib.import_module("check_manifest").describe(found).encode(errors="backslashreplace")
    assert all(text.startswith("line ") for text in (*found.problems, *found.warnings))
    return found


@any_input
@given(lines=st.lists(values | st.binary(max_size=20), min_size=1, max_size=4))
def test_any_manifest_is_checked_or_refused(manifest: Path, lines: list[Any]) -> None:
    texts = [
        line if isinstance(line, bytes) else json.dumps(line).encode(errors="surrogatepass")
        for line in lines
    ]
    manifest.write_bytes(b"\n".join(texts))
    with suppress(UserError):
        check(manifest)


@any_input
@given(path=st.sampled_from(["a.wav"]) | st.text(), duration=times)
def test_any_line_is_checked(manifest: Path, path: str, duration: Any) -> None:
    manifest.write_text(json.dumps({"path": path, "duration": duration}))
    found = check(manifest)
    assert found.recordings + len(found.problems) >= 1


@any_input
@given(rows=rows | values, probes=probes)
def test_any_alignments_and_probes_are_checked(manifest: Path, rows: Any, probes: Any) -> None:
    (manifest.parent / "a.json").write_text(json.dumps({"alignments": rows, "probes": probes}))
    found = check(manifest)
    assert found.recordings == 1


@any_input
@given(
    shape=st.lists(st.integers(0, 7), max_size=3),
    dtype=st.sampled_from(["int16", ">i2", "int64", "float32", "bool", "U3", "complex64"]),
    codec=st.sampled_from(["codec-1"]) | st.text(max_size=5),
    value=st.integers(-3, 200),
)
def test_any_arrays_are_codes_of_the_model_or_refused(
    manifest: Path, shape: list[int], dtype: str, codec: str, value: int
) -> None:
    path = manifest.parent / "a.npz"
    codes = np.full(shape, value).astype(dtype)
    np.savez(path, codes=codes, codec=np.array(codec), tokenizer=np.array("letters"))
    usable = dtype == "int16" and len(shape) == 2 and shape[0] == 5 and shape[1] > 0
    usable = usable and -1 <= value < 64 and codec == "codec-1"
    if usable:
        assert read_codes(path, FORMAT).shape == tuple(shape)
    else:
        with pytest.raises(UserError, match=r"a\.npz"):
            read_codes(path, FORMAT)


@any_input
@given(content=st.binary(max_size=300), start=st.sampled_from([b"", b"PK\x03\x04", b"RIFF"]))
@pytest.mark.parametrize("name", ["a.wav", "a.npz", "a.json"])
def test_any_bytes_are_refused_by_name(
    manifest: Path, name: str, content: bytes, start: bytes
) -> None:
    assume(start + content)
    (manifest.parent / name).write_bytes(start + content)
    if name == "a.npz":
        manifest.write_text(json.dumps({"path": name, "duration": SECONDS}))
    (problem,) = check(manifest).problems
    assert name in problem
