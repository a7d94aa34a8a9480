"""Codes files that are damaged or meant to do damage: refused, in little memory."""

from __future__ import annotations

import io
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moshi_ttt.data.codes_file import CodesFormat, read_codes, write_codes
from moshi_ttt.errors import UserError

FORMAT = CodesFormat("codec-1", "letters", 4, (3, 0), 64, 128)
CODES = torch.arange(5 * 12).view(5, 12)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.npz"
    write_codes(path, CODES, FORMAT, "x")
    return path


def header(shape: tuple[int, ...], descr: str = "<i2") -> bytes:
    """What stands before the numbers in a .npy."""
    file = io.BytesIO()
    content = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, content)
    return file.getvalue()


def put(path: Path, name: str, start: bytes, zeros: int = 0) -> None:
    """Replace a member by `start` and as many zeros."""
    with zipfile.ZipFile(path) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    content.pop(name, None)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for other, data in content.items():
            archive.writestr(other, data)
        with archive.open(name, "w", force_zip64=True) as file:
            file.write(start)
            for _ in range(zeros >> 20):
                file.write(bytes(1 << 20))


def encrypt(path: Path) -> None:
    """Say of every member, in front of it and in the directory, that it is encrypted."""
    content = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.find(mark)
        while place >= 0:
            content[place + flags] |= 1
            place = content.find(mark, place + 4)
    path.write_bytes(content)


class Trap:
    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was loaded",)


def set_trap(path: Path) -> None:
    np.savez(path, codes=np.array([Trap()], object), codec="codec-1", tokenizer="letters")


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda p: put(p, "codes.npy", header((5, 10**9)), 1 << 28), "codes.npy unpacks to 2684"),
        (lambda p: put(p, "codec.npy", header((), "<U67108864"), 1 << 28), "codec.npy unpacks to"),
        (lambda p: put(p, "codes.npy", header((5, 1 << 50))), "damaged"),
        (lambda p: put(p, "codes.npy", header((5, 12))), "damaged"),
        (lambda p: put(p, "codes.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': ((((("), "damaged"),
        (encrypt, "encrypted"),
        (lambda p: p.write_bytes(pickle.dumps(Trap())), "damaged .*not a zip"),
        (set_trap, "damaged .*codes.npy is a pickle, which is never loaded"),
    ],
)
def test_bombs_locks_and_pickles_are_refused_in_little_memory(
    path: Path, spoil: Callable[[Path], None], complaint: str
) -> None:
    spoil(path)
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"a\.npz.*{complaint}.*encode_manifest\.py"):
        read_codes(path, FORMAT)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_what_a_file_holds_besides_is_not_unpacked(path: Path) -> None:
    put(path, "other.npy", header((1 << 28,), "|i1"), 1 << 28)
    tracemalloc.start()
    assert torch.equal(read_codes(path, FORMAT), CODES)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_byte_that_changed_is_refused_or_changes_nothing(path: Path) -> None:
    whole = path.read_bytes()
    refused = 0
    for place in range(len(whole)):
        for change in (1, 0xFF):
            content = bytearray(whole)
            content[place] ^= change
            path.write_bytes(content)
            try:
                assert torch.equal(read_codes(path, FORMAT), CODES)
            except UserError:
                refused += 1
    assert refused > len(whole)


def test_a_file_cut_short_anywhere_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged"):
            read_codes(path, FORMAT)
