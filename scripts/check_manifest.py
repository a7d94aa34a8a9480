"""Check a data manifest without training: `python scripts/check_manifest.py my.jsonl`.

Opens and decodes every recording or codes file, reads every alignment file, and prints totals,
warnings and problems.

Exit status: 0 usable, 1 problems, 2 wrong arguments or an unreadable manifest.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moshi_ttt.data import CodesFormat, ManifestCheck, check_manifest
from moshi_ttt.errors import UserError
from moshi_ttt.model.source import open_source


def main(args: list[str] | None = None) -> int:
    """Check as the command line says.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "manifest", type=Path, nargs="+", help='JSON lines: {"path": "a.wav", "duration": 24.5}'
    )
    parser.add_argument(
        "--source",
        default="tiny",
        help="model whose tokenizer counts the text tokens, and that codes files must have been "
        "made with: tiny, a folder or a hub id",
    )
    options = parser.parse_args(args)
    try:
        source = open_source(options.source)
        tokenizer = source.tokenizer()
        codes_format = CodesFormat.of(source)
        checks = [
            check_manifest(path, source.clock, tokenizer, decode=True, codes_format=codes_format)
            for path in options.manifest
        ]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
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
    sys.exit(main())
