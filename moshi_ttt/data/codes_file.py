"""Recordings that were encoded before: one `.npz` in place of the audio, about 1 MB an hour.

Codes say nothing without the codec and the tokenizer they were made with, so the file names both
by fingerprint, and is refused by every other model.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moshi_ttt.data.json_text import PATHS_REMEDY
from moshi_ttt.data.text import ZERO_TOKEN
from moshi_ttt.errors import UserError
from moshi_ttt.files import require_readable, write_atomic
from moshi_ttt.model.source import ModelSource
from moshi_ttt.rows import AUDIO_ROWS, TEXT_ROW

CODES_SUFFIX = ".npz"
MOST_BYTES = {"codes": 1 << 27, "codec": 1 << 16, "tokenizer": 1 << 16, "made_of": 1 << 16}
"""What each array of a file may unpack to: 88 h of Moshi's codes, and names."""
REMEDY = "encode the recording again with scripts/encode_manifest.py"


@dataclass(frozen=True, slots=True)
class CodesFormat:
    """What codes must have been made with to mean something to a model."""

    codec: str
    """`ModelSource.codec_fingerprint`."""
    tokenizer: str
    """`ModelSource.tokenizer_fingerprint`."""
    codebooks: int
    """Audio rows: Moshi's and the user's."""
    padding_ids: tuple[int, int]
    """Text tokens of steps without a word: padding, end of padding."""
    card: int
    """Entries of a codebook; the model has embeddings and outputs for codes below it."""
    text_card: int
    """The same of text tokens."""

    @classmethod
    def of(cls, source: ModelSource) -> CodesFormat:
        """The format that a model reads."""
        return cls(
            source.codec_fingerprint,
            source.tokenizer_fingerprint,
            source.n_q,
            (source.text_padding_id, source.end_of_text_padding_id),
            source.card,
            source.text_card,
        )

    def text_tokens(self, codes: Tensor) -> int:
        """Tokens of words in the text row of `codes` [17, T]."""
        silent = torch.tensor([ZERO_TOKEN, *self.padding_ids])
        return int((~torch.isin(codes[TEXT_ROW], silent)).sum())


def write_codes(path: Path, codes: Tensor, made_with: CodesFormat, made_of: str) -> None:
    """Write a codes file, atomically; equal contents give equal bytes.

    Args:
        path: ends in `.npz`.
        codes: [17, T] text, Moshi's 8 codebooks, the user's 8; every value below 32768.
        made_with: fingerprints to write beside them.
        made_of: fingerprint of the recording, by which `written_from` knows it again.
    """
    arrays = {
        "codes": codes.to(torch.int16).numpy(),
        "codec": np.array(made_with.codec),
        "tokenizer": np.array(made_with.tokenizer),
        "made_of": np.array(made_of),
    }
    write_atomic(path, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))


def read_codes(path: Path, expected: CodesFormat | None) -> Tensor:
    """Read a codes file.

    Args:
        path: the file.
        expected: format of the model that will read the codes; None checks only what needs no
            model.

    Returns:
        [17, T] int64: text, Moshi's 8 codebooks, the user's 8; -1 where nothing is known.

    Raises:
        UserError: missing, damaged, of a wrong shape or range, or made with another codec or
            tokenizer.
    """
    found = _load(path)
    codes = found["codes"]
    rows = "1 + codebooks" if expected is None else str(1 + expected.codebooks)
    right = codes.dtype == np.int16 and codes.ndim == 2 and codes.size > 0
    if not right or (expected is not None and len(codes) != 1 + expected.codebooks):
        raise UserError(
            f"{path}: codes are {codes.dtype} {list(codes.shape)}; the rule is int16 [{rows}, "
            f"steps], text above Moshi's codebooks above the user's: {REMEDY}"
        )
    if expected is not None:
        for what in ("codec", "tokenizer"):
            got, wanted = str(found[what]), getattr(expected, what)
            if got != wanted:
                raise UserError(
                    f"{path} was made with {what} {got[:12]}, and the model has {what} "
                    f"{wanted[:12]}; {REMEDY}, or use the model it was made for"
                )
        _check_range(path, "text token", codes[TEXT_ROW], expected.text_card)
        _check_range(path, "code", codes[AUDIO_ROWS], expected.card)
    return torch.from_numpy(codes.astype(np.int64))


def _check_range(path: Path, what: str, codes: np.ndarray, card: int) -> None:
    """Refuse what the model has no embedding for: it would end the training on a GPU."""
    wrong = codes[(codes < ZERO_TOKEN) | (codes >= card)]
    if wrong.size:
        raise UserError(
            f"{path}: {what} {wrong[0]} is outside the model's {ZERO_TOKEN}..{card - 1} "
            f"({ZERO_TOKEN} is unknown); {REMEDY}, or use the model it was made for"
        )


def written_from(path: Path, made_with: CodesFormat, made_of: str) -> bool:
    """Whether `path` is a whole codes file of just this recording in just this format."""
    try:
        read_codes(path, made_with)
        return str(_load(path).get("made_of")) == made_of
    except UserError:
        return False


def _load(path: Path) -> dict[str, np.ndarray]:
    require_readable(path, "codes file", PATHS_REMEDY)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {Path(info.filename).stem: info for info in archive.infolist()}
            found = {
                name: _array(archive, members[name], most)
                for name, most in MOST_BYTES.items()
                if name in members
            }
    # what zipfile, its decompressors and numpy's parser of headers raise is nowhere listed
    except Exception as error:
        raise UserError(f"{path} is damaged ({error!s:.200}); restore it, or {REMEDY}") from error
    missing = {"codes", "codec", "tokenizer"} - found.keys()
    if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}; {REMEDY}")
    return found


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most_bytes: int) -> np.ndarray:
    """One array of a codes file; nothing is unpacked that could not be one, and no pickle."""
    if info.flag_bits & 1:
        raise ValueError(f"{info.filename} is encrypted")
    # zipfile unpacks no more than the directory says
    if info.file_size > most_bytes:
        raise ValueError(
            f"{info.filename} unpacks to {info.file_size} bytes, the most is {most_bytes}"
        )
    content = archive.read(info)
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{info.filename} is of another version than numpy writes")
    shape, by_column, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError(f"{info.filename} is a pickle, which is never loaded")
    # not numpy's reader, which makes an array of the shape claimed before it looks for its numbers
    numbers = np.frombuffer(content, dtype, offset=file.tell())
    return numbers.reshape(shape, order="F" if by_column else "C")
