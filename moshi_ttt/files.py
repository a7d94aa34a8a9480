"""Files that matter: why one cannot be read, and writing it whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from moshi_ttt.errors import UserError

MISSING = "it does not exist"
_TEMPORARY = ".tmp"


def why_unreadable(path: Path) -> str | None:
    """Why a file cannot be read; None if it can. A pipe is not opened: it might never answer."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return "it is a folder"
        if not stat.S_ISREG(mode):
            return "it is a pipe or a device"
        path.open("rb").close()
    except OSError as error:
        # a name too long for a file system is not in it
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
        return MISSING if missing else str(error.strerror)
    except ValueError as error:  # a name with a null byte
        return str(error)
    return None


def require_readable(path: Path, what: str, remedy: str) -> None:
    """Refuse what `why_unreadable`, before anything opens it.

    Args:
        path: the file.
        what: it is, for the message.
        remedy: what to do if it cannot be read.

    Raises:
        UserError: it cannot be read.
    """
    reason = why_unreadable(path)
    if reason is not None:
        raise UserError(f"{what} {path} cannot be read ({reason}); {remedy}")


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it into place, all on disk.

    Raises:
        UserError: the disk is full, the folder read-only, or anything else the system refuses.
    """
    try:
        _write_atomic(path, write)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); make room or give permission, "
            "or choose another folder"
        ) from error


def _write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = _temporary(path)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)  # closed, it would count as litter
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        # torch.save, broken off, fails once more while it closes its archive
        if isinstance(error, RuntimeError) and error.__context__ is not None:
            raise error.__context__ from None
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)


def _temporary(path: Path) -> tuple[int, str]:
    """An open file beside `path`, locked to say that its writer lives, and its name."""
    while True:
        # a short name: the longest that a folder takes leaves no room for more
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name[:32]}.", suffix=_TEMPORARY
        )
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_SH)
        if os.fstat(handle).st_nlink:
            return handle, name
        os.close(handle)  # taken for litter before it was locked


def clear_litter(folder: Path, *, below: bool = True) -> None:
    """Remove what processes that were killed left half written in here, and below.

    Others may be writing meanwhile: their files are locked, and stay. Not `below` in a folder that
    people choose: what lies under it may be theirs.
    """
    pattern = f".*{_TEMPORARY}"
    for half in folder.rglob(pattern) if below else folder.glob(pattern):
        with suppress(OSError), half.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            half.unlink()


def next_folder(root: Path) -> Path:
    """The first unused `root/000`, `root/001`, ...; nothing is ever overwritten."""
    taken = [int(path.name) for path in root.glob("[0-9][0-9][0-9]")]
    return root / f"{max(taken, default=-1) + 1:03d}"


def claim_folder(root: Path, setting: str) -> Path:
    """Make the next one; of several runs that start at once each gets its own.

    Args:
        root: what people chose.
        setting: how they chose it, for the errors.

    Raises:
        UserError: it cannot be made.
    """
    while True:
        folder = next_folder(root)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not root.is_dir():
                raise UserError(f"{setting}={root} is not a folder; give another one") from None
        except OSError as error:
            raise UserError(
                f"{setting}={root} cannot be written to ({error.strerror}); give another folder"
            ) from error
        else:
            return folder


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content`, atomically."""
    write_atomic(path, lambda file: file.write(content))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN becomes null."""
    text = json.dumps(plain(value), indent=2, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def plain(value: Any) -> Any:
    """What JSON can hold: dataclasses as dicts, arrays as lists, NaN and infinities as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
