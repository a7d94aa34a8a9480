"""Codes on disk: encoded once, found again by what they were made of."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from moshi_ttt.data.json_text import PATHS_REMEDY
from moshi_ttt.files import (
    MISSING,
    clear_litter,
    require_readable,
    why_unreadable,
    write_bytes,
)

FORMAT_VERSION = 2  # raise it when reading, resampling or encoding changes

logger = logging.getLogger(__name__)


class CodeCache:
    """A folder of `KEY.safetensors`; the key hashes the audio file, the codec and the settings.

    Writes are atomic, so processes that encode the same file at once both leave a whole one.
    A file that does not match its own checksum counts as absent. What writers that were killed
    left is removed.

    Args:
        folder: made when first written to.
        settings: everything besides the audio that codes depend on, as JSON values.
    """

    def __init__(self, folder: Path, settings: dict[str, str | int]) -> None:
        self.folder = folder
        clear_litter(folder, below=False)
        self._settings = {"format": FORMAT_VERSION, **settings}
        self._audio_digests: dict[Path, str] = {}

    def path(self, audio_path: Path) -> Path:
        """Where the codes of an audio file are kept."""
        if audio_path not in self._audio_digests:
            require_readable(audio_path, "audio file", PATHS_REMEDY)
            with audio_path.open("rb") as file:
                self._audio_digests[audio_path] = hashlib.file_digest(file, "sha256").hexdigest()
        text = json.dumps({"audio": self._audio_digests[audio_path], **self._settings})
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.safetensors"

    def load(self, audio_path: Path) -> Tensor | None:
        """Codes of an audio file, [rows, T] int64; None if they must be made (again)."""
        path = self.path(audio_path)
        if why_unreadable(path) == MISSING:
            return None
        try:
            with safe_open(path, "pt") as file:
                codes = file.get_tensor("codes")
                intact = (file.metadata() or {}).get("digest") == _digest(codes)
        except (SafetensorError, OSError) as error:
            logger.warning("%s is damaged (%s); encoding %s again", path, error, audio_path)
            return None
        if not intact:
            logger.warning("%s fails its checksum; encoding %s again", path, audio_path)
            return None
        return codes.long()

    def store(self, audio_path: Path, codes: Tensor) -> None:
        """Keep codes, [rows, T], every value below 32768."""
        compact = codes.to(torch.int16).contiguous()
        content = save({"codes": compact}, {"digest": _digest(compact)})
        write_bytes(self.path(audio_path), content)


def _digest(codes: Tensor) -> str:
    return hashlib.sha256(repr(codes.shape).encode() + codes.numpy().tobytes()).hexdigest()
