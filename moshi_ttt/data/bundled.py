"""The bundled recordings: which of them a model can read."""

from __future__ import annotations

from pathlib import Path

from moshi_ttt.model.source import ASSETS, TINY, ModelSource, open_source


def bundled_held_out(source: ModelSource) -> Path:
    """Manifest of the bundled held-out conversations as a model can read them.

    Codes of all of them for the bundled codec and tokenizer, the audio of one for any other.
    """
    bundle = open_source(TINY)
    if (source.codec_fingerprint, source.tokenizer_fingerprint) == (
        bundle.codec_fingerprint,
        bundle.tokenizer_fingerprint,
    ):
        return ASSETS / "conversations" / "heldout" / "manifest.jsonl"
    return ASSETS / "demo" / "val.jsonl"
