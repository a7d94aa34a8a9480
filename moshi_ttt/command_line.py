"""What the command lines of all programs share: the parser, and the flags that mean the same."""

from __future__ import annotations

import logging
import logging.config
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from moshi_ttt.progress import LinesBesideBars

LogLevel = Literal["info", "warning", "error"]
LOG_LEVEL_HELP = "What is said beside results: also choices made (info), or only what may be wrong."
USAGE = "%(prog)s [options]"
"""One line: all flags at once, before an error or before what they mean, help nobody."""


class _HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Types and defaults beside each flag, the lines of the description as they are."""


def program_parser(description: str | None) -> ArgumentParser:
    """A parser of the program that `description`, its docstring, tells of, by whole names."""
    # the docstring under each config field is its help text
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        usage=USAGE,
    )
    parser.add_argument("--log_level", type=LogLevel, default="info", help=LOG_LEVEL_HELP)
    return parser


def parse(parser: ArgumentParser, args: Sequence[str] | None, **settings: Any) -> Any:
    """Parse `args` (None: those of the process), and log from the level on that they ask for.

    Args:
        parser: of the program.
        args: what was given.
        settings: of `ArgumentParser.parse_args`.
    """
    options = parser.parse_args(underscored(sys.argv[1:] if args is None else args), **settings)
    if level := options.pop("log_level", None):  # no setting of what the program does
        log_from(level)
    return options


def log_from(level: LogLevel, *others: str) -> None:
    """Let this project's loggers, and `others` by name, write what is of this level or above."""
    ours = {"level": level.upper(), "handlers": ["lines"]}
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"plain": {"format": "%(levelname)s: %(message)s"}},
            "handlers": {"lines": {"()": LinesBesideBars, "formatter": "plain"}},
            # LoRA imports bitsandbytes, which on some CPUs asks for a package of no use here
            "loggers": {"moshi_ttt": ours, "train": ours, "bitsandbytes": {"level": "ERROR"}},
        }
    )
    for name in others:  # they have handlers of their own
        logging.getLogger(name).setLevel(level.upper())


def underscored(args: Sequence[str]) -> list[str]:
    """Arguments with the names of flags as they are defined: `--cache-dir` is `--cache_dir`."""
    return [_underscored(one) for one in args]


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument[2:].partition("=")
    return f"--{flag.replace('-', '_')}{equals}{value}"


def add_model(parser: ArgumentParser, **settings: Any) -> None:
    """`--model`, one source unless `settings` (of `add_argument`) say otherwise."""
    parser.add_argument(
        "--model",
        **({"type": str} | settings),
        help="Model: tiny, moshi7b-random, a folder in moshi's layout or a hub id.",
    )


def add_subjects(parser: ArgumentParser, *, several: bool = False) -> None:
    """`--model`, `--checkpoint`, `--base` and `--dtype`: what `open_subject` opens.

    Args:
        parser: of the program.
        several: several models may be given.
    """
    count: dict[str, Any] = {"nargs": "+"} if several else {}
    add_model(parser, **count)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        **count,
        help="Trained model: a .ckpt of a run (the .safetensors beside it is read).",
    )
    parser.add_argument(
        "--base",
        type=str,
        help="Where the base of --checkpoint lies now, or a hub id to fetch it; null: where it "
        "lay.",
    )
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "bfloat16"] | None,
        help="Weights' type, with --model only; null: float32.",
    )


def add_device(parser: ArgumentParser) -> None:
    """`--device`: the GPU where there is one."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=str, default=default, help="Where the model runs.")


def add_cache_dir(parser: ArgumentParser) -> None:
    """`--cache_dir`, where encoded audio is kept."""
    parser.add_argument(
        "--cache_dir", type=Path, default=Path(".cache/codes"), help="Cache of encoded audio."
    )


def add_held_out(parser: ArgumentParser) -> None:
    """`--manifest` and `--cache_dir`: the recordings that a model is examined with."""
    parser.add_argument(
        "--manifest",
        type=Path,
        help="Held-out recordings; null: the bundled ones, as the model can read them.",
    )
    add_cache_dir(parser)
