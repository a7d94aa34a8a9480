"""Which room may import which, and how long files and functions may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# lowest first; a room imports rooms of lower rows only, never one beside it
LAYERS = (
    ("ground",),  # the files of moshi_ttt itself: clock, errors, files, ...
    ("memory",),
    ("model",),
    ("data", "instruments"),
    ("teacher_forcing", "generation", "diagnosis"),
    ("evaluation",),
    ("attribution",),
    ("report",),
    ("callbacks",),
    ("train",),
    ("scripts",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
# lower, and yet not for them: what generates takes an observer, whatever it is
APART = {("generation", "instruments")}
OUTER = {"callbacks", "train", "scripts"}  # beside moshi_ttt; they may know these:
FRAMEWORKS = ("lightning", "pytorch_lightning", "tensorboard", "torch.utils.tensorboard")

MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 60
EXCEPTIONS: dict[str, str] = {
    # "path" or "path::function": "why it is better long"
}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


CODE = sources("moshi_ttt", *OUTER)
# programs and tests import the files beside them by name alone
SCRIPTS = {path.stem for path in sources("scripts")}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: Path) -> str:
    top, *inner = path.relative_to(ROOT).parts
    if top in OUTER:
        return top
    return inner[0] if len(inner) > 1 else "ground"


def room_of_module(module: str) -> str | None:
    """The room of a module of this repository; None for any other."""
    top, *inner = module.split(".")
    if top in OUTER or top in SCRIPTS:
        return top if top in OUTER else "scripts"
    if top != "moshi_ttt":
        return None
    return inner[0] if inner and (ROOT / "moshi_ttt" / inner[0]).is_dir() else "ground"


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of all that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: write imports in full"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def test_every_file_is_in_a_room_with_a_place_in_the_order() -> None:
    assert {room_of(path) for path in CODE} <= LEVEL.keys()


def test_a_room_imports_lower_rooms_only() -> None:
    wrong = []
    for path in CODE:
        room = room_of(path)
        for line, module in imports(path):
            other = room_of_module(module)
            if other is None or other == room:
                continue
            if LEVEL[other] >= LEVEL[room] or (room, other) in APART:
                wrong.append(f"{name_of(path)}:{line}: {room} imports {module} ({other})")
    assert not wrong, "\n".join(wrong)


def test_moshi_ttt_knows_neither_lightning_nor_tensorboard() -> None:
    wrong = [
        f"{name_of(path)}:{line}: {module}"
        for path in sources("moshi_ttt")
        for line, module in imports(path)
        if any(f"{module}.".startswith(f"{framework}.") for framework in FRAMEWORKS)
    ]
    assert not wrong, "\n".join(wrong)


def long_ones(path: Path) -> Iterator[tuple[str, int, int]]:
    """What of a file passes its limit: name, lines, limit."""
    text = path.read_text(encoding="utf-8")
    if (lines := len(text.splitlines())) > MAX_FILE_LINES:
        yield name_of(path), lines, MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            if (lines := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES:
                yield f"{name_of(path)}::{node.name}", lines, MAX_FUNCTION_LINES


def test_files_and_functions_are_short_or_say_why_not() -> None:
    found = {
        name: f"{name}: {lines} lines, of {limit} at most"
        for path in [*CODE, *sources("tests")]
        for name, lines, limit in long_ones(path)
    }
    wrong = [text for name, text in found.items() if name not in EXCEPTIONS]
    assert not wrong, "\n".join(wrong)
    assert EXCEPTIONS.keys() <= found.keys(), "an exception that is no longer needed"


@pytest.mark.parametrize(
    ("module", "room"),
    [
        ("moshi_ttt", "ground"),
        ("moshi_ttt.clock.Clock", "ground"),
        ("moshi_ttt.memory.ttt.linear", "memory"),
        ("callbacks.tensorboard", "callbacks"),
        ("codec_module.CodecTraining", "scripts"),
        ("torch.utils.tensorboard.SummaryWriter", None),
    ],
)
def test_modules_are_told_to_their_rooms(module: str, room: str | None) -> None:
    assert room_of_module(module) == room
