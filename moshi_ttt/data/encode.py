"""A manifest of recordings as codes files, once for all trainings: scripts/encode_manifest.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from moshi_ttt.data.codes_file import (
    CODES_SUFFIX,
    CodesFormat,
    read_codes,
    write_codes,
    written_from,
)
from moshi_ttt.data.manifest import ManifestEntry, check_manifest, read_manifest
from moshi_ttt.data.recordings import RecordingReader
from moshi_ttt.errors import UserError
from moshi_ttt.files import clear_litter, why_unreadable, write_bytes
from moshi_ttt.model.source import ModelSource
from moshi_ttt.progress import progress

BATCH_SEC = 3600.0  # encoded with one load of the codec, then written


def encode_manifest(
    manifest: Path,
    out: Path,
    source: ModelSource,
    cache_dir: Path,
    *,
    with_words: bool,
    hours: float | None = None,
) -> None:
    """Write codes files and their manifest, which appears when all of them are there.

    Args:
        manifest: of recordings; all of it must be usable.
        out: folder to write; files in it that were made of the same recordings are kept.
        source: whose codec and tokenizer are used.
        cache_dir: of `RecordingReader`.
        with_words: copy the JSON beside each recording too.
        hours: take only the first recordings, as many as fit; None takes all.

    Raises:
        UserError: something is wrong with the manifest, `out` cannot be written, or not even the
            first recording fits into `hours`.
    """
    codes_format = CodesFormat.of(source)
    check_manifest(
        manifest, source.clock, source.tokenizer(), decode=False, codes_format=codes_format
    ).raise_problems()
    entries, _ = read_manifest(manifest)
    if hours is not None:
        entries = _first_hours(entries, hours, manifest)
    targets = _targets(entries, out)
    clear_litter(out, below=False)
    distinct = list({entry.path: entry for entry in entries}.values())
    missing = [
        entry
        for entry in progress(
            distinct, desc="looking for what is done", unit="recording", leave=False
        )
        if not written_from(targets[entry.path], codes_format, _made_of(entry))
    ]
    reader = RecordingReader(source, cache_dir)
    for batch in _batches(missing):
        for entry, recording in zip(batch, reader.read(batch), strict=True):
            write_codes(targets[entry.path], recording.codes, codes_format, _made_of(entry))
    lines = []
    for entry in entries:
        target = targets[entry.path]
        if with_words and why_unreadable(entry.alignments_path) is None:
            write_bytes(target.with_suffix(".json"), entry.alignments_path.read_bytes())
        # whole steps: what was encoded, the padded last step included
        duration_sec = source.clock.seconds(read_codes(target, codes_format).shape[-1])
        lines.append(json.dumps({"path": target.name, "duration": round(duration_sec, 4)}) + "\n")
    write_bytes(out / "manifest.jsonl", "".join(lines).encode())


def _first_hours(
    entries: Sequence[ManifestEntry], hours: float, manifest: Path
) -> list[ManifestEntry]:
    """The first recordings, as many as fit into `hours`."""
    ends_sec = accumulate(entry.duration_sec for entry in entries)
    fits = sum(end_sec <= 3600 * hours for end_sec in ends_sec)
    if not fits:
        raise UserError(
            f"--hours={hours:g} is less than the first recording of {manifest} "
            f"({entries[0].duration_sec / 3600:.3f} h); give more"
        )
    return list(entries[:fits])


def _targets(entries: Sequence[ManifestEntry], out: Path) -> Mapping[Path, Path]:
    """The codes file of each recording; another one of the same name is given a number."""
    names: dict[str, Path] = {}
    for path in dict.fromkeys(entry.path for entry in entries):
        name, copy = path.stem, 1
        # in the order of the manifest, so that --hours does not change the names of the first
        while name in names:
            copy += 1
            name = f"{path.stem}-{copy}"
        names[name] = path
    targets = {path: out / f"{name}{CODES_SUFFIX}" for name, path in names.items()}
    if {path.resolve() for path in targets} & {path.resolve() for path in targets.values()}:
        raise UserError(f"{out} holds the recordings themselves; give another folder")
    return targets


def _made_of(entry: ManifestEntry) -> str:
    """Fingerprint of a recording: its sound and its words."""
    digest = hashlib.sha256()
    for path in (entry.path, entry.alignments_path):
        content = path.read_bytes() if why_unreadable(path) is None else b""
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _batches(entries: Sequence[ManifestEntry]) -> list[list[ManifestEntry]]:
    """Consecutive recordings of about `BATCH_SEC` together, so that little is lost when stopped."""
    batches: list[list[ManifestEntry]] = []
    seconds = BATCH_SEC
    for entry in entries:
        if seconds >= BATCH_SEC:
            batches.append([])
            seconds = 0.0
        batches[-1].append(entry)
        seconds += entry.duration_sec
    return batches
