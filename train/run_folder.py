"""Where a run writes, and what it resumes from."""

from __future__ import annotations

import fcntl
import os
import socket
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moshi_ttt.errors import UserError
from moshi_ttt.files import clear_litter

LAST = Path("checkpoints/last.ckpt")
PREVIOUS = LAST.with_name("previous.ckpt")
BEST = LAST.with_name("best.safetensors")
_LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a run in here.

    What a process that was killed left half written is removed.

    Raises:
        UserError: another process is writing to it.
    """
    with (folder / _LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{folder} is being written to by {file.read().strip() or 'another process'}; wait "
                "for its end, or leave out --ckpt_path to begin a new run"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        clear_litter(folder)
        yield


def find_checkpoint(root: Path, resume: str | None) -> Path | None:
    """The checkpoint file that `--ckpt_path` means.

    Of a run whose `last.ckpt` cannot be read the one before is taken, and that is said.

    Raises:
        UserError: there is none.
    """
    if resume is None:
        return None
    if resume != "last":
        if not Path(resume).is_file():
            raise UserError(f"--ckpt_path {resume} does not exist; give a .ckpt file or `last`")
        if not _is_whole(Path(resume)):
            raise UserError(f"--ckpt_path {resume} is damaged or no checkpoint; give another one")
        return Path(resume)
    found = [file for name in (LAST, PREVIOUS) for file in root.glob(f"[0-9][0-9][0-9]/{name}")]
    if not found:
        raise UserError(
            f"--ckpt_path last: no {root}/NNN/{LAST}; start without it, or set --run_dir to the "
            "folder of the run to resume"
        )
    newest = max(file.parent.parent for file in found)
    last, previous = newest / LAST, newest / PREVIOUS
    if _is_whole(last):
        return last
    if not _is_whole(previous):
        raise UserError(f"--ckpt_path last: {last} is damaged, and no other is there; start anew")
    print(f"{last} is missing or damaged; resuming from the one before it, {previous.name}")
    return previous


def folder_of(checkpoint: Path, root: Path) -> Path | None:
    """The run in `root` that wrote a checkpoint, and goes on in its folder; None for any other."""
    folder = checkpoint.absolute().parent.parent
    own = checkpoint.absolute() in (folder / LAST, folder / PREVIOUS)
    return root / folder.name if own and folder.parent == root.absolute() else None


def _is_whole(path: Path) -> bool:
    """Whether everything in the archive is as it was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
