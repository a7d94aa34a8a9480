"""Draw variants of studies that were measured: nothing is trained or read again.

    python scripts/recall_figure.py build/study/controls --only window_15s memory lora \
        --out docs/recall.png

    python scripts/recall_figure.py build/study/half_hour --by asked --out docs/half_hour.png

Takes folders that scripts/study.py wrote. Seeds (`NAME`, `NAME_seed1`, ...) are one variant,
named `NAME`. Writes the figure, and prints the tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from moshi_ttt.command_line import parse, program_parser
from moshi_ttt.errors import UserError, run_program
from moshi_ttt.files import write_bytes
from moshi_ttt.report import png
from moshi_ttt.report.asked_study import asked_study_figure
from moshi_ttt.report.study import read_record, study_figure, variants_of
from moshi_ttt.report.study_table import study_table


def main(args: list[str] | None = None) -> None:
    """Draw what the command line names."""
    options = parse(_parser(), args)
    records = [
        read_record(path) for folder in options.study for path in sorted(folder.glob("*.json"))
    ]
    shown = {variant.name: variant for variant in variants_of(records)}
    names = options.only or [*shown]
    missing = [name for name in names if name not in shown]
    if missing or not names:
        folders = ", ".join(map(str, options.study))
        raise UserError(
            f"{', '.join(missing) or 'no variant'}: {folders} have {', '.join(shown) or 'none'}"
        )
    variants = [shown[name] for name in names]
    if not any(variant.records[0]["recall"] for variant in variants):
        raise UserError(f"{', '.join(names)}: read without probes, so there is no recall to draw")
    print(study_table(variants), end="")
    draw = study_figure if options.by == "gap" else asked_study_figure
    write_bytes(options.out, png(draw(variants)))


def _parser() -> ArgumentParser:
    parser = program_parser(__doc__)
    add: Any = parser.add_argument
    add("study", type=Path, nargs="+", help="Folders of studies.")
    add("--only", type=str, nargs="+", help="Names of variants to show, in this order.")
    add(
        "--by",
        type=Literal["gap", "asked"],
        default="gap",
        help="Against the seconds since the fact, or the minutes of the conversation.",
    )
    add("--out", type=Path, default=Path("recall.png"), help="Figure to write.")
    return parser


if __name__ == "__main__":
    run_program(main)
