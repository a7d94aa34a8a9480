"""Flags that mean the same in every program are spelt the same."""

from __future__ import annotations

import logging
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from moshi_ttt.command_line import add_held_out, add_subjects, parse, program_parser

PROGRAMS = sorted(
    path
    for path in (Path(__file__).parents[1] / "scripts").rglob("*.py")
    # what hands its command line on to train/fit.py has the help of that
    if "__main__" in path.read_text() and "from train.fit import main" not in path.read_text()
)


def parser() -> Any:
    made = program_parser("Tests.")
    add_subjects(made, several=True)
    add_held_out(made)
    return made


def test_dashes_in_flags_mean_underscores_and_stay_in_values() -> None:
    for flag in ("--cache_dir", "--cache-dir"):
        for args in ([flag, "a-b/c"], [f"{flag}=a-b/c"]):
            assert parse(parser(), args).cache_dir == Path("a-b/c")


def test_names_are_given_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(parser(), ["--cache_di", "a"])
    *hints, error = capsys.readouterr().err.splitlines()
    assert error == "error: unrecognized arguments: --cache_di a"
    assert len(hints) == 2  # and not every flag there is


@pytest.mark.parametrize(
    ("level", "seen"),
    [("info", "INFO: a\nWARNING: b\n"), ("warning", "WARNING: b\n"), ("error", "")],
)
def test_the_log_begins_at_the_level_asked_for(
    level: str, seen: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = parse(parser(), [f"--log-level={level}"])
    logger = logging.getLogger("moshi_ttt.somewhere")
    logger.info("a")
    logger.warning("b")
    assert capsys.readouterr().err == seen
    assert "log_level" not in options  # what is done does not depend on it
    # nor is anything heard of what a library would like to have installed
    assert not logging.getLogger("bitsandbytes.backends.cpu").isEnabledFor(logging.WARNING)


def test_sources_are_names_and_checkpoints_are_paths() -> None:
    options = parse(parser(), ["--model", "tiny", "a/b", "--checkpoint", "x/last.ckpt"])
    assert options.model == ["tiny", "a/b"]
    assert options.checkpoint == [Path("x/last.ckpt")]
    assert options.manifest is None


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_every_program_explains_itself_with_the_common_spellings(
    program: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [str(program), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(program), run_name="__main__")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    documented = program.read_text().split('"""')[1].splitlines()[0]
    assert documented in shown
    flags = re.findall(r"^  (--[\w.-]+)", shown, flags=re.MULTILINE)
    assert not [flag for flag in flags if "-" in flag[2:]]
    assert not {"--source", "--heldout"} & set(flags)
    # jsonargparse prints defaults itself
    helped = re.sub(r"\s+", " ", shown)
    assert not re.search(r"default: [^()]*\(type:", helped, flags=re.IGNORECASE)
