"""Check a data manifest without training: `python scripts/check_manifest.py my.jsonl`.

Opens and decodes every recording or codes file, reads every alignment file, and prints totals,
warnings and problems. The tokenizer of `--model` counts the text tokens, and codes files must have
been made with that model.

Exit status: 0 usable, 1 problems, 2 wrong arguments or an unreadable manifest.
"""

from __future__ import annotations

import sys
from pathlib import Path

from moshi_ttt.command_line import add_model, parse, program_parser
from moshi_ttt.data import CodesFormat, ManifestCheck, check_manifest
from moshi_ttt.errors import run_program, settings_at
from moshi_ttt.model.source import TINY, open_source


def main(args: list[str] | None = None) -> int:
    """Check as the command line says.

    Returns:
        The exit status: 0, or 1 for problems.

    Raises:
        UserError: a manifest cannot be read, or there is no such model.
    """
    parser = program_parser(__doc__)
    parser.add_argument(
        "manifest", type=Path, nargs="+", help='JSON lines: {"path": "a.wav", "duration": 24.5}'
    )
    add_model(parser, default=TINY)
    options = parse(parser, args)
    with settings_at("", source="--model"):
        source = open_source(options.model)
    tokenizer = source.tokenizer()
    codes_format = CodesFormat.of(source)
    checks = [
        check_manifest(path, source.clock, tokenizer, decode=True, codes_format=codes_format)
        for path in options.manifest
    ]
    for check in checks:
        print(describe(check))
    return int(any(check.problems for check in checks))


def describe(check: ManifestCheck) -> str:
    """Totals, then warnings, then problems, as text."""
    tokens = check.text_tokens + check.dropped_text_tokens
    share = f"{check.dropped_text_tokens / tokens:.1%}" if tokens else "none"
    lines = [
        str(check.manifest),
        f"  recordings           {check.recordings:>10}",
        f"  hours                {check.duration_sec / 3600:>10.3f}",
        f"  words of Moshi       {check.words:>10}",
        f"  text tokens          {tokens:>10}",
        f"  dropped text tokens  {check.dropped_text_tokens:>10}  ({share}; a token needs a step)",
        f"  memory probes        {check.probes:>10}",
        f"  warnings             {len(check.warnings):>10}",
        f"  problems             {len(check.problems):>10}",
        *(f"warning: {text}" for text in check.warnings),
        *(f"problem: {text}" for text in check.problems),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_program(main))
